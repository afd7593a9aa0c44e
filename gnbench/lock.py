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

    lock = filelock.FileLock(directory / LOCK)
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
    if not (directory / LOCK).exists():
        return False
    with contextlib.suppress(OSError, NotImplementedError), held(directory) as is_free:
        return not is_free
    return False  # on a disk that is read-only it cannot be told, and nothing can be trained
