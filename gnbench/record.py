"""A run's identity and its record: the contract between the half that trains and the half that draws.

Standard library only, so that either half can read a record without the other's packages. A record is one JSON
file a run, written aside, flushed and renamed; it carries a SHA-256 of its own content, which every load checks.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gnbench.crash import crash_at
from gnbench.errors import UserError

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
PART = ".part"  # ends the name of a file that is still being written
WRONG_KIND = (TypeError, KeyError, AttributeError, ValueError, OverflowError)  # what strange values make a reader raise
CORRUPT = ".corrupt"  # ends the name of a file that failed its checksum and is kept as evidence

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


def name_wrong_kind(error: Exception) -> str:
    """What is wrong with a record, whole by its checksum, on whose values a reader stumbled by one of WRONG_KIND."""
    return f"has a value of another kind than a record's ({type(error).__name__}: {error})"


def load_record(path: Path | str) -> dict:
    """The record at `path`.

    Raises:
        UserError: it cannot be read, is not a record, has another schema number, or fails its checksum.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
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


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: written beside it, flushed to the disk, then renamed.

    Raises:
        UserError: the disk is full or the place cannot be written; what stood at `path` is untouched.
    """
    temporary = None
    half = len(content) // 2
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=PART, delete=False) as file:
            temporary = Path(file.name)
            file.write(content[:half])
            crash_at(f"{path.name}.half")
            file.write(content[half:])
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        crash_at(f"{path.name}.written")
        os.replace(temporary, path)
        crash_at(f"{path.name}.renamed")
        _sync_directory(path.parent)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError | NotImplementedError) -> UserError:
    """The sentence for a file or directory that could not be written: its path, why, and the space if that is why."""
    lacks_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    space = _free_space(path) if lacks_space else ""
    return UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}{space}")


def check_place(directory: Path) -> None:
    """Try whether a directory of runs can be written, or be made where it is not there; nothing is left behind.

    Raises:
        UserError: it cannot.
    """
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"results={directory} cannot be written: {error.strerror}") from error


def delete_parts(directory: Path) -> None:
    """Remove what a process that was killed has left half-written or untrue. The caller holds the directory's lock."""
    for path in (*directory.glob(f".*{PART}"), directory / PROGRESS):
        path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a file that failed its checksum, so that it is evidence and in nobody's way; returns its new place.

    Raises:
        UserError: it cannot be renamed.
    """
    names = (path.with_name(f"{path.name}{CORRUPT}{number or ''}") for number in itertools.count())
    place = next(name for name in names if not name.exists())
    try:
        return path.rename(place)
    except OSError as error:
        raise cannot_write(place, error) from error


def _drop_none(value: object) -> object:
    if isinstance(value, dict):
        return {key: _drop_none(inner) for key, inner in value.items() if inner is not None}
    return value


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(directory: Path) -> None:
    """Make a rename survive a power cut, where the system can flush a directory."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _free_space(path: Path) -> str:
    """Of the disk of the nearest directory above `path` that exists."""
    for directory in path.absolute().parents:
        with contextlib.suppress(OSError):
            return f" ({shutil.disk_usage(directory).free / 2**20:.0f} MiB free)"
    return ""
