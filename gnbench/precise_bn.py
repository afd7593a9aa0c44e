"""Which statistics a batch-dependent norm uses once it is trained: running averages are only one choice.

A layer belongs here if it keeps buffers named `running_...`, whatever its class. The population's values are written
to `running_mean` and `running_var`, where it has them, of (C,) or as many elements; a layer whose statistics are others
takes them by a method `set_statistics(mean, square)`, the population's mean of x and of x^2 for each channel (C,).
Its attribute `norm_batch_size`, where it has one, is None while the population's are measured: the whole batch.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def layers_with_statistics(model: nn.Module) -> list[nn.Module]:
    """The layers that keep running statistics, in the order of the model."""
    return [layer for layer in model.modules() if _keeps_statistics(layer)]


def set_train_mode(model: nn.Module, frozen: bool) -> None:
    """Training mode, but for layers with running statistics where `frozen` says that those stay as they are."""
    model.train()
    for layer in layers_with_statistics(model) if frozen else ():
        layer.eval()


@torch.no_grad()
def update_precise_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace running statistics by those of the population, with fixed weights (arXiv:2105.07576, section 3).

    Each batch of images (N, C, H, W) passes in training mode, normalized over the whole of itself, whatever the
    layer's norm_batch_size. The moments of each layer's input are pooled over all positions of all batches:
    mean = sum(x) / n, var = sum(x^2) / n - mean^2, as fvcore's `update_bn_stats` estimates the population variance.
    """
    layers = layers_with_statistics(model)
    moments: list[list[Tensor]] = [[] for _ in layers]  # count, sum and sum of squares, once a batch has passed
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, own=own: _add_moments(own, inputs[0]))
        for layer, own in zip(layers, moments, strict=True)
    ]
    try:
        with batch_statistics(model), _whole_batches(layers):
            for images in batches:
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, own in zip(layers, moments, strict=True):
        if own:  # else the model does not use it
            count, first, second = own
            _set_statistics(layer, first / count, second / count)


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, layers normalize with the statistics of the batch at hand; their running ones are left as they were.

    A layer that mixes the two in training, as Batch Renorm does, is told by its attribute `batch_only`.
    """
    layers = layers_with_statistics(model)
    modes = [layer.training for layer in layers]
    kept = [{name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers]
    try:
        for layer in layers:
            layer.train()
            layer.batch_only = True
        yield
    finally:
        for layer, mode, buffers in zip(layers, modes, kept, strict=True):
            layer.train(mode)
            layer.batch_only = False
            for name, buffer in layer.named_buffers():
                buffer.copy_(buffers[name])


@contextlib.contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Running statistics, and whatever else is a buffer, may change inside; afterwards they are what they were."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, before in kept:
            setattr(module, name, buffer.copy_(before))  # a layer may put another tensor into its place


@contextlib.contextmanager
def _whole_batches(layers: list[nn.Module]) -> Iterator[None]:
    split = [layer for layer in layers if getattr(layer, "norm_batch_size", None) is not None]
    sizes = [layer.norm_batch_size for layer in split]
    try:
        for layer in split:
            layer.norm_batch_size = None
        yield
    finally:
        for layer, size in zip(split, sizes, strict=True):
            layer.norm_batch_size = size


def _keeps_statistics(layer: nn.Module) -> bool:
    return any(name.startswith("running_") for name, _ in layer.named_buffers(recurse=False))


def _add_moments(moments: list[Tensor], x: Tensor) -> None:
    """Add count, sum and sum of squares of each channel of x (N, C, H, W) to `moments`."""
    x = x.double()
    newest = [
        torch.full((x.shape[1],), x.numel() // x.shape[1], dtype=x.dtype, device=x.device),
        x.sum((0, 2, 3)),
        x.square().sum((0, 2, 3)),
    ]
    moments[:] = [old + new for old, new in zip(moments, newest, strict=True)] if moments else newest


def _set_statistics(layer: nn.Module, mean: Tensor, square: Tensor) -> None:
    if hasattr(layer, "set_statistics"):
        layer.set_statistics(mean, square)
        return
    for name, value in (("running_mean", mean), ("running_var", square - mean.square())):
        running = getattr(layer, name, None)
        if running is not None:
            running.copy_(value.view_as(running))
