"""Norms and models by name, for notebooks, and the check that a model takes a norm."""

import torch
from torch import nn

from gnbench.configs import load_group, partial
from gnbench.errors import UserError
from gnbench.models import NormFactory, initialize


def norm(name: str, **params: object) -> NormFactory:
    """A norm of configs/norm as a function `num_channels -> Module`.

    >>> import gnbench
    >>> gnbench.norm("gn", num_groups=4)(16)
    GroupNorm(4, 16, eps=1e-05, affine=True)

    Args:
        name: bn, gn, ln, in, none, ...: the name of a file in configs/norm.
        params: that file's keys; for bn also norm_batch_size, by default the whole batch.

    Raises:
        UserError: the name or a parameter is not known.
    """
    return partial(load_group("norm", name, params, context={"norm_batch_size": None}))


def model(
    name: str, norm: NormFactory | str = "gn", num_classes: int = 10, seed: int = 0, **params: object
) -> nn.Module:
    """A model of configs/model with `norm` in every place of a norm, its weights drawn from `seed`.

    Args:
        name: resnet20, resnet50, ...: the name of a file in configs/model.
        norm: a function num_channels -> Module, or the name of a norm.
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
    """The model of a resolved config node, initialized from `seed`: the same weights whatever the norm."""
    model = partial(node)(norm, num_classes)
    initialize(model, seed)
    return model


def check_norm(node: dict, norm: NormFactory, label: str) -> None:
    """Refuse a norm that cannot be built on every channel count of a model.

    Raises:
        UserError: names the channel counts on which it fails, and why.
    """
    reasons = {}
    for num_channels in channel_counts(node):
        try:
            _try_norm(norm, num_channels)
        except Exception as error:  # a stranger's layer may raise anything
            reasons[num_channels] = str(error).splitlines()[0] if str(error) else type(error).__name__
    if reasons:
        failing, all_counts = (", ".join(map(str, counts)) for counts in (reasons, channel_counts(node)))
        raise UserError(
            f"{label} cannot be built on {failing} channels (model={node['name']} has norms on {all_counts}): "
            f"{next(iter(reasons.values()))}"
        )


def _try_norm(norm: NormFactory, num_channels: int) -> None:
    """Build a norm and pass one small batch through it in training mode."""
    x = torch.randn(4, num_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    y = norm(num_channels).train()(x)
    if y.shape != x.shape:
        raise ValueError(f"it turns the shape {tuple(x.shape)} into {tuple(y.shape)}")
    if not torch.isfinite(y).all():
        raise ValueError("its output is not finite on a first batch of standard normal numbers")


def channel_counts(node: dict) -> list[int]:
    """The channel counts on which a model asks for a norm, ascending."""
    counts = set()

    def record(num_channels: int) -> nn.Module:
        counts.add(num_channels)
        return nn.Identity()

    with torch.device("meta"):
        partial(node)(record, 10)
    return sorted(counts)
