"""Convolutions by 3 x 3 with 16 multiplications where there are 36 otherwise: winograd.cpp.

Winograd's minimal filtering F(2 x 2, 3 x 3) (arXiv:1509.09308). torch's CPU kernels multiply as often as the formula of
a convolution says, and do so at the rate of matrix products: only with fewer multiplications is there more to be had.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gnbench import kernels

DTYPES = (torch.float32, torch.float64)  # in bf16 the sums of inputs and of weights would lose digits
Shape = kernels.shape_of("lanes", "images", "height", "width", "inputs", "outputs")


def suits(conv: nn.Conv2d) -> bool:
    """Whether a convolution is by 3 x 3, of stride 1 and padding 1, without bias, its channels multiples of WIDTH."""
    sizes = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    is_plain = sizes == ((3, 3), (1, 1), (1, 1), (1, 1)) and conv.padding_mode == "zeros" and conv.bias is None
    lane = conv.groups * kernels.WIDTH  # channels of all groups, WIDTH of each
    return is_plain and conv.in_channels % lane == 0 and conv.out_channels % lane == 0


def takes(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can be used on a map x (N, C, H, W): on a CPU, by one thread."""
    alike = (weight.dtype, weight.device) == (x.dtype, x.device) and x.shape[1:2] == (conv.in_channels,)
    alike = alike and weight.shape == (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
    return alike and suits(conv) and kernels.serve(x, DTYPES) and not torch.is_autocast_enabled("cpu")


def convolve(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """torch.nn.functional.conv2d(x, weight, padding=1, groups=groups), to rounding; the output is channels_last.

    It is differentiable once. Near numbers that are not finite, or above a quarter of what their type holds, y is not
    finite.

    Args:
        x: a map (N, C, H, W) that `takes` takes.
        weight: (O, C / groups, 3, 3).
    """
    return _Convolve.apply(x, weight, groups)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        x, weight = _lay_out(x, weight)
        shape = Shape(groups, len(x), *x.shape[2:], weight.shape[1], len(weight) // groups)
        sizes = len(x), len(weight), *x.shape[2:]
        y = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        kernels.call("convolve", x.dtype, shape, x, weight, y)
        ctx.shape = shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, dy = _lay_out(*ctx.saved_tensors, dy)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            kernels.call("input_gradient", x.dtype, ctx.shape, dy, weight, dx)
        if ctx.needs_input_grad[1]:
            dweight = torch.empty_like(weight)
            kernels.call("weight_gradient", x.dtype, ctx.shape, x, dy, dweight)
        return dx, dweight, None


def _lay_out(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as the kernel reads them; whoever saves them for backward may bring them back in another format."""
    return tuple(tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors)
