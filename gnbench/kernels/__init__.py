"""Parts of a training step in C++, for one thread of a CPU, on maps stored as (N, H, W, C).

They are compiled by the machine's own C++ compiler, for its CPU. An engine says where they are used; without a
compiler torch's own kernels do the same, more slowly.
"""

import ctypes
import functools
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gnbench.errors import first_line

log = logging.getLogger(__name__)

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
WIDTH = 16  # the largest of vectors.h: numbers of channels are multiples of it
FLAGS = ("-std=c++17", "-O2", "-march=native", "-fno-fast-math", "-Wno-psabi", "-shared", "-fPIC")
TIMEOUT_S = 120.0  # of a compiler that waits for something


def are_available() -> bool:
    """Whether the kernels are to be had here: that takes a C++ compiler, and some seconds of it in each process."""
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled sources, for this process: code for one machine's CPU is not to be found by another's."""
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:  # NFS keeps what is mapped
            library = Path(directory) / "kernels.so"
            # in a session of its own: a Ctrl-C is gnbench's to hear, and no failure of the compiler
            subprocess.run(
                [*compiler, *FLAGS, *map(str, SOURCES), "-o", str(library)],
                check=True, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, start_new_session=True,
                env={**os.environ, "TMPDIR": directory},
            )  # fmt: skip
            return ctypes.CDLL(str(library))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        cause = _find_cause(error)
        log.warning("trained by torch's own kernels, which are slower; gnbench's were not to be had: %s", cause)
        return None


def _find_cause(error: Exception) -> str:
    """Why there is no library, in one line: the first of the compiler's that says error, if it has said anything."""
    if not isinstance(error, subprocess.CalledProcessError):
        return first_line(error)
    lines = error.stderr.strip().splitlines() or [f"{error.cmd[0]} ended with status {error.returncode}"]
    return next((line for line in lines if "error" in line), lines[0])


def call(name: str, dtype: torch.dtype, shape: ctypes.Structure, *arguments: Tensor | float | bool | None) -> None:
    """Call a kernel: `name` for maps of type `dtype`, with a shape, then tensors by their addresses, and numbers."""
    function = getattr(_library(), f"{name}_{str(dtype).removeprefix('torch.')}")
    function(ctypes.byref(shape), *(_to_c(argument) for argument in arguments))


def _to_c(argument: Tensor | float | bool | None) -> ctypes.c_void_p | ctypes.c_double | ctypes.c_bool:
    if isinstance(argument, bool):
        return ctypes.c_bool(argument)
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def shape_of(*names: str) -> type[ctypes.Structure]:
    """The type of a kernel's shape: whole numbers in the order of the C++ struct of it."""
    return type("Shape", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_int64) for name in names]})


def serve(x: Tensor, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether kernels for these types can be used on x: a map (N, C, H, W) on a CPU, by one thread."""
    return (
        type(x) in (Tensor, nn.Parameter)  # others may have no memory
        and x.device.type == "cpu"
        and x.dtype in dtypes
        and x.ndim == 4
        and x.numel() > 0
        and torch.get_num_threads() == 1
        and are_available()
    )
