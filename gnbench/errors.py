"""The exceptions whose messages are shown to the user without a traceback, and what others say in one line."""

import contextlib
from collections.abc import Iterator


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
def exits_are_errors() -> Iterator[None]:
    """Let an exit that would pass for success be an error; others, as a scheduler's on a signal, end the program.

    Raises:
        Exited: `sys.exit` was called with 0 or nothing.
    """
    try:
        yield
    except SystemExit as error:
        if error.code:
            raise
        raise Exited(f"a layer called sys.exit({'' if error.code is None else error.code})") from error


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its type where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
