"""How a step of training is executed: one training by itself, or several seeds of one cell as one network.

`Eager` is the reference, against which the tests step every other engine; `Fused` is several seeds as one network;
`CudaGraph` records the step of either; `Distributed` is one training by several processes. An engine has a `name`, the
`members` that it moves forward together, `set_train_mode(frozen)` and `step(batches) -> (losses, errors)`, one update
of every member; gnbench.train.train drives it.
"""

from collections.abc import Sequence

import torch
from torch import nn

from gnbench import kernels
from gnbench.engine.eager import PLAIN, Eager, Ways
from gnbench.engine.fused import Fused
from gnbench.engine.graph import CudaGraph
from gnbench.errors import UserError
from gnbench.kernels import winograd
from gnbench.models.conv import Conv2d
from gnbench.models.resnet import BasicBlock
from gnbench.norms.batch import BatchNorm
from gnbench.norms.group import GroupNorm
from gnbench.train import Engine, Training
from gnbench.workers import count_workers

__all__ = [
    "CudaGraph",
    "Eager",
    "Fused",
    "Ways",
    "check_engine",
    "make_engine",
    "most_lanes",
    "prefers_channels_last",
]

MOST_LANES = 8  # seeds as one network: with so many, even batches of 2 fill the kernels
MOST_FUSED_BATCH, MOST_FUSED_BATCH_ON_GPU = 8, 128  # larger ones fill the kernels by themselves
# Pixels of the images in a step of all seeds: the maps of more outgrow a CPU's caches, or a GPU's memory.
MOST_PIXELS, MOST_PIXELS_ON_GPU = 32 * 32 * 32, 8 * 128 * 32 * 32
WORTH_COMPILING = 50_000  # images in a training; some seconds of compiling against a fifth of the training


def make_engine(lanes: Sequence[Training | None], engine: str) -> Engine:
    """The engine of the trainings in `lanes`, of which several make one network.

    What is taken depends on the whole training, not on what is left of it, so that a resumed one goes on with the same
    arithmetic on the same machine. On a CPU, by one thread, BN at any normalization batch size and GN with any number
    of groups go in one pass over memory, and convolutions in float32 with fewer multiplications, unless the training is
    too short to compile that, or there is no compiler.

    Args:
        engine: eager is the reference, for a single training; auto takes what is faster; cuda_graph records the step.

    Raises:
        UserError: the device does not have the engine, or gradients are to be clipped over several seeds.
    """
    training = next(training for training in lanes if training is not None)
    recipe, device = training.recipe, training.dataset.mean.device
    check_engine(engine, device)
    ways = _find_ways(training) if engine == "auto" else PLAIN
    if count_workers() > 1:
        from gnbench.engine.distributed import Distributed  # torch.distributed is for those who need it

        return Distributed(training, ways)
    if len(lanes) > 1:
        if recipe.clip_grad_norm is not None:
            raise UserError("clip_grad_norm is of each seed's own gradients: its seeds are not trained as one network")
        made: Eager | Fused = Fused(lanes, ways)
    else:
        made = Eager(training, ways)
    return CudaGraph(made) if engine == "cuda_graph" else made


def _find_ways(training: Training) -> Ways:
    """What makes a step of a training faster.

    Norms in one pass gain where a model asks for the ReLU and the addition together with the norm: in the CIFAR
    ResNets. What is to be compiled has to gain more than the compiler takes.
    """
    channels_last = prefers_channels_last(training)
    long = training.total_steps * training.recipe.batch_size >= WORTH_COMPILING
    on_cpu = training.dataset.mean.device.type == "cpu" and torch.get_num_threads() == 1
    if not (long and on_cpu and count_workers() == 1):
        return Ways(channels_last)
    modules = list(training.model.modules())
    norms = [module.norm1 for module in modules if isinstance(module, BasicBlock)]
    one_pass = any(type(norm) in (BatchNorm, GroupNorm) and len(norm.weight) % kernels.WIDTH == 0 for norm in norms)
    convs = any(isinstance(module, Conv2d) and winograd.suits(module) for module in modules)
    ways = Ways(channels_last or one_pass, one_pass, convs and training.precision != "bf16")
    is_gain = one_pass or (ways.winograd and channels_last)
    return ways if is_gain and kernels.are_available() else Ways(channels_last)


def prefers_channels_last(training: Training) -> bool:
    """Whether a step by torch's own norms keeps weights and activations as (N, H, W, C): on a CPU, with most norms.

    Not where a norm is faster on (N, C, H, W) than the convolutions lose by it. That is a GroupNorm with one channel a
    group, or any in bf16, whose channels_last kernels are slow, and a batch norm that splits its batch, whose view of
    it as (NBS, W * C, H, W') would be a copy.
    """
    modules, own_batch_size = list(training.model.modules()), training.recipe.batch_size // count_workers()
    groups = [m for m in modules if isinstance(m, nn.GroupNorm)]
    slow = any(training.precision == "bf16" or m.num_groups == m.num_channels for m in groups)
    sizes = [getattr(module, "norm_batch_size", None) for module in modules]
    split = any(size is not None and size < own_batch_size for size in sizes)
    return training.dataset.mean.device.type == "cpu" and not slow and not split


def check_engine(engine: str, device: torch.device) -> None:
    """Refuse an engine that a device does not have.

    Raises:
        UserError: cuda_graph is asked for on another device than a GPU, or for several workers.
    """
    if engine == "cuda_graph" and device.type != "cuda":
        raise UserError(f"engine=cuda_graph is not legal on device={device.type}: it is auto or eager there")
    if engine == "cuda_graph" and count_workers() > 1:
        raise UserError("engine=cuda_graph is not legal for several workers: it is auto or eager for them")


def most_lanes(config: dict, num_pixels: int, on_gpu: bool, asked: int | None = None) -> int:
    """How many seeds of a run's cell may be trained as one network; 1 where they are trained one by one.

    Args:
        num_pixels: of an image, height x width.
        asked: the most that the user wants; None is what is faster. A norm or model from outside of gnbench, which
            cannot be taken apart, the reference engine, clipped gradients and a measurement go one by one whatever is
            asked.
    """
    ours = all(target.startswith("gnbench.") for part in ("norm", "model") for target in _targets(config[part]))
    alone = config["engine"] == "eager" or config.get("measure") is not None or config["clip_grad_norm"] is not None
    if alone or not ours:
        return 1
    batch_size = config["batch_size"]
    if asked or batch_size > (MOST_FUSED_BATCH_ON_GPU if on_gpu else MOST_FUSED_BATCH):
        return asked or 1
    most_pixels = MOST_PIXELS_ON_GPU if on_gpu else MOST_PIXELS
    return max(1, min(MOST_LANES, most_pixels // (batch_size * num_pixels)))


def _targets(node: dict) -> list[str]:
    """The import paths in a config node and the nodes below it."""
    below = [target for value in node.values() if isinstance(value, dict) for target in _targets(value)]
    return below + [node["_target_"]] * ("_target_" in node)
