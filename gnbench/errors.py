"""The exceptions whose messages are shown to the user without a traceback, and what others say in one line."""

import contextlib
import re
from collections.abc import Iterator

# Sequences that colour text or move a cursor (CSI), name a window (OSC, up to its end) or do something shorter.
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]")
UNPRINTED = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # control characters, of the escape sequences of eight bits too
OUT_OF_MEMORY = "out of memory"  # so begins an explanation of an error that says it


class UserError(Exception):
    """What was asked for cannot be done; the message names the key or file, its value, and what is legal."""


def require(condition: bool, key: str, value: object, legal: str) -> None:
    """Refuse the value of a key, unless `condition` holds.

    Args:
        legal: what the value is to be, a clause such as "it is 1 or more".

    Raises:
        UserError: the condition does not hold.
    """
    if not condition:
        raise UserError(f"{key}={value} is not legal: {legal}")


class SweepFailed(Exception):
    """Some runs of a sweep failed; the message lists them, each with its cause and its log."""


class Exited(Exception):
    """A norm or a model from outside ended the program, as no layer may."""


@contextlib.contextmanager
def exits_are_errors(who: str = "a layer") -> Iterator[None]:
    """Let an exit that is no number, or would pass for success, be an error; others, as a scheduler's, end the program.

    Raises:
        Exited: `sys.exit` was called with 0, nothing or a text.
    """
    try:
        yield
    except SystemExit as error:
        if is_status(error):
            raise
        raise Exited(f"{who} called {name_exit(error)}") from error


def is_status(error: SystemExit) -> bool:
    """Whether an exit's number says that something ended: submitit queues a task again by such a one."""
    return isinstance(error.code, int) and error.code != 0


def name_exit(error: SystemExit) -> str:
    """The call that an exit was."""
    return f"sys.exit({'' if error.code is None else repr(error.code)})"


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its type where it says nothing."""
    return _find_words(error) or type(error).__name__


def explain(error: BaseException) -> str:
    """An exception's type and what it says, in one line; that memory ran out comes first."""
    words = _find_words(error)
    prefix = f"{OUT_OF_MEMORY}: " if is_out_of_memory(error) else ""
    return f"{prefix}{type(error).__name__}{': ' * bool(words)}{words}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a device or of the host: some libraries raise a RuntimeError of their own."""
    words = _find_words(error)
    by_words = any(each in words for each in ("can't allocate memory", OUT_OF_MEMORY, "ALLOC_FAILED"))
    return by_words or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # the last: torch's


def _find_words(error: BaseException) -> str:
    """The first line that is not empty, without what a terminal would obey."""
    lines = ESCAPES.sub("", str(error)).splitlines()
    return next(filter(None, (UNPRINTED.sub(" ", line).strip() for line in lines)), "")
