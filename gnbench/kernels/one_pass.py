"""relu(norm(x) + shortcut) in one pass over the sets of images that share statistics: one_pass.cpp.

It reads a set's maps from memory once, and then from the cache. torch's kernels normalize, add and clip one after the
other, each over the whole batch; and a normalization batch of its own is a view for them only where maps are stored
channel by channel.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gnbench import kernels

WIDE = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}  # maps: parameters
Shape = kernels.shape_of("sets", "images", "positions", "channels", "groups")


def takes(x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None = None) -> bool:
    """Whether the kernel can be used on a map x (N, C, H, W): on a CPU, one thread, stored as (N, H, W, C)."""
    return (
        kernels.serve(x, WIDE)
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.shape[1] % kernels.WIDTH == 0
        and all(_is_of_channels(parameter, x) for parameter in (weight, bias))
        and (shortcut is None or (shortcut.shape, shortcut.dtype) == (x.shape, x.dtype))
    )


def _is_of_channels(parameter: Tensor | None, x: Tensor) -> bool:
    alike = parameter is not None and (parameter.dtype, parameter.device) == (WIDE[x.dtype], x.device)
    return alike and parameter.shape == x.shape[1:2] and parameter.is_contiguous()


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_sets: int,
    num_groups: int,
    eps: float,
    relu: bool = False,
    shortcut: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = relu(gamma * (x - mean) / sqrt(var + eps) + beta + shortcut), and the mean and (biased) var that were taken.

    The images w, w + num_sets, w + 2 num_sets, ... of x (N, C, H, W) are set w. mean and var (num_sets, num_groups) are
    taken over the positions of a set's images and the neighbouring channels of a group; no gradient flows through them.

    Args:
        x: a map that `takes` takes.
        weight, bias: gamma and beta (C,), in float32, or float64 where x is.
        relu: whether the ReLU is applied.
        shortcut: what is added before the ReLU, of the shape and type of x; only with `relu`.
    """
    return _Normalize.apply(x, weight, bias, shortcut, num_sets, num_groups, eps, relu)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shortcut: Tensor | None,
        num_sets: int,
        num_groups: int,
        eps: float,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels, height, width = x.shape[1:]
        shape = Shape(num_sets, len(x) // num_sets, height * width, channels, num_groups)
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        y = torch.empty_like(x)
        mean, var = weight.new_empty(2, num_sets, num_groups).unbind()
        kernels.call("forward", x.dtype, shape, float(eps), relu, x, shortcut, weight, bias, y, mean, var)
        ctx.save_for_backward(x, None if shortcut is None else y, weight, bias, mean, var)
        ctx.arguments = shape, eps, relu, shortcut is not None
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, mean, var = ctx.saved_tensors
        shape, eps, relu, has_shortcut = ctx.arguments
        # whoever saves tensors for backward may bring them back in another format
        dy, x = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (dy, x))
        y = None if y is None else y.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        dshortcut = torch.empty_like(x) if has_shortcut else None
        dweight, dbias = weight.new_zeros(2, len(weight)).unbind()
        results = dx, dshortcut, dweight, dbias
        kernels.call("backward", x.dtype, shape, float(eps), relu, dy, y, x, weight, bias, mean, var, *results)
        return dx, dweight, dbias, dshortcut, None, None, None, None
