"""The lock of a run's directory: one process at a time writes there. The system lets go of it when the process dies."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gnbench.record import LOCK


@contextlib.contextmanager
def held(directory: Path, timeout_s: float = 0.0) -> Iterator[bool]:
    """Hold the lock of a run's directory; False where another process has it for longer than `timeout_s`.

    Raises:
        OSError, NotImplementedError: there is no writing here, or the file system has no locks.
    """
    import filelock  # here, because --help need not wait for it

    path = directory / LOCK
    try:  # newer ones would make do with a file that outlives its process
        lock = filelock.FileLock(path, fallback_to_soft=False)
    except TypeError:
        lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=timeout_s)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_held(directory: Path) -> bool:
    """Whether a process holds the lock of a run's directory. Leaves no file behind."""
    path = directory / LOCK
    if not path.exists():
        return False
    try:
        with held(directory) as is_free:
            return not is_free
    except (OSError, NotImplementedError):  # this user, or nobody, may write here
        return _is_locked_for_readers(path)


def _is_locked_for_readers(path: Path) -> bool:
    """The same for those who may only read; False where it cannot be told."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl  # not on Windows

        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False
