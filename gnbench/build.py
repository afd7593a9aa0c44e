"""Norms and models by name, for notebooks, and the check that a model takes a norm."""

import copy
import functools

import torch
from torch import Tensor, nn

from gnbench.configs import first_line, load_group, partial
from gnbench.errors import UserError
from gnbench.models import (
    ConvWeight,
    NormFactory,
    brings_activation,
    initialize,
    norm_and_activation,
    parametrize_weights,
)
from gnbench.precise_bn import update_precise_statistics


def norm(name: str, weight: ConvWeight | None = None, **params: object) -> NormFactory:
    """A norm of configs/norm as a function `num_channels -> Module`.

    >>> import gnbench
    >>> gnbench.norm("gn", num_groups=4)(16)
    GroupNorm(4, 16, eps=1e-05, affine=True)

    Args:
        name: bn, gn, ln, in, none, ...: the name of a file in configs/norm.
        weight: a function conv -> Module, through which the model's convolutions see their weights; by default the
            norm's own, if it has one, as gn_ws does.
        params: that file's keys; for norms of the batch also norm_batch_size, by default the whole batch.

    Raises:
        UserError: the name or a parameter is not known.
    """
    layer = partial(load_group("norm", name, params, context={"norm_batch_size": None}))
    if weight is not None:
        layer.conv_weight = weight
    return layer


def model(
    name: str, norm: NormFactory | str = "gn", num_classes: int = 10, seed: int = 0, **params: object
) -> nn.Module:
    """A model of configs/model with `norm` in every place of a norm, its weights drawn from `seed`.

    Args:
        name: resnet20, resnet50, ...: the name of a file in configs/model.
        norm: a function num_channels -> Module, or the name of a norm. One with the argument `apply_act` brings the
            activation after it; its attribute `conv_weight`, if it has one, acts on the convolutions' weights.
        params: the model file's keys.

    Raises:
        UserError: a name or a parameter is not known, or the norm cannot be built on the model's channels.
    """
    node = load_group("model", name, params, context={})
    if isinstance(norm, str):
        norm = partial(load_group("norm", norm, {}, context={"norm_batch_size": None}))
    check_norm(node, norm, label="norm")
    return build_model(node, norm, num_classes, seed)


def build_model(node: dict, norm: NormFactory, num_classes: int, seed: int) -> nn.Module:
    """The model of a resolved config node, initialized from `seed`: the same weights whatever the norm.

    Its attribute `norm_places` holds the names of the modules that stand where it asked for a norm.
    """
    layers = []

    @functools.wraps(norm, updated=())  # the model sees the norm's own signature
    def keep(num_channels: int, **options: object) -> nn.Module:
        layers.append(norm(num_channels, **options))
        return layers[-1]

    model = partial(node)(keep, num_classes)
    initialize(model, seed, layers)
    if getattr(norm, "conv_weight", None) is not None:
        parametrize_weights(model, norm.conv_weight, layers)
    placed = {id(layer) for layer in layers}
    model.norm_places = [name for name, module in model.named_modules() if id(module) in placed]
    return model


def check_norm(node: dict, norm: NormFactory, label: str) -> None:
    """Refuse a norm that cannot be built on every channel count of a model, or that does not behave as a layer.

    Raises:
        UserError: names the channel counts, or the convolution, on which it fails, and why.
    """
    counts, convs = _places(node)
    reasons = {}
    for num_channels in counts:
        try:
            _try_norm(norm, num_channels)
        except Exception as error:  # a stranger's layer may raise anything
            reasons[num_channels] = first_line(error)
    if reasons:
        failing, all_counts = (", ".join(map(str, numbers)) for numbers in (reasons, counts))
        raise UserError(
            f"{label} cannot be built on {failing} channels (model={node['name']} has norms on {all_counts}): "
            f"{next(iter(reasons.values()))}"
        )
    for conv in convs if getattr(norm, "conv_weight", None) is not None else ():
        try:
            _try_weight(norm.conv_weight, conv)
        except Exception as error:
            raise UserError(
                f"{label} cannot act on the weights of model={node['name']}, of shape {tuple(conv.weight.shape)}: "
                f"{first_line(error)}"
            ) from error


def depends_on_batch(norm: NormFactory, num_channels: int = 16) -> bool:
    """Whether in training an image's output changes with the images beside it. Random layers do not count."""
    layer = norm_and_activation(norm, num_channels)[0].train()
    x = 3 * _first_batch(num_channels) + 5  # far from the running statistics with which a layer starts
    whole, again, half = (copy.deepcopy(layer)(images)[:2] for images in (x, x, x[:2]))
    return torch.equal(whole, again) and not torch.allclose(whole, half, rtol=1e-3, atol=1e-4)


@torch.enable_grad()
def _try_norm(norm: NormFactory, num_channels: int) -> None:
    """Build a norm wherever a model may ask for one; pass one batch through it, forth and back, and in evaluation."""
    for options in ({"apply_act": True}, {"apply_act": False}) if brings_activation(norm) else ({},):
        x = _first_batch(num_channels).requires_grad_()
        layer = norm(num_channels, **options)
        if not isinstance(layer, nn.Module):
            raise TypeError(f"it returns {type(layer).__name__}, no torch.nn.Module")
        y = layer.train()(x)
        _require_same(x, y, "output")
        y.square().sum().backward()
        _require_same(x, x.grad, "gradient")
        with torch.no_grad():
            _require_same(x, norm(num_channels, **options).eval()(x), "output in evaluation")
        update_precise_statistics(norm(num_channels, **options), [x])


def _try_weight(conv_weight: ConvWeight, conv: nn.Conv2d) -> None:
    _require_same(conv.weight, conv_weight(conv)(conv.weight), "weight")


def _require_same(x: Tensor, y: object, what: str) -> None:
    """Refuse what a layer gives for x, unless it is a finite tensor of the same shape."""
    if not isinstance(y, Tensor):
        raise TypeError(f"its {what} is of type {type(y).__name__}, not a tensor")
    if y.shape != x.shape:
        raise ValueError(f"it turns the shape {tuple(x.shape)} into {tuple(y.shape)}")
    if not torch.isfinite(y).all():
        raise ValueError(f"its {what} is not finite on a first batch of standard normal numbers")


def _first_batch(num_channels: int) -> Tensor:
    return torch.randn(4, num_channels, 4, 4, generator=torch.Generator().manual_seed(0))


def channel_counts(node: dict) -> list[int]:
    """The channel counts on which a model asks for a norm, ascending."""
    return _places(node)[0]


def _places(node: dict) -> tuple[list[int], list[nn.Conv2d]]:
    """The channel counts on which a model asks for a norm, ascending, and a convolution of each shape that it has."""
    counts = set()

    def record(num_channels: int) -> nn.Module:
        counts.add(num_channels)
        return nn.Identity()

    with torch.device("meta"):
        model = partial(node)(record, 10)
    convs = {module.weight.shape: module for module in model.modules() if isinstance(module, nn.Conv2d)}
    return sorted(counts), [
        nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, groups=conv.groups) for conv in convs.values()
    ]
