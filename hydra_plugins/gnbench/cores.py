"""Hydra's launcher for one machine: runs in processes of their own, as many side by side as there are cores.

A process trains one run, or several seeds of one cell as one network where that is faster. One that is killed loses its
own runs only, which are tried once more, and one that runs out of memory beside others is tried by itself; one without
progress is ended, if a time for that is set; when the launcher dies, its processes write their checkpoints and stop. On
a terminal a table says what they are doing.
"""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from gnbench.errors import OUT_OF_MEMORY, UserError, explain, require
from gnbench.machine import num_cores
from gnbench.plan import Run, unverified_images
from gnbench.record import RECORD, load_record
from gnbench.sweep_table import REDRAW_S, SweepTable, print_into
from gnbench.watch import is_terminal
from gnbench.words import describe, duration, name_varied

TRIES = 2  # of a run whose process dies without a word
MOST_ON_A_GPU = 8  # processes; each holds a context of some 500 MB
STOP_S = 60.0  # for the step and the checkpoint of a process that is told to stop; then it is killed
End = tuple[JobStatus, Any]  # of a run: its record, or the error by which it failed
LOOKS = 10  # at a run's directory in the time that it may stand still


@dataclass
class CoresConf:
    """`num_processes`: processes side by side; null is one for each core that this process may use, or one in all for
    measurements of cost.

    `seeds_per_process`: at most so many seeds of a cell are trained as one network; null is what is faster, 1 is none.

    `stall_s`: seconds after which a run whose directory has not changed is killed and counts as failed; null waits
    for ever. A run writes at each epoch's end and every `checkpoint_s`, so it is to be longer than that and a test.
    k seeds that are trained as one network have k times as long; a measurement of cost is never killed.
    """

    _target_: str = "hydra_plugins.gnbench.cores.Cores"
    num_processes: int | None = None
    seeds_per_process: int | None = None
    stall_s: float | None = None


ConfigStore.instance().store(group="hydra/launcher", name="cores", node=CoresConf, provider="gnbench")


@dataclass
class Job:
    """What one process does: runs that are alike but for their seeds, mostly a single one, by their places in the grid.

    `runs` is None where the sweeper has not planned them; then there is one, and Hydra is to compose its config.
    """

    indices: list[int]
    overrides: list[list[str]]
    runs: list[Run] | None
    alone: bool = False  # not as part of the network that failed
    by_itself: bool = False  # with no other process beside it, which had left too little memory
    tries: int = 0
    stalled: bool = False

    @property
    def effort(self) -> float:
        return sum(run.effort for run in self.runs) if self.runs else 1.0

    def split(self, places: Sequence[int], by_itself: bool = False) -> list["Job"]:
        """A job for each of its runs at `places`, of which it has several."""
        return [
            Job([self.indices[i]], [self.overrides[i]], [self.runs[i]], alone=True, by_itself=by_itself) for i in places
        ]


@dataclass
class Child:
    """A job under way in its process, and when its directories were last seen to change."""

    job: Job
    process: Any
    trace: list
    moved_s: float
    beside: bool  # whether others ran at any time while it did


class Cores(Launcher):
    """Runs side by side in processes.

    A sweeper sets `runs`, the planned runs of the jobs, and `sweep`, all of its grid, those that are finished too.
    """

    here = True  # whether it trains on this machine, and so on its devices

    def __init__(
        self, num_processes: int | None, seeds_per_process: int | None = None, stall_s: float | None = None
    ) -> None:
        self.num_processes = num_processes
        self.seeds_per_process = seeds_per_process
        self.stall_s = stall_s
        self.runs: list[Run] | None = None
        self.sweep: list[Run] | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        self._check()
        overrides = [list(each) for each in job_overrides]
        if self.runs is None:
            jobs = [Job([index], [each], None) for index, each in enumerate(overrides)]
        else:
            groups = self._group(self.runs)
            jobs = [Job(group, [overrides[i] for i in group], [self.runs[i] for i in group]) for group in groups]
            print(self._describe(jobs), flush=True)
        sweep = self.sweep or self.runs or []
        pool = _Pool(self._context(), self._num_processes(), self.stall_s, initial_job_idx, self._payload(), sweep)
        returns = pool.run(jobs)
        return [returns[index] for index in range(len(overrides))]

    def _check(self) -> None:
        for key in ("num_processes", "seeds_per_process"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"hydra.launcher.{key}", value, "it is 1 or more, or null")
        if len({run.measures_cost for run in self.runs or ()}) > 1:
            raise UserError(
                "measure=error,cost is not legal in one sweep: trainings go side by side and measurements alone"
            )
        if self._measures_cost() and (self.num_processes or 1) > 1:
            raise UserError(
                f"hydra.launcher.num_processes={self.num_processes} is not legal with measure=cost: "
                "measurements go one at a time, or each would time the others"
            )
        if self.stall_s is None:
            return
        if self.runs is None:
            raise UserError("hydra.launcher.stall_s needs to know where runs write: use it with hydra/sweeper=grid")
        least = max(run.config["checkpoint_s"] for run in self.runs)
        legal = f"it is above checkpoint_s={least:g}"
        require(self.stall_s > least, "hydra.launcher.stall_s", f"{self.stall_s:g}", legal)

    def _group(self, runs: list[Run]) -> list[list[int]]:
        """The places of the runs of each process: the seeds of a cell together, where that is worth it."""
        import numpy as np

        from gnbench.engine import most_lanes

        cells: dict[str, list[int]] = {}
        for index, run in enumerate(runs):
            cells.setdefault(run.cell, []).append(index)
        fill = math.ceil(len(runs) / self._num_processes())  # more in one process would leave others without work
        groups = []
        for cell in cells.values():
            config = runs[cell[0]].config
            num_pixels = math.prod(unverified_images(json.dumps(config["data"])).train_images.shape[1:3])
            most = min(fill, most_lanes(config, num_pixels, self._on_gpu(), self.seeds_per_process))
            groups += [group.tolist() for group in np.array_split(cell, math.ceil(len(cell) / most))]
        return groups

    def _describe(self, jobs: list[Job]) -> str:
        together = [len(job.indices) for job in jobs if len(job.indices) > 1]
        text = side_by_side(self._num_processes(), most=True)
        if not together:
            return f"{text}, a run each"
        return f"{text}; {sum(together)} runs of small batches go {max(together)} seeds as one network, which is faster"

    def _on_gpu(self) -> bool:
        import torch

        on_cpu = self.runs is not None and all(run.config["device"] == "cpu" for run in self.runs)
        return torch.cuda.is_available() and not on_cpu

    def _measures_cost(self) -> bool:
        return any(run.measures_cost for run in self.runs or ())

    def _num_processes(self) -> int:
        if self._measures_cost():
            return 1
        return self.num_processes or count_processes(self._on_gpu(), num_cores())

    def _context(self) -> Any:
        if "forkserver" not in multiprocessing.get_all_start_methods():
            return multiprocessing.get_context("spawn")
        context = multiprocessing.get_context("forkserver")
        # imported once, not once a run; the third is what torch.optim imports when it makes an optimizer
        context.set_forkserver_preload(["gnbench.cli", "gnbench.run", "torch._dynamo"])
        os.environ.setdefault("PYTHONSAFEPATH", "1")  # a random.py in the working directory is not Python's own
        return context

    def _payload(self) -> tuple:
        return self.hydra_context, self.config, self.task_function


def count_processes(on_gpu: bool, cores: int) -> int:
    """How many processes a sweep has at a time on so many cores, unless it is told otherwise."""
    return min(cores, MOST_ON_A_GPU) if on_gpu else cores


class _Pool:
    """Starts jobs as processes come free, and prints a line as each of their runs ends."""

    def __init__(
        self,
        context: Any,
        num_processes: int,
        stall_s: float | None,
        first_index: int,
        payload: tuple,
        sweep: list[Run],
    ) -> None:
        self.context, self.num_processes, self.stall_s = context, num_processes, stall_s
        self.first_index, self.payload = first_index, payload
        self.sweep, self.varied = sweep, find_varied(sweep)
        self.running: dict[Connection, Child] = {}
        self.returns: dict[int, JobReturn] = {}
        self.table: SweepTable | None = None

    def run(self, jobs: list[Job]) -> dict[int, JobReturn]:
        with SweepTable(jobs, self.sweep) if is_terminal() else contextlib.nullcontext() as self.table:
            self._run(jobs)
        return self.returns

    def _run(self, jobs: list[Job]) -> None:
        self.num_runs = sum(len(job.indices) for job in jobs)
        self.started_s, self.effort_left = time.monotonic(), sum(job.effort for job in jobs)
        self.effort_all = self.effort_left
        waiting = sorted(jobs, key=lambda job: -job.effort)  # long ones first, so that the cores end together
        try:
            while waiting or self.running:
                while waiting and self._has_room_for(waiting[0]):
                    self._start(waiting.pop(0))
                self._draw()
                for connection in wait(list(self.running), timeout=self._timeout_s()):
                    again, ended = self._collect(connection)
                    waiting = again + waiting
                    for index, returned in ended:
                        self._finish(index, returned)
                self._kill_stalled()
        finally:
            self._stop()

    def _has_room_for(self, job: Job) -> bool:
        if job.by_itself or any(child.job.by_itself for child in self.running.values()):
            return not self.running
        return len(self.running) < self.num_processes

    def _timeout_s(self) -> float | None:
        times = (self.table and REDRAW_S, self.stall_s and self.stall_s / LOOKS)
        return min((time_s for time_s in times if time_s), default=None)

    def _draw(self) -> None:
        if self.table is None:
            return
        running = [child.job for child in self.running.values()]
        failed = sum(each.status == JobStatus.FAILED for each in self.returns.values())
        elapsed_s, effort_done = time.monotonic() - self.started_s, self.effort_all - self.effort_left
        self.table.show(running, len(self.returns) - failed, failed, elapsed_s, effort_done)

    def _start(self, job: Job) -> None:
        job.tries += 1
        ours, theirs = self.context.Pipe()
        if job.runs is None:
            work = (_compose_and_train, theirs, self.first_index + job.indices[0], job.overrides[0], *self.payload)
        else:
            work = (_train_planned, theirs, job.runs, job.alone)
        process = self.context.Process(target=print_into, args=(self.table and self.table.words, *work))
        process.start()
        theirs.close()
        for child in self.running.values():
            child.beside = True
        self.running[ours] = Child(job, process, _trace(job), time.monotonic(), beside=bool(self.running))

    def _collect(self, connection: Connection) -> tuple[list[Job], list[tuple[int, JobReturn]]]:
        """The jobs that are to be tried after what this process said before it ended, and the ends of its runs."""
        child = self.running.pop(connection)
        job = child.job
        try:
            said = connection.recv()  # (status, value) of each run, or why they all failed
        except (EOFError, OSError):
            said = None
        connection.close()
        child.process.join()
        end = f"process ended with {exit_word(child.process.exitcode)}"
        if said is None and job.stalled:
            said = f"no progress for {self.stall_s:g} s, so its process was killed"
        elif said is None and job.tries < TRIES:
            print(f"a run's {end}; trying it once more", flush=True)
            return [job], []
        elif said is None:
            said = f"its {end}, {TRIES} times"
        if isinstance(said, str) and len(job.indices) > 1:
            print(f"{len(job.indices)} seeds as one network failed ({said}); trying them one by one", flush=True)
            return job.split(range(len(job.indices))), []
        if isinstance(said, str):
            said = [end_of(run, said) for run in job.runs or [None]]
        again = self._find_starved(child, said)
        if job.by_itself and said[0][0] == JobStatus.COMPLETED:  # there was too little memory for so many
            self.num_processes = max(1, self.num_processes - 1)
            print(f"from here on {side_by_side(self.num_processes, most=True)}", flush=True)
        self.effort_left -= job.effort - sum(each.effort for each in again)
        gone = {index for each in again for index in each.indices}
        ended = zip(job.indices, make_returns(job.overrides, said), strict=True)
        return again, [(index, returned) for index, returned in ended if index not in gone]

    def _find_starved(self, child: Child, said: list[End]) -> list[Job]:
        """Jobs for the runs that ran out of memory while other processes took some: each is tried by itself."""
        if not child.beside:
            return []
        places = [
            place
            for place, (status, value) in enumerate(said)
            if status == JobStatus.FAILED and str(value).startswith(OUT_OF_MEMORY)
        ]
        if not places:
            return []
        runs = "a run" if len(places) == 1 else f"{len(places)} runs"
        print(f"{runs} ran out of memory beside other processes; trying again with none beside", flush=True)
        if len(child.job.indices) > 1:
            return child.job.split(places, by_itself=True)
        return [replace(child.job, by_itself=True)]

    def _kill_stalled(self) -> None:
        """End the processes whose runs have written nothing for `stall_s`."""
        now = time.monotonic()
        for child in self.running.values() if self.stall_s else ():
            trace = _trace(child.job)
            if trace != child.trace:
                child.trace, child.moved_s = trace, now
            elif child.job.runs[0].measures_cost:  # which writes nothing meanwhile
                continue
            elif now - child.moved_s > self.stall_s * len(child.job.indices):  # they are tested one after the other
                child.job.stalled = True
                child.process.kill()

    def _finish(self, index: int, returned: JobReturn) -> None:
        self.returns[index] = returned
        elapsed_s = time.monotonic() - self.started_s
        left_s = elapsed_s * self.effort_left / max(self.effort_all - self.effort_left, 1e-9)
        failed = sum(each.status == JobStatus.FAILED for each in self.returns.values())
        left = self.num_runs - len(self.returns)
        print(
            f"[{len(self.returns)}/{self.num_runs}] {describe_end(returned, self.varied)}"
            + (f" | {failed} failed" if failed else "")
            + (f" | {left} left, about {duration(left_s)}" if left else f" | all in {duration(elapsed_s)}"),
            flush=True,
        )  # fmt: skip

    def _stop(self) -> None:
        """End what still runs, after an interrupt: each process writes its checkpoint first."""
        if self.table and self.running:
            print("stopping: what is trained at this moment writes its checkpoints", flush=True)
        for child in self.running.values():
            child.process.terminate()
        end_s = time.monotonic() + STOP_S
        for child in self.running.values():
            child.process.join(max(0.0, end_s - time.monotonic()))
            child.process.kill()


def _train_planned(connection: Connection, runs: list[Run], alone: bool) -> None:
    """In a process of their own: train runs that the sweeper has planned, and say how each went.

    Where several fail by one error, that error alone is said: they are to be tried one by one.
    """
    from gnbench.run import Interrupted, execute_group

    if hasattr(signal, "pthread_sigmask"):  # the server of processes may be shielded from it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_stop_with_launcher, args=(connection,), daemon=True).start()
    try:
        said = [
            _end(record["status"] != "failed", record, record["cause"]) for record in execute_group(runs, alone=alone)
        ]
    except (KeyboardInterrupt, Interrupted) as error:  # the launcher is to hear of it
        said = [end_of(run, explain(error)) for run in runs]
    except Exception as error:
        cause = explain(error)
        said = cause if len(runs) > 1 else [end_of(runs[0], cause)]
    _send(connection, said)


def end_of(run: Run | None, cause: str) -> End:
    """How a run ended whose process failed by `cause`: it may have finished before."""
    finished = run is not None and run.is_finished()
    return _end(finished, load_record(run.directory / RECORD) if finished else None, cause)


def make_returns(overrides: list[list[str]], ends: list[End]) -> list[JobReturn]:
    """What Hydra is told of runs that have ended."""
    return [
        JobReturn(overrides=words, status=status, _return_value=value)
        for words, (status, value) in zip(overrides, ends, strict=True)
    ]


def _end(completed: bool, record: dict | None, cause: str | None) -> End:
    if completed:
        return JobStatus.COMPLETED, record
    return JobStatus.FAILED, RuntimeError(cause)  # plain, so that it can be sent


def _compose_and_train(
    connection: Connection,
    index: int,
    overrides: list[str],
    hydra_context: HydraContext,
    config: DictConfig,
    task_function: TaskFunction,
) -> None:
    """In a process of its own: do what Hydra's launchers do for a job, and say how it went."""
    threading.Thread(target=_stop_with_launcher, args=(connection,), daemon=True).start()
    setup_globals()
    Plugins.instance()  # its search registers Hydra's own configs
    job_config = hydra_context.config_loader.load_sweep_config(config, overrides)
    HydraConfig.instance().set_config(job_config)
    returned = run_job(
        hydra_context=hydra_context,
        task_function=task_function,
        config=job_config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
    value = returned._return_value
    if returned.status == JobStatus.FAILED:
        value = RuntimeError(explain(value))
    _send(connection, [(returned.status, value)])


def _send(connection: Connection, ends: list[End]) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody listens to a process whose launcher is gone
        connection.send(ends)


def _stop_with_launcher(connection: Connection) -> None:
    """The launcher never writes: the end of its file is the end of its life."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_S)
    os._exit(1)  # a step that hangs does not hear the signal, and would keep the run's lock for ever


def _trace(job: Job) -> list:
    """What changes when its runs move: their records and logs at an epoch's end, their checkpoints by the clock."""
    trace = []
    for run in job.runs or ():
        with contextlib.suppress(OSError):  # not there yet, or a file was renamed meanwhile
            trace += sorted((entry.path, entry.stat().st_mtime_ns) for entry in os.scandir(run.directory))
    return trace


def find_varied(sweep: list[Run]) -> dict[str, str]:
    """What else than norm, batch_size and seed tells each run of a sweep from the others of its norm, by its digest."""
    varied = name_varied([run.config for run in sweep])
    return {run.digest: words for run, words in zip(sweep, varied, strict=True)}


def describe_end(returned: JobReturn, varied: dict[str, str]) -> str:
    """How a run ended, in one line; `varied` is of `find_varied`."""
    if returned.status == JobStatus.FAILED:
        return f"{' '.join(returned.overrides)}: failed, {returned._return_value}"
    record = returned.return_value
    return describe(record, varied.get(record["digest"], ""))


def side_by_side(num_processes: int, most: bool = False) -> str:
    """How many processes there are at a time, or at most."""
    if num_processes == 1:
        return "one process at a time"
    return f"{'up to ' if most else ''}{num_processes} processes side by side"


def exit_word(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
