"""What a sweep would do, told without doing it: counts, estimates and command lines are those of the real thing."""

import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import compose_config, environment, tiny_config

from gnbench import timing
from gnbench.engine import Eager
from gnbench.errors import UserError
from gnbench.plan import plan_run
from gnbench.recipe import Recipe
from gnbench.record import load_record
from gnbench.run import execute
from hydra_plugins.gnbench import plan as planning
from hydra_plugins.gnbench.plan import Calibration, Plan

TINY = ("data=tiny", "model=resnet8", "epochs=2", "batch_size=8", "num_threads=1", "results=out")
PLAN = ("-m", *TINY, "hydra/launcher=plan")
NUMBERS = Calibration(
    engine="eager", setup_s=2.0, step_s=3.0, test_s=5.0, val_s=7.0, end_s=11.0, memory_mb=300.0,
    whole=True,
)  # fmt: skip


def plan_tiny(directory, *words):
    return plan_run({**tiny_config(*words), "results": str(directory)}, default_threads=1)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("max_steps", [None, 5, 12, 13, 25])
@pytest.mark.parametrize("batch_size", [8, 10])
def test_images_are_counted_as_batches_hold_them(drop_last, max_steps, batch_size):
    recipe = Recipe(batch_size=batch_size, epochs=2, max_steps=max_steps, drop_last=drop_last)
    sizes = [min(batch_size, 97 - start) for start in range(0, 97, batch_size)] * 2
    sizes = [size for size in sizes if size == batch_size or not drop_last][:max_steps]
    assert recipe.total_steps(97) == len(sizes)
    assert planning.count_images(recipe, 97) == sum(sizes)


def test_a_run_does_the_work_that_was_counted(tmp_path):
    run = plan_tiny(tmp_path, "epochs=9", "max_steps=77", "test_every=3", "report_epochs=2", "data.val_size=12")
    work, history = planning.count_work(run), execute(run)["history"]
    assert work.steps == history[-1]["step"] == 77
    assert work.epochs == len(history) == 8
    assert work.tests == sum(row["test_error"] is not None for row in history) == 4
    assert work.images == 77 * 8


def test_a_cells_time_is_that_of_its_steps_and_of_each_seeds_tests(tmp_path):
    group = [plan_tiny(tmp_path, f"seed={seed}", "max_steps=20", "report_epochs=1") for seed in (0, 1)]
    steps, tests, epochs, seeds = 20, 2, 2, 2
    expected = 2 + steps * 3 + seeds * (tests * 5 + epochs * 7 + 11)
    assert planning.estimate_time(group, NUMBERS) == expected
    assert planning.estimate_time(group, "why not") is None


@pytest.mark.parametrize(("num_processes", "end_s"), [(1, 12), (2, 7), (3, 5), (9, 3)])
def test_processes_take_jobs_in_order_as_they_come_free(num_processes, end_s):
    assert planning.schedule([3, 3, 2, 2, 2], num_processes) == end_s


@pytest.mark.parametrize(("norm", "end_s"), [("bn", 60.0), ("gn", 0.0)])
def test_a_calibration_measures_steps_and_tests_and_leaves_nothing(tmp_path, monkeypatch, norm, end_s):
    """By a clock that only a step (2 s) and an image in evaluation (0.5 s) move."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], time=lambda: now[0])
    step = Eager.step

    def take_time(seconds):
        now[0] += seconds

    monkeypatch.setattr(planning, "time", clock)
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(Eager, "step", lambda self, batches: (take_time(2.0), step(self, batches))[1])
    monkeypatch.setattr("gnbench.evaluate.evaluate", lambda model, dataset, split, *_: take_time(0.5 * len(split)))
    found = planning.calibrate([plan_tiny(tmp_path / "out", f"norm={norm}", "data.val_size=12")], started_s=-4.0)
    assert (found.setup_s, found.step_s, found.test_s, found.val_s) == (4.0, 2.0, 20.0, 6.0)
    assert found.end_s == end_s  # a test by running, by precise and by mini-batch statistics
    assert found.engine == "channels_last"
    assert found.whole
    assert found.memory_mb > 100
    assert not (tmp_path / "out").exists()


def test_a_slow_test_is_foretold_and_measured_in_part(tmp_path, monkeypatch):
    now = [0.0]

    def evaluate(model, dataset, split, *_):
        now[0] += 1.0 * len(split)

    monkeypatch.setattr(planning, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(planning, "FEW_IMAGES", 4)
    monkeypatch.setattr(planning, "EVALUATION_S", 10.0)
    monkeypatch.setattr("gnbench.evaluate.evaluate", evaluate)
    import torch

    from gnbench.run import make_training

    training = make_training(plan_tiny(tmp_path), torch.device("cpu"))
    assert planning._measure_evaluation(training) == (1.0, 10)


def test_seeds_are_calibrated_as_the_network_that_they_train_as(tmp_path):
    runs = [plan_tiny(tmp_path, f"seed={seed}") for seed in (0, 1)]
    assert planning.calibrate(runs, started_s=0.0).engine == "2 seeds as one network, channels_last"


def test_what_does_not_change_a_steps_time_is_calibrated_once(tmp_path):
    first, tuned, larger = (
        [plan_tiny(tmp_path, *words)] for words in ([], ["base_lr=0.3", "epochs=7", "seed=5"], ["batch_size=16"])
    )
    assert planning._kind(first) == planning._kind(tuned)
    assert len({planning._kind(group) for group in (first, larger, first * 2)}) == 3


def test_cells_are_named_by_what_tells_them_apart():
    grids = {
        "norm=gn,bn": [["–", "8"], ["norm", "batch_size", "norm_batch_size"]],
        "norm=gn norm.num_groups=4,8": [["4", "8"], ["norm", "batch_size", "norm_batch_size", "num_groups"]],
        "norm=bn base_lr=0.1,0.2": [["0.1", "0.2"], ["norm", "batch_size", "norm_batch_size", "base_lr"]],
        "norm=bn model=resnet8,resnet20": [["resnet8", "resnet20"], ["norm", "batch_size", "norm_batch_size", "model"]],
    }
    for words, (last, columns) in grids.items():
        *fixed, axis = words.split()
        key, values = axis.split("=")
        configs = [
            plan_run(compose_config("model=resnet8", "batch_size=8", *fixed, f"{key}={value}"), 1).config
            for value in values.split(",")
        ]
        frame = planning.find_names(configs)
        assert list(frame) == columns
        assert list(frame[columns[-1]]) == last


def test_the_table_adds_up(tmp_path):
    runs = [
        plan_tiny(tmp_path, f"norm={norm}", f"seed={seed}", "max_steps=20", "report_epochs=1")
        for norm in ("bn", "gn")
        for seed in (0, 1, 2)
    ]
    groups = [runs[1:3], runs[3:4], runs[4:5]]
    calibrations = {planning._kind(groups[0]): NUMBERS, planning._kind(groups[1]): "why not"}
    assert planning.tabulate(runs, groups, calibrations).to_dict("records") == [
        {
            "norm": "bn", "batch_size": "8", "norm_batch_size": "8", "left": "2 of 3", "steps": 20, "images": 160,
            "executed as": "2 seeds as one network", "estimated time": "about 2 min",
        },
        {
            "norm": "gn", "batch_size": "8", "norm_batch_size": "–", "left": "2 of 3", "steps": 20, "images": 160,
            "executed as": "one a process", "estimated time": "–",
        },
    ]  # fmt: skip


def test_a_sweep_that_is_done_is_told_without_a_calibration(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(planning, "_calibrate_aside", None)
    Plan(False, None, None).tell("1 run: 1 finished, 0 to do", [plan_tiny(tmp_path)], [])
    count, _, row, last = capsys.readouterr().out.splitlines()
    assert count == "1 run: 1 finished, 0 to do"
    assert row.split() == ["bn", "8", "8", "0", "of", "1", "24", "192", "–", "–"]
    assert last == "nothing is left to do"


def test_a_calibration_that_never_ends_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "LIMIT_S", 0.5)
    context = Plan(False, 1, None)._context()
    run = plan_tiny(tmp_path, "norm=troubled", "norm.fault=hang")
    assert planning._calibrate_aside(context, [run]).endswith("its calibration took more than 0 s")


def test_another_sweeper_is_refused():
    with pytest.raises(UserError, match="hydra/sweeper=grid"):
        Plan(False, None, None).launch([["seed=0"]], 0)


def test_a_plan_trains_nothing_and_names_what_cannot_be_calibrated(gnbench, tmp_path):
    words = (*PLAN, "norm=troubled", "norm.fault=good,raise,exit", "norm_batch_size=2,4", "max_steps=20")
    done = gnbench(*words)
    assert (done.returncode, done.stderr) == (0, "")
    count, told, titles, *lines = done.stdout.splitlines()
    assert count == "3 runs (6 cells; some are one and the same run): 0 finished, 3 to do"
    assert told.startswith("calibrating: 3 kinds of run")
    assert titles.split()[:5] == ["norm", "batch_size", "norm_batch_size", "fault", "left"]
    rows = {row[3]: row for row in map(str.split, lines[:3])}
    assert [rows[fault][:10] for fault in ("good", "raise", "exit")] == [
        ["troubled", "8", "–", fault, "1", "of", "1", "20", "160", "one"] for fault in ("good", "raise", "exit")
    ]
    assert [rows[fault][-1] for fault in ("good", "raise", "exit")] == ["s", "–", "–"]
    assert lines[3] == "left: 3 runs, 60 steps, 480 images"
    assert lines[4].startswith("estimated: ")
    assert sorted(lines[-2:]) == [
        "without an estimate, and not in the total: troubled batch_size=8: ZeroDivisionError: a fault",
        "without an estimate, and not in the total: troubled batch_size=8: the process of its calibration ended with "
        "exit status 139",
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_commands_train_the_runs_that_are_left(gnbench, tmp_path):
    words = (*PLAN, "norm=bn", "norm_batch_size=8,4", "seed=3", "max_steps=2", "hydra.launcher.commands=true")
    told = gnbench(*words)
    assert (told.returncode, told.stderr) == (0, "")
    lines = told.stdout.splitlines()
    assert len(lines) == 2
    assert list(tmp_path.iterdir()) == []
    program, *typed = shlex.split(lines[0])
    assert program == "gnbench"
    done = subprocess.run(
        [sys.executable, "-m", "gnbench", *typed], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("out/*/record.json")
    assert load_record(path)["status"] == "done"
    assert load_record(path)["config"]["norm_batch_size"] == 8
    assert gnbench(*words).stdout.splitlines() == lines[1:]


def test_every_run_has_the_command_that_composes_to_it(tmp_path):
    runs = [
        plan_tiny(tmp_path / "my results", f"norm={norm}", f"seed={seed}") for norm in ("bn", "gn") for seed in (0, 1)
    ]
    lines = planning.find_commands(runs)
    again = [plan_run(compose_config(*shlex.split(line)[1:]), default_threads=4) for line in lines]
    assert [run.digest for run in again] == [run.digest for run in runs]
    assert [run.directory for run in again] == [run.directory for run in runs]
    changed = plan_tiny(tmp_path)
    changed.config["epochs"] = 3
    with pytest.raises(UserError, match=f"{changed.name} has no command line: its digest"):
        planning.find_commands([changed])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((*PLAN, "norm_batch_size=4,3", "hydra.launcher.commands=true"), "norm_batch_size=3 is not legal"),
        ((*PLAN, "seed=0,1", "hydra.launcher.num_processes=0"), "hydra.launcher.num_processes=0 is not legal"),
        ((*TINY, "hydra/launcher=plan"), "hydra/launcher=plan tells of a sweep and this is a single run"),
    ],
)
def test_what_is_not_legal_is_refused_before_a_line_is_printed(gnbench, tmp_path, words, sentence):
    refused = gnbench(*words)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"gnbench: {sentence}")
    assert refused.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
