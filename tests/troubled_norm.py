"""A norm that goes wrong in every way a stranger's can, and only in a run's own process: the launcher tries it too."""

import functools
import multiprocessing
import os
import time
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn

from gnbench.norms import group_norm


class Troubled(nn.Module):
    """GN until its second batch; then what `fault` says."""

    def __init__(self, num_channels: int, fault: str) -> None:
        super().__init__()
        self.norm = group_norm(num_channels, num_groups=8)
        self.fault = fault
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += 1
        if self.batches == 2 and multiprocessing.parent_process() is not None:
            self._go_wrong()
        return self.norm(x) * (float("inf") if self.fault == "overflow" and self.batches > 1 else 1.0)

    def _go_wrong(self) -> None:
        if self.fault == "raise":
            raise ZeroDivisionError("a fault")
        if self.fault == "memory":
            torch.empty(10**15)  # 4 PB
        if self.fault == "exit":
            os._exit(139)
        if self.fault == "hang":
            time.sleep(3600)
        if self.fault == "crowded":
            take_all_memory()


@functools.cache  # once for all layers of a process
def take_all_memory() -> TextIO:
    """Of a machine that has enough for one process; the first to have it keeps it until another was refused."""
    import fcntl  # not on Windows

    memory, refused = open("memory", "w"), Path("refused")  # noqa: SIM115  until the process ends
    try:
        fcntl.flock(memory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        refused.touch()
        raise MemoryError("another process has it") from None
    while not refused.exists():
        time.sleep(0.01)
    return memory


def build(num_channels: int, fault: str) -> nn.Module:
    """The norm of configs/norm/troubled.yaml."""
    return Troubled(num_channels, fault)
