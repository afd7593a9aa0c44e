"""A run's life in its directory: skipped, resumed, left alone, diverged, failed."""

import errno
import logging
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from filelock import FileLock

from gnbench import run as run_module
from gnbench.checkpoint import CURRENT, PREVIOUS, load_checkpoints, save_checkpoint
from gnbench.errors import UserError
from gnbench.lock import held, is_held
from gnbench.machine import choose_device
from gnbench.plan import Run, plan_run
from gnbench.record import load_record, save_record
from gnbench.run import check_runs, execute, execute_group


def plan(tmp_path, *words: str) -> Run:
    return plan_run(tiny_config(f"results={tmp_path}", *words), default_threads=1)


def stable(record: dict) -> dict:
    """A record without its times, as two runs of one command agree on it."""
    kept = {key: value for key, value in record.items() if key not in ("schema", "sha256", "environment")}
    drop = ("time_s", "peak_memory_mb")
    kept["history"] = [{k: v for k, v in row.items() if k not in drop} for row in record["history"]]
    kept["result"] = record["result"] and {k: v for k, v in record["result"].items() if k not in drop}
    return kept


def test_a_run_leaves_its_record_and_nothing_unfinished(tmp_path):
    run = plan(tmp_path)
    record = execute(run)
    assert record["status"] == "done"
    assert load_record(run.directory / "record.json")["result"] == record["result"]
    assert sorted(path.name for path in run.directory.iterdir()) == [".lock", "record.json", "run.log"]
    assert record["environment"]["torch"] == torch.__version__
    assert record["num_parameters"] == 74_835  # resnet8 with 3 classes


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    run = plan(tmp_path)
    record = execute(run)
    monkeypatch.setattr(run_module, "train", pytest.fail)
    assert stable(execute(run)) == stable(record)


def test_the_same_config_gives_the_same_record(tmp_path):
    one, other = (execute(plan(tmp_path / name)) for name in ("a", "b"))
    one["config"]["results"] = other["config"]["results"]
    assert stable(one) == stable(other)


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_a_run_stopped_by_a_signal_goes_on_where_it_was(tmp_path, monkeypatch, norm):
    whole = execute(plan(tmp_path / "whole", f"norm={norm}"))
    run = plan(tmp_path / "cut", f"norm={norm}")
    train = run_module.train

    def train_until_step_7(engine, pause, drop):
        def stop_and_pause():
            if engine.members[0].progress.step == 7:
                pause.stop.append(15)
            pause()

        train(engine, stop_and_pause, drop)

    monkeypatch.setattr(run_module, "train", train_until_step_7)
    with pytest.raises(run_module.Interrupted):
        execute(run)
    assert load_record(run.directory / "record.json")["status"] == "interrupted"
    assert load_checkpoints(run.directory)[0]["progress"]["step"] == 7
    monkeypatch.setattr(run_module, "train", train)
    record = execute(run)
    record["config"]["results"] = whole["config"]["results"]
    assert stable(record) == stable(whole)
    assert not (run.directory / CURRENT).exists()


def test_a_run_that_another_process_has_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "LOCK_WAIT_S", 0)
    run = plan(tmp_path)
    run.directory.mkdir(parents=True)
    with FileLock(run.directory / ".lock"):
        assert execute(run)["status"] == "running"
    assert not (run.directory / "record.json").exists()


def test_a_diverged_run_is_a_result_and_is_kept(tmp_path, monkeypatch):
    run = plan(tmp_path, "norm=none", "base_lr=1e30", "schedule=constant")
    record = execute(run)
    assert (record["status"], record["result"]) == ("diverged", None)
    assert "not finite" in record["cause"]
    monkeypatch.setattr(run_module, "train", pytest.fail)
    assert execute(run)["status"] == "diverged"


def test_a_failed_run_says_why_and_is_tried_again(tmp_path, monkeypatch):
    run = plan(tmp_path)

    def break_down(*_):
        raise ZeroDivisionError("the cause")

    train = run_module.train
    monkeypatch.setattr(run_module, "train", break_down)
    with pytest.raises(ZeroDivisionError):
        execute(run)
    record = load_record(run.directory / "record.json")
    assert (record["status"], record["cause"]) == ("failed", "ZeroDivisionError: the cause")
    assert "Traceback" in (run.directory / "run.log").read_text()
    monkeypatch.setattr(run_module, "train", train)
    assert execute(run)["status"] == "done"


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("\n\n  the cause\nand more", "ZeroDivisionError: the cause"),
        ("\x1b[1;31mthe\x1b[0m \x1b]0;title\x07cause\x9b\b", "ZeroDivisionError: the cause"),
        (" \n", "ZeroDivisionError"),
        ("\nout of memory", "out of memory: ZeroDivisionError: out of memory"),
    ],
)
def test_a_cause_is_one_line_that_a_terminal_may_print(tmp_path, monkeypatch, said, cause):
    def break_down(*_):
        raise ZeroDivisionError(said)

    run = plan(tmp_path)
    monkeypatch.setattr(run_module, "train", break_down)
    with pytest.raises(ZeroDivisionError):
        execute(run)
    assert load_record(run.directory / "record.json")["cause"] == cause


def test_a_damaged_record_does_not_count_as_finished(tmp_path):
    run = plan(tmp_path)
    execute(run)
    path = run.directory / "record.json"
    path.write_bytes(path.read_bytes().replace(b'"done"', b'"dome"'))
    assert not run.is_finished()
    assert execute(run)["status"] == "done"
    assert run.is_finished()


def test_a_record_of_another_config_does_not_count(tmp_path):
    run = plan(tmp_path)
    record = execute(run)
    save_record(run.directory / "record.json", {**record, "digest": "other"})
    assert not run.is_finished()


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, caplog):
    save_checkpoint(tmp_path, {"step": 1, "weights": torch.arange(9.0)})
    save_checkpoint(tmp_path, {"step": 2, "weights": torch.arange(9.0)})
    assert load_checkpoints(tmp_path)[0]["step"] == 2
    damaged = bytearray((tmp_path / CURRENT).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / CURRENT).write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert load_checkpoints(tmp_path)[0]["step"] == 1
    assert "does not match its checksum" in caplog.text
    assert (tmp_path / "checkpoint.pt.corrupt").read_bytes() == damaged
    (tmp_path / PREVIOUS).write_bytes(b"short")
    assert load_checkpoints(tmp_path) == []


def test_identity_knows_which_norm_uses_the_normalization_batch(tmp_path):
    def identities(norm: str) -> set[str]:
        return {plan(tmp_path, f"norm={norm}", f"norm_batch_size={size}").digest for size in (1, 2, 4, 8)}

    assert len(identities("bn")) == 4
    assert len(identities("gn")) == 1
    assert plan(tmp_path, "norm=gn", "norm_batch_size=2").config["norm_batch_size"] is None


def test_frozen_epochs_are_for_norms_with_batch_statistics(tmp_path):
    frozen = {norm: plan(tmp_path, f"norm={norm}", "frozen_epochs=1").digest for norm in ("bn", "gn")}
    assert frozen["bn"] != plan(tmp_path, "norm=bn").digest
    assert frozen["gn"] == plan(tmp_path, "norm=gn").digest


def test_a_signal_between_two_networks_of_a_group_is_heard(tmp_path, monkeypatch):
    first, second = plan(tmp_path, "seed=0"), plan(tmp_path, "seed=1")
    monkeypatch.setattr(run_module, "_line_up", lambda members, _: [([m.run.digest], [m]) for m in members])
    summarize = run_module.summarize

    def stop_there(training):
        signal.raise_signal(signal.SIGTERM)
        return summarize(training)

    monkeypatch.setattr(run_module, "summarize", stop_there)
    with pytest.raises(run_module.Interrupted):
        execute_group([first, second])
    assert [load_record(run.directory / "record.json")["status"] for run in (first, second)] == ["done", "interrupted"]


def test_a_run_that_starts_again_forgets_why_it_failed(tmp_path, monkeypatch):
    run = plan(tmp_path)
    save_record(run.directory / "record.json", {**run_module._new_record(run), "status": "failed", "cause": "old"})
    seen = []
    monkeypatch.setattr(run_module, "make_training", lambda *_: seen.append(load_record(run.directory / "record.json")))
    with pytest.raises(AttributeError):
        execute(run)
    assert (seen[0]["status"], seen[0]["cause"]) == ("running", None)


def test_a_record_that_cannot_be_read_for_a_moment_is_not_set_aside(tmp_path, monkeypatch):
    run = plan(tmp_path)
    before = execute(run)

    def away(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", away)
        with pytest.raises(UserError, match=r"cannot be read \(Stale file handle\)"):
            execute(run)
        with pytest.raises(UserError, match=r"cannot be read \(Stale file handle\)"):
            run_module.record_death(run, "it died")
    assert stable(load_record(run.directory / "record.json")) == stable(before)
    assert not list(run.directory.glob("*.corrupt*"))


def test_the_death_of_a_run_whose_record_is_damaged_leaves_the_evidence(tmp_path):
    run = plan(tmp_path)
    execute(run)
    (run.directory / "record.json").write_text("broken")
    run_module.record_death(run, "it died")
    assert (run.directory / "record.json.corrupt").read_text() == "broken"
    assert load_record(run.directory / "record.json")["cause"] == "it died"


def test_a_lock_is_seen_by_those_who_may_only_read(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with held(tmp_path) as is_free:
        assert is_free
        monkeypatch.setattr(FileLock, "acquire", refuse)
        assert is_held(tmp_path)
    assert not is_held(tmp_path)


def test_a_file_system_without_locks_is_refused_rather_than_trusted(tmp_path, monkeypatch):
    def no_flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_flock)
    with pytest.raises(UserError, match=r"cannot write .*\.lock: "):
        execute(plan(tmp_path))


def test_images_that_changed_since_the_run_was_planned_are_not_trained_on(tmp_path):
    run = replace(plan(tmp_path), data_fingerprint="of other images")
    with pytest.raises(UserError, match="the images of data=tiny have changed since the run was planned"):
        execute(run)
    assert load_record(run.directory / "record.json")["status"] == "failed"


def test_threads_are_the_callers_unless_they_are_named(tmp_path):
    assert plan_run(tiny_config("num_threads=auto"), default_threads=3).config["num_threads"] == 3
    assert plan_run(tiny_config("num_threads=2"), default_threads=3).config["num_threads"] == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["num_threads=0"], "num_threads=0 is not legal: it is auto, or"),
        (["num_threads=many"], "num_threads=many is not legal"),
        (["seed=-1"], "seed=-1 is not legal"),
        ([f"seed={2**63}"], f"seed={2**63} is not legal: it is 0 or more, and below"),
        (["data.split_seed=-1"], r"data\.split_seed=-1 is not legal"),
        (["data.split_seed=x"], r"data\.split_seed=x is not legal: it is a whole number"),
        (["data.train_size=1e3"], r"data\.train_size=1000\.0 is not legal: it is a whole number, or null"),
        (["data.train_size=true"], r"data\.train_size=True is not legal: it is a whole number, or null"),
        (["data.val_size=null"], r"data\.val_size=None is not legal: it is a whole number"),
        (["data.augment=foo"], r"data\.augment=foo is not legal: it is one of crop_flip, crop, none"),
        (["data=random", "data.size=abc"], "size of random: size=abc is not legal: it is a whole number"),
        (["data=random", "data.size=0"], r"data\.size=0 is not legal: it is a number of pixels, 1 or more"),
        (
            ["norm=custom", "norm._target_=torch.nn.Identity", "+norm.x=[inf]"],
            r"norm\.x\.0=inf is not legal: it is a finite number",
        ),
        (["lr_decay=1e300"], r"lr_decay=1e\+300 is not legal: lr_decay is above 0 and at most 1"),
        (["+data.foo=1"], r"data\.foo is not a key of data=tiny"),
        (["precision=fp8"], "precision=fp8 is not legal: it is one of float32, tf32, bf16"),
        (["checkpoint_s=0"], "checkpoint_s=0"),
        (["norm.norm_batch_size=4"], r"norm\.norm_batch_size=4 is not legal: set norm_batch_size=4"),
        (
            ["norm=ln", "norm._target_=torch.nn.BatchNorm2d"],
            "norm=ln keeps running statistics of a batch: its file needs",
        ),
        (["norm_batch_size=3"], "norm_batch_size=3 is not legal: it divides batch_size=8, so it is one of 1, 2, 4, 8"),
        (["model=vgg16"], "model=vgg16 does not take images of 8 x 8: "),
        (["epochs=0"], "epochs=0 is not legal: epochs is 1 or more"),
        (["norm._target_=nowhere.Norm"], r"_target_=nowhere\.Norm of bn cannot be imported: No module named 'nowhere'"),
    ],
)
def test_a_config_that_cannot_be_is_refused_before_training(words, sentence):
    with pytest.raises(UserError, match=sentence):
        check_runs([plan_run(tiny_config(*words), default_threads=1)])


@pytest.mark.parametrize("name", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=f"device={name} is not to be had here"):
        choose_device(name, "float32")


def test_tf32_is_for_gpus():
    with pytest.raises(UserError, match="precision=tf32 is not legal on device=cpu"):
        choose_device("cpu", "tf32")
