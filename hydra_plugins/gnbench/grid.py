"""Hydra's sweeper for grids: the whole grid is checked before its first run, and only what is left is launched."""

import contextlib
import sys
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from gnbench.errors import SweepFailed, UserError
from gnbench.plan import Run
from gnbench.record import LOG, RECORD, load_record
from gnbench.schema import plan
from gnbench.words import describe, number_of
from gnbench.workers import count_workers
from hydra_plugins.gnbench.composer import Composer


@dataclass
class GridConf:
    """`params` is the grid of a sweep file: override -> values separated by commas. The command line wins over it."""

    _target_: str = "hydra_plugins.gnbench.grid.Grid"
    params: dict[str, str] | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridConf, provider="gnbench")


class Grid(Sweeper):
    """Every combination of the values of its axes, each run once: finished runs and equal runs are left out.

    A launcher of gnbench is known by its attributes `runs`, `tell` and `here`, not by its class: where Hydra's search
    for plugins sees this package, it executes the modules again, and there are two classes of each name.
    """

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
        composer = Composer(self.hydra_context, self.config)
        runs = {}
        for overrides in cells:
            run = plan(composer.compose(overrides), in_sweep=True)
            runs.setdefault(run.directory, (run, overrides))
        left = [(run, overrides) for run, overrides in runs.values() if not run.is_finished()]
        told = _count(len(cells), len(runs), len(left))
        if hasattr(self.launcher, "tell"):  # what would be done, of finished runs too, and does nothing
            self._check(left)
            self.launcher.tell(told, [run for run, _ in runs.values()], [run for run, _ in left])
            return []
        if count_workers() > 1:
            return _train_together([run for run, _ in runs.values()])
        print(told, flush=True)
        if not left:
            return []
        self._check(left)
        if hasattr(self.launcher, "runs"):  # it takes them as they are planned, and composes nothing again
            self.launcher.runs = [run for run, _ in left]
            self.launcher.sweep = [run for run, _ in runs.values()]
        here = getattr(self.launcher, "here", True)
        returns = list(self.launcher.launch([overrides for _, overrides in left], initial_job_idx=0))
        _raise_failures([run for run, _ in left], returns)
        if others := [run.name for run, _ in left if returns and here and not run.is_finished()]:
            print(f"left to another process, which trains them: {', '.join(others)}", flush=True)
        return returns

    def _check(self, left: list[tuple[Run, list[str]]]) -> None:
        if left:
            from gnbench.run import check_runs  # imports torch: not for a sweep that is done

            with contextlib.redirect_stdout(sys.stderr):  # a stranger's norm prints, into a list of commands too
                check_runs([run for run, _ in left], here=getattr(self.launcher, "here", True))

    def _combinations(self, arguments: list[str]) -> list[list[str]]:
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([f"{key}={value}" for key, value in self.params.items()] + arguments)
        return BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]


def _train_together(runs: list[Run]) -> list[JobReturn]:
    """Train the one run of a grid in this process, which torchrun started beside others."""
    from gnbench.torchrun import train_run

    if len(runs) > 1:
        raise UserError(f"torchrun trains one run and this is a sweep of {len(runs)}: give each key one value")
    record = train_run(runs[0], progress=True)
    if record is not None:
        print(f"{describe(record)}\n{runs[0].directory}")
    return []


def _count(num_cells: int, num_runs: int, num_left: int) -> str:
    equal = f" ({number_of(num_cells, 'cell')}; some are one and the same run)" if num_cells != num_runs else ""
    return f"{number_of(num_runs, 'run')}{equal}: {num_runs - num_left} finished, {num_left} to do"


def _raise_failures(runs: list[Run], returns: list[JobReturn]) -> None:
    failed = [
        f"  {run.name}: {_settle(run, returned)}"
        + (f"\n    log: {run.directory / LOG}" if (run.directory / LOG).is_file() else "")
        for run, returned in zip(runs, returns, strict=True)
        if returned.status == JobStatus.FAILED
    ]
    if failed:
        raise SweepFailed(
            f"{len(failed)} of {number_of(len(runs), 'run')} failed; the others are kept\n" + "\n".join(failed)
        )


def _settle(run: Run, returned: JobReturn) -> str:
    """Why a run failed: as its record says, or else as its launcher saw it end, which the record then says too."""
    from gnbench.run import record_death

    cause = str(returned._return_value)
    try:
        record_death(run, cause)
        return load_record(run.directory / RECORD)["cause"] or cause
    except (UserError, OSError):  # nothing can be written there
        return cause
