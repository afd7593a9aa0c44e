"""One run by two processes that torchrun starts: the numbers, record and identity of the same run in one process."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHORT, TESTS, environment, tiny_config
from torch import nn

import gnbench.run as run_module
from gnbench.checkpoint import CURRENT, load_checkpoints
from gnbench.engine import check_engine
from gnbench.errors import UserError
from gnbench.machine import choose_device
from gnbench.plan import Run, plan_run
from gnbench.record import RECORD, load_record
from gnbench.run import Interrupted, execute
from gnbench.torchrun import check_workers
from gnbench.workers import choose_own_gpu, count_workers

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
GNBENCH = (*TORCHRUN, "-m", "gnbench", "--config-dir", str(TESTS / "configs"))
TINY = ("data=tiny", *SHORT, "results=out")
ODD = ("norm_batch_size=2", "data.train_size=93", "drop_last=false")  # an epoch's last batch has 5 images
MABN = {"norm_batch_size": 2, "warmup_steps": 1, "renorm_steps": 4, "simulated_batch_size": 4}
STEPS = {  # norm, training images, its parameters, the recipe; a batch has 12 images, and each worker 6 of them
    "a normalization batch a worker": ("bn", 36, {"norm_batch_size": 6}, {}),
    "several a worker": ("bn", 36, {"norm_batch_size": 3}, {"frozen_epochs": 29}),
    "one over both workers": ("bn", 36, {"norm_batch_size": 12}, {}),
    "each of three over both": ("bn", 36, {"norm_batch_size": 4}, {}),
    "a last batch of 11": ("bn", 35, {"norm_batch_size": 6}, {}),
    "a last batch of 9 in threes": ("bn", 33, {"norm_batch_size": 3}, {}),
    "synchronized": ("syncbn", 31, {}, {}),
    "with the weights' own norm": ("bn_ws", 35, {"norm_batch_size": 6}, {}),
    "inside another norm": ("bcn", 35, {"norm_batch_size": 3}, {}),
    "images by themselves": ("gn", 31, {}, {}),
    "Batch Renorm": ("brn", 36, {"norm_batch_size": 6}, {}),
    "MABN in all its phases": ("mabn", 36, MABN, {}),
    "Switchable": ("switchable", 36, {"norm_batch_size": 3}, {}),
    "EvoNorm-B0": ("evonorm_b0", 36, {"norm_batch_size": 6}, {}),
    "estimates": ("bcn_ws", 36, {"norm_batch_size": 2}, {}),
    "Batch Group": ("batch_group", 36, {"norm_batch_size": 6}, {}),
}


class Foreign(nn.BatchNorm2d):
    """A norm of the batch that has its own way of dealing it out, or none."""

    def __init__(self, num_channels: int, norm_batch_size: int) -> None:
        super().__init__(num_channels)


def torchrun(directory: Path, *words: str, env: dict | None = None) -> subprocess.CompletedProcess:
    options = [word for word in words if word.startswith("-")]
    command = [*GNBENCH, *options, *TINY, *(word for word in words if word not in options)]
    return subprocess.run(command, cwd=directory, env=environment(env), capture_output=True, text=True, timeout=240)


def sentences(ended: subprocess.CompletedProcess) -> list[str]:
    """What gnbench itself says on standard error, beside torchrun's report of its processes."""
    return [line for line in ended.stderr.splitlines() if line.startswith("gnbench: ")]


def plan(directory: Path, *words: str) -> Run:
    return plan_run(tiny_config(f"results={directory / 'out'}", *words), default_threads=1)


def assert_same_run(run: Run, whole: Run) -> None:
    """Compare the records of a run that workers had part in and of one that they had not."""
    ours, expected = (load_record(each.directory / RECORD) for each in (run, whole))
    for key in ("digest", "run", "status", "cause", "num_parameters", "data_fingerprint"):
        assert ours[key] == expected[key], key
    rows = [(ours["result"], expected["result"]), *zip(ours["history"], expected["history"], strict=True)]
    for row, other in rows:
        assert row.keys() == other.keys()
        for key in row.keys() - {"time_s", "peak_memory_mb"}:
            expected_value = other[key] if other[key] is None else pytest.approx(other[key], rel=1e-4)
            assert row[key] == expected_value, key


def test_steps_of_two_workers_are_those_of_one_process():
    command = [*TORCHRUN, str(TESTS / "steps_of_workers.py"), json.dumps(list(STEPS.values()))]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    *differences, diverged = json.loads(ended.stdout)
    assert {case: d for case, d in zip(STEPS, differences, strict=True) if not d < 1e-10} == {}
    assert diverged


def test_a_run_by_two_workers_has_the_record_and_the_identity_of_one_by_one_process(tmp_path):
    run = plan(tmp_path, *ODD)
    ended = torchrun(tmp_path, "-m", *ODD)  # a sweep of one
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("test error") == 1, "the first worker alone speaks"
    assert sorted(path.name for path in run.directory.iterdir()) == [".lock", "record.json", "run.log"]
    assert load_record(run.directory / RECORD)["environment"]["engine"] == "2 workers"
    whole = replace(run, directory=tmp_path / "whole" / run.name)
    execute(whole)
    assert_same_run(run, whole)


def test_one_process_and_two_workers_go_on_from_each_others_checkpoints(tmp_path, monkeypatch):
    run = plan(tmp_path, "norm=syncbn", "checkpoint_s=1e-9")
    monkeypatch.setattr(run_module, "crash_at", lambda point: point == "epoch" and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        execute(run)
    monkeypatch.undo()
    killed = torchrun(tmp_path, "norm=syncbn", "checkpoint_s=1e-9", env={"GNBENCH_CRASH_AT": "step:6"})
    assert killed.returncode == 1
    assert sentences(killed) == [], "the first worker died, and the other leaves it to torchrun to say so"
    execute(run)
    log = (run.directory / "run.log").read_text()
    assert "goes on from step 12 of 24" in log
    assert "goes on from step 17 of 24" in log
    whole = replace(run, directory=tmp_path / "whole" / run.name)
    execute(whole)
    assert_same_run(run, whole)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_a_worker_that_is_stopped_stops_all_and_one_that_dies_ends_the_run(tmp_path):
    words = ("epochs=1000", "checkpoint_s=0.2")
    run = plan(tmp_path, *words)

    def strike(number: int) -> str:
        """Send the second worker a signal once there is a checkpoint; what torchrun and the workers say."""
        checkpoint = run.directory / CURRENT
        before = checkpoint.stat().st_mtime if checkpoint.exists() else 0
        command = [*GNBENCH, *TINY, *words]
        with subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) as process:
            while not checkpoint.exists() or checkpoint.stat().st_mtime == before:
                assert process.poll() is None
                time.sleep(0.05)
            os.kill(find_worker(process.pid, "1"), number)
            _, said = process.communicate(timeout=120)
        assert process.returncode == 1
        return said

    assert strike(signal.SIGTERM).count("gnbench: ") == 1
    record = load_record(run.directory / RECORD)
    assert (record["status"], record["cause"]) == ("interrupted", "stopped by SIGTERM")
    (newest, *_) = load_checkpoints(run.directory)
    strike(signal.SIGKILL)
    assert f"goes on from step {newest['progress']['step']} " in (run.directory / "run.log").read_text()
    record = load_record(run.directory / RECORD)
    assert record["status"] in ("failed", "running"), "torchrun may have ended the first worker before it could write"
    assert record["cause"] in ("WorkerLost: another of the 2 workers has ended, or cannot be reached", None)


def find_worker(torchrun_pid: int, rank: str) -> int:
    children = (Path("/proc") / str(torchrun_pid) / "task").glob("*/children")
    pids = [int(pid) for path in children for pid in path.read_text().split()]
    variables = {pid: (Path("/proc") / str(pid) / "environ").read_text().split("\0") for pid in pids}
    return next(pid for pid in pids if f"RANK={rank}" in variables[pid])


def test_a_refusal_is_said_once_and_nothing_is_trained(tmp_path):
    refused = torchrun(tmp_path, "-m", "seed=0,1")
    assert refused.returncode == 1, "torchrun's own"
    assert sentences(refused) == [
        "gnbench: torchrun trains one run and this is a sweep of 2: give each key one value",
    ]
    assert not (tmp_path / "out").exists()


@pytest.fixture
def two_workers(monkeypatch):
    """This process as torchrun would have started the second of two."""
    variables = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["measure=cost"], "measure=cost is not legal for 2 workers: one process measures"),
        (["batch_size=9"], "batch_size=9 is not legal for 2 workers: it is a multiple of 2"),
        (["data.train_size=81", "drop_last=false"], "an epoch's last batch has 1 image,"),
        (["norm=brn"], "norm=brn cannot be trained by 2 workers: 8 of 8 images share statistics"),
        (["norm=brn", *ODD], "norm=brn cannot be trained by 2 workers: 5 of 5 images share statistics"),
        (
            ["norm=custom", "norm._target_=test_distributed.Foreign", "+norm.norm_batch_size=${norm_batch_size}"],
            "norm=Foreign cannot be trained by 2 workers: it is of the batch",
        ),
    ],
)
def test_a_run_that_workers_cannot_share_is_refused(tmp_path, two_workers, words, sentence):
    with pytest.raises(UserError, match=sentence):
        check_workers(plan(tmp_path, *words))


@pytest.mark.parametrize("words", [["norm=gn"], ["norm=syncbn", *ODD], ["norm=brn", "norm_batch_size=4"], ODD])
def test_a_run_that_workers_can_share_is_not_refused(tmp_path, two_workers, words):
    check_workers(plan(tmp_path, *words))


def test_each_worker_has_a_gpu_of_its_own(two_workers):
    assert choose_own_gpu("cuda", num_gpus=2) == "cuda:1"
    assert choose_own_gpu("cpu", num_gpus=0) == "cpu"
    with pytest.raises(UserError, match="device=cuda:0 is not legal for 2 workers"):
        choose_own_gpu("cuda:0", num_gpus=2)
    with pytest.raises(UserError, match="2 workers on this machine need a GPU each and it has 1"):
        choose_own_gpu("cuda", num_gpus=1)
    assert choose_device("cpu", "float32").type == "cpu"


def test_a_graph_is_not_for_several_workers(two_workers):
    with pytest.raises(UserError, match="engine=cuda_graph is not legal for several workers"):
        check_engine("cuda_graph", torch.device("cuda"))


def test_variables_of_a_batch_system_make_no_worker(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert count_workers() == 1
    assert choose_own_gpu("cuda:0", num_gpus=2) == "cuda:0"
