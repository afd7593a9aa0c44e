"""The configs of a grid's cells, without a composition each.

Composing a config takes Hydra some 0.3 s. The cells of a grid differ in few choices of files (norm, model, data) and
in many values (batch_size, seed), and Hydra applies values last, to a config composed from the files. Here that config
is kept for each combination of choices, and Hydra's own function applies the values to a copy of it.
"""

import copy
import functools
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict


class Composer:
    """Composes cells of the grid whose own config is `config`."""

    def __init__(self, hydra_context: HydraContext, config: DictConfig) -> None:
        self.loader = hydra_context.config_loader
        self.config = config
        self.groups = set(config.hydra.runtime.choices)
        self.parse = functools.cache(OverridesParser.create(config_loader=self.loader).parse_override)
        self.compose_choices = functools.cache(self._compose_choices)

    def compose(self, overrides: list[str]) -> DictConfig:
        """The config that Hydra composes for `overrides`, without its own node `hydra`."""
        parsed = [self.parse(override) for override in overrides]
        if all(self._is_choice(override) or self._is_value(override) for override in parsed):
            config = self.compose_choices(tuple(o.input_line for o in parsed if self._is_choice(o)))
            values = [override for override in parsed if self._is_value(override)]
            if config is not None:
                return self._apply(values, config, overrides)
        return self._compose(overrides)

    def _is_choice(self, override: Override) -> bool:
        """Whether it names a file of a group, as norm=gn does."""
        is_name = isinstance(override.value(), str) and not override.is_sweep_override()
        return override.type == OverrideType.CHANGE and override.key_or_group in self.groups and is_name

    def _is_value(self, override: Override) -> bool:
        """Whether it changes the value of a key, as batch_size=2 does."""
        elsewhere = override.key_or_group in self.groups or "/" in override.key_or_group or override.package is not None
        return override.type == OverrideType.CHANGE and not elsewhere and not override.is_sweep_override()

    def _compose_choices(self, choices: tuple[str, ...]) -> DictConfig | None:
        """The config of the files alone; None where it asks Hydra for what is a cell's own (`${hydra:...}`)."""
        config = self._compose(list(choices))
        return None if "${hydra" in str(OmegaConf.to_container(config, resolve=False)) else config

    def _apply(self, values: list[Override], config: DictConfig, overrides: list[str]) -> DictConfig:
        config = copy.deepcopy(config)
        try:
            ConfigLoaderImpl._apply_overrides_to_config(values, config)
        except HydraException:
            return self._compose(overrides)  # Hydra's own words for what is wrong
        return config

    def _compose(self, overrides: list[str]) -> Any:
        config = self.loader.load_sweep_config(self.config, overrides)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        return config
