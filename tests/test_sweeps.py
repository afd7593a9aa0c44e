"""Every sweep file end to end at toy size: trained as a user would, and then reported."""

import pandas as pd
import pytest
from omegaconf import OmegaConf

from gnbench.analysis.page import write_report
from gnbench.configs import CONFIGS, choices

TINY = ("data=tiny", "model=resnet8", "num_threads=1", "epochs=2", "precise_images=32")
SMALLER = {  # what is typed to make each sweep toy-sized, how many runs it then has, and a figure that it is for
    "batch_size": ("norm=bn,gn batch_size=8,2 seed=0,1 max_steps=3", 8, "error_vs_batch_size.png"),
    "paper": ("norm=bn,gn norm_batch_size=4,2 seed=0 max_steps=2", 4, "error_vs_norm_batch_size.png"),
    "norm_batch_size": (
        "norm=bn,gn batch_size=16 norm_batch_size=16,2 seed=0,1 max_steps=2",
        6,
        "error_by_statistics.png",
    ),
    "norms": ("batch_size=8 seed=0 max_steps=2", 4, "curves.png"),
    "num_groups": ("norm.num_groups=16,1 batch_size=8 seed=0 max_steps=2", 2, "groups.png"),
    "channels_per_group": ("norm.channels_per_group=16,1 batch_size=8 seed=0 max_steps=2", 2, "groups.png"),
    "batch_renorm": ("seed=0 max_steps=2", 3, "error_vs_batch_size.png"),
    "diagnostics": ("norm=bn,none batch_size=2 max_steps=2 diagnostics=32", 2, "noise.png"),
    "responses": ("model=vgg16 data.size=32 batch_size=8 seed=0 max_steps=1", 3, "responses.png"),
    "zoo": ("norm=mabn,frn batch_size=8 norm_batch_size=8,2 seed=0 max_steps=1", 3, "error_vs_norm_batch_size.png"),
    "quick": ("norm=bn,gn batch_size=8,2 seed=0 max_steps=2", 4, "error_vs_batch_size.png"),
}
TWINS = {"paper", "norms", "channels_per_group", "batch_renorm", "quick", "zoo", "diagnostics"}  # of others here


def test_every_sweep_is_tried_here():
    elsewhere = {"tune", "tuned", "cost"}  # the first two below, the third in test_cost.py: it trains nothing
    assert set(SMALLER) | elsewhere == set(choices("sweep"))


def test_the_zoo_leaves_no_norm_out():
    listed = OmegaConf.load(CONFIGS / "sweep" / "zoo.yaml")["hydra"]["sweeper"]["params"]["norm"].split(",")
    assert {*listed, "custom", "syncbn"} == set(choices("norm"))  # syncbn is bn where one process holds the batch


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in TWINS else name for name in SMALLER]
)
def test_a_sweep_trains_and_reports(gnbench, tmp_path, name):
    words, count, figure = SMALLER[name]
    done = gnbench(f"sweep={name}", *TINY, *words.split(), "hydra.launcher.num_processes=1")
    assert (done.returncode, done.stderr) == (0, "")
    runs = tmp_path / "results" / name
    write_report([runs], runs)
    frame = pd.read_csv(runs / "runs.csv")
    assert len(frame) == count
    assert set(frame["status"]) == {"done"}
    assert (runs / figure).stat().st_size > 10_000
    assert (runs / "report.html").exists()


def test_tuned_rates_come_from_held_out_images_and_reach_the_final_runs(gnbench, tmp_path):
    words = ("norm=bn,gn", "batch_size=8", "max_steps=4")
    assert gnbench("sweep=tune", *TINY, *words, "base_lr=0.2,0.1", "data.val_size=12").returncode == 0
    done = gnbench("sweep=tuned", *TINY, *words, "seed=1,2")
    assert (done.returncode, done.stderr) == (0, "")
    tune, tuned = (tmp_path / "results" / name for name in ("tune", "tuned"))
    for directory in (tune, tuned):
        write_report([directory], directory)
    assert (tune / "error_vs_learning_rate.png").stat().st_size > 10_000
    tried, final = pd.read_csv(tune / "runs.csv"), pd.read_csv(tuned / "runs.csv")
    for norm in ("bn", "gn"):
        candidates = tried[tried["norm"] == norm].sort_values(["val_error", "base_lr"])
        assert set(final.loc[final["norm"] == norm, "base_lr"]) == {candidates["base_lr"].iloc[0]}


def test_a_sweep_of_tuned_runs_without_the_tuning_says_what_to_do(gnbench):
    refused = gnbench("sweep=tuned", *TINY, "norm=bn", "batch_size=8", "seed=1")
    assert refused.returncode == 2
    assert refused.stderr.strip() == "gnbench: tuned_from=results/tune holds no runs: gnbench sweep=tune makes them"
