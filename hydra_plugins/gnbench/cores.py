"""Hydra's launcher for one machine: each run in a process of its own, as many side by side as there are cores.

A process that is killed loses its own run only, which is tried once more; one without progress is ended, if a time
for that is set; when the launcher dies, its processes write their checkpoints and stop.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from gnbench.errors import UserError

TRIES = 2  # of a run whose process dies without a word
MOST_ON_A_GPU = 8  # processes; each holds a context of some 500 MB
STOP_S = 60.0  # for the step and the checkpoint of a process that is told to stop; then it is killed
LOOKS = 10  # at a run's directory in the time that it may stand still


@dataclass
class CoresConf:
    """`num_processes`: runs side by side; null is one for each core that this process may use.

    `stall_s`: seconds after which a run whose directory has not changed is killed and counts as failed; null waits
    for ever. A run writes at each epoch's end and every `checkpoint_s`, so it is to be longer than that and a test.
    """

    _target_: str = "hydra_plugins.gnbench.cores.Cores"
    num_processes: int | None = None
    stall_s: float | None = None


ConfigStore.instance().store(group="hydra/launcher", name="cores", node=CoresConf, provider="gnbench")


@dataclass
class Job:
    """One run: its place in the grid, what was typed for it, its share of the work and where it writes."""

    index: int
    overrides: list[str]
    cost: float
    directory: Path | None
    tries: int = 0
    stalled: bool = False


@dataclass
class Child:
    """A job under way in its process, and when its directory was last seen to change."""

    job: Job
    process: Any
    trace: list | None
    moved_s: float


class Cores(Launcher):
    """Runs side by side, one process each. `runs`, where a sweeper sets it, are the planned runs of the jobs."""

    def __init__(self, num_processes: int | None, stall_s: float | None = None) -> None:
        self.num_processes = num_processes
        self.stall_s = stall_s
        self.runs: list[Any] | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        self._check_stall()
        runs = self.runs or [None] * len(job_overrides)
        jobs = [
            Job(initial_job_idx + i, list(overrides), run.cost if run else 1.0, run.directory if run else None)
            for i, (overrides, run) in enumerate(zip(job_overrides, runs, strict=True))
        ]
        returns = _Pool(self._context(), self._num_processes(), self.stall_s, self._payload()).run(jobs)
        return [returns[job.index] for job in jobs]

    def _check_stall(self) -> None:
        if self.stall_s is None:
            return
        if self.runs is None:
            raise UserError("hydra.launcher.stall_s needs to know where runs write: use it with hydra/sweeper=grid")
        least = max(run.config["checkpoint_s"] for run in self.runs)
        if self.stall_s <= least:
            raise UserError(f"hydra.launcher.stall_s={self.stall_s:g} is not legal: it is above checkpoint_s={least:g}")

    def _num_processes(self) -> int:
        import torch

        from gnbench.plan import num_cores

        on_cpu = self.runs is not None and all(run.config["device"] == "cpu" for run in self.runs)
        most = MOST_ON_A_GPU if torch.cuda.is_available() and not on_cpu else num_cores()
        return self.num_processes or min(num_cores(), most)

    def _context(self) -> Any:
        if "forkserver" not in multiprocessing.get_all_start_methods():
            return multiprocessing.get_context("spawn")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["gnbench.cli", "gnbench.run"])  # torch is imported once, not once a run
        return context

    def _payload(self) -> tuple:
        return self.hydra_context, self.config, self.task_function


class _Pool:
    """Starts jobs as processes come free, and prints a line as each of them ends."""

    def __init__(self, context: Any, num_processes: int, stall_s: float | None, payload: tuple) -> None:
        self.context, self.num_processes, self.stall_s, self.payload = context, num_processes, stall_s, payload
        self.running: dict[Connection, Child] = {}
        self.returns: dict[int, JobReturn] = {}

    def run(self, jobs: list[Job]) -> dict[int, JobReturn]:
        self.num_jobs, self.started_s, self.cost_left = len(jobs), time.monotonic(), sum(job.cost for job in jobs)
        self.cost_all = self.cost_left
        waiting = sorted(jobs, key=lambda job: -job.cost)  # long runs first, so that the cores end together
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.num_processes:
                    self._start(waiting.pop(0))
                for connection in wait(list(self.running), timeout=self.stall_s and self.stall_s / LOOKS):
                    job, returned = self._collect(connection)
                    if returned is None:
                        waiting.insert(0, job)
                    else:
                        self._finish(job, returned)
                self._kill_stalled()
        finally:
            self._stop()
        return self.returns

    def _start(self, job: Job) -> None:
        job.tries += 1
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_run_child, args=(theirs, job.index, job.overrides, *self.payload))
        process.start()
        theirs.close()
        self.running[ours] = Child(job, process, _trace(job.directory), time.monotonic())

    def _collect(self, connection: Connection) -> tuple[Job, JobReturn | None]:
        """What a process said before it ended; None where it died without a word and may try again."""
        child = self.running.pop(connection)
        job = child.job
        try:
            status, value = connection.recv()
        except (EOFError, OSError):
            status, value = JobStatus.FAILED, None
        connection.close()
        child.process.join()
        if value is None and job.stalled:
            value = RuntimeError(f"no progress for {self.stall_s:g} s, so its process was killed")
        end = f"process ended with {_exit_word(child.process.exitcode)}"
        if value is None and job.tries < TRIES:
            print(f"a run's {end}; trying it once more", flush=True)
            return job, None
        returned = JobReturn(overrides=job.overrides, status=status)
        returned.return_value = value or RuntimeError(f"its {end}, {TRIES} times")
        return job, returned

    def _kill_stalled(self) -> None:
        """End the processes whose runs have written nothing for `stall_s`."""
        now = time.monotonic()
        for child in self.running.values() if self.stall_s else ():
            trace = _trace(child.job.directory)
            if trace != child.trace:
                child.trace, child.moved_s = trace, now
            elif now - child.moved_s > self.stall_s:
                child.job.stalled = True
                child.process.kill()

    def _finish(self, job: Job, returned: JobReturn) -> None:
        from gnbench.cli import describe

        self.returns[job.index] = returned
        self.cost_left -= job.cost
        failed = sum(each.status == JobStatus.FAILED for each in self.returns.values())
        elapsed_s = time.monotonic() - self.started_s
        left_s = elapsed_s * self.cost_left / max(self.cost_all - self.cost_left, 1e-9)
        if returned.status == JobStatus.FAILED:
            line = f"{' '.join(job.overrides)}: failed, {returned._return_value}"
        else:
            line = describe(returned.return_value)
        left = self.num_jobs - len(self.returns)
        print(
            f"[{len(self.returns)}/{self.num_jobs}] {line}" + (f" | {failed} failed" if failed else "")
            + (f" | {left} left, about {_duration(left_s)}" if left else f" | all in {_duration(elapsed_s)}"),
            flush=True,
        )  # fmt: skip

    def _stop(self) -> None:
        """End what still runs, after an interrupt: each process writes its checkpoint first."""
        for child in self.running.values():
            child.process.terminate()
        end_s = time.monotonic() + STOP_S
        for child in self.running.values():
            child.process.join(max(0.0, end_s - time.monotonic()))
            child.process.kill()


def _run_child(
    connection: Connection,
    index: int,
    overrides: list[str],
    hydra_context: HydraContext,
    config: DictConfig,
    task_function: TaskFunction,
) -> None:
    """In the run's own process: do what Hydra's launchers do for a job, and say how it went."""
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
        value = RuntimeError(f"{type(value).__name__}: {value}")  # plain, so that it can be sent
    with contextlib.suppress(BrokenPipeError):  # nobody listens to a process whose launcher is gone
        connection.send((returned.status, value))


def _stop_with_launcher(connection: Connection) -> None:
    """The launcher never writes: the end of its file is the end of its life."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_S)
    os._exit(1)  # a step that hangs does not hear the signal, and would keep the run's lock for ever


def _trace(directory: Path | None) -> list | None:
    """What changes when a run moves: its record and its log at an epoch's end, its checkpoint by the clock."""
    with contextlib.suppress(OSError):  # not there yet, or a file was renamed meanwhile
        return sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(directory))
    return None


def _exit_word(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
