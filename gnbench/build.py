"""Norms and models by name, for notebooks, and a model from its config."""

import functools

from torch import nn

from gnbench.configs import load_group, partial
from gnbench.models import ConvWeight, NormFactory, initialize, parametrize_weights
from gnbench.trial import check_norm


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
        UserError: a name or a parameter is not known, the model cannot be built with it, or the norm not on the model's
            channels.
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
