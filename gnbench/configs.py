"""The YAML files of configs/, for the command line and for notebooks alike, and the objects that they name."""

import functools
import pkgutil
from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gnbench.errors import UserError

_PACKAGE = Path(__file__).parent
# An installed package carries the files inside; a clone has them beside it, where people edit them.
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"

OmegaConf.register_new_resolver(
    "unless", lambda given, default: default if given is None else None, replace=True
)  # ${unless:${.a},8}: 8, unless `a` is given
OmegaConf.register_new_resolver("times", lambda a, b: a * b, replace=True)


def choices(group: str) -> list[str]:
    """The legal names of a group (`norm`, `model`, `data`, `sweep`): its files."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def load_group(group: str, name: str, params: dict, context: dict) -> dict:
    """The resolved content of configs/<group>/<name>.yaml with `params` in place of its own values.

    Args:
        context: values for what the file takes from the whole config, such as ${norm_batch_size}.

    Raises:
        UserError: no such file, or a parameter that it does not have.
    """
    if name not in choices(group):
        raise UserError(f"{group}={name} is not known: it is one of {', '.join(choices(group))}")
    node = OmegaConf.load(CONFIGS / group / f"{name}.yaml")
    unknown = sorted(set(params) - set(node))
    if unknown:
        legal = ", ".join(key for key in node if key not in ("name", "_target_"))
        raise UserError(f"{group}.{unknown[0]} is not known: {group}={name} takes {legal or 'no parameters'}")
    try:
        config = OmegaConf.create({**context, group: OmegaConf.merge(node, params)})
        return OmegaConf.to_container(config, resolve=True)[group]
    except OmegaConfBaseException as error:
        raise UserError(f"{group}={name}: {str(error).splitlines()[0]}") from error


def partial(node: dict, **more: object) -> Callable:
    """The object that `_target_` names by its import path, with the node's other keys, but `name`, as arguments.

    Raises:
        UserError: there is nothing at the import path.
    """
    try:
        target = pkgutil.resolve_name(node["_target_"])
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"_target_={node['_target_']} of {node['name']} cannot be imported: {error}") from error
    params = {key: value for key, value in node.items() if key not in ("name", "_target_")}
    return functools.partial(target, **params, **more)
