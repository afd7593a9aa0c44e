"""What all tests share: one thread, a tiny data set, and the commands as real processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and its commands would
ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def gnbench(tmp_path):
    """Run `gnbench` with words as its arguments, from an empty directory; the tiny data set is `data=tiny`."""

    def run(*words: str, env: dict | None = None, **kwargs) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "gnbench", "--config-dir", str(TESTS / "configs"), *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment(env), capture_output=True, text=True, timeout=240, **kwargs
        )

    return run


def environment(more: dict | None = None) -> dict:
    """The environment of a command: gnbench, and the tests' own modules, can be imported from any directory."""
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""}  # what a test compares bit for bit is trained on a CPU
    usual = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}  # as a user's shell has it
    return {**usual, **no_gpu, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", **(more or {})}


SHORT = ("model=resnet8", "norm=bn", "batch_size=8", "epochs=2", "num_threads=1")


def tiny_config(*words: str) -> dict:
    """The resolved config of a short run on the tiny data set."""
    return compose_config(*SHORT, *words)


def compose_config(*words: str) -> dict:
    """The resolved config of `words` on the tiny data set, composed as the command line composes it."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    import gnbench.cli  # noqa: F401  registers the schema
    from gnbench.configs import CONFIGS

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", [f"hydra.searchpath=[file://{TESTS}/configs]", "data=tiny", "device=cpu", *words])
    return OmegaConf.to_container(cfg, resolve=True)
