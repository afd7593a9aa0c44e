"""The machine that a run is executed on: its cores, devices and memory, how it computes, and what a record says of it.

torch is imported where it is needed: how many cores there are is asked without it.
"""

import ctypes
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import gnbench
from gnbench.errors import UserError, first_line, require
from gnbench.workers import choose_own_gpu

if TYPE_CHECKING:
    import torch


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(name: str, precision: str) -> "torch.device":
    """The torch device of `device` and `precision`; auto is a GPU where there is one.

    Raises:
        UserError: there is no such device here, or not one for each worker, or the precision is not for it.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = choose_own_gpu(name, torch.cuda.device_count())
    try:
        device = torch.device(name)
        if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
            torch.empty(0, device=device)  # not on a GPU that is there, where a sweep's launcher would keep a context
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device={name} is not to be had here: {first_line(error)}") from error
    require(device.type in ("cpu", "cuda"), "device", name, "it is auto, cpu, cuda, cuda:1, ...")
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"precision=tf32 is not legal on device={name}: it is float32 or bf16 there")
    return device


def set_arithmetic(config: dict) -> None:
    """Threads, memory, matrix products and the choice of algorithms, for the whole process."""
    import torch

    torch.set_num_threads(config["num_threads"])
    keep_freed_memory()
    torch.set_float32_matmul_precision("high" if config["precision"] == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = config["precision"] == "tf32"
    deterministic = bool(config.get("deterministic"))
    if deterministic:  # cuBLAS reads it when it starts; without it torch refuses its matrix products
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def autocast(device: "torch.device", precision: str) -> "torch.autocast":
    """A context in which bf16 is mixed precision: matrix products and convolutions in bfloat16, on any device."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one: it gives large blocks back to the system otherwise."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        if libc.mallopt(mmap_threshold, 2**30):  # 0 where that is more than it takes
            libc.mallopt(trim_threshold, 2**31 - 1)


def peak_memory_mb(device: "torch.device") -> float | None:
    """Largest memory so far in MiB: of the device where it is a GPU, of the process elsewhere; None where unknown."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def describe_environment(config: dict, device: "torch.device") -> dict:
    """What a record's `environment` says of the machine and its software, but for the engine.

    Args:
        config: of the run.
        device: on which it is trained.
    """
    import torch

    return {
        "gnbench": gnbench.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _find_version("torchvision"),  # most runs need no more of it
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": name_processor(),
        "cores": num_cores(),
        "num_threads": config["num_threads"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _find_version(package: str) -> str | None:
    """A package's version, without an import of it; None where it was not installed as one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def name_processor() -> str:
    """The processor's model, as its maker calls it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
