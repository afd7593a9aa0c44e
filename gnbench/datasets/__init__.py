"""Data sources. A source is one function, named by a config, that returns `Images`:

    load_<source>(..., verify: bool = True) -> Images

Its arrays are memory-mapped from a prepared set on the disk, so that many processes share their pages.
`verify=False` does not read them: the fingerprint, which a sweep needs to plan, then costs next to nothing.
A run that trains leaves `verify` as it is: every array is compared with its checksum.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from gnbench.errors import UserError
from gnbench.files import cannot_write

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
META = "meta.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Images:
    """A data set as arrays; labels index `classes`.

    `fingerprint` is the hex SHA-256 of the pixels, labels and classes (`fingerprint_images`): it changes with them
    and with nothing else, neither the set's name nor its place.
    """

    name: str
    classes: tuple[str, ...]
    train_images: np.ndarray  # (N, H, W, 3), uint8
    train_labels: np.ndarray  # (N,), int64
    test_images: np.ndarray
    test_labels: np.ndarray
    fingerprint: str


def make_images(name: str, classes: tuple[str, ...], **arrays: np.ndarray) -> Images:
    """`Images` of the four `arrays`, with their fingerprint."""
    return Images(name, classes, **arrays, fingerprint=fingerprint_images(classes, digest_arrays(arrays)))


def digest_arrays(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """The hex SHA-256 of each array's type, shape and bytes."""
    digests = {}
    for key in ARRAYS:
        digest = hashlib.sha256(f"{arrays[key].dtype.str} {arrays[key].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[key]).reshape(-1))
        digests[key] = digest.hexdigest()
    return digests


def fingerprint_images(classes: tuple[str, ...], digests: dict[str, str]) -> str:
    """The hex SHA-256 of the classes and of the digests of the four arrays."""
    return hashlib.sha256(json.dumps([list(classes), *(digests[key] for key in ARRAYS)]).encode()).hexdigest()


def save_images(images: Images, directory: Path) -> None:
    """Write a prepared set: beside `directory`, flushed, then renamed to it. The caller holds `lock(directory)`.

    Raises:
        UserError: it cannot be written; nothing of it is left.
    """
    aside = directory.with_name(f".{directory.name}.partial")
    arrays = {key: np.ascontiguousarray(getattr(images, key)) for key in ARRAYS}
    meta = {"classes": images.classes, "sha256": digest_arrays(arrays), "fingerprint": images.fingerprint}
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    try:
        aside.mkdir(parents=True)
        for key, array in arrays.items():
            with _flushed(aside / f"{key}.npy") as file:  # np.save does not notice all that a full disk refuses
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
                file.write(array.reshape(-1).data)
        with _flushed(aside / META) as file:
            file.write(json.dumps(meta).encode())
        shutil.rmtree(directory, ignore_errors=True)  # a corrupt one
        aside.rename(directory)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise cannot_write(directory, error) from error


@contextlib.contextmanager
def _flushed(path: Path) -> Iterator:
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def open_images(directory: Path, name: str, verify: bool = True) -> Images | None:
    """The prepared set in `directory`, memory-mapped and read-only; None where there is none.

    Raises:
        UserError: it is corrupt. `verify=False` checks the description alone, not the pixels and labels.
    """
    try:
        meta = json.loads((directory / META).read_bytes())
        arrays = {key: np.load(directory / f"{key}.npy", mmap_mode="r") for key in ARRAYS}
        if meta["fingerprint"] != fingerprint_images(meta["classes"], meta["sha256"]):
            raise UserError(f"{META} does not match its checksum")
        if verify:
            digests = digest_arrays(arrays)
            wrong = [f"{key}.npy" for key in ARRAYS if digests[key] != meta["sha256"][key]]
            if wrong:
                raise UserError(f"{' and '.join(wrong)} does not match its checksum")
        return Images(name, tuple(meta["classes"]), **arrays, fingerprint=meta["fingerprint"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # a damaged file makes the parsers of JSON and .npy raise errors of many kinds
        raise UserError(f"the prepared images in {directory} are corrupt ({error})") from error


def cache_root() -> Path:
    """Where prepared sets go unless told: $XDG_CACHE_HOME/gnbench, or ~/.cache/gnbench."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gnbench"


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold the lock of a prepared set, which dies with its process; says so when another process has it.

    Raises:
        UserError: the lock's file cannot be made beside `directory`.
    """
    file_lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            file_lock.acquire(timeout=0)
        except Timeout:
            log.warning("waiting for another process that is preparing %s", directory)
            file_lock.acquire()
    except OSError as error:
        raise cannot_write(directory.parent, error) from error
    try:
        yield
    finally:
        file_lock.release()
