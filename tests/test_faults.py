"""Faults injected for real: kills, damaged files, full and read-only disks, runs that fail in every way, orphans."""

import ast
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import crashes
import pytest
import torch
from conftest import ROOT
from crashes import KILLED, NORMS, outcome, plan
from filelock import FileLock
from test_cli import TINY, records, start, wait_for

from gnbench import run as run_module
from gnbench.checkpoint import CURRENT, PREVIOUS, load_checkpoints, save_checkpoint
from gnbench.errors import UserError
from gnbench.files import CORRUPT
from gnbench.record import LOG, RECORD, load_record, save_record
from gnbench.run import Interrupted, execute

EXACT = ("step:7", "epoch:1", "rotated:2", "record.json.half:2", "checkpoint.pt.half:2", "checkpoint.pt.renamed:1")


@pytest.fixture(scope="session")
def wholes(tmp_path_factory):
    """A planned run of each norm, and what it says when nothing stops it."""
    root = tmp_path_factory.mktemp("wholes")
    runs = {norm: plan(root, norm) for norm in NORMS}
    for run in runs.values():
        execute(run)
    return {norm: (run, outcome(run)) for norm, run in runs.items()}


@pytest.fixture
def small_disk(tmp_path):
    """A directory on a disk of its own of 2 MiB, or a skip where this process may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Leave `left` bytes of a disk free, in pages of 4 KiB; returns the file that takes the rest."""
    filler = disk / "filler"
    usage = os.statvfs(disk)
    filler.write_bytes(bytes(max(0, usage.f_bavail * usage.f_frsize - left)))
    return filler


def stop_at(monkeypatch, step: int) -> None:
    """Let the next run be interrupted, with a checkpoint, after `step` updates."""
    train = run_module.train

    def train_and_stop(engine, pause, drop):
        def stop_and_pause():
            if engine.members[0].progress.step == step:
                pause.stop.append(signal.SIGTERM)
            pause()

        train(engine, stop_and_pause, drop)

    monkeypatch.setattr(run_module, "train", train_and_stop)


# Kills


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("place", EXACT)
def test_a_run_killed_at_an_exact_point_ends_like_an_uncut_one(tmp_path, wholes, norm, place):
    whole, expected = wholes[norm]
    kill = crashes.torture(replace(whole, directory=tmp_path / whole.name), place, None, expected)
    assert kill.dead
    assert not kill.other


def test_a_run_killed_again_and_again_at_random_times_ends_like_an_uncut_one(tmp_path, wholes):
    whole, expected = wholes["brn"]
    run = replace(whole, directory=tmp_path / whole.name)
    rng = random.Random(0)
    codes = [crashes.execute(run, {"GNBENCH_CRASH_AT": f"step:{rng.randint(2, 6)}"}) for _ in range(4)]
    assert codes == [KILLED] * 4
    assert crashes.execute(run) == 0
    assert outcome(run) == expected


def test_a_kill_costs_no_more_than_the_steps_since_the_last_checkpoint(tmp_path, wholes):
    whole, _ = wholes["bn"]
    run = replace(whole, directory=tmp_path / whole.name, config={**whole.config, "checkpoint_s": 1e-9})
    assert crashes.execute(run, {"GNBENCH_CRASH_AT": "step:7"}) == KILLED
    assert load_checkpoints(run.directory)[0]["progress"]["step"] == 6


@pytest.mark.parametrize("place", ["finished:1", "record.json.renamed:4"])
def test_a_run_killed_after_its_final_record_is_done_and_leaves_nothing(tmp_path, wholes, place):
    whole, expected = wholes["gn"]
    run = replace(whole, directory=tmp_path / whole.name)
    assert crashes.execute(run, {"GNBENCH_CRASH_AT": place}) == KILLED
    assert run.is_finished()
    execute(run)
    assert outcome(run) == expected


def test_a_file_that_was_never_finished_is_swept_away(tmp_path, wholes):
    whole, _ = wholes["gn"]
    run = replace(whole, directory=tmp_path / whole.name)
    assert crashes.execute(run, {"GNBENCH_CRASH_AT": "checkpoint.pt.half:1"}) == KILLED
    assert list(run.directory.glob(".checkpoint.pt.*.part"))
    execute(run)
    assert not list(run.directory.glob(".*.part"))


# Files


def damage(content: bytes, rng: random.Random, cut: bool) -> bytes:
    if cut:
        return content[: rng.randrange(len(content))]
    damaged = bytearray(content)
    damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


@pytest.mark.parametrize(("cut", "times"), [(False, 300), (True, 200)])
def test_no_damaged_checkpoint_is_accepted(tmp_path, cut, times):
    for step in (1, 2):
        save_checkpoint(tmp_path, {"step": step, "weights": torch.arange(500.0)})
    newest, rng = (tmp_path / CURRENT).read_bytes(), random.Random(0)
    for _ in range(times):
        damaged = damage(newest, rng, cut)
        (tmp_path / CURRENT).write_bytes(damaged)
        assert load_checkpoints(tmp_path)[0]["step"] == 1
        evidence = tmp_path / f"{CURRENT}{CORRUPT}"
        assert evidence.read_bytes() == damaged
        evidence.unlink()


@pytest.mark.parametrize(("cut", "times"), [(False, 300), (True, 200)])
def test_no_damaged_record_of_a_real_run_is_accepted(tmp_path, wholes, cut, times):
    whole, _ = wholes["bn"]
    content, rng = (whole.directory / RECORD).read_bytes(), random.Random(0)
    expected = load_record(whole.directory / RECORD)
    path = tmp_path / RECORD
    refused = 0
    for _ in range(times):
        path.write_bytes(damage(content, rng, cut))
        try:
            assert load_record(path) == expected  # only white space differs
        except UserError:
            refused += 1
    assert refused > 0.5 * times


@pytest.mark.parametrize("names", [(CURRENT,), (CURRENT, PREVIOUS), (CURRENT, PREVIOUS, RECORD)])
def test_a_run_with_damaged_files_says_so_keeps_them_and_ends_like_an_uncut_one(tmp_path, wholes, capsys, names):
    whole, expected = wholes["bn"]
    run = replace(whole, directory=tmp_path / whole.name, config={**whole.config, "checkpoint_s": 1e-9})
    assert crashes.execute(run, {"GNBENCH_CRASH_AT": "step:8"}) == KILLED
    for name in names:
        path = run.directory / name
        path.write_bytes(damage(path.read_bytes(), random.Random(1), cut=True))
    execute(run)
    said = capsys.readouterr().err
    assert all(f"{run.directory / name}" in said for name in names)
    assert all((run.directory / f"{name}{CORRUPT}").exists() for name in names)
    assert ("no checkpoint is whole; the run starts again" in said) == (PREVIOUS in names)
    assert ("goes on from step 6" in (run.directory / LOG).read_text()) == (PREVIOUS not in names)
    assert outcome(run)[0] == expected[0]


def test_a_checkpoint_of_another_run_is_refused(tmp_path, wholes):
    whole, _ = wholes["bn"]
    run = replace(whole, directory=tmp_path / whole.name)
    save_checkpoint(run.directory, {"digest": "0123456789abcdef"})
    with pytest.raises(UserError, match="belongs to another run, 0123456789ab; remove it"):
        execute(run)


def test_evidence_is_not_overwritten_by_later_evidence(tmp_path):
    for text in (b"one", b"two"):
        (tmp_path / CURRENT).write_bytes(text)
        assert load_checkpoints(tmp_path) == []
    assert {path.read_bytes() for path in tmp_path.glob(f"*{CORRUPT}*")} == {b"one", b"two"}


def test_nothing_is_unpickled_but_tensors_and_plain_values():
    loads = []
    for path in [*ROOT.glob("gnbench/**/*.py"), *ROOT.glob("hydra_plugins/**/*.py"), ROOT / "tests" / "crashes.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
                assert not {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"} & set(names), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                loads.append({keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", path
    assert loads
    assert all(keywords.get("weights_only") == "True" for keywords in loads)


# Disks


@pytest.mark.parametrize("left", [0, 4096, 16384, 400_000, 1_000_000])
def test_a_full_disk_ends_a_run_with_a_sentence_and_the_run_goes_on_when_there_is_space(
    small_disk, wholes, left, monkeypatch
):
    whole, expected = wholes["gn"]
    run = replace(
        whole, directory=small_disk / "out" / whole.name, config={**whole.config, "checkpoint_s": 1e-9}
    )  # room for: no directory, the directory, the record, a checkpoint, two of them
    filler = fill(small_disk, left)
    with pytest.raises(UserError, match=r"^cannot write .*/disk/out.*: No space left on device \(\d+ MiB free\)$"):
        execute(run)
    assert not list(small_disk.rglob(".*.part"))
    for path in small_disk.rglob(RECORD):
        assert load_record(path)["status"] in ("running", "failed")
    if left == 1_000_000:
        assert load_checkpoints(run.directory)[0]["progress"]["step"] >= 1
    filler.unlink()
    execute(run)
    assert outcome(run) == expected


def test_a_full_disk_does_not_touch_the_checkpoint_that_is_there(small_disk, wholes, monkeypatch):
    whole, expected = wholes["gn"]
    run = replace(whole, directory=small_disk / whole.name)
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Interrupted):
            execute(run)
    filler = fill(small_disk, 0)
    with pytest.raises(UserError, match="No space left"):
        execute(run)
    filler.unlink()
    assert load_checkpoints(run.directory)[0]["progress"]["step"] == 7
    execute(run)
    assert outcome(run) == expected


def test_a_read_only_disk_is_named(small_disk, wholes):
    whole, expected = wholes["gn"]
    run = replace(whole, directory=small_disk / whole.name)
    assert crashes.execute(run, {"GNBENCH_CRASH_AT": "step:7"}) == KILLED
    files = sorted(small_disk.rglob("*"))
    for target in (run, replace(run, directory=small_disk / "other")):
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        with pytest.raises(UserError, match=r"^cannot write .*: Read-only file system$"):
            execute(target)
        assert sorted(small_disk.rglob("*")) == files
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    execute(run)
    assert outcome(run) == expected


def test_a_quota_is_named(tmp_path, wholes):
    whole, expected = wholes["gn"]
    run = replace(whole, directory=tmp_path / whole.name, config={**whole.config, "checkpoint_s": 1e-9})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # a checkpoint has 600 KB
    try:
        with pytest.raises(UserError, match=r"cannot write .*checkpoint.pt: File too large"):
            execute(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    record = load_record(run.directory / RECORD)
    assert (record["status"], "File too large" in record["cause"]) == ("failed", True)
    assert not list(tmp_path.rglob(".*.part"))
    execute(run)
    assert outcome(run) == expected


def test_a_full_disk_fails_the_command_in_one_line(gnbench, small_disk):
    fill(small_disk, 0)
    failed = gnbench(*TINY[:-1], "norm=gn", f"results={small_disk}")
    assert failed.returncode != 0
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"gnbench: cannot write {small_disk}/gn-bs8-s0-")
    assert line.endswith("No space left on device (0 MiB free)")


# Sweeps


def test_a_sweep_with_every_kind_of_bad_run_finishes_the_others_and_tells_them_apart(gnbench, tmp_path):
    kinds = "good,raise,memory,exit,hang,overflow"
    words = ("-m", *TINY, "norm=troubled", f"norm.fault={kinds}", "checkpoint_s=1", "hydra.launcher.stall_s=12")
    failed = gnbench(*words)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert "4 of 6 runs failed; the others are kept" in failed.stderr
    logs = [line.removeprefix("    log: ") for line in failed.stderr.splitlines() if line.startswith("    log: ")]
    assert len(logs) == 2, "a process that dies at once, or hangs, has written none"
    assert all((tmp_path / log).is_file() for log in logs)
    ends = {r["config"]["norm"]["fault"]: (r["status"], r["cause"]) for r in records(tmp_path / "out")}
    assert {kind: status for kind, (status, _) in ends.items()} == {
        "good": "done", "overflow": "diverged",
        "raise": "failed", "memory": "failed", "exit": "failed", "hang": "failed",
    }  # fmt: skip
    assert ends["raise"][1] == "ZeroDivisionError: a fault"
    assert ends["memory"][1].startswith("out of memory: RuntimeError: ")
    assert ends["exit"][1] == "its process ended with exit status 139, 2 times"
    assert ends["hang"][1] == "no progress for 12 s, so its process was killed"
    assert ends["overflow"][1].startswith("the training loss is not finite")
    for kind in ("raise", "memory", "exit", "hang"):
        assert ends[kind][1] in failed.stderr
    again = gnbench(*(word.replace(kinds, "good,raise,overflow") for word in words))
    assert again.stdout.splitlines()[0] == "3 runs: 2 finished, 1 to do"
    assert again.returncode == 1


def test_a_run_that_others_leave_too_little_memory_is_tried_by_itself(gnbench, tmp_path):
    words = ("-m", *TINY, "norm=troubled", "norm.fault=crowded", "seed=0,1,2", "hydra.launcher.num_processes=2")
    done = gnbench(*words)
    assert done.returncode == 0, done.stderr
    assert [record["status"] for record in records(tmp_path / "out")] == ["done"] * 3
    assert done.stdout.count("a run ran out of memory beside other processes; trying again with none") == 1
    assert done.stdout.count("from here on one process at a time") == 1


def test_a_time_to_stand_still_is_longer_than_that_between_checkpoints(gnbench):
    refused = gnbench("-m", *TINY, "norm=gn", "seed=0,1", "checkpoint_s=9", "hydra.launcher.stall_s=9")
    assert refused.returncode == 2
    assert refused.stderr == "gnbench: hydra.launcher.stall_s=9 is not legal: it is above checkpoint_s=9\n"


@pytest.mark.slow
def test_a_successor_waits_for_the_orphans_of_a_killed_sweep(gnbench, tmp_path):
    words = ("-m", *TINY, "norm=bn", "epochs=12", "seed=0,1", "checkpoint_s=0.2")
    process = start(tmp_path, *words)
    wait_for(lambda: sum(bool(record["history"]) for record in records(tmp_path / "out")) >= 1)
    process.send_signal(signal.SIGKILL)
    done = gnbench(*words)  # at once: the orphans may still be at their last step
    process.communicate(timeout=60)
    assert done.returncode == 0, done.stderr
    assert [record["status"] for record in records(tmp_path / "out")] == ["done"] * 2
    for path in tmp_path.glob("out/*/run.log"):
        assert path.read_text().count(" epoch 12:") == 1


@pytest.mark.slow
def test_a_sweep_killed_with_all_its_processes_five_times_trains_each_run_once(gnbench, tmp_path):
    """A checkpoint a step: a kill then costs no more than the epoch's line of each run that is under way."""
    keys = ("batch_size=32", f"epochs={(epochs := 12)}", "engine=eager")
    grid = ("-m", *TINY, *keys, "norm=bn,gn", "seed=0,1", "checkpoint_s=1e-9", "hydra.launcher.num_processes=2")
    rng, untouched = random.Random(0), {}

    def count_epochs() -> int:
        return sum(path.read_text().count(" epoch ") for path in tmp_path.glob(f"out/*/{LOG}"))

    def find_finished() -> dict:
        paths = [path for path in tmp_path.glob(f"out/*/{RECORD}") if load_record(path)["status"] == "done"]
        return {path: (path.stat().st_mtime_ns, path.with_name(LOG).read_text()) for path in paths}

    for number in range(5):
        process, before = start(tmp_path, *grid, start_new_session=True), count_epochs()
        if number % 2 == 0:  # the others are killed as they start
            wait_for(lambda before=before: count_epochs() > before)
        time.sleep(rng.uniform(0, 0.1))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == KILLED
        untouched = {**find_finished(), **untouched}
    assert gnbench(*grid).returncode == 0
    finished = find_finished()
    assert untouched.items() <= finished.items()
    assert 4 * epochs <= count_epochs() <= 4 * epochs + 5 * 2
    wholes = [plan(tmp_path / "wholes", norm, f"seed={seed}", *keys) for norm in ("bn", "gn") for seed in (0, 1)]
    assert {path.parent.name for path in finished} == {run.name for run in wholes}
    for run in wholes:
        execute(run)
        assert outcome(replace(run, directory=tmp_path / "out" / run.name)) == outcome(run)


def test_a_death_is_not_written_into_the_record_of_a_run_that_another_process_has(tmp_path, wholes, monkeypatch):
    whole, _ = wholes["gn"]
    run = replace(whole, directory=tmp_path / whole.name)
    save_record(run.directory / RECORD, {**load_record(whole.directory / RECORD), "status": "running"})
    monkeypatch.setattr(run_module, "LOCK_WAIT_S", 0)
    with FileLock(run.directory / ".lock"):
        run_module.record_death(run, "a cause")
    assert load_record(run.directory / RECORD)["status"] == "running"
    run_module.record_death(run, "a cause")
    assert load_record(run.directory / RECORD)["cause"] == "a cause"


# Signals and determinism


def test_ctrl_c_before_the_first_step_leaves_no_traceback(tmp_path):
    process = start(tmp_path, *TINY, "norm=gn", "epochs=500")
    wait_for(lambda: list(tmp_path.glob("out/*/.lock")))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in stderr) == (130, False), stderr


def test_deterministic_algorithms_are_asked_for_and_belong_to_the_identity(tmp_path):
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    default, off, on = (plan(tmp_path, "gn", f"deterministic={value}") for value in ("null", "false", "true"))
    assert default.digest == off.digest != on.digest
    try:
        execute(on)
        assert torch.are_deterministic_algorithms_enabled()
        execute(off)
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        with contextlib.suppress(KeyError):
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
        if before is not None:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = before
    assert outcome(on)[0]["result"] == outcome(off)[0]["result"]


@pytest.mark.slow
def test_a_run_beside_others_gives_the_record_of_a_run_alone(gnbench, tmp_path):
    words = ("-m", *TINY[:-1], "norm=bn", "hydra.launcher.num_processes=3")
    assert gnbench(*words, "seed=0,1,2", "results=beside").returncode == 0
    assert gnbench(*words, "seed=1", "results=alone").returncode == 0
    (alone,) = records(tmp_path / "alone")
    beside = next(record for record in records(tmp_path / "beside") if record["config"]["seed"] == 1)
    for record in (alone, beside):
        for row in record["history"]:
            del row["time_s"], row["peak_memory_mb"]
    assert alone["history"] == beside["history"]
