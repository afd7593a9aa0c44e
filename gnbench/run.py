"""A planned run from its start, or from its checkpoint, to its record: every way that it can end has a status."""

import contextlib
import functools
import json
import logging
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import filelock
import torch
from tqdm import tqdm

import gnbench
from gnbench.build import build_model, check_norm
from gnbench.checkpoint import delete_checkpoints, load_checkpoint, save_checkpoint
from gnbench.configs import partial
from gnbench.crash import crash_at
from gnbench.data import Dataset, prepare
from gnbench.errors import UserError
from gnbench.plan import SPLIT_KEYS, Run, load_images, make_recipe, num_cores
from gnbench.precise_bn import layers_with_statistics
from gnbench.record import LOCK, LOG, RECORD, cannot_write, delete_parts, load_record, save_record, set_aside
from gnbench.torchvision_compat import import_torchvision
from gnbench.train import Diverged, Training, summarize, train

log = logging.getLogger(__name__)
LOCK_WAIT_S = 3.0  # for a run's lock: a process whose launcher was killed needs a step and a checkpoint to let go of it


class Interrupted(Exception):
    """A signal asked the run to stop; its checkpoint is written."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def check_runs(runs: list[Run]) -> None:
    """Build every norm on every channel count of its model, before any training.

    Raises:
        UserError: a norm cannot be built there, or the device is not to be had.
    """
    checked = set()
    for run in runs:
        key = repr((run.config["norm"], run.config["model"], run.config["device"], run.config["precision"]))
        if key not in checked:
            checked.add(key)
            choose_device(run.config["device"], run.config["precision"])
            params = ", ".join(f"{k}={v}" for k, v in run.config["norm"].items() if k not in ("name", "_target_"))
            label = f"norm={run.config['norm']['name']} ({params})"
            check_norm(run.config["model"], partial(run.config["norm"]), label)
            _check_statistics(run.config["norm"])


def _check_statistics(node: dict) -> None:
    """Refuse a norm that keeps batch statistics without saying over how many images: it would be drawn as level."""
    if "norm_batch_size" not in node and layers_with_statistics(partial(node)(16)):
        raise UserError(
            f"norm={node['name']} keeps running statistics of a batch: its file needs the line "
            "norm_batch_size: ${norm_batch_size}, and its layer that argument"
        )


def execute(run: Run, progress: bool = False) -> dict:
    """Train `run`, unless it is finished, and return its record.

    A finished run is left as it is; an unfinished one goes on from its checkpoint; one that another process is
    training is left to it. The record's status is done or diverged (results), running (another process has it),
    interrupted, or failed: `cause` says why, run.log has the traceback, and the exception is raised again.

    Args:
        progress: show a bar, where standard error is a terminal.
    """
    try:
        run.directory.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run.directory / LOCK)  # the system lets go of it when the process dies
        lock.acquire(timeout=LOCK_WAIT_S)
    except filelock.Timeout:
        log.warning("%s is being trained by another process", run.name)
        return {**_new_record(run), "cause": "another process trains it"}
    except (OSError, NotImplementedError) as error:  # the second: a file system without locks
        raise cannot_write(run.directory / LOCK, error) from error
    try:
        if run.is_finished():
            delete_checkpoints(run.directory)  # a process that was killed as it ended may have left them
            return load_record(run.directory / RECORD)
        with _logging_to(run.directory / LOG):
            _clear(run.directory)
            return _execute_locked(run, progress)
    finally:
        lock.release()


def record_death(run: Run, cause: str) -> None:
    """Let the record of a run say that it failed, where its process died without a word.

    Raises:
        UserError: the record cannot be written.
    """
    with contextlib.suppress(filelock.Timeout), filelock.FileLock(run.directory / LOCK, timeout=LOCK_WAIT_S):
        try:
            record = load_record(run.directory / RECORD)
        except UserError:
            record = _new_record(run)
        if record.get("status") == "running":
            save_record(run.directory / RECORD, {**record, "status": "failed", "cause": cause})


def choose_device(name: str, precision: str) -> torch.device:
    """The torch device of `device` and `precision`; auto is a GPU where there is one.

    Raises:
        UserError: there is no such device here, or the precision is not for it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device={name} is not to be had here: {str(error).splitlines()[0]}") from error
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"precision=tf32 is not legal on device={name}: it is float32 or bf16 there")
    return device


def _new_record(run: Run) -> dict:
    return {
        "run": run.name,
        "digest": run.digest,
        "status": "running",
        "cause": None,
        "config": run.config,
        "data_fingerprint": run.data_fingerprint,
        "environment": {},
        "num_parameters": None,
        "history": [],
        "result": None,
    }


def _clear(directory: Path) -> None:
    """Set aside a record that cannot be read, and remove files that were never finished."""
    delete_parts(directory)
    path = directory / RECORD
    if path.is_file():
        try:
            load_record(path)
        except UserError as error:
            log.warning("%s; it is kept as %s, and the run goes on from what is left", error, set_aside(path).name)


def _execute_locked(run: Run, progress: bool) -> dict:
    record = _new_record(run)
    try:
        return _train_recorded(run, record, progress)
    except Diverged as error:
        record.update(status="diverged", cause=str(error))
    except Interrupted as error:
        record.update(status="interrupted", cause=f"stopped by {error}")
        save_record(run.directory / RECORD, record)
        raise
    except Exception as error:
        log.error("%s", traceback.format_exc())
        record.update(status="failed", cause=_explain(error))
        with contextlib.suppress(UserError):  # a full disk may be the cause; then the record cannot say so
            save_record(run.directory / RECORD, record)
        raise
    save_record(run.directory / RECORD, record)
    delete_checkpoints(run.directory)
    return record


def _explain(error: Exception) -> str:
    """Why a run failed, in one line; that memory ran out, on a device or on the host, in words of its own."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    out_of_memory = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
    return f"out of memory: {text}" if out_of_memory or "can't allocate memory" in text else text


def _train_recorded(run: Run, record: dict, progress: bool) -> dict:
    device = choose_device(run.config["device"], run.config["precision"])
    _set_arithmetic(run.config)
    training = make_training(run, device)
    _restore(run, training)
    record.update(
        environment=_environment(run, device),
        num_parameters=sum(parameter.numel() for parameter in training.model.parameters()),
        history=training.progress.history,
    )
    save_record(run.directory / RECORD, record)
    crash_at("started")
    with _stop_signals() as stop, _progress_bar(run, training, progress) as bar:
        train(training, _Pause(run, training, record, stop, bar))
    crash_at("trained")
    record.update(status="done", result=summarize(training))
    save_record(run.directory / RECORD, record)
    crash_at("finished")
    delete_checkpoints(run.directory)
    return record


def _set_arithmetic(config: dict) -> None:
    """Threads, matrix products and the choice of algorithms, for the whole process."""
    torch.set_num_threads(config["num_threads"])
    torch.set_float32_matmul_precision("high" if config["precision"] == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = config["precision"] == "tf32"
    deterministic = bool(config.get("deterministic"))
    if deterministic:  # cuBLAS reads it when it starts; without it torch refuses its matrix products
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def _restore(run: Run, training: Training) -> None:
    """Bring a fresh training to where its newest whole checkpoint was taken, if there is one."""
    state = load_checkpoint(run.directory)
    if state is None:
        return
    if state.get("digest", run.digest) != run.digest:
        raise UserError(f"the checkpoint in {run.directory} belongs to another run, {state['digest'][:12]}; remove it")
    training.restore(state)
    log.info("goes on from step %d of %d", training.progress.step, training.total_steps)


def make_training(run: Run, device: torch.device) -> Training:
    """The model of a run, fresh from its seed, and its data, on `device`."""
    dataset = _dataset(json.dumps(run.config["data"]), device)
    config = run.config
    torch.manual_seed(config["seed"])  # for a stranger's norm that draws its own parameters
    model = build_model(config["model"], partial(config["norm"]), dataset.num_classes, config["seed"])
    return Training(model.to(device), dataset, make_recipe(config), config["seed"], config["precision"])


class _Pause:
    """What happens between two steps: the record follows the epochs, a checkpoint the clock, and signals are heard."""

    def __init__(self, run: Run, training: Training, record: dict, stop: list[int], bar: tqdm) -> None:
        self.run, self.training, self.record, self.stop, self.bar = run, training, record, stop, bar
        self.saved_s = time.monotonic()
        self.epochs = len(training.progress.history)

    def __call__(self) -> None:
        progress = self.training.progress
        self.bar.update(progress.step - self.bar.n)
        crash_at("step")
        if len(progress.history) > self.epochs:
            self.epochs = len(progress.history)
            self._show(progress.history[-1])
            crash_at("epoch")
            save_record(self.run.directory / RECORD, self.record)
            crash_at("recorded")
        if self.stop or time.monotonic() - self.saved_s >= self.run.config["checkpoint_s"]:
            save_checkpoint(self.run.directory, {**self.training.state(), "digest": self.run.digest})
            self.saved_s = time.monotonic()
        if self.stop:
            raise Interrupted(self.stop[0])

    def _show(self, row: dict) -> None:
        test_error = "" if row["test_error"] is None else f", test error {row['test_error']:.2f} %"
        log.info(
            "epoch %d: training loss %.4f, training error %.2f %%%s, %.1f s",
            row["epoch"], row["train_loss"], row["train_error"], test_error, row["time_s"],
        )  # fmt: skip
        self.bar.set_postfix_str(f"train {row['train_error']:.1f} %{test_error.replace(', test error', ', test')}")


@functools.lru_cache(maxsize=1)  # the runs of one process mostly share their images
def _dataset(node_json: str, device: torch.device) -> Dataset:
    node = json.loads(node_json)
    split = {name: node[name] for name in SPLIT_KEYS}
    return prepare(load_images(node), device, **split)


def _progress_bar(run: Run, training: Training, progress: bool) -> tqdm:
    tqdm.set_lock(threading.RLock())  # the default is a semaphore that a killed process leaves behind
    return tqdm(
        total=training.total_steps,
        initial=training.progress.step,
        desc=f"{run.config['norm']['name']} bs{run.config['batch_size']} s{run.config['seed']}",
        unit="step",
        disable=None if progress else True,  # None: shown on a terminal only
        leave=False,
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, to be acted on between two steps, in the process's main thread."""
    stop: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(number, lambda number, _: stop.append(number)) for number in numbers]
    except ValueError:  # in another thread signals keep their meaning
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class _LogFile(logging.FileHandler):
    """run.log. A line that finds no room on the disk is left out: it is the record's write that stops a run there."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Log to `path`; warnings, of what was found damaged, are shown on standard error as well."""
    file, console = _LogFile(path, encoding="utf-8", delay=True), logging.StreamHandler()
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    console.setFormatter(logging.Formatter("gnbench: %(message)s"))
    console.addFilter(lambda record: record.levelno == logging.WARNING)
    logger = logging.getLogger("gnbench")
    logger.setLevel(logging.INFO)
    for handler in (file, console):
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in (file, console):
            logger.removeHandler(handler)
            handler.close()


def _environment(run: Run, device: torch.device) -> dict:
    return {
        "gnbench": gnbench.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": import_torchvision().__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": num_cores(),
        "num_threads": run.config["num_threads"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
