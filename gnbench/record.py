"""A run's identity and its record: the contract between the half that trains and the half that draws.

Standard library only, so that either half can read a record without the other's packages. A record is one JSON
file a run, written aside, flushed and renamed; it carries a SHA-256 of its own content, which every load checks.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from gnbench.errors import UserError

SCHEMA = 1  # of the record and of what a digest covers; a change of either starts a new number
RECORD = "record.json"
FINISHED = ("done", "diverged")  # statuses that a second start leaves alone: both are results

# What decides how or where a run is executed and is shown in its record, but cannot change its numbers.
NOT_IDENTITY = ("results", "device", "checkpoint_s", "tuned_from", "tuning")


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
    write_atomic(Path(path), json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False).encode() + b"\n")


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
    except ValueError as error:
        raise UserError(f"{path}: not a whole JSON file") from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise UserError(f"{path}: not a record of gnbench")
    if record.get("schema") != SCHEMA:
        raise UserError(f"{path}: schema {record.get('schema')!r}, this version of gnbench reads {SCHEMA}")
    content = {key: value for key, value in record.items() if key != "sha256"}
    if hashlib.sha256(_canonical(content)).hexdigest() != record.get("sha256"):
        raise UserError(f"{path}: its content does not match its checksum")
    return record


def find_runs(directory: Path | str) -> list[Path]:
    """The record files of the runs that stand directly in `directory`, sorted by name."""
    return sorted(Path(directory).glob(f"*/{RECORD}"))


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: written beside it, flushed to the disk, then renamed.

    Raises:
        UserError: the disk is full or the place cannot be written; what stood at `path` is untouched.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}{_free_space(path.parent)}") from error


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


def _free_space(directory: Path) -> str:
    try:
        return f" ({shutil.disk_usage(directory).free / 2**20:.0f} MiB free)"
    except OSError:
        return ""
