"""Sweeps through other engines: submitit on a Slurm of processes, submitit and joblib on one machine."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_slurm
import pytest
from conftest import ROOT, TESTS, compose_config, environment
from crashes import outcome
from hydra.core.utils import JobStatus
from test_cli import records, start, wait_for

from gnbench.errors import UserError
from gnbench.plan import plan_run
from gnbench.record import LOG, RECORD, load_record, save_record
from gnbench.run import check_runs, execute
from hydra_plugins.gnbench import slurm
from hydra_plugins.gnbench.slurm import Slurm, SlurmConf, Task

submitit = pytest.importorskip("submitit")

EPOCHS = 24  # long enough that a run is still under way when another has begun
WORDS = (
    "model=resnet8",
    "norm=bn",
    "batch_size=8",
    f"epochs={EPOCHS}",
    "num_threads=1",
    "engine=eager",
    "checkpoint_s=1000",
)
SWEEP = ("-m", "data=tiny", *WORDS, "results=out")
CPU = ("hydra.launcher.gpus_per_node=0", "hydra.launcher.cpus_per_task=2")
OPTIONS = {
    key: value for key, value in vars(SlurmConf(additional_parameters={"constraint": "a100"})).items() if key[0] != "_"
}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Slurm of this machine's processes; returns the directory of its state."""
    directory = tmp_path / "slurm"
    directory.mkdir()
    for key, value in fake_slurm.install(directory).items():
        monkeypatch.setenv(key, value)
    yield directory / "state"
    fake_slurm.stop(directory)
    assert not (directory / "state/errors").exists() or not (directory / "state/errors").read_text()


def plan(directory, *words):
    return plan_run({**compose_config(*WORDS, *words), "results": str(directory)}, default_threads=1)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """What runs of three seeds say when nothing stops them and no launcher starts them, by their digests."""
    runs = [plan(tmp_path_factory.mktemp("wholes"), f"seed={seed}") for seed in range(3)]
    for run in runs:
        execute(run)
    return {run.digest: outcome(run) for run in runs}


def outcomes(directory: Path) -> dict:
    places = [path.parent for path in directory.glob(f"*/{RECORD}")]
    return {load_record(place / RECORD)["digest"]: outcome(SimpleNamespace(directory=place)) for place in places}


def logs(directory: Path) -> dict[str, str]:
    """What stands in run.log, by the run's seed, as its directory is named for it."""
    return {path.parent.name.split("-")[3]: path.read_text() for path in directory.glob(f"*/{LOG}")}


def are_under_way(directory: Path, seeds: int) -> bool:
    return sum(" epoch 2:" in text for text in logs(directory).values()) >= seeds


def make(runs, **options):
    made = Slurm(**{**OPTIONS, **options})
    made.runs = runs
    return made


# Through the launchers


def test_a_packed_array_task_that_is_pre_empted_goes_on_and_ends_like_plain_runs(cluster, tmp_path, wholes):
    words = ("hydra/launcher=slurm", *CPU, "hydra.launcher.runs_per_task=2", "hydra.launcher.array_parallelism=1")
    process = start(tmp_path, *SWEEP, "seed=0,1,2", *words)
    wait_for(lambda: are_under_way(tmp_path / "out", 2))
    subprocess.run(["scancel", "7_0", "--signal", "SIGUSR2"], check=True)  # to every process of the task, as Slurm does
    stdout, stderr = process.communicate(timeout=240)
    assert (process.returncode, stderr) == (0, ""), stdout
    assert outcomes(tmp_path / "out") == wholes
    count, array, *lines = stdout.splitlines()
    assert count == "3 runs: 0 finished, 3 to do"
    assert array.startswith("array 7: 2 tasks of up to 2 runs, 2 processes side by side in each; their logs: ")
    assert [line.partition("]")[0] for line in lines] == ["[1/3", "[2/3", "[3/3"]
    assert all(": test error " in line for line in lines)
    assert (cluster / "7_0/restarts").read_text() == "1"
    assert not (cluster / "7_1/restarts").exists()
    resumed = {seed: text.count("goes on from step") for seed, text in logs(tmp_path / "out").items()}
    assert resumed == {"s0": 1, "s1": 1, "s2": 0}
    for text in logs(tmp_path / "out").values():
        assert [text.count(f" epoch {epoch}:") for epoch in range(1, EPOCHS + 1)] == [1] * EPOCHS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "signals"),
    [
        (("hydra/launcher=submitit_local", "checkpoint_s=0.05"), ["SIGUSR2"]),  # stops it without a checkpoint
        (("hydra/launcher=slurm", "hydra.launcher.cluster=local", *CPU), ["SIGTERM", "SIGUSR2"]),  # as in a grace time
    ],
)
def test_a_submitit_job_on_this_machine_is_queued_again_by_sigusr2_and_goes_on(tmp_path, wholes, launcher, signals):
    if launcher[0].endswith("submitit_local"):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    process = start(tmp_path, *SWEEP, "seed=0", *launcher)
    wait_for(lambda: are_under_way(tmp_path / "out", 1))
    (pickle,) = tmp_path.rglob("*_submitted.pkl")
    controller = pickle.name.partition("_")[0]
    task = Path(f"/proc/{controller}/task/{controller}/children").read_text()
    for name in signals:
        os.kill(int(task), signal.Signals[name])
        if name == "SIGTERM":  # it stops its runs and waits
            wait_for(lambda: [record["status"] for record in records(tmp_path / "out")] == ["interrupted"])
    _, stderr = process.communicate(timeout=240)
    assert (process.returncode, stderr) == (0, "")
    (text,) = logs(tmp_path / "out").values()
    assert text.count("goes on from step") == 1
    (digest,) = outcomes(tmp_path / "out")
    assert outcomes(tmp_path / "out")[digest] == wholes[digest]


@pytest.mark.slow
def test_joblib_gives_the_records_of_plain_runs(gnbench, tmp_path, wholes):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = gnbench(*SWEEP, "seed=0", "hydra/launcher=joblib")
    assert (done.returncode, done.stderr) == (0, "")
    found = outcomes(tmp_path / "out")
    assert len(found) == 1
    assert found.items() <= wholes.items()


def test_the_page_for_clusters_trains_through_any_scheduler_as_it_is_typed(cluster, tmp_path):
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    (typed,) = [block for block in page.split("```")[1::2] if "sbatch --array" in block]
    program = cluster.parent / "gnbench"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m gnbench "$@"\n')
    program.chmod(0o755)
    sweep = f"--config-dir {TESTS}/configs -m data=tiny {' '.join(WORDS)} epochs=1 seed=0 results=out"
    script = typed.replace("sweep=batch_size", sweep)
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Submitted batch job 7\n"
    wait_for(lambda: [record["status"] for record in records(tmp_path / "out")] == ["done"])


# What is asked of Slurm


def test_sbatch_is_asked_for_what_the_keys_say_and_the_command_need_not_wait(cluster, tmp_path):
    options = {"partition": "gpu", "account": "lab", "mem_gb": 32, "timeout_min": 90, "runs_per_task": 1}
    made = make([plan(tmp_path, f"seed={seed}") for seed in (0, 1)], wait=False, **options)
    returns = made.launch([["seed=0"], ["seed=1"]], 0)
    assert [(each.overrides, each.status) for each in returns] == [
        (["seed=0"], JobStatus.UNKNOWN),
        (["seed=1"], JobStatus.UNKNOWN),
    ]
    asked = json.loads((cluster / "7.json").read_text())
    del asked["output"], asked["error"], asked["wckey"], asked["nodes"]
    assert asked == {
        "array": "0-1%2", "partition": "gpu", "account": "lab", "mem": "32GB", "time": "90", "requeue": "",
        "signal": "USR2@120", "cpus-per-task": "8", "gpus-per-node": "1", "constraint": "a100", "job-name": "gnbench",
        "open-mode": "append",
    }  # fmt: skip
    assert "srun --unbuffered" in (cluster / "7.sh").read_text()
    assert " --cpus-per-task=8 " in (cluster / "7.sh").read_text()


def test_what_sbatch_refuses_is_a_sentence(cluster, tmp_path):
    with pytest.raises(
        UserError, match=r"^sbatch does not take the sweep: sbatch: error: invalid partition .* refused$"
    ):
        make([plan(tmp_path)], partition="refused").launch([["seed=0"]], 0)


def test_without_slurm_or_submitit_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"finds no srun here: .* hydra.launcher.cluster=local tries it"):
        make([plan(tmp_path)]).launch([["seed=0"]], 0)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"^hydra/launcher=slurm needs submitit: pip install 'gnbench\[slurm\]'$"):
        make([plan(tmp_path)]).launch([["seed=0"]], 0)


@pytest.mark.parametrize(
    ("key", "value", "legal"),
    [
        ("cluster", "pbs", "it is one of slurm, local"),
        ("gpus_per_node", 2, "it is 0 or 1, which all runs of a task share, or null"),
        ("max_num_timeout", -1, "it is 0 or more"),
        ("cpus_per_task", 0, "it is 1 or more"),
        ("mem_gb", 0, "it is 1 or more"),
        ("array_parallelism", 0, "it is 1 or more"),
        ("runs_per_task", 0, "it is 1 or more"),
        ("num_processes", 0, "it is 1 or more, or null"),
        ("signal_delay_s", 30, "it is above 60, which checkpoints may take"),
        ("timeout_min", 2, "it is more minutes than the signal_delay_s=120 seconds in which it stops"),
    ],
)
def test_a_value_that_is_not_legal_is_named(tmp_path, key, value, legal):
    with pytest.raises(UserError) as refused:
        make([plan(tmp_path)], **{key: value}).launch([["seed=0"]], 0)
    assert str(refused.value) == f"hydra.launcher.{key}={value} is not legal: {legal}"


def test_it_is_for_the_runs_of_a_grid(gnbench):
    with pytest.raises(UserError, match="hydra/sweeper=grid"):
        make(None).launch([["seed=0"]], 0)
    refused = gnbench("data=tiny", "hydra/launcher=slurm")
    assert refused.returncode == 2
    sentence = "hydra/launcher=slurm submits a sweep and this is a single run: -m makes it a sweep of one"
    assert refused.stderr == f"gnbench: {sentence}\n"


# What goes where


def test_runs_share_a_task_as_far_as_it_trains_them_side_by_side(tmp_path):
    runs = [plan(tmp_path, f"epochs={epochs}", f"seed={seed}") for epochs in (1, 3, 2) for seed in (0, 1)]
    assert make(runs, cpus_per_task=4)._pack() == [[2, 3, 4, 5], [0, 1]]  # the longest first
    assert make(runs, cpus_per_task=16)._pack() == [[2, 3, 4, 5, 0, 1]]
    assert make(runs, cpus_per_task=4, num_processes=1)._pack() == [[2], [3], [4], [5], [0], [1]]
    assert make(runs, cpus_per_task=1, runs_per_task=4)._pack() == [[2, 3, 4, 5], [0, 1]]


def test_seeds_of_a_cell_stay_together_as_one_network(tmp_path):
    runs = [plan(tmp_path, "engine=auto", f"norm={norm}", f"seed={seed}") for seed in range(4) for norm in ("bn", "gn")]
    bn, gn = [0, 2, 4, 6], [1, 3, 5, 7]
    assert make(runs, cpus_per_task=2, gpus_per_node=0)._pack() == [bn + gn]
    assert make(runs, cpus_per_task=1, gpus_per_node=0)._pack() == [bn, gn]
    assert make(runs, cpus_per_task=1, gpus_per_node=0, runs_per_task=3)._pack() == [bn[:3], bn[3:], gn[:3], gn[3:]]


@pytest.mark.parametrize(
    ("gpus", "device", "processes"), [(1, "auto", 8), (None, "auto", 8), (0, "auto", 32), (1, "cpu", 32)]
)
def test_so_many_processes_share_a_gpu_or_the_cores(tmp_path, gpus, device, processes):
    runs = [plan(tmp_path, f"device={device}")]
    assert make(runs, gpus_per_node=gpus, cpus_per_task=32)._num_processes() == processes


def test_a_device_of_the_nodes_need_not_be_here(tmp_path):
    runs = [plan(tmp_path, "device=cuda:99"), plan(tmp_path, "engine=cuda_graph")]
    check_runs(runs, here=False)
    for run in runs:
        with pytest.raises(UserError, match=r"device=cuda:99 is not to be had here|engine=cuda_graph is not legal"):
            check_runs([run])
    assert make(runs, cluster="local").here
    assert not make(runs).here


# When a task ends badly


def test_of_a_task_that_died_the_finished_runs_count(tmp_path, wholes):
    class Job:
        job_id, state, paths = "7_0", "CANCELLED", SimpleNamespace(stderr="7_0.err")

        def result(self):
            raise submitit.core.utils.UncompletedJobError("Job 7_0 has not produced any output\nand so on")

    runs = [plan(tmp_path, f"seed={seed}") for seed in (0, 1)]
    runs[0].directory.mkdir()
    save_record(runs[0].directory / RECORD, {"config": runs[0].config, "status": "done", "digest": runs[0].digest})
    done, failed = slurm._collect(Job(), Task(runs, [["seed=0"], ["seed=1"]], (1, None, None)))
    assert (done.status, done.return_value["status"]) == (JobStatus.COMPLETED, "done")
    assert (failed.status, failed.overrides) == (JobStatus.FAILED, ["seed=1"])
    assert str(failed._return_value) == "its task 7_0 ended without a result (CANCELLED): see 7_0.err"


def test_a_task_that_is_not_queued_again_says_why(tmp_path, monkeypatch):
    def give_up(self):
        raise submitit.core.utils.UncompletedJobError("Job not requeued because: timed-out too many times.")

    monkeypatch.setattr(Task, "_train", give_up)
    (returned,) = Task([plan(tmp_path)], [["seed=0"]], (1, None, None))()
    assert returned.status == JobStatus.FAILED
    assert str(returned._return_value).endswith("timed-out too many times.")
