"""A run's identity and its record: the contract between the half that trains and the half that draws.

Standard library only, so that either half can read a record without the other's packages. A record is one JSON
file a run, written aside, flushed and renamed; it carries a SHA-256 of its own content, which every load checks.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

from gnbench.errors import UserError
from gnbench.files import PART, write_atomic

SCHEMA = 1  # of the record and of what a digest covers; a change of either starts a new number
RECORD = "record.json"
LOG = "run.log"
CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")  # of an unfinished run, newest first: gnbench/checkpoint.py
PROGRESS = "progress.json"  # how far a run under way is: gnbench/progress.py
LOCK = ".lock"  # held while a process trains the run: gnbench/lock.py
STATUSES = ("running", "done", "diverged", "failed", "interrupted")
FINISHED = ("done", "diverged")  # statuses that a second start leaves alone: both are results
TOGETHER = "as one network"  # in `environment.engine` of a run that was not trained by itself
PERCENTILES = (1, 20, 80, 99)  # of responses and activations, as arXiv:1803.08494, Figure 6
WRONG_KIND = (TypeError, KeyError, AttributeError, ValueError, OverflowError)  # what strange values make a reader raise

# What decides how or where a run is executed, not what is trained. `device` and `engine` belong here although they
# change the last bits of the numbers: a sweep begun in one way may end in another, and the record says how a run ended.
NOT_IDENTITY = ("results", "device", "engine", "checkpoint_s", "tensorboard", "tuned_from", "tuning")


def digest(config: dict, data_fingerprint: str) -> str:
    """Hex SHA-256 of everything in a resolved config that can change a run's numbers, and of the images' content.

    `norm_batch_size` at the top level does not count: a norm that uses it carries it in its own parameters. A key
    without a value asks for nothing and does not count either, so that a new optional key leaves finished runs so.
    """
    identity = {key: value for key, value in config.items() if key not in (*NOT_IDENTITY, "norm_batch_size")}
    identity["data"] = {key: value for key, value in config["data"].items() if key not in ("root", "cache")}
    identity = _drop_none(identity)
    return hashlib.sha256(_canonical([SCHEMA, data_fingerprint, identity])).hexdigest()


def run_name(config: dict, digest: str) -> str:
    """The directory of a run: enough of its config to find it by eye, and its digest to be the only one."""
    norm_batch_size = f"-nbs{config['norm_batch_size']}" if config["norm_batch_size"] else ""
    parts = f"{config['norm']['name']}-bs{config['batch_size']}{norm_batch_size}-s{config['seed']}-{digest[:12]}"
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in parts)


def save_record(path: Path | str, record: dict) -> None:
    """Write `record` with its schema number and checksum; a reader sees the old file or the new one, never a part."""
    content = {**record, "schema": SCHEMA}
    content.pop("sha256", None)
    content["sha256"] = hashlib.sha256(_canonical(content)).hexdigest()
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    # a path that is no Unicode holds lone surrogates; backslashreplace turns them into JSON's own escapes
    write_atomic(Path(path), text.encode(errors="backslashreplace") + b"\n")


def count_reported(report_epochs: int, frozen_epochs: int | None) -> int:
    """Of how many last epochs `test_error` is the median: with fewer frozen ones of those, whose statistics differ."""
    return min(report_epochs, frozen_epochs or report_epochs)


def name_wrong_kind(error: Exception) -> str:
    """What is wrong with a record, whole by its checksum, on whose values a reader stumbled by one of WRONG_KIND."""
    return f"has a value of another kind than a record's ({type(error).__name__}: {error})"


class NotToBeRead(UserError):
    """The system does not give a record's content, which may be whole: no permission, a file server that is away."""


def load_record(path: Path | str) -> dict:
    """The record at `path`.

    Raises:
        UserError: it cannot be read (`NotToBeRead`), is not a record, has another schema number, or fails its checksum.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise NotToBeRead(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a whole JSON file") from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise UserError(f"{path}: not a record of gnbench")
    if record.get("schema") != SCHEMA:
        raise UserError(f"{path}: schema {record.get('schema')!r}, this version of gnbench reads {SCHEMA}")
    content = {key: value for key, value in record.items() if key != "sha256"}
    try:
        checksum = hashlib.sha256(_canonical(content)).hexdigest()
    except ValueError as error:
        raise UserError(f"{path}: holds a number that is not finite") from error
    if checksum != record.get("sha256"):
        raise UserError(f"{path}: its content does not match its checksum")
    return record


def is_number(value: object) -> bool:
    """Whether a value of a record is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def find_runs(directory: Path | str) -> list[Path]:
    """The record files of the runs that stand directly in `directory`, sorted by name."""
    return sorted(Path(directory).glob(f"*/{RECORD}"))


def leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The values of a config, each with its key from the top: ("norm.eps", 1e-5) and so on."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def delete_parts(directory: Path) -> None:
    """Remove what a process that was killed has left half-written or untrue. The caller holds the directory's lock."""
    for path in (*directory.glob(f".*{PART}"), directory / PROGRESS):
        path.unlink(missing_ok=True)


def _drop_none(value: object) -> object:
    if isinstance(value, dict):
        return {key: _drop_none(inner) for key, inner in value.items() if inner is not None}
    return value


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
