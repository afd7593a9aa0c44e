"""How a command ends that its user interrupts, or whose output nobody takes."""

import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

INTERRUPTED = 128 + signal.SIGINT
UNHEARD = 141  # 128 + SIGPIPE, where there is such a signal


def as_command(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """`main`, whose exit code on Ctrl-C and behind `| head` is the shell's own, without a traceback."""

    @functools.wraps(main)
    def command(argv: Sequence[str] | None = None) -> int:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a dash, where the locale has ASCII alone
        try:
            code = main(argv)
            sys.stdout.flush()
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            return fall_silent()
        return code

    return command


def fall_silent(stream: TextIO | None = None) -> int:
    """Let what is still to be printed go nowhere, and return the exit code of a command that nobody hears.

    Args:
        stream: standard output if None.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())
    return UNHEARD
