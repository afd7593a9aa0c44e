"""A run's epochs as scalars for TensorBoard, in `tensorboard/` of its directory, where `tensorboard=true` asks for it.

They are a copy of the record's history, which nothing here reads.
"""

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path

from gnbench.errors import UserError
from gnbench.files import cannot_write

DIRECTORY = "tensorboard"
SCALARS = {  # of TensorBoard, each with its key in a row of the history
    "loss/train": "train_loss",
    "loss/test": "test_loss",
    "error/train": "train_error",
    "error/test": "test_error",
    "error/val": "val_error",
    "lr": "lr",
}


def check_tensorboard() -> None:
    """Refuse what could not be written.

    Raises:
        UserError: the package tensorboard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("tensorboard=true needs the package tensorboard: pip install tensorboard, or leave it false")


class Board:
    """The scalars of one run, an epoch each; errors in percent, `images_per_s` without the tests.

    Those of an earlier start are deleted and written anew from `history`, so that no epoch is there twice; a
    TensorBoard that has read them is told to forget them (purge_step).

    Raises:
        UserError: they cannot be written; `add` says so too.
    """

    def __init__(self, directory: Path, history: Sequence[dict], batch_size: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.place, self.batch_size, self.step = directory / DIRECTORY, batch_size, 0
        try:
            shutil.rmtree(self.place, ignore_errors=True)
            self.writer = SummaryWriter(str(self.place), purge_step=1)
        except OSError as error:
            raise cannot_write(self.place, error) from error
        for row in history:
            self.add(row)

    def add(self, row: dict) -> None:
        """Write a row of the history."""
        scalars = {name: row[key] for name, key in SCALARS.items() if row[key] is not None}
        scalars["images_per_s"] = (row["step"] - self.step) * self.batch_size / row["time_s"]
        self.step = row["step"]
        try:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, row["epoch"])
            self.writer.flush()
        except OSError as error:
            raise cannot_write(self.place, error) from error

    def close(self) -> None:
        """Give back the file and the thread that writes it."""
        self.writer.close()
