"""A planned run from its start, or from its checkpoint, to its record: every way that it can end has a status."""

import contextlib
import functools
import json
import logging
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
from gnbench.data import Dataset, prepare
from gnbench.errors import UserError
from gnbench.plan import SPLIT_KEYS, Run, load_images, make_recipe, num_cores
from gnbench.record import RECORD, load_record, save_record
from gnbench.torchvision_compat import import_torchvision
from gnbench.train import Diverged, Training, summarize, train

log = logging.getLogger(__name__)


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


def execute(run: Run, progress: bool = False) -> dict:
    """Train `run`, unless it is finished, and return its record.

    A finished run is left as it is; an unfinished one goes on from its checkpoint; one that another process is
    training is left to it. The record's status is done or diverged (results), running (another process has it),
    interrupted, or failed: `cause` says why, run.log has the traceback, and the exception is raised again.

    Args:
        progress: show a bar, where standard error is a terminal.
    """
    run.directory.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(run.directory / ".lock")  # the system lets go of it when the process dies
    try:
        with lock.acquire(timeout=0):
            if run.is_finished():
                return load_record(run.directory / RECORD)
            with _logging_to(run.directory / "run.log"):
                return _execute_locked(run, progress)
    except filelock.Timeout:
        log.warning("%s is being trained by another process", run.name)
        return {"run": run.name, "status": "running", "config": run.config, "result": None}


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


def _execute_locked(run: Run, progress: bool) -> dict:
    record = {
        "run": run.name,
        "digest": run.digest,
        "status": "running",
        "cause": None,
        "config": run.config,
        "environment": {},
        "num_parameters": None,
        "history": [],
        "result": None,
    }
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
        record.update(status="failed", cause=f"{type(error).__name__}: {error}".splitlines()[0])
        with contextlib.suppress(UserError):  # a full disk may be the cause; then the record cannot say so
            save_record(run.directory / RECORD, record)
        raise
    save_record(run.directory / RECORD, record)
    delete_checkpoints(run.directory)
    return record


def _train_recorded(run: Run, record: dict, progress: bool) -> dict:
    device = choose_device(run.config["device"], run.config["precision"])
    torch.set_num_threads(run.config["num_threads"])
    torch.set_float32_matmul_precision("high" if run.config["precision"] == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = run.config["precision"] == "tf32"
    training = make_training(run, device)
    state = load_checkpoint(run.directory)
    if state is not None:
        training.restore(state)
        log.info("goes on from step %d of %d", training.progress.step, training.total_steps)
    record.update(
        environment=_environment(run, device),
        num_parameters=sum(parameter.numel() for parameter in training.model.parameters()),
        history=training.progress.history,
    )
    save_record(run.directory / RECORD, record)
    with _stop_signals() as stop, _progress_bar(run, training, progress) as bar:
        train(training, _Pause(run, training, record, stop, bar))
    record.update(status="done", result=summarize(training))
    save_record(run.directory / RECORD, record)
    delete_checkpoints(run.directory)
    return record


def make_training(run: Run, device: torch.device) -> Training:
    """The model of a run, fresh from its seed, and its data, on `device`."""
    dataset = _dataset(json.dumps(run.config["data"]), device)
    config = run.config
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
        if len(progress.history) > self.epochs:
            self.epochs = len(progress.history)
            self._show(progress.history[-1])
            save_record(self.run.directory / RECORD, self.record)
        if self.stop or time.monotonic() - self.saved_s >= self.run.config["checkpoint_s"]:
            save_checkpoint(self.run.directory, self.training.state())
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


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("gnbench")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
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
