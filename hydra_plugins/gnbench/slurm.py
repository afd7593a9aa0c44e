"""Hydra's launcher for a Slurm cluster, through submitit: a sweep as one array of tasks, each of which trains runs.

A task does what Cores does on one machine: as many processes side by side as it has cores, seeds as one network, one
GPU for all of them. When Slurm wants its node back, or its time is up, its processes write their checkpoints and the
task is queued again: its runs go on from there, bit for bit. The results directory, which all nodes see, is the only
thing that the tasks share.
"""

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from gnbench.errors import UserError, explain, require
from gnbench.plan import Run
from gnbench.words import number_of
from hydra_plugins.gnbench.cores import (
    STOP_S,
    Cores,
    count_processes,
    describe_end,
    end_of,
    find_varied,
    make_returns,
    side_by_side,
)

FOLDER = ".submitit"  # in the results: scripts, logs, and pickles of what is to be done and of how it went
POLL_S = 2.0  # between two looks for tasks that have ended
HOLD_S = 600.0  # for which a task waits to be killed, or queued again, after SIGTERM: to end by itself would be its end
CLUSTERS = ("slurm", "local")


@dataclass
class SlurmConf:
    """`cluster`: slurm; or local, which starts the same tasks as processes of this machine, all of them at once.

    `partition`, `account`, `qos`: of sbatch; null is the cluster's own choice.

    `gpus_per_node`: 1 or 0, for each task; null where `additional_parameters` ask for it, as by gres=gpu:a100:1.

    `cpus_per_task`: cores of a task, each of which trains one run or one network of seeds; at most 8 share a GPU.

    `mem_gb`: memory of a task; null is the cluster's own choice.

    `timeout_min`: time limit of a task; at its end the task is queued again and its runs go on where they were.

    `max_num_timeout`: how often, before its runs count as failed; a pre-emption does not count.

    `signal_delay_s`: before the limit, for the last step and the checkpoints.

    `array_parallelism`: tasks at a time.

    `runs_per_task`: at most so many runs go to one task; null is what it trains side by side.

    `num_processes`, `seeds_per_process`, `stall_s`: of a task, as those of hydra/launcher=cores.

    `setup`: lines of shell before a task starts.

    `additional_parameters`: any other option of sbatch.

    `wait`: whether the command stays until all tasks have ended.
    """

    _target_: str = "hydra_plugins.gnbench.slurm.Slurm"
    cluster: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus_per_node: int | None = 1
    cpus_per_task: int = 8
    mem_gb: int | None = None
    timeout_min: int = 240
    max_num_timeout: int = 20
    signal_delay_s: int = 120
    array_parallelism: int = 256
    runs_per_task: int | None = None
    num_processes: int | None = None
    seeds_per_process: int | None = None
    stall_s: float | None = None
    setup: list[str] | None = None
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    wait: bool = True


ConfigStore.instance().store(group="hydra/launcher", name="slurm", node=SlurmConf, provider="gnbench")


class Slurm(Cores):
    """An array of tasks, submitted and waited for."""

    def __init__(
        self, num_processes: int | None, seeds_per_process: int | None, stall_s: float | None, **options: Any
    ) -> None:
        super().__init__(num_processes, seeds_per_process, stall_s)
        self.options = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for key, value in options.items()
        }

    @property
    def here(self) -> bool:
        return self.options["cluster"] == "local"

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        self._check()
        overrides = [list(each) for each in job_overrides]
        parcels = self._pack()
        tasks = [self._make_task(parcel, overrides) for parcel in parcels]
        jobs = self._submit(tasks)
        if not self.options["wait"]:
            return [JobReturn(overrides=each, status=JobStatus.UNKNOWN) for each in overrides]
        try:
            return self._wait(jobs, parcels, tasks)
        except KeyboardInterrupt:
            if not self.here:
                print(f"the tasks go on without this command; to end them: scancel {_array(jobs)}", flush=True)
            raise

    def _check(self) -> None:
        if self.runs is None:
            raise UserError("hydra/launcher=slurm needs to know the runs of a sweep: use it with hydra/sweeper=grid")
        if self._measures_cost():
            raise UserError(
                "measure=cost is not legal with hydra/launcher=slurm: tasks may share a machine, and time each other; "
                "start the sweep with the default launcher in a job of its own"
            )
        super()._check()
        options = self.options

        def check(key: str, is_legal: bool, legal: str) -> None:
            require(is_legal, f"hydra.launcher.{key}", options[key], legal)

        check("cluster", options["cluster"] in CLUSTERS, f"it is one of {', '.join(CLUSTERS)}")
        shared = options["gpus_per_node"] in (None, 0, 1)
        check("gpus_per_node", shared, "it is 0 or 1, which all runs of a task share, or null")
        check("max_num_timeout", options["max_num_timeout"] >= 0, "it is 0 or more")
        for key in ("cpus_per_task", "mem_gb", "array_parallelism", "runs_per_task"):
            check(key, options[key] is None or options[key] >= 1, "it is 1 or more")
        delay_s = options["signal_delay_s"]
        check("signal_delay_s", delay_s > STOP_S, f"it is above {STOP_S:g}, which checkpoints may take")
        legal = f"it is more minutes than the signal_delay_s={delay_s} seconds in which it stops"
        check("timeout_min", options["timeout_min"] * 60 > delay_s, legal)

    def _on_gpu(self) -> bool:
        on_cpu = all(run.config["device"] == "cpu" for run in self.runs)
        return self.options["gpus_per_node"] != 0 and not on_cpu

    def _num_processes(self) -> int:
        return self.num_processes or count_processes(self._on_gpu(), self.options["cpus_per_task"])

    def _pack(self) -> list[list[int]]:
        """The places of the runs of each task: of runs that take about as long as one another, the longest first."""
        most, parcels, room = self.options["runs_per_task"], [], 0
        for group in sorted(self._group(self.runs), key=lambda group: -sum(self.runs[i].effort for i in group)):
            for part in [group[i : i + most] for i in range(0, len(group), most)] if most else [group]:
                size = len(part) if most else 1
                if size > room:
                    parcels.append([])
                    room = most or self._num_processes()
                parcels[-1] += part
                room -= size
        return parcels

    def _make_task(self, parcel: list[int], overrides: list[list[str]]) -> "Task":
        runs = [self.runs[i] for i in parcel]
        settings = (self._num_processes(), self.seeds_per_process, self.stall_s)
        return Task(runs, [overrides[i] for i in parcel], settings)

    def _submit(self, tasks: list["Task"]) -> list[Any]:
        """The tasks as one array.

        Raises:
            UserError: there is no Slurm here, or it does not take them.
        """
        submitit = _import_submitit()
        folder, options = self.runs[0].directory.parent / FOLDER, self.options
        try:
            executor = submitit.AutoExecutor(
                folder,
                options["cluster"],
                slurm_max_num_timeout=options["max_num_timeout"],
                local_max_num_timeout=options["max_num_timeout"],
            )
        except RuntimeError as error:
            raise UserError(
                "hydra/launcher=slurm finds no srun here: it is for a cluster's login node; "
                "hydra.launcher.cluster=local tries it on this machine"
            ) from error
        of_slurm = ("partition", "account", "qos", "array_parallelism", "signal_delay_s", "setup")
        executor.update_parameters(
            name="gnbench",
            slurm_additional_parameters={"requeue": True, **options["additional_parameters"]},
            slurm_srun_args=[f"--cpus-per-task={options['cpus_per_task']}"],  # which Slurm 22.05 does not hand down
            **{key: options[key] for key in ("timeout_min", "cpus_per_task", "mem_gb")},
            gpus_per_node=options["gpus_per_node"] or None,
            **{f"slurm_{key}": options[key] for key in of_slurm},
        )
        try:
            jobs = executor.submit_array(tasks)
        except (OSError, submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            raise UserError(f"sbatch does not take the sweep: {' '.join(str(error).split())}") from error
        most = max(len(task.runs) for task in tasks)
        print(
            f"{'processes' if self.here else 'array'} {_array(jobs)}: {number_of(len(tasks), 'task')} of "
            f"{'up to ' if most > 1 else ''}{number_of(most, 'run')}, {side_by_side(self._num_processes())} in each; "
            f"their logs: {folder}",
            flush=True,
        )
        return jobs

    def _wait(self, jobs: list[Any], parcels: list[list[int]], tasks: list["Task"]) -> list[JobReturn]:
        """How each run ended, with a line for it as soon as its task has."""
        from submitit.helpers import as_completed

        returns: dict[int, JobReturn] = {}
        varied = find_varied(self.sweep or self.runs)
        of_job = {job.job_id: pair for job, *pair in zip(jobs, parcels, tasks, strict=True)}
        for job in as_completed(jobs, poll_frequency=POLL_S):
            parcel, task = of_job[job.job_id]
            for index, returned in zip(parcel, _collect(job, task), strict=True):
                returns[index] = returned
                left = len(self.runs) - len(returns)
                print(f"[{len(returns)}/{len(self.runs)}] {describe_end(returned, varied)} | {left} left", flush=True)
        return [returns[index] for index in range(len(self.runs))]


@dataclass
class Task:
    """What one task of the array does. submitit sends it to its node, and again whenever it is queued again."""

    runs: list[Run]
    overrides: list[list[str]]
    settings: tuple[int, int | None, float | None]  # of Cores

    def __call__(self) -> list[JobReturn]:
        try:
            return self._train()
        except Exception as error:
            return self.end(explain(error))

    def _train(self) -> list[JobReturn]:
        """Train the runs; on a signal, stop them first, and then do as submitit does."""
        from submitit import JobEnvironment

        requeue = signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]
        cores, told = _ShieldedCores(requeue, self.settings), []
        cores.runs = self.runs

        def stop(number: int, _: Any) -> None:
            told.append(number)
            if len(told) == 1:  # later ones find the processes on their way to their checkpoints
                raise _Told

        handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, requeue)}
        try:
            return list(cores.launch(self.overrides, initial_job_idx=0))
        except _Told:
            pass
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if requeue in told:
            signal.raise_signal(requeue)  # submitit's own handler queues the task again and leaves
        time.sleep(HOLD_S)
        raise RuntimeError("stopped by SIGTERM")

    def end(self, cause: str) -> list[JobReturn]:
        """How each run ended if the task did by `cause`: some had finished before."""
        return make_returns(self.overrides, [end_of(run, cause) for run in self.runs])

    def checkpoint(self) -> Any:
        """What submitit queues: the same again. The runs have their own checkpoints."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class _Told(BaseException):
    """A signal asked the task to stop; it passes through the pool, which lets every process write its checkpoint."""


class _ShieldedCores(Cores):
    """Cores whose processes do not hear what Slurm tells a task, but only what the task then tells them.

    Slurm sends its signals to every process of a task. A process that is no submitit job dies of SIGUSR2, without a
    checkpoint; the server that starts processes dies of SIGTERM, and nobody could wait for the others any more. What a
    process blocks, those that it starts block too.
    """

    def __init__(self, requeue: signal.Signals, settings: tuple[int, int | None, float | None]) -> None:
        super().__init__(*settings)
        self.requeue = requeue
        self.setup(hydra_context=None, task_function=None, config=None)  # planned runs need none

    def _context(self) -> Any:
        context = super()._context()
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, {self.requeue})
            resource_tracker.ensure_running()  # ignores SIGTERM by itself, and would let it through here
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {self.requeue, signal.SIGTERM})
        return context


def _import_submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UserError("hydra/launcher=slurm needs submitit: pip install 'gnbench[slurm]'") from error
    return submitit


def _array(jobs: list[Any]) -> str:
    """What scancel calls the array; the processes' numbers where they are local."""
    return " ".join(dict.fromkeys(str(job.job_id).partition("_")[0] for job in jobs))


def _collect(job: Any, task: Task) -> list[JobReturn]:
    """How the runs of a task that has ended went: as it says, or else, where it died without a word, as they do."""
    from submitit.core.utils import UncompletedJobError

    try:
        return job.result()
    except UncompletedJobError:
        return task.end(f"its task {job.job_id} ended without a result ({job.state}): see {job.paths.stderr}")
