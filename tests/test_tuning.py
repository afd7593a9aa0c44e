"""The choice of a learning rate: on held-out images, on an equal budget, and kept in the final record."""

import pytest
from conftest import tiny_config

from gnbench.errors import UserError
from gnbench.plan import plan_run
from gnbench.record import save_record
from gnbench.run import execute


def write_run(
    directory, base_lr: float, val_error: float | None, seed=0, status="done", norm="bn", more=(), fingerprint=None
) -> None:
    planned = plan_run(tiny_config(f"norm={norm}", f"base_lr={base_lr}", f"seed={seed}", *more), 1)
    config, fingerprint = planned.config, fingerprint or planned.data_fingerprint
    name = f"{norm}-{base_lr}-{seed}"
    result = {"val_error": val_error, "test_error": 100 - (val_error or 0)} if status == "done" else None
    record = {"run": name, "status": status, "config": config, "result": result, "data_fingerprint": fingerprint}
    save_record(directory / name / "record.json", record)


def plan(directory, *words: str):
    return plan_run(tiny_config(f"tuned_from={directory}", f"results={directory}-final", *words), default_threads=1)


def test_the_rate_of_least_mean_held_out_error_is_taken_whatever_the_test_says(tmp_path):
    for seed, errors in enumerate(((30.0, 20.0, 25.0), (30.0, 26.0, 19.0))):
        for base_lr, error in zip((0.05, 0.1, 0.2), errors, strict=True):
            write_run(tmp_path, base_lr, error, seed)
    run = plan(tmp_path)
    assert run.config["base_lr"] == 0.2
    assert run.config["tuning"]["val_error"] == {"0.05": 30.0, "0.1": 23.0, "0.2": 22.0}
    assert run.config["tuning"]["edge"] is True
    assert run.digest == plan_run(tiny_config("base_lr=0.2"), default_threads=1).digest


def test_a_rate_at_which_a_seed_diverged_is_not_taken(tmp_path):
    write_run(tmp_path, 0.05, 30.0)
    write_run(tmp_path, 0.1, 29.0)
    write_run(tmp_path, 0.2, 10.0)
    for base_lr in (0.05, 0.1):
        write_run(tmp_path, base_lr, 31.0, seed=1)
    write_run(tmp_path, 0.2, None, seed=1, status="diverged")
    run = plan(tmp_path)
    assert (run.config["base_lr"], run.config["tuning"]["edge"]) == (0.1, False)


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ([], "holds no runs: gnbench sweep=tune makes them"),
        ([(0.1, None, 0, "running")], r"bn-0\.1-0 is not finished"),
        ([(0.1, None, 0, "diverged")], "every run of norm=bn model=resnet8 batch_size=8 diverged"),
        ([(0.1, None)], r"bn-0\.1-0 held out no images"),
        ([(0.1, 20.0), (0.2, 20.0, 0, "done", "bn", ("epochs=3",))], "mixes runs that differ in epochs"),
        ([(0.1, 20.0, 0, "done", "bn", ("base_batch_size=16",))], r"base_batch_size=128 is not legal: \S+ has 16"),
        ([(0.1, 20.0, 0, "done", "bn", (), "other")], "was tuned on other images: data=tiny"),
        ([(0.1, 20.0), (0.2, 20.0), (0.2, 9.0, 1)], r"no run of norm=bn .* base_lr=0\.1 seed=1: every cell needs"),
        ([(0.1, 20.0), (0.2, 20.0, 0, "done", "gn")], r"no run of norm=bn .* base_lr=0\.2: every cell needs the same"),
    ],
)
def test_a_choice_that_would_not_be_fair_is_refused(tmp_path, runs, sentence):
    for run in runs:
        write_run(tmp_path, *run)
    with pytest.raises(UserError, match=sentence):
        plan(tmp_path)


def test_a_rate_that_is_typed_beside_the_choice_is_refused(tmp_path):
    write_run(tmp_path, 0.2, 20.0)
    with pytest.raises(UserError, match=r"base_lr=0\.7 is not legal beside tuned_from, which chooses it"):
        plan(tmp_path, "base_lr=0.7")


def test_a_choice_among_runs_on_different_images_is_refused(tmp_path):
    for base_lr, fingerprint in ((0.1, "one"), (0.2, "other")):
        write_run(tmp_path, base_lr, 20.0, fingerprint=fingerprint)
    with pytest.raises(UserError, match="mixes runs on different images"):
        plan(tmp_path)


def test_tuned_runs_carry_the_choice_in_their_records(tmp_path):
    for base_lr in (0.05, 0.1):
        execute(plan_run(tiny_config(f"results={tmp_path}", f"base_lr={base_lr}", "data.val_size=12"), 1))
    record = execute(plan(tmp_path, "seed=1"))
    candidates = record["config"]["tuning"]["val_error"]
    assert record["config"]["base_lr"] == float(min(candidates, key=lambda lr: (candidates[lr], float(lr))))
    assert record["config"]["data"]["val_size"] == 0
