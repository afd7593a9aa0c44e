"""How a piece of work is timed: as often as fits into some time, waiting for the device before and after."""

import time
from collections.abc import Callable

import torch


def time_calls(action: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Seconds a call of `action`, the mean over as many as begin within `seconds`; one at least."""
    wait_for_device(device)
    started, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - started < seconds:
        action()
        calls += 1
    wait_for_device(device)
    return (time.perf_counter() - started) / calls


def wait_for_device(device: torch.device) -> None:
    """Until what was asked of a GPU is done; a CPU does what it is asked at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
