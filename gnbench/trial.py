"""A norm is tried before any training: what a stranger's layer may do wrong is said in a sentence, at once.

It is built on every channel count of the model, and takes a batch there forth and back, in evaluation and for
population statistics. One of the batch is to share its statistics among `norm_batch_size` images and no more.
"""

import contextlib
import copy
import math
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from gnbench.configs import partial
from gnbench.errors import UserError, explain, first_line
from gnbench.models import ConvWeight, NormFactory, brings_activation, norm_and_activation
from gnbench.precise_bn import layers_with_statistics, update_precise_statistics

IMAGES = 4  # of a trial's batch, or the next multiple of norm_batch_size
SIDE = 4  # positions, H = W, of its images; a layer that does not take them sees what a model makes of ...
MODEL_SIDE = 32  # ... images of this height and width
SHARING = 2  # norm_batch_size, at most, of the trial that counts on how many images an output depends
LIBRARIES = [Path(path) for path in sysconfig.get_paths().values()]
OURS = [Path(__file__).parent, Path(torch.__file__).parent]  # lines that tell an author nothing

Shape = tuple[int, int, int, int]  # (N, C, H, W)


class _NotBuilt(Exception):
    """What is wrong with how a layer is built, in words that follow "cannot be built on 16 channels: "."""


class _Unfit(Exception):
    """What is wrong with what a layer does, in words that begin with "its"."""


def check_norm(node: dict, norm: NormFactory, label: str) -> Shape:
    """Refuse a norm that cannot be built on every channel count of a model, or that does not behave as a layer.

    Returns:
        A batch's shape that it takes, on the fewest channels.

    Raises:
        UserError: names the channel counts, or the convolution, on which it fails, in which step, and why.
    """
    counts, convs = _places(node)
    taken, failures = {}, {}
    for num_channels in counts:
        try:
            taken[num_channels] = _find_shape(node, norm, num_channels)
        except (_NotBuilt, _Unfit) as error:
            failures[num_channels] = error
    if failures:
        failing, all_counts = (", ".join(map(str, numbers)) for numbers in (failures, counts))
        first = next(iter(failures.values()))
        raise UserError(
            f"{label} cannot be {'built' if isinstance(first, _NotBuilt) else 'used'} on {failing} channels "
            f"(model={node['name']} has norms on {all_counts}): {first}"
        ) from first
    for conv in convs if getattr(norm, "conv_weight", None) is not None else ():
        try:
            _try_weight(norm.conv_weight, conv)
        except Exception as error:
            raise UserError(
                f"{label} cannot act on the weights of model={node['name']}, of shape {tuple(conv.weight.shape)}: "
                f"{error if isinstance(error, _Unfit) else _explain(error)}"
            ) from error
    return taken[counts[0]] if counts else (IMAGES, 16, SIDE, SIDE)


def check_batches(node: dict, shape: Shape, label: str) -> None:
    """Refuse a norm whose results would stand at a normalization batch size that is not its own.

    Args:
        node: its config; norm_batch_size is null where its statistics are always the whole batch's.
        shape: of a batch that it takes.

    Raises:
        UserError: it says nothing of norm_batch_size, or does not follow it, or keeps statistics where none are looked
            for.
    """
    norm = partial(node)
    layer = norm_and_activation(norm, shape[1])[0]
    keeping = layers_with_statistics(layer)
    size = node.get("norm_batch_size")
    if "norm_batch_size" not in node:
        if keeping or depends_on_batch(norm, shape):
            raise UserError(
                f"{label} {'keeps running statistics' if keeping else 'depends on the other images'} of a batch: its "
                "file needs the line norm_batch_size: ${norm_batch_size}, or the command line "
                "'+norm.norm_batch_size=${norm_batch_size}', and its layer that argument"
            )
        return
    if size is not None:
        _check_sharing(node, shape, label)
    for part in keeping if size is not None else ():
        if not hasattr(part, "norm_batch_size"):
            raise UserError(
                f"{label} keeps running statistics in {type(part).__name__}, which has no attribute norm_batch_size: "
                "what keeps them is to read it from an attribute of that name, which gnbench sets to None, the whole "
                "batch, while it measures population statistics"
            )
    if not keeping and (moved := _find_moved(layer, shape)):
        raise UserError(
            f"{label} changes {', '.join(moved)} in training: buffers with statistics for evaluation are to have names "
            "that begin with running_, or gnbench neither freezes nor measures them"
        )


def depends_on_batch(norm: NormFactory, shape: Shape = (IMAGES, 16, SIDE, SIDE)) -> bool:
    """Whether in training an image's output changes with the images beside it. Random layers do not count."""
    return count_others(norm, shape) > 0


@torch.no_grad()
def count_others(norm: NormFactory, shape: Shape) -> int:
    """On how many other images of a batch the first one's output depends in training; 0 for a random layer.

    Each pass is a fresh copy's, so that none sees what another has kept of its batch.
    """
    layer = norm_and_activation(norm, shape[1])[0].train()

    def look(images: Tensor) -> Tensor:
        return copy.deepcopy(layer)(images.clone())[0]

    x = _randn(shape)
    first = look(x)
    if not torch.equal(first, look(x)):
        return 0
    count = 0
    for other in range(1, len(x)):
        changed = x.clone()
        changed[other] = 10 * x[other] + 5
        count += not torch.allclose(first, look(changed), rtol=1e-3, atol=1e-4, equal_nan=True)
    return count


def _check_sharing(node: dict, shape: Shape, label: str) -> None:
    """Refuse a layer that is given norm_batch_size and shares its statistics among more images.

    Three normalization batches are tried, of one or two images: a small batch, in which a layer that takes the number
    for that of the workers is found out too. One that is not to be had with so few is not asked.
    """
    size = min(SHARING, node["norm_batch_size"])
    batch_size = 3 * size
    try:
        count = count_others(partial({**node, "norm_batch_size": size}), (batch_size, *shape[1:]))
    except Exception:  # a stranger's layer may raise anything
        return
    if count > size - 1:
        raise UserError(
            f"{label} is given norm_batch_size={size} but its output depends on {count} other images of a batch of "
            f"{batch_size}: it is to treat N images as N / norm_batch_size workers would (docs/norms.md has an "
            "example), or to have norm_batch_size=null, if its statistics are always those of the whole batch"
        )


def _find_moved(layer: nn.Module, shape: Shape) -> list[str]:
    """The names of the buffers, of floating-point numbers, that a batch changes in training."""
    before = {name: buffer.clone() for name, buffer in layer.named_buffers() if buffer.is_floating_point()}
    layer.train()(_randn(shape))
    after = dict(layer.named_buffers())
    return [name for name, buffer in before.items() if name in after and not torch.equal(buffer, after[name])]


def _find_shape(node: dict, norm: NormFactory, num_channels: int) -> Shape:
    """The shape of a batch that the norm takes on `num_channels`: of few positions, or else of those of a model.

    Raises:
        _NotBuilt, _Unfit: it takes neither; what is wrong with the last.
    """
    size = getattr(norm, "keywords", {}).get("norm_batch_size") or 1
    num_images = math.ceil(IMAGES / size) * size if isinstance(size, int) else IMAGES
    try:
        _try_norm(norm, (num_images, num_channels, SIDE, SIDE))
        return num_images, num_channels, SIDE, SIDE
    except _Unfit as error:
        first = error
    tried = f"tried on {num_images} images of {SIDE} x {SIDE} positions"
    height, width = _sizes(node).get(num_channels, (SIDE, SIDE))
    if (height, width) == (SIDE, SIDE):
        raise _Unfit(f"{first}; {tried}") from first.__cause__
    try:
        _try_norm(norm, (num_images, num_channels, height, width))
        return num_images, num_channels, height, width
    except _Unfit as error:
        raise _Unfit(f"{error}; {tried} and of {height} x {width}") from error.__cause__


@torch.enable_grad()
def _try_norm(norm: NormFactory, shape: Shape) -> None:
    """Build a norm wherever a model may ask for one; pass one batch through it, forth and back, and in evaluation."""
    for options in ({"apply_act": True}, {"apply_act": False}) if brings_activation(norm) else ({},):
        _try_layer(norm, options, _randn(shape))


def _try_layer(norm: NormFactory, options: dict, x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    layer = _build(norm, x.shape[1], options).train()
    with _step("forward pass in training"):
        y = layer(leaf * 1)  # as a convolution's output, which a layer may change in place
    _require_same(x, y, "output")
    if not y.requires_grad:
        raise _Unfit("its output is cut off from its input, so that nothing before it would learn: is it detached?")
    with _step("backward pass"):
        y.square().sum().backward()
    if leaf.grad is None:
        raise _Unfit("no gradient of its output reaches its input: is the input detached on the way?")
    _require_same(x, leaf.grad, "gradient")
    for images in (x, x[1:]):  # a test's last batch is of any size
        layer = _build(norm, x.shape[1], options).eval()
        with torch.no_grad(), _step(f"forward pass in evaluation, of {len(images)} images,"):
            y = layer(images.clone())
        _require_same(images, y, "output in evaluation")
    layer = _build(norm, x.shape[1], options)
    split = any(getattr(part, "norm_batch_size", None) is not None for part in layers_with_statistics(layer))
    told = ", in which its attribute norm_batch_size is None for the whole batch," if split else ""
    with _step(f"pass for population statistics{told}"):
        update_precise_statistics(layer, [x.clone()])


def _build(norm: NormFactory, num_channels: int, options: dict) -> nn.Module:
    try:
        layer = norm(num_channels, **options)
    except (TypeError, ValueError) as error:  # what wrong arguments raise, which need no such word
        raise _NotBuilt(f"{first_line(error)}{_place(error)}") from error
    except Exception as error:  # a stranger's layer may raise anything
        raise _NotBuilt(_explain(error)) from error
    if not isinstance(layer, nn.Module):
        raise _NotBuilt(f"it returns {type(layer).__name__}, no torch.nn.Module")
    return layer


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
    """Inside, whatever is raised is said to be of this step."""
    try:
        yield
    except Exception as error:
        raise _Unfit(f"its {name} raised {_explain(error)}") from error


def _explain(error: Exception) -> str:
    """An exception's type, the first line of what it says, and where it was raised."""
    return f"{explain(error)}{_place(error)}"


def _place(error: Exception) -> str:
    """The innermost line of an author's own code, as " (mynorm.py:23, in forward)"; "" where there is none."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and not _is_below(frame.filename, OURS)
    ]
    own = [frame for frame in frames if not _is_below(frame.filename, LIBRARIES)] or frames
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno}, in {own[-1].name})" if own else ""


def _is_below(path: str, directories: list[Path]) -> bool:
    return any(directory in Path(path).parents for directory in directories)


def _try_weight(conv_weight: ConvWeight, conv: nn.Conv2d) -> None:
    _require_same(conv.weight, conv_weight(conv)(conv.weight), "weight")


def _require_same(x: Tensor, y: object, what: str) -> None:
    """Refuse what a layer gives for x, unless it is a finite tensor of the same shape and type."""
    if not isinstance(y, Tensor):
        raise _Unfit(f"its {what} is of type {type(y).__name__}, not a tensor")
    if y.shape != x.shape:
        raise _Unfit(f"it turns the shape {tuple(x.shape)} into {tuple(y.shape)}")
    if y.dtype != x.dtype:
        given, gives = (str(tensor.dtype).removeprefix("torch.") for tensor in (x, y))
        raise _Unfit(f"its {what} is of {gives} where its input is of {given}")
    if not torch.isfinite(y).all():
        raise _Unfit(f"its {what} is not finite on a first batch of standard normal numbers")


def _randn(shape: Shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def check_images(node: dict, height: int, width: int) -> None:
    """Refuse images that a model of gnbench's is too deep for.

    Raises:
        UserError: the model cannot be passed by images of this size.
    """
    if not node["_target_"].startswith("gnbench."):
        return
    model = partial(node)(lambda num_channels: nn.Identity(), 10)
    try:
        with torch.no_grad():  # not on the meta device, where a pass would import torch's compiler, for a second
            model(torch.zeros(1, 3, height, width))
    except RuntimeError as error:
        raise UserError(
            f"model={node['name']} does not take images of {height} x {width}: {first_line(error)}"
        ) from error


def channel_counts(node: dict) -> list[int]:
    """The channel counts on which a model asks for a norm, ascending."""
    return _places(node)[0]


def _places(node: dict) -> tuple[list[int], list[nn.Conv2d]]:
    """The channel counts on which a model asks for a norm, ascending, and a convolution of each shape that it has.

    Raises:
        UserError: the model cannot be built, with whatever norm.
    """
    counts = set()

    def record(num_channels: int) -> nn.Module:
        counts.add(num_channels)
        return nn.Identity()

    try:
        with torch.device("meta"):
            model = partial(node)(record, 10)
    except (TypeError, ValueError) as error:
        raise UserError(f"model={node['name']} cannot be built: {first_line(error)}") from error
    convs = {module.weight.shape: module for module in model.modules() if isinstance(module, nn.Conv2d)}
    return sorted(counts), [
        nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, groups=conv.groups) for conv in convs.values()
    ]


class _Gauge(nn.Module):
    """Stands in a norm's place and keeps the height and width of the first images that it sees on so many channels."""

    def __init__(self, sizes: dict[int, tuple[int, int]]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.setdefault(x.shape[1], tuple(x.shape[2:]))
        return x


def _sizes(node: dict) -> dict[int, tuple[int, int]]:
    """Height and width at a model's first norm of each channel count, for images of MODEL_SIDE; {} if it takes none."""
    sizes = {}
    with torch.no_grad(), contextlib.suppress(Exception):  # a stranger's model may want other images
        partial(node)(lambda num_channels: _Gauge(sizes), 10)(torch.zeros(2, 3, MODEL_SIDE, MODEL_SIDE))
    return sizes
