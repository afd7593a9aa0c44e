"""Files that are whole or not there, on any disk. Standard library only."""

import contextlib
import errno
import hashlib
import itertools
import os
import shutil
import tempfile
from pathlib import Path

from gnbench.crash import crash_at
from gnbench.errors import UserError

PART = ".part"  # ends the name of a file that is still being written
CORRUPT = ".corrupt"  # ends the name of a file that failed its checksum and is kept as evidence
CHECKSUM_BYTES = hashlib.sha256().digest_size


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


def seal(content: bytes) -> bytes:
    """`content` and, at its end, its SHA-256."""
    return content + hashlib.sha256(content).digest()


def unseal(sealed: bytes) -> bytes | None:
    """The content of what `seal` made; None where it does not match its checksum."""
    content, checksum = sealed[:-CHECKSUM_BYTES], sealed[-CHECKSUM_BYTES:]
    return content if hashlib.sha256(content).digest() == checksum else None


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
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # it cannot flush a directory
                raise
        finally:
            os.close(descriptor)


def _free_space(path: Path) -> str:
    """Of the disk of the nearest directory above `path` that exists."""
    for directory in path.absolute().parents:
        with contextlib.suppress(OSError):
            return f" ({shutil.disk_usage(directory).free / 2**20:.0f} MiB free)"
    return ""
