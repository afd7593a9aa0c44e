"""How far a run under way is, told about once a second in a small file in its directory, and now and then in a line.

Whoever may read the directory may watch the run: the launcher that started it, and a person on another machine. A file
makes nobody wait, as a pipe does whose reader stands still. Standard library only.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from gnbench.console import fall_silent
from gnbench.record import PROGRESS
from gnbench.words import duration

EVERY_S = 1.0
WINDOW = 10  # times EVERY_S, over which speed is taken: an epoch's test mostly fits in
LINE_EVERY_S = 10.0  # at most; before it, a run that is over in no time says its result alone
EPOCH_LINES, STEP_LINES = 50, 10  # of a whole run, at most: at the ends of epochs, and within epochs that are long


class Teller:
    """Tells of the runs that this process trains as one network, and how many images a second each is trained on.

    The speed is that of the last `WINDOW` tellings, what is done between steps, tests above all, included.
    """

    def __init__(self, step: int, num_steps: int, steps_per_epoch: int, batch_size: int) -> None:
        self.num_steps, self.steps_per_epoch, self.batch_size = num_steps, steps_per_epoch, batch_size
        self.marks = deque([(time.monotonic(), step)], maxlen=WINDOW + 1)
        self.process = {"host": socket.gethostname(), "pid": os.getpid()}

    def is_due(self) -> bool:
        return time.monotonic() - self.marks[-1][0] >= EVERY_S

    def tell(self, step: int, directories: Iterable[Path]) -> None:
        """Write where the runs of `directories` are. A disk without room is no reason to stop them."""
        self.marks.append((time.monotonic(), step))
        (first_s, first_step), (last_s, _) = self.marks[0], self.marks[-1]
        num_epochs = -(-self.num_steps // self.steps_per_epoch)
        content = {
            "step": step,
            "num_steps": self.num_steps,
            "epoch": min(step // self.steps_per_epoch + 1, num_epochs),  # the one under way
            "num_epochs": num_epochs,
            "images_per_s": self.batch_size * (step - first_step) / (last_s - first_s),
            **self.process,
        }
        for directory in directories:
            with contextlib.suppress(OSError):
                (directory / PROGRESS).write_text(json.dumps(content))


class Lines:
    """Says on standard error how far a run is, for who reads the log of a batch job; a terminal has a bar instead.

    The first line has the speed. Then there is one at the end of each epoch, or of each so many that a long run has not
    more than EPOCH_LINES, and within an epoch that is more than one STEP_LINES-th of the run.
    """

    def __init__(self, name: str, step: int, num_steps: int, steps_per_epoch: int, batch_size: int) -> None:
        self.name, self.first_step, self.num_steps = name, step, num_steps
        self.steps_per_epoch, self.batch_size = steps_per_epoch, batch_size
        self.started_s = self.told_s = time.monotonic()
        self.told_step: int | None = None

    def is_due(self, step: int) -> bool:
        if step == self.num_steps or time.monotonic() - self.told_s < LINE_EVERY_S:
            return False
        most = STEP_LINES if step % self.steps_per_epoch else EPOCH_LINES
        return self.told_step is None or (step - self.told_step) * most >= self.num_steps

    def tell(self, step: int, history: Sequence[dict]) -> None:
        """Print where the run is. A reader who has left is no reason to stop it."""
        self.told_s, self.told_step = time.monotonic(), step
        step_s = (self.told_s - self.started_s) / (step - self.first_step)
        if step % self.steps_per_epoch:
            told = f"step {step} of {self.num_steps}, {self.batch_size / step_s:.0f} images/s"
        else:
            told = f"epoch {history[-1]['epoch']} of {-(-self.num_steps // self.steps_per_epoch)}, "
            told += describe_errors(history[-1])
        left = duration((self.num_steps - step) * step_s)
        try:
            print(f"{self.name}: {told}, about {left} left", file=sys.stderr, flush=True)
        except OSError:
            fall_silent(sys.stderr)  # or Python would try again at its end, and fail by it


def describe_errors(row: dict) -> str:
    """The errors in a row of a history; not every epoch is tested."""
    tested = "" if row["test_error"] is None else f", test error {row['test_error']:.2f} %"
    return f"training error {row['train_error']:.2f} %{tested}"
