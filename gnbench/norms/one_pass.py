"""relu(norm(x) + shortcut) in one pass over the sets of images that share statistics, on a CPU: one_pass.cpp.

It is compiled by the machine's own C++ compiler, and reads a set's maps from memory once, and then from the cache.

torch's kernels normalize, add and clip one after the other, each over the whole batch; and a normalization batch of its
own is a view for them only where maps are stored channel by channel.
"""

import ctypes
import functools
import logging
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
WIDTH = 16  # the largest of one_pass.cpp: the number of channels is a multiple of it
FLAGS = ("-std=c++17", "-O2", "-march=native", "-fno-fast-math", "-Wno-psabi", "-shared", "-fPIC")
TIMEOUT_S = 120.0  # of a compiler that waits for something
WIDE = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}  # maps: parameters


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("sets", "images", "positions", "channels", "groups")]


def is_available() -> bool:
    """Whether the kernel is to be had here: that takes a C++ compiler, and some seconds of it in each process."""
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled source, for this process: code for one machine's CPU is not to be found by another's."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:  # NFS keeps what is mapped
            library = Path(directory) / "one_pass.so"
            # in a session of its own: a Ctrl-C is gnbench's to hear, and no failure of the compiler
            subprocess.run(
                [*compiler, *FLAGS, str(SOURCE), "-o", str(library)],
                check=True, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, start_new_session=True,
            )  # fmt: skip
            return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().partition("\n")[0]
        log.warning("trained by torch's own norms, which are slower; norms in one pass were not to be had: %s", said)
        return None


def takes(x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None = None) -> bool:
    """Whether the kernel can be used on a map x (N, C, H, W): on a CPU, one thread, stored as (N, H, W, C)."""
    return (
        x.device.type == "cpu"
        and x.dtype in WIDE
        and x.ndim == 4
        and x.shape[1] % WIDTH == 0
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and all(_is_of_channels(parameter, x) for parameter in (weight, bias))
        and (shortcut is None or (shortcut.shape, shortcut.dtype) == (x.shape, x.dtype))
        and torch.get_num_threads() == 1
        and is_available()
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
        shape = _Shape(num_sets, len(x) // num_sets, height * width, channels, num_groups)
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        y = torch.empty_like(x)
        mean, var = weight.new_empty(2, num_sets, num_groups).unbind()
        _call("forward", x.dtype, shape, eps, relu, x, shortcut, weight, bias, y, mean, var)
        ctx.save_for_backward(x, None if shortcut is None else y, weight, bias, mean, var)
        ctx.arguments = shape, eps, relu, shortcut is not None
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, mean, var = ctx.saved_tensors
        shape, eps, relu, has_shortcut = ctx.arguments
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        dshortcut = torch.empty_like(x) if has_shortcut else None
        dweight, dbias = weight.new_zeros(2, len(weight)).unbind()
        _call("backward", x.dtype, shape, eps, relu, dy, y, x, weight, bias, mean, var, dx, dshortcut, dweight, dbias)
        return dx, dweight, dbias, dshortcut, None, None, None, None


def _call(name: str, dtype: torch.dtype, shape: _Shape, eps: float, relu: bool, *tensors: Tensor | None) -> None:
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    function = getattr(_library(), f"{name}_{str(dtype).removeprefix('torch.')}")
    function(ctypes.byref(shape), ctypes.c_double(eps), ctypes.c_bool(relu), *pointers)
