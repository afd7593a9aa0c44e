"""The processes that train one run together: which of them this one is, and what they tell each other.

`torchrun --nproc_per_node=W -m gnbench ...` starts W workers. A process that torchrun did not start is the only worker,
and nothing here then imports torch.distributed. The workers' words go over gloo, between their hosts' memories; what
is on GPUs is reduced over NCCL.
"""

import contextlib
import io
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from gnbench.errors import UserError

if TYPE_CHECKING:
    import torch

FIRST = 0  # the worker that reads, writes and speaks
PATIENCE = timedelta(hours=6)  # for a worker that tests, or writes to a slow disk; one that dies is noticed at once
REFUSAL_S = 30.0  # after which a worker speaks for itself that the first one should have spoken for


class WorkerLost(Exception):
    """Another worker has ended before the run did."""


def count_workers() -> int:
    """W. torchrun's own variable is asked for too: a batch system may leave the other one lying about."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Which worker this one is, from 0."""
    return int(os.environ["RANK"]) if count_workers() > 1 else FIRST


def choose_own_gpu(name: str, num_gpus: int) -> str:
    """The worker's own GPU where `name` says cuda; other devices are shared.

    Raises:
        UserError: it names one GPU for all, or there are fewer than workers.
    """
    if count_workers() == 1 or name.partition(":")[0] != "cuda":
        return name
    if name != "cuda":
        raise UserError(
            f"device={name} is not legal for {count_workers()} workers: each takes its own, with device=cuda"
        )
    on_this_machine = int(os.environ["LOCAL_WORLD_SIZE"])
    if on_this_machine > num_gpus:
        raise UserError(
            f"{on_this_machine} workers on this machine need a GPU each and it has {num_gpus}: start as many as that, "
            "or set device=cpu"
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


@contextlib.contextmanager
def connected(device: "torch.device") -> Iterator[None]:
    """Inside, the workers hear each other, and can reduce tensors on `device`."""
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
    with noticing_loss():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    except UserError as error:
        error.of_this_worker = True
        raise
    finally:
        dist.destroy_process_group()


def broadcast(state: dict | None = None) -> dict | None:
    """What the first worker gives, on every worker, its tensors on the CPU: what a checkpoint may hold, or None."""
    import torch
    import torch.distributed as dist

    content = io.BytesIO()
    torch.save(state, content)
    said = [content.getvalue()]
    with noticing_loss():
        dist.broadcast_object_list(said, src=FIRST, device=torch.device("cpu"))
    return torch.load(io.BytesIO(said[0]), map_location="cpu", weights_only=True)


def share_signals(heard: list[int]) -> None:
    """Let a signal that any worker has heard be heard by all of them, at the same step."""
    if count_workers() == 1:
        return
    import torch
    import torch.distributed as dist

    number = torch.tensor(max(heard, default=0))
    with noticing_loss():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    if number:
        heard[:] = [int(number)]


@contextlib.contextmanager
def noticing_loss() -> Iterator[None]:
    """Name the error that another worker's end is: gloo's are plain RuntimeErrors, told by their text.

    Raises:
        WorkerLost: another worker has ended, or could not be reached.
    """
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise WorkerLost(f"another of the {count_workers()} workers has ended, or cannot be reached") from error
        raise


def leave_refusal_to_first(error: Exception) -> None:
    """Keep other workers from saying what the first one says too; its end then ends them, before this returns.

    What a worker refuses once it is connected may be its own: other images, say, on another machine.
    """
    if rank() != FIRST and not hasattr(error, "of_this_worker"):
        time.sleep(REFUSAL_S)
