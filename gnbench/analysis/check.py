"""Whether the runs of a directory are what they say: `gnbench-report --check DIR`. Reads, and changes nothing."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from gnbench.errors import UserError
from gnbench.files import CORRUPT, PART, unseal
from gnbench.lock import is_held
from gnbench.record import (
    CHECKPOINTS,
    FINISHED,
    LOG,
    RECORD,
    STATUSES,
    WRONG_KIND,
    count_reported,
    load_record,
    name_wrong_kind,
)


@dataclass(frozen=True)
class Finding:
    """What is wrong with one run."""

    run: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.run}: {self.sentence}"


def check_runs(directory: Path | str) -> list[Finding]:
    """What is wrong with the runs that stand in `directory`, by name; an empty list is what one hopes for.

    A directory is a run's if it holds a record, a log or a checkpoint. A link that leads out of `directory` is named
    and not followed.

    Raises:
        UserError: there is no such directory, or there is no run in it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give one that holds runs (<directory>/<run>/{RECORD})")
    findings, num_runs = [], 0
    for place in sorted(path for path in directory.iterdir() if path.is_dir()):
        if not place.resolve().is_relative_to(directory.resolve()):
            findings.append(Finding(place.name, f"is a link to {place.resolve()}, outside of {directory}; not read"))
        elif _is_run(place):
            num_runs += 1
            findings += [Finding(place.name, sentence) for sentence in _check_run(place)]
    if not findings and not num_runs:
        raise UserError(f"{directory}: holds no runs; they stand directly in it, as <run>/{RECORD}")
    return findings


def _is_run(place: Path) -> bool:
    return any((place / name).exists() for name in (RECORD, LOG, *CHECKPOINTS))


def _check_run(place: Path) -> list[str]:
    sentences = _check_files(place)
    path = place / RECORD
    if path.is_symlink() and not path.resolve().is_relative_to(place.resolve()):
        return [*sentences, f"{RECORD} is a link to {path.resolve()}, outside of the run; not read"]
    if not path.exists():
        return [*sentences, f"has no {RECORD}"]
    try:
        record = load_record(path)
    except UserError as error:
        return [*sentences, str(error).removeprefix(f"{path}: ")]
    try:
        return sentences + _check_identity(place, record) + _check_status(place, record) + _check_numbers(record)
    except WRONG_KIND as error:
        return [*sentences, name_wrong_kind(error)]


def _check_files(place: Path) -> list[str]:
    names = sorted(path.name for path in place.iterdir())
    sentences = [f"{name} was set aside as damaged" for name in names if CORRUPT in name]
    parts = [name for name in names if name.startswith(".") and name.endswith(PART)]
    if parts and not is_held(place):  # else a process is about to finish them
        sentences += [f"{name} was never finished" for name in parts]
    for name in names:
        if name.endswith(".pt"):
            try:
                whole = unseal((place / name).read_bytes()) is not None
            except FileNotFoundError:  # its run has replaced it since
                continue
            except OSError as error:
                sentences.append(f"{name} cannot be read ({error.strerror})")
                continue
            sentences += [] if whole else [f"{name} does not match its checksum"]
    return sentences


def _check_identity(place: Path, record: dict) -> list[str]:
    sentences = []
    if record.get("run") != place.name:
        sentences.append(f"its record says that it is {record.get('run')!r}")
    if str(record["digest"])[:12] != place.name.rpartition("-")[2]:
        sentences.append(f"its record's digest is {record['digest']!r}, which its directory is not named after")
    return sentences


def _check_status(place: Path, record: dict) -> list[str]:
    status, cause = record["status"], record.get("cause")
    if status not in STATUSES:
        return [f"status is {status!r}; it is one of {', '.join(STATUSES)}"]
    if status == "failed":
        return [f"failed: {cause}"]
    if status == "running" and not is_held(place):
        return ["says running, but no process trains it: start its sweep again"]
    if status == "interrupted":
        return [f"interrupted: {cause}; start its sweep again"]
    if status in FINISHED and any(place.glob("*.pt")):
        return ["is finished; what is left of its checkpoints may be removed"]
    return []


def _check_numbers(record: dict) -> list[str]:
    if record["config"].get("measure") == "cost":
        return _check_cost(record)
    history, result = record["history"], record["result"]
    epochs = [row["epoch"] for row in history]
    if epochs != list(range(1, len(epochs) + 1)):
        return [f"its history has the epochs {epochs}"]
    if record["status"] != "done":
        return [] if result is None else [f"has a result, being {record['status']}"]
    if result is None or not history:
        return ["is done, without a result or without a history"]
    sentences = _check_length(record["config"], history)
    num_reported = count_reported(record["config"]["report_epochs"], record["config"].get("frozen_epochs"))
    errors = [row["test_error"] for row in history[-num_reported:]]
    for key, expected in (("test_error", statistics.median(errors)), ("final_test_error", errors[-1])):
        if not math.isclose(result[key], expected, abs_tol=1e-9):
            sentences.append(f"{key} is {result[key]}, by its history {expected}")
    for row in history:
        for key in ("train_error", "test_error", "val_error"):
            if row.get(key) is not None and not 0 <= row[key] <= 100:
                sentences.append(f"{key} of epoch {row['epoch']} is {row[key]} %")
    return sentences


def _check_cost(record: dict) -> list[str]:
    cost = record.get("cost")
    if record["status"] != "done":
        return [] if cost is None else [f"has a cost, being {record['status']}"]
    if cost is None or not cost["rounds"]:
        return ["is done, without a cost or without its rounds"]
    sentences = []
    for way in ("step", "inference"):
        times = [row[f"{way}_ms"] for row in cost["rounds"]]
        ratios = [row[f"{way}_ms"] / row[f"bn_{way}_ms"] for row in cost["rounds"]]
        for key, values in ((f"{way}_ms", times), (f"{way}_ratio", ratios)):
            expected = statistics.median(values)
            if not math.isclose(cost[key], expected, rel_tol=1e-9):
                sentences.append(f"{key} is {cost[key]}, by its rounds {expected}")
    return sentences


def _check_length(config: dict, history: list[dict]) -> list[str]:
    if config.get("max_steps"):
        early = history[-1]["step"] < config["max_steps"] and len(history) < config["epochs"]
        return [f"is done after {history[-1]['step']} of {config['max_steps']} steps"] if early else []
    early = len(history) != config["epochs"]
    return [f"is done with {len(history)} of {config['epochs']} epochs in its history"] if early else []
