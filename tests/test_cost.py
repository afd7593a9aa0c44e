"""What a norm costs: bytes by hand, ratios by naive formulas, and the sweep from its command to its figures."""

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import environment, tiny_config
from matplotlib.text import Text
from omegaconf import OmegaConf
from synthetic import make_config, write_run
from torch import nn

from gnbench import cost as costing
from gnbench import timing
from gnbench.analysis import check, page, report, runs, table
from gnbench.analysis import cost as analysis
from gnbench.analysis.statistics import summarize
from gnbench.configs import CONFIGS, choices
from gnbench.cost import count_saved_bytes, find_largest, summarize_rounds, take_batch, time_rounds
from gnbench.errors import UserError
from gnbench.plan import plan_run
from gnbench.record import digest, load_record, run_name, save_record
from gnbench.run import Interrupted, execute, make_training
from hydra_plugins.gnbench.cores import Cores
from hydra_plugins.gnbench.plan import Plan
from hydra_plugins.gnbench.slurm import Slurm

N, C, H, W = 4, 8, 5, 6
FLOAT = 4  # bytes
MAP = N * C * H * W * FLOAT  # of one feature map
SHORT = ("measure=cost", "cost_rounds=2", "cost_round_s=0")
TINY = ("data=tiny", "model=resnet8", "num_threads=1", "cost_rounds=2", "cost_round_s=0")
MYNORM = """
from torch import nn


class Scale(nn.Module):
    def __init__(self, num_channels, factor=2.0):
        super().__init__()
        self.norm = nn.GroupNorm(2, num_channels)
        self.factor = factor

    def forward(self, x):
        return self.factor * self.norm(x)
"""


def plan_tiny(*words, results="x"):
    return plan_run({**tiny_config(*words), "results": str(results)}, default_threads=1)


# Memory


def count(*layers):
    """Bytes that layers save of images (N, C, H, W), which have no part in it, as parameters and buffers have none."""
    model, images = nn.Sequential(*layers).train(), torch.randn(N, C, H, W)
    return count_saved_bytes(lambda: model(images), [*model.parameters(), *model.buffers(), images])


def conv():
    return nn.Conv2d(C, C, 3, padding=1, bias=False)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([conv()], 0),  # its weight and the images
        ([conv(), nn.ReLU()], MAP),  # the ReLU's output
        ([conv(), nn.ReLU(), conv()], MAP),  # which is the second convolution's input too
        ([conv(), conv()], MAP),
        ([conv(), nn.BatchNorm2d(C)], MAP + 2 * C * FLOAT),  # its input, each channel's mean and 1 / std
        ([conv(), nn.BatchNorm2d(C), nn.ReLU(), conv()], 2 * MAP + 2 * C * FLOAT),
        ([conv(), nn.GroupNorm(2, C)], MAP + 2 * N * 2 * FLOAT),  # of each group of each image
        ([conv(), nn.GroupNorm(C, C), nn.ReLU(), conv()], 2 * MAP + 2 * N * C * FLOAT),
        ([conv(), nn.Flatten(), nn.Unflatten(1, (C, H, W)), conv()], MAP),  # a view is no more memory
    ],
)
def test_saved_bytes_are_those_that_a_hand_counts(layers, expected):
    assert count(*layers) == expected


def test_nothing_is_saved_where_nothing_is_trained():
    with torch.no_grad():
        assert count(conv(), nn.ReLU()) == 0


def test_a_part_of_a_tensor_keeps_all_of_it():
    whole = torch.randn(10, 4, requires_grad=True) * 1
    assert (
        count_saved_bytes(lambda: whole[:2].relu() * whole[2:4].detach()) == (40 + 8) * FLOAT
    )  # and the ReLU's output


def make_for(run):
    return lambda node: make_training(
        dataclasses.replace(run, config={**run.config, "norm": node}), torch.device("cpu")
    )


def test_a_norms_share_is_what_the_model_saves_more_than_without():
    """ResNet-8 on 8 x 8 images: norms on 3 maps of 16 channels, 2 of 32 at half the size, 2 of 64 at a quarter."""
    batch, run = 8, plan_tiny("norm=bn", *SHORT)
    maps = [(16, 8)] * 3 + [(32, 4)] * 2 + [(64, 2)] * 2
    bn, none = (
        costing.measure_saved(costing.make_subject(make_for(run), node, run.config))
        for node in (run.config["norm"], {"name": "none", "_target_": "gnbench.norms.no_norm"})
    )
    expected = sum(batch * channels * size**2 * FLOAT + 2 * channels * FLOAT for channels, size in maps)
    assert (bn - none) * 2**20 == expected


@pytest.mark.parametrize(
    ("limit", "first", "found"), [(7, 2, 7), (2, 2, 2), (1, 2, None), (63, 1, 63), (100, 100, 100)]
)
def test_the_largest_that_fits_is_found_exactly_where_it_is_small(limit, first, found):
    assert find_largest(lambda size: size <= limit, first, most=10**6) == found


@pytest.mark.parametrize("limit", [1000, 4097, 123456])
def test_a_large_one_is_found_to_one_part_in_64_by_few_trials(limit):
    tried = []
    found = find_largest(lambda size: tried.append(size) or size <= limit, 2, most=10**6)
    assert limit - limit / costing.RESOLUTION <= found <= limit
    assert len(tried) == len(set(tried)) < 30


def test_no_batch_is_tried_that_is_larger_than_the_most():
    tried = []
    assert find_largest(lambda size: tried.append(size) or True, 3, most=20) == 12
    assert tried == [3, 6, 12]


def test_a_largest_batch_has_its_statistics_over_itself_and_says_what_stopped_it(monkeypatch):
    run, built = plan_tiny("norm=bn", "batch_size=8", *SHORT), []
    make = make_for(run)

    def make_small(node):
        built.append(node["norm_batch_size"])
        if node["norm_batch_size"] > 9:
            raise torch.cuda.OutOfMemoryError("no more")
        return make(node)

    found = costing.measure_largest_batch(run.config, make_small)
    assert found == {"largest_batch": 9, "largest_batch_limit": "out of memory"}
    assert built == [8, 16, 12, 10, 9]
    monkeypatch.setattr(costing, "MOST_IMAGES", 16)
    assert costing.measure_largest_batch(run.config, make)["largest_batch_limit"] == "16 were tried"


# Time


def test_calls_are_timed_as_often_as_they_begin_in_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def take_two_seconds():
        now[0] += 2.0
        calls.append(now[0])

    for seconds, expected in ((5.0, 3), (4.0, 2), (0.0, 1)):
        calls = []
        assert timing.time_calls(take_two_seconds, seconds, torch.device("cpu")) == 2.0
        assert len(calls) == expected


def test_the_norm_and_bn_take_turns_in_an_order_that_every_round_reverses(monkeypatch):
    said = []

    def subject(name):
        return SimpleNamespace(
            prepare=lambda way: said.append((name, way)),
            step=lambda: f"{name} step",
            inference=lambda: f"{name} inference",
            images=torch.empty(0),
        )

    seconds = {"norm step": 3.0, "bn step": 2.0, "norm inference": 0.5, "bn inference": 0.25}
    monkeypatch.setattr(costing, "time_calls", lambda action, *_: seconds[action()])
    pauses = []
    rounds = time_rounds({"": subject("norm"), "bn_": subject("bn")}, 2, 0.1, lambda: pauses.append(1))
    row = {"bn_inference_ms": 250.0, "bn_step_ms": 2000.0, "inference_ms": 500.0, "step_ms": 3000.0}
    assert rounds == [row, row]
    assert [name for name, way in said if way == "step"] == ["norm", "bn", "bn", "norm"]
    assert len(pauses) == 2


def test_medians_quartiles_and_ratios_are_those_of_naive_formulas():
    steps, bn_steps = [30.0, 10.0, 20.0, 50.0, 40.0], [10.0, 10.0, 5.0, 20.0, 80.0]
    rounds = [
        {"step_ms": a, "bn_step_ms": b, "inference_ms": a / 2, "bn_inference_ms": b}
        for a, b in zip(steps, bn_steps, strict=True)
    ]
    summary = summarize_rounds(rounds, batch_size=8)
    assert (summary["step_ms_low"], summary["step_ms"], summary["step_ms_high"]) == (20.0, 30.0, 40.0)
    ratios = sorted(a / b for a, b in zip(steps, bn_steps, strict=True))  # of the same round, not of the medians
    assert ratios == [0.5, 1.0, 2.5, 3.0, 4.0]
    assert (summary["step_ratio_low"], summary["step_ratio"], summary["step_ratio_high"]) == (1.0, 2.5, 3.0)
    assert summary["inference_ratio"] == statistics.median(ratio / 2 for ratio in ratios)
    assert summary["bn_step_ms"] == statistics.median(bn_steps)
    assert summary["images_per_s"] == pytest.approx(8 / 0.030)
    assert summary["inference_images_per_s"] == pytest.approx(8 / 0.015)


def test_one_round_is_its_own_median_and_quartiles():
    row = {"step_ms": 6.0, "bn_step_ms": 2.0, "inference_ms": 1.0, "bn_inference_ms": 2.0}
    summary = summarize_rounds([row], 2)
    assert {summary[f"step_ratio{end}"] for end in ("", "_low", "_high")} == {3.0}


@pytest.mark.parametrize(
    ("norm", "asked", "taken", "bn"),
    [
        ("gn", "auto", "channels_last", "channels_last"),
        ("in", "auto", "contiguous", "channels_last"),  # each as its own trainer would
        ("in", "channels_last", "channels_last", "channels_last"),
        ("gn", "contiguous", "contiguous", "contiguous"),
    ],
)
def test_the_format_is_the_one_asked_for_or_the_trainers(tmp_path, norm, asked, taken, bn):
    record = execute(plan_tiny(f"norm={norm}", f"memory_format={asked}", *SHORT, results=tmp_path))
    assert (record["cost"]["norm_format"], record["cost"]["bn_format"]) == (taken, bn)
    assert record["environment"]["engine"] == {"contiguous": "eager"}.get(taken, taken)


def test_a_measurement_does_not_move_the_weights_and_fills_a_batch():
    run = plan_tiny("norm=none", *SHORT)
    subject = costing.make_subject(make_for(run), run.config["norm"], run.config, batch_size=200)
    assert subject.images.shape == (200, 3, 8, 8)  # of 96 images
    torch.testing.assert_close(subject.images[96:192], subject.images[:96])
    before = [parameter.clone() for parameter in subject.training.model.parameters()]
    costing.warm_up(subject, 3)
    torch.testing.assert_close(list(subject.training.model.parameters()), before, rtol=0, atol=1e-6)
    assert len(take_batch(subject.training.dataset, 5)[1]) == 5


# Config


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["measure=speed"], "measure=speed is not legal: it is one of error, cost"),
        (["memory_format=contiguous"], "memory_format=contiguous is not legal for a training: it belongs to"),
        (["measure=error", "cost_rounds=3"], "cost_rounds=3 is not legal for a training"),
        (["measure=cost", "memory_format=nhwc"], "memory_format=nhwc is not legal: it is one of auto, channels_last"),
        (["measure=cost", "tensorboard=true"], "tensorboard=True is not legal with measure=cost"),
        (["measure=cost", "diagnostics=64"], "diagnostics=64 is not legal with measure=cost"),
        (["measure=cost", "engine=eager"], "engine=eager is not legal with measure=cost"),
        (["measure=cost", "cost_rounds=0"], "cost_rounds=0 is not legal: it is 1 or more"),
        (["measure=cost", "cost_round_s=-1"], "cost_round_s=-1.0 is not legal: it is 0 or more"),
        (["measure=cost", "cost_warm_up=0"], "cost_warm_up=0 is not legal: it is 1 or more"),
    ],
)
def test_what_is_not_legal_is_refused_in_a_sentence(words, sentence):
    with pytest.raises(UserError, match=sentence):
        plan_tiny(*words)


def test_a_training_is_the_run_that_it_was_before_there_were_measurements():
    plain, error, cost = plan_tiny(), plan_tiny("measure=error"), plan_tiny("measure=cost")
    assert plain.digest == error.digest != cost.digest
    assert not {"measure", "memory_format", "cost_rounds", "cost_round_s", "cost_warm_up"} & set(plain.config)
    assert cost.digest == plan_tiny("measure=cost", "memory_format=auto", "cost_rounds=15").digest
    assert cost.digest != plan_tiny("measure=cost", "memory_format=contiguous").digest


def test_the_sweep_is_of_every_norm():
    params = OmegaConf.load(CONFIGS / "sweep" / "cost.yaml").hydra.sweeper.params
    left_out = {"custom", "syncbn"}  # syncbn is bn where one process holds the batch
    assert sorted(params.norm.split(",")) == sorted(set(choices("norm")) - left_out)


def test_measurements_go_one_at_a_time():
    launcher = Cores(num_processes=2)
    launcher.runs = [plan_tiny("measure=cost")]
    with pytest.raises(UserError, match="num_processes=2 is not legal with measure=cost"):
        launcher._check()
    launcher = Cores(num_processes=None)
    launcher.runs = [plan_tiny("measure=cost", f"seed={seed}", "batch_size=2") for seed in (0, 1)]
    assert launcher._num_processes() == 1
    assert launcher._group(launcher.runs) == [[0], [1]]  # nor as one network


def test_measurements_do_not_share_a_sweep_with_trainings_or_a_cluster():
    launcher = Cores(num_processes=None)
    launcher.runs = [plan_tiny("measure=cost"), plan_tiny()]
    with pytest.raises(UserError, match="measure=error,cost is not legal in one sweep"):
        launcher._check()
    cluster = Slurm(None, None, None, cluster="local")
    cluster.runs = [plan_tiny("measure=cost")]
    with pytest.raises(UserError, match="measure=cost is not legal with hydra/launcher=slurm"):
        cluster._check()


def test_a_plan_tells_how_long_measurements_take_at_least(capsys):
    left = [plan_tiny("measure=cost", "cost_rounds=10", "cost_round_s=0.5", f"seed={seed}") for seed in (0, 1)]
    Plan(False, None, None).tell("2 runs: 0 finished, 2 to do", left, left)
    assert capsys.readouterr().out.splitlines()[-1] == "estimated: about 44 s at least, one after the other"


# From the command to the figures


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The sweep as a user starts it, a norm of the user's own, and two trainings; and what the commands said."""
    directory = tmp_path_factory.mktemp("measured")
    (directory / "mynorm.py").write_text(MYNORM)
    sweep = ("sweep=cost", *TINY, "norm=bn,gn", "batch_size=8,2")
    custom = (*TINY, "measure=cost", "norm=custom", "norm._target_=mynorm.Scale", "+norm.factor=3.0", "batch_size=8")
    said = [start(directory, *words) for words in (sweep, (*custom, "results=results/cost"), sweep)]
    for norm in ("gn", "ln"):
        execute(plan_tiny(f"norm={norm}", "max_steps=2", results=directory / "results" / "errors"))
    return directory / "results", said


def start(directory, *words):
    command = [sys.executable, "-m", "gnbench", "--config-dir", os.path.join(os.path.dirname(__file__), "configs")]
    done = subprocess.run(
        [*command, *words], cwd=directory, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_sweep_measures_each_point_once(measured):
    results, said = measured
    assert "4 runs: 0 finished, 4 to do" in said[0]
    assert [text.count(" ms a step, ") for text in said] == [4, 1, 0]
    assert said[2] == "4 runs: 4 finished, 0 to do\n"
    records = [load_record(path) for path in sorted((results / "cost").glob("*/record.json"))]
    assert sorted(record["config"]["norm"]["name"] for record in records) == ["Scale", "bn", "bn", "gn", "gn"]
    for record in records:
        assert (record["status"], record["result"], record["history"]) == ("done", None, [])
        assert len(record["cost"]["rounds"]) == 2
        assert record["cost"]["peak_memory_mb"] is record["cost"]["largest_batch"] is None  # on a CPU
        assert record["cost"]["norm_saved_mb"] > 0


def test_a_norm_of_ones_own_costs_like_any_other(measured):
    costs = analysis.load(measured[0] / "cost")
    own = costs[costs["norm"] == "Scale"].iloc[0]
    gn = costs[(costs["norm"] == "gn") & (costs["batch_size"] == 8)].iloc[0]
    assert own["norm.factor"] == 3.0
    assert own["step_ratio"] > 0
    assert own["num_parameters"] == gn["num_parameters"]
    assert 0.5 < own["norm_saved_mb"] / gn["norm_saved_mb"] < 2


def test_a_report_of_measurements_has_their_table_and_figures(measured, tmp_path, capsys):
    assert report.main([str(measured[0] / "cost"), "--out", str(tmp_path)]) == 0
    names = {"cost.csv", "report.html", *(f"{n}.{e}" for n in ("cost_vs_bn", "saved_memory") for e in ("svg", "png"))}
    assert {path.name for path in tmp_path.iterdir()} == names  # and no figure or table of errors
    assert "Time of a training step at batch size 8 as a multiple of BN's" in capsys.readouterr().out
    frame = pd.read_csv(tmp_path / "cost.csv")
    assert tuple(frame) == analysis.COLUMNS
    assert len(frame) == 5
    assert set(frame["memory_format"]) == {"auto"}
    page = (tmp_path / "report.html").read_text()
    for words in ("What each norm costs", "Measurements of cost", "5: 5 done", "Scale", "rounds, in each of which"):
        assert words in page
    assert "Every cell" not in page


def test_errors_and_costs_are_reported_together_and_stay_apart(measured, tmp_path):
    directories = [str(measured[0] / name) for name in ("errors", "cost")]
    assert report.main([*directories, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "error_vs_cost.png").stat().st_size > 10_000
    assert len(pd.read_csv(tmp_path / "cost.csv")) == 5
    assert set(pd.read_csv(tmp_path / "runs.csv")["norm"]) == {"gn", "ln"}
    assert list(pd.read_csv(tmp_path / "summary.csv")["n"]) == [1, 1]


def test_the_other_commands_take_a_measurement_as_a_run(measured, capsys):
    cost = str(measured[0] / "cost")
    assert report.main(["--check", cost]) == 0
    assert runs.main([cost, "--where", "step_ratio > 0 and norm == 'gn'"]) == 0
    assert "2 of 5 runs: 2 done" in capsys.readouterr().out
    assert runs.main([cost, "--compare"]) == 0
    assert "step_ratio" in capsys.readouterr().out
    assert runs.main([cost, "--where", "norm == 'bn'", "--command"]) == 0
    assert capsys.readouterr().out.count("measure=cost memory_format=auto cost_rounds=2") == 2


def test_a_stopped_measurement_begins_anew(tmp_path, monkeypatch):
    run = plan_tiny(*SHORT, results=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(costing, "time_calls", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or 1.0)
        with pytest.raises(Interrupted):
            execute(run)
    record = load_record(run.directory / "record.json")
    assert (record["status"], record["cause"]) == ("interrupted", "stopped by SIGTERM")
    assert execute(run)["status"] == "done"
    monkeypatch.setattr(costing, "measure_saved", None)  # which a finished one needs no more
    assert execute(run)["cost"]["rounds"]


def test_a_measurement_that_fails_says_why_and_is_tried_again(tmp_path, monkeypatch):
    run = plan_tiny(*SHORT, results=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(costing, "time_rounds", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            execute(run)
    record = load_record(run.directory / "record.json")
    assert (record["status"], record["cause"]) == ("failed", "ZeroDivisionError: division by zero")
    assert [finding.sentence for finding in check.check_runs(tmp_path)] == [
        "failed: ZeroDivisionError: division by zero"
    ]
    assert execute(run)["status"] == "done"


# Analysis of made-up measurements


def write_cost(directory, norm="gn", batch_size=32, ratio=2.0, status="done", cause=None, **keys):
    """The record of a measurement in which a step takes `ratio` times BN's, give or take a tenth."""
    keys = {"measure": "cost", "memory_format": "auto", "cost_rounds": 3, "cost_round_s": 0.1, **keys}
    config = make_config(norm, batch_size, 0, **keys)
    bn = [10.0, 11.0, 12.0]
    rounds = [
        {"step_ms": b * ratio * f, "bn_step_ms": b, "inference_ms": b / 2 * ratio * f, "bn_inference_ms": b / 2}
        for b, f in zip(bn, (0.9, 1.0, 1.1), strict=True)
    ]
    cost = {"norm_format": "contiguous", "bn_format": "contiguous", **summarize_rounds(rounds, batch_size)}
    cost |= {"saved_mb": 10.0, "norm_saved_mb": 4.0, "peak_memory_mb": None, "largest_batch": None, "rounds": rounds}
    record = {
        "digest": digest(config, "fingerprint"), "status": status, "cause": cause, "config": config, "history": [],
        "environment": {"torch": "2.13.0", "device": "cpu", "processor": "Made-up 9000"}, "result": None,
        **({"cost": {**cost, "time_s": 3.0}} if status == "done" else {}),
    }  # fmt: skip
    record["run"] = run_name(config, record["digest"])
    save_record(directory / record["run"] / "record.json", record)
    return directory / record["run"]


@pytest.fixture
def both(tmp_path):
    """Errors of BN, GN, LN at 32 and 4, and the costs of BN and GN at 32."""
    for norm in ("bn", "gn", "ln"):
        for seed in (0, 1, 2):
            write_run(tmp_path / "errors", norm, 32, seed, test_error=24.0 + seed)
            write_run(tmp_path / "errors", norm, 4, seed, test_error=27.0 + seed)
    write_cost(tmp_path / "cost", "bn", 32, ratio=1.0)
    write_cost(tmp_path / "cost", "gn", 32, ratio=1.5)
    return tmp_path / "errors", tmp_path / "cost"


def test_a_measurement_never_joins_an_error(both):
    errors, costs = both
    alone, together = table.load(errors), table.load(errors, costs)
    pd.testing.assert_frame_equal(alone, together)
    pd.testing.assert_frame_equal(summarize(alone), summarize(together))
    pd.testing.assert_frame_equal(table.curves(errors), table.curves(errors, costs))
    assert len(table.load(costs)) == 0
    assert len(table.load(errors, costs, measure=None)) == len(alone) + 2
    assert list(analysis.load(errors, costs)["norm"]) == ["bn", "gn"]
    assert analysis.load(errors).empty


def points(ax):
    """{label: (x, y)} of the points drawn, each labelled where it stands."""
    return {text.get_text(): text.xy for text in ax.texts if text.get_text() and not text.get_text().isspace()}


def note(figure):
    return " ".join(figure._supxlabel.get_text().split())


def test_error_against_cost_has_a_labelled_point_a_norm_and_names_who_has_none(both):
    errors, costs = table.load(*both), analysis.load(*both)
    (ax,) = analysis.error_vs_cost(errors, costs)
    assert points(ax) == {"BN": (1.0, 25.0), "GN": (1.5, 25.0)}
    assert ax.get_title() == "batch size 32"
    assert "Without a measured cost, and left out: LN at 32" in note(ax.figure)
    assert ax.get_ylabel() == "test error (%)"


def test_where_no_batch_size_is_shared_the_nearest_two_are_and_the_title_says_so(tmp_path, both):
    other = tmp_path / "other"
    write_cost(other, "gn", 64, ratio=3.0)
    write_cost(other, "gn", 128, ratio=4.0)
    (ax,) = analysis.error_vs_cost(table.load(both[0]), analysis.load(other))
    assert points(ax) == {"GN": (3.0, 25.0)}
    assert ax.get_title() == "batch size 32, cost at 64"


def test_a_cost_belongs_to_the_same_parameters_model_and_precision(both):
    errors, costs = both
    for number, keys in enumerate(
        ({"norm_keys": {"num_groups": 4}}, {"model": {"name": "resnet8"}}, {"precision": "bf16"})
    ):
        write_cost(costs, "ln" if number else "gn", 32, ratio=9.0, **keys)
    cells = analysis.match_costs(table.load(errors), analysis.load(costs)).set_index("norm")
    assert cells["step_ratio"].dropna().to_dict() == {"bn": 1.0, "gn": 1.5}


def test_of_several_memory_formats_the_trainers_own_is_taken(both):
    errors, costs = both
    write_cost(costs, "gn", 32, ratio=9.0, memory_format="channels_last")
    write_cost(costs, "ln", 32, ratio=7.0, memory_format="contiguous")
    cells = analysis.match_costs(table.load(errors), analysis.load(costs)).set_index("norm")
    assert cells["step_ratio"].to_dict() == {"bn": 1.0, "gn": 1.5, "ln": 7.0}


def test_costs_and_memory_are_drawn_for_every_norm_batch_size_and_setting(both):
    _, costs = both
    write_cost(costs, "gn", 4, ratio=0.5)
    write_cost(costs, "gn", 32, ratio=3.0, precision="bf16")
    write_cost(costs, "ln", 32, status="failed", cause="RuntimeError: no")
    write_cost(costs, "in", 4, ratio=0.25)
    frame = analysis.load(costs)
    axes = analysis.cost_vs_bn(frame)
    assert [ax.get_title() for ax in axes] == [
        f"batch size {size}\nprecision={precision}" for precision in ("float32", "bf16") for size in (32, 4)
    ]
    drawn = [[line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1] for ax in axes]
    assert drawn == [[1.0, 1.0, 1.5, 1.5], [0.25, 0.25, 0.5, 0.5], [3.0, 3.0], []]
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["IN", "BN", "GN"]  # by geometric means
    assert "cost of LN" in note(axes[0].figure)
    panels = analysis.saved_memory(frame)
    assert [text.get_text() for text in panels[0].texts] == [" +4.0", " +4.0"]
    assert "batch size 32" in panels[0].get_xlabel()
    assert "Measured at other batch sizes alone: IN" in note(panels[0].figure)


def test_bn_that_shares_statistics_among_fewer_images_has_a_row_of_its_own(tmp_path):
    write_cost(tmp_path, "bn", 32, ratio=1.0)
    write_cost(tmp_path, "bn", 32, ratio=1.2, norm_batch_size=2)
    (ax,) = analysis.cost_vs_bn(analysis.load(tmp_path))
    assert [text.get_text() for text in ax.get_yticklabels()] == ["BN", "BN, NBS 2"]


def test_times_of_another_device_or_more_threads_are_another_setting(tmp_path):
    write_cost(tmp_path, "gn", 32)
    write_cost(tmp_path, "gn", 32, num_threads=2)
    assert list(analysis.load(tmp_path)["setting"]) == ["threads=1", "threads=2"]


def test_labels_stand_off_each_other_and_inside_the_axes():
    from gnbench.analysis.figures import new_axes

    ax = new_axes(1, (5, 4))[0]
    spots = pd.DataFrame({"x": [1.0, 1.001, 1.002, 2.0], "y": [5.0, 5.01, 4.99, 8.0]})
    ax.plot(spots["x"], spots["y"], "o")
    analysis.label_points(ax, spots.to_numpy(), ["first", "second", "third", "at the right edge"])
    ax.figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without the line to the point
    assert not any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[:index])
    frame = ax.get_window_extent()
    assert all(frame.x0 <= box.x0 + 1 and box.x1 - 1 <= frame.x1 for box in boxes)


def test_an_unfinished_or_damaged_measurement_is_named_and_not_drawn(both, capsys, tmp_path):
    _, costs = both
    write_cost(costs, "in", 32, status="interrupted", cause="stopped by SIGINT")
    damaged = write_cost(costs, "ln", 32) / "record.json"
    damaged.write_text("{")
    assert report.main([str(costs), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "cost of IN at batch size 32: interrupted, stopped by SIGINT" in page
    assert "unreadable" in page
    assert not (tmp_path / "out" / "runs.csv").exists()


def test_a_check_compares_a_cost_with_its_rounds(both):
    costs = both[1]
    assert check.check_runs(costs) == []
    place = next(path for path in costs.iterdir() if path.name.startswith("gn"))
    record = json.loads((place / "record.json").read_text())
    record["cost"]["step_ratio"] = 0.5
    save_record(place / "record.json", record)
    (finding,) = check.check_runs(costs)
    assert finding.sentence == "step_ratio is 0.5, by its rounds 1.5"
    save_record(place / "record.json", {**record, "cost": None})
    assert "without a cost" in check.check_runs(costs)[0].sentence


def test_costs_beside_trainings_of_which_none_has_finished_are_drawn_alone(both, tmp_path):
    write_run(tmp_path / "begun", "gn", 32, 0, status="running")
    page.write_report([tmp_path / "begun", both[1]], tmp_path / "out")
    assert (tmp_path / "out/cost_vs_bn.png").exists()
    assert not (tmp_path / "out/error_vs_cost.png").exists()
