"""How a step of training is executed: one training by itself, or several seeds of one cell as one network.

An engine has a `name`, the `members` that it moves forward together, `set_train_mode(frozen)` and
`step(batches) -> (losses, errors)`, one update of every member; gnbench.train.train drives it. `Eager` is the
reference, against which the tests step every other engine.
"""

import ctypes
import math
import sys
from collections.abc import Sequence

from gnbench.engine.eager import Eager
from gnbench.engine.fused import Fused
from gnbench.norms.batch import BatchNorm
from gnbench.train import Engine, Training

__all__ = ["Eager", "Fused", "keep_freed_memory", "make_engine", "most_lanes", "share_out"]

MOST_LANES = 8  # seeds as one network: 16 were no faster
MOST_FUSED_BATCH = 8  # larger batches fill a CPU's kernels by themselves
MOST_FUSED_BATCH_ON_GPU = 128
WORTH_COMPILING = 1_000_000  # images in a training; half a minute of compiling against minutes of gain


def make_engine(lanes: Sequence[Training | None], engine: str) -> Engine:
    """The engine of the trainings in `lanes`, of which several make one network.

    On a CPU, channels_last suits the convolutions, but not a batch norm that splits its batch, whose view of it as
    (NBS, W * C, H, W') would be a copy; and torch.compile gains an eighth with BN, and nothing with norms that look at
    one image. What is taken depends on the whole training, not on what is left of it, so that a resumed one goes on
    with the same arithmetic.

    Args:
        engine: eager is the reference, for a single training; auto takes what is faster.
    """
    if len(lanes) > 1:
        return Fused(lanes)
    (training,) = lanes
    if engine == "eager" or training.dataset.mean.device.type != "cpu":
        return Eager(training)
    sizes = [getattr(module, "norm_batch_size", None) for module in training.model.modules()]
    if any(size is not None and size < training.recipe.batch_size for size in sizes):
        return Eager(training)
    is_bn = any(type(module) is BatchNorm for module in training.model.modules())
    num_images = training.total_steps * training.recipe.batch_size
    return Eager(training, channels_last=True, compiled=is_bn and num_images >= WORTH_COMPILING)


def most_lanes(config: dict, on_gpu: bool, asked: int | None = None) -> int:
    """How many seeds of a run's cell may be trained as one network; 1 where they are trained one by one.

    Args:
        asked: the most that the user wants; None is what is faster. A norm or model from outside of gnbench, which
            cannot be taken apart, the reference engine and clipped gradients train one by one whatever is asked.
    """
    ours = all(target.startswith("gnbench.") for part in ("norm", "model") for target in _targets(config[part]))
    if config["engine"] != "auto" or not ours or config["clip_grad_norm"] is not None:
        return 1
    small = config["batch_size"] <= (MOST_FUSED_BATCH_ON_GPU if on_gpu else MOST_FUSED_BATCH)
    return asked or (MOST_LANES if small else 1)


def _targets(node: dict) -> list[str]:
    """The import paths in a config node and the nodes below it."""
    below = [target for value in node.values() if isinstance(value, dict) for target in _targets(value)]
    return below + [node["_target_"]] * ("_target_" in node)


def share_out(num_seeds: int, most: int) -> list[int]:
    """Sizes, as even as can be, of the fewest groups of at most `most` seeds.

    >>> share_out(10, 8)
    [5, 5]
    """
    num_groups = math.ceil(num_seeds / most)
    return [num_seeds // num_groups + (group < num_seeds % num_groups) for group in range(num_groups)]


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one: it gives large blocks back to the system otherwise."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)
