"""Hydra's sweeper for grids: the whole grid is checked before its first run, and only what is left is launched."""

from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from gnbench.errors import SweepFailed
from hydra_plugins.gnbench.cores import Cores


@dataclass
class GridConf:
    """`params` is the grid of a sweep file: override -> values separated by commas. The command line wins over it."""

    _target_: str = "hydra_plugins.gnbench.grid.Grid"
    params: dict[str, str] | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridConf, provider="gnbench")


class Grid(Sweeper):
    """Every combination of the values of its axes, each run once: finished runs and equal runs are left out."""

    def __init__(self, params: dict[str, str] | None) -> None:
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.hydra_context = hydra_context
        self.config = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        cells = self._combinations(arguments)
        runs = {}
        for overrides in cells:
            run = self._plan(overrides)
            runs.setdefault(run.directory, (run, overrides))
        left = [(run, overrides) for run, overrides in runs.values() if not run.is_finished()]
        print(_count(len(cells), len(runs), len(left)), flush=True)
        if not left:
            return []
        from gnbench.run import check_runs  # imports torch: not for a sweep that is done

        check_runs([run for run, _ in left])
        if isinstance(self.launcher, Cores):
            self.launcher.costs = [run.cost for run, _ in left]
        returns = list(self.launcher.launch([overrides for _, overrides in left], initial_job_idx=0))
        _raise_failures([run for run, _ in left], returns)
        return returns

    def _combinations(self, arguments: list[str]) -> list[list[str]]:
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([f"{key}={value}" for key, value in self.params.items()] + arguments)
        return BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]

    def _plan(self, overrides: list[str]) -> Any:
        from gnbench.cli import plan

        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        return plan(cfg, in_sweep=True)


def _count(num_cells: int, num_runs: int, num_left: int) -> str:
    equal = f" ({num_cells} cells; some are one and the same run)" if num_cells != num_runs else ""
    return f"{num_runs} runs{equal}: {num_runs - num_left} finished, {num_left} to do"


def _raise_failures(runs: list[Any], returns: list[JobReturn]) -> None:
    failed = [
        f"  {run.name}: {returned._return_value}\n    log: {run.directory / 'run.log'}"
        for run, returned in zip(runs, returns, strict=True)
        if returned.status == JobStatus.FAILED
    ]
    if failed:
        raise SweepFailed(f"{len(failed)} of {len(runs)} runs failed; the others are kept\n" + "\n".join(failed))
