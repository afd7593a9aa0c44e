"""How far a run under way is, told about once a second in a small file in its directory.

Whoever may read the directory may watch the run: the launcher that started it, and a person on another machine. A file
makes nobody wait, as a pipe does whose reader stands still. Standard library only.
"""

import contextlib
import json
import os
import socket
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from gnbench.record import PROGRESS

EVERY_S = 1.0
WINDOW = 10  # times EVERY_S, over which speed is taken: an epoch's test mostly fits in


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
