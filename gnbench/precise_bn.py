"""Which statistics a batch-dependent norm uses once it is trained: running averages are only one choice.

A layer belongs here if it keeps `running_mean` and `running_var`, whatever its class.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def layers_with_statistics(model: nn.Module) -> list[nn.Module]:
    """The layers that keep running statistics, in the order of the model."""
    return [layer for layer in model.modules() if isinstance(getattr(layer, "running_mean", None), Tensor)]


@torch.no_grad()
def update_precise_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace running statistics by those of the population, with fixed weights (arXiv:2105.07576, section 3).

    Each batch of images (N, C, H, W) passes in training mode, normalized over the whole of itself, whatever the
    layer's norm_batch_size. The moments of each layer's input are pooled over all positions of all batches:
    mean = sum(x) / n, var = sum(x^2) / n - mean^2, as fvcore's `update_bn_stats` estimates the population variance.
    """
    layers = layers_with_statistics(model)
    sums = [torch.zeros(3, layer.running_mean.numel(), dtype=torch.float64, device=layer.running_mean.device)
            for layer in layers]  # fmt: skip
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, total=total: _add_moments(total, inputs[0]))
        for layer, total in zip(layers, sums, strict=True)
    ]
    try:
        with batch_statistics(model), _whole_batches(layers):
            for images in batches:
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, (count, first, second) in zip(layers, sums, strict=True):
        mean = first / count
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(second / count - mean.square())


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
    """Running statistics may change inside; afterwards they are what they were."""
    kept = [(buffer, buffer.clone()) for layer in layers_with_statistics(model) for buffer in layer.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


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


def _add_moments(total: Tensor, x: Tensor) -> None:
    """Add (count, sum, sum of squares) of each channel of x (N, C, H, W) to `total` (3, C)."""
    x = x.double()
    total[0] += x.numel() // x.shape[1]
    total[1] += x.sum((0, 2, 3))
    total[2] += x.square().sum((0, 2, 3))
