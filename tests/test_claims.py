"""Every verdict on data made to deserve it, on data that must not be judged, and its rate of error under chance."""

import math
import re

import numpy as np
import pandas as pd
import pytest
from synthetic import write_run, write_sweep

from gnbench.analysis import claims, table

SEEDS = range(5)


def write_cell(directory, norm, batch_size, mean, sd=0.2, seeds=SEEDS, train_error=None, **options):
    """Seeds spread evenly around `mean`, and around `train_error`, with standard deviation `sd`."""
    spread = np.linspace(-1, 1, len(seeds))
    for seed, off in zip(seeds, sd * spread / spread.std(ddof=1), strict=True):
        trained = {} if train_error is None else {"train_error": float(train_error + off)}
        write_run(directory, norm, batch_size, seed, test_error=float(mean + off), **trained, **options)


def test_seeds_that_agree_to_the_last_image_prove_nothing(tmp_path):
    for norm, batch_size, mean in (("bn", 32, 40), ("bn", 4, 50), ("bn", 2, 60), *(("gn", n, 50) for n in (32, 4, 2))):
        write_cell(tmp_path, norm, batch_size, mean, sd=0)
    table_of_claims = claims.claims(table.load(tmp_path)).set_index("claim")
    assert set(table_of_claims["verdict"]) == {claims.OPEN, claims.NOT_TESTED}
    told = table_of_claims.loc["BN beats GN at batch size 32.", "detail"]
    assert told == f"GN at batch size 32 and BN at batch size 32: {claims.NO_SPREAD}"


def test_lines_that_touch_at_a_size_cross_there(tmp_path):
    for norm, errors in (("bn", (20, 30, 40)), ("gn", (30, 30, 30))):
        for batch_size, mean in zip((32, 8, 2), errors, strict=True):
            write_cell(tmp_path, norm, batch_size, mean)
    found = judge(tmp_path, "BN's and GN's lines cross")
    assert found["verdict"] == claims.HOLDS
    assert "the crossover lies between 2 and 32 (the means cross between 2 and 32)" in found["detail"]


def judge(directory, start, **options):
    """The row of the one statement that starts so."""
    table_of_claims = claims.claims(table.load(directory), **options)
    rows = table_of_claims[table_of_claims["claim"].str.startswith(start)]
    assert len(rows) == 1
    return rows.iloc[0]


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """A whole grid shaped like the paper's Figure 1, five seeds."""
    directory = write_sweep(tmp_path_factory.mktemp("paper"), norms=("bn", "gn", "ln", "in"), seeds=SEEDS, sd=0.15)
    return claims.claims(table.load(directory)).set_index("claim")


@pytest.mark.parametrize(
    "start",
    [
        "GN's test error is level",
        "BN's test error rises",
        "BN beats",
        "GN beats",
        "BN's and GN's",
        "GN's tr",
        "GN lies",
    ],
)
def test_the_papers_numbers_make_the_papers_claims_hold(paper, start):
    rows = paper[paper.index.str.startswith(start)]
    assert len(rows)
    assert set(rows["verdict"]) == {claims.HOLDS}


def test_what_was_not_trained_is_not_judged(paper):
    rows = paper[paper["verdict"] == claims.NOT_TESTED]
    assert list(rows["detail"]) == [
        "GN was not trained with different groups",
        "BN was not trained at one batch size with different norm_batch_size",
        "the records hold no errors by statistics",
    ]
    assert rows["effect"].isna().all()
    assert list(paper["verdict"])[-3:] == [claims.NOT_TESTED] * 3
    assert claims.OPEN not in set(paper["verdict"])


def test_a_sweep_of_three_norms_without_bn_tests_nothing(tmp_path):
    for norm in ("gn", "ln", "in"):
        write_cell(tmp_path, norm, 32, 24)
    found = claims.claims(table.load(tmp_path))
    papers = found[found["source"] != claims.OF_ANY]
    assert set(papers["verdict"]) == {claims.NOT_TESTED}
    assert "GN at batch size 2 has no run" in set(papers["detail"])
    assert "BN has no run" in set(papers["detail"])


# Norms of which the papers say nothing


def test_a_new_norm_is_judged_level_and_against_bn_and_gn_at_its_smallest_batch(tmp_path):
    for batch_size in (32, 4):
        write_cell(tmp_path, "bn", batch_size, {32: 23, 4: 27}[batch_size])
        write_cell(tmp_path, "gn", batch_size, 24)
        write_cell(tmp_path, "mynorm", batch_size, 24.6)
    assert judge(tmp_path, "mynorm's test error is level from batch size 32 to 4")["verdict"] == claims.HOLDS
    beaten, lost = judge(tmp_path, "mynorm beats BN at batch size 4."), judge(tmp_path, "mynorm beats GN")
    assert (beaten["verdict"], lost["verdict"]) == (claims.HOLDS, claims.FAILS)
    assert beaten["effect"] == pytest.approx(2.4)
    assert set(claims.claims(table.load(tmp_path))["claim"].str.contains("mynorm beats GN at batch size 32")) == {False}


def test_a_norm_that_rises_is_not_level_and_one_with_a_failed_run_is_not_judged(tmp_path):
    for batch_size in (32, 4):
        write_cell(tmp_path, "rising", batch_size, {32: 23, 4: 27}[batch_size])
        write_cell(tmp_path, "lost", batch_size, 24, seeds=(0, 1, 2))
    write_run(tmp_path, "lost", 4, 3, test_error=24.0, status="failed")
    assert judge(tmp_path, "rising's test error is level")["verdict"] == claims.FAILS
    row = judge(tmp_path, "lost's test error is level")
    assert (row["verdict"], "1 of 4 runs failed" in row["detail"]) == (claims.OPEN, True)


def test_many_norms_against_one_are_a_family(tmp_path):
    """A difference that shows by itself, and not among twelve that are asked the same."""
    write_cell(tmp_path, "gn", 4, 24, sd=1.0)
    write_cell(tmp_path, "mynorm", 4, 22.3, sd=1.0)
    assert judge(tmp_path, "mynorm beats GN")["verdict"] == claims.HOLDS
    for number in range(11):
        write_cell(tmp_path, f"norm{number}", 4, 24, sd=1.0)
    row = judge(tmp_path, "mynorm beats GN")
    assert (row["verdict"], row["p"] < 0.05, row["p_holm"]) == (claims.OPEN, True, pytest.approx(12 * row["p"]))
    assert row["test"] == "Welch, Holm over 12 norms"


def test_no_norm_is_no_norm(tmp_path):
    for norm in ("gn", "none"):
        write_cell(tmp_path, norm, 4, 24)
    assert not claims.claims(table.load(tmp_path))["claim"].str.contains("no norm").any()


def test_a_cell_without_runs_weighs_more_than_one_that_cannot_be_judged(tmp_path):
    """BN at 2 has one seed, or has diverged; GN at 2 and BN at 32 were never trained: no more seeds would tell."""
    write_run(tmp_path / "one", "bn", 2)
    write_run(tmp_path / "diverged", "bn", 2, status="diverged")
    for place in ("one", "diverged"):
        for start in ("BN's test error rises", "GN beats BN at batch size 2", "BN's and GN's"):
            assert judge(tmp_path / place, start)["verdict"] == claims.NOT_TESTED, (place, start)
        assert judge(tmp_path / place, "Precise statistics")["verdict"] != claims.HOLDS
    assert judge(tmp_path / "diverged", "Precise statistics")["detail"] == "BN at batch size 2: 1 of 1 run diverged"


def test_statements_that_are_not_tested_come_last(tmp_path):
    for epochs in (3, 30):
        write_cell(tmp_path, "bn", 32, 24, epochs=epochs)
        write_cell(tmp_path, "bn", 2, 34, epochs=epochs)
    found = claims.claims(table.load(tmp_path))
    assert list(found["verdict"]) == [claims.HOLDS] * 2 + [claims.NOT_TESTED] * (len(found) - 2)


def test_one_setting_with_one_norm_batch_size_makes_up_no_others(tmp_path):
    """SGD batch 128 with NBS 128 to 2, and frozen statistics with NBS 2 alone: no sweep has batches of 2048."""
    for size in (128, 32, 2):
        write_cell(tmp_path, "bn", 128, 24, norm_batch_size=size)
    write_cell(tmp_path, "bn", 128, 24, norm_batch_size=2, frozen_epochs=3)
    found = claims.claims(table.load(tmp_path))
    frozen = found[found["setting"] == "frozen_epochs=3"]
    assert set(frozen["verdict"]) == {claims.NOT_TESTED}
    assert "BN [frozen_epochs=3] at batch size 2 has no run" in set(frozen["detail"])
    assert not found["detail"].str.contains("2048|256|norm_batch_size 32").any()


def test_a_norm_off_the_axis_is_not_said_to_have_no_run(tmp_path):
    for images in (32, 2):
        write_cell(tmp_path, "brn", 8 * images, 24, norm_batch_size=images, norm_keys={"norm_batch_size": images})
    frame = table.load(tmp_path)
    of_bn = frame.assign(norm="bn", norm_batch_size=frame["batch_size"], label="BN")
    both = pd.concat([frame.assign(norm_batch_size=frame["batch_size"] // 8), of_bn.iloc[:5]], ignore_index=True)
    details = claims.claims(both)["detail"]
    assert "BN has no run with batch_size = 8 · norm_batch_size" in set(details)


def test_a_rise_is_reported_in_points_with_its_interval(tmp_path):
    write_cell(tmp_path, "bn", 32, 24)
    write_cell(tmp_path, "bn", 2, 34)
    row = judge(tmp_path, "BN's test error rises")
    assert row["verdict"] == claims.HOLDS
    assert row["effect"] == pytest.approx(10)
    assert 9 < row["low"] < 10 < row["high"] < 11
    assert row["p"] < 1e-4
    assert row["n"] == 5
    assert row["p_paired"] == pytest.approx(2 / 2**5)


def test_a_rise_below_the_margin_does_not_hold(tmp_path):
    write_cell(tmp_path, "bn", 32, 24)
    write_cell(tmp_path, "bn", 2, 25)
    assert judge(tmp_path, "BN's test error rises", margin=3)["verdict"] == claims.FAILS
    assert judge(tmp_path, "BN's test error rises", margin=0.3)["verdict"] == claims.HOLDS
    row = judge(tmp_path, "BN's test error rises", margin=0.9)
    assert row["verdict"] == claims.OPEN
    assert row["seeds_needed"] > 20
    assert f"about {row['seeds_needed']:.0f} seeds a cell would tell" in row["detail"]
    assert "more than 0.9 points" in row["claim"]


def test_no_affordable_number_of_seeds(tmp_path):
    write_cell(tmp_path, "bn", 32, 24)
    write_cell(tmp_path, "bn", 2, 25)
    row = judge(tmp_path, "BN's test error rises")
    assert row["verdict"] == claims.OPEN
    assert "no affordable number" in row["detail"]
    assert math.isnan(row["seeds_needed"])


def test_level_is_refuted_by_one_size_that_is_far_off(tmp_path):
    for batch_size, mean in ((32, 24), (8, 27), (2, 24)):
        write_cell(tmp_path, "gn", batch_size, mean)
    row = judge(tmp_path, "GN's test error is level")
    assert row["verdict"] == claims.FAILS
    assert row["effect"] == pytest.approx(3)
    assert row["test"] == "Welch against +1, Holm over 2 batch sizes"
    assert row["p"] < row["p_holm"] < 0.05
    assert row["low"] > 1


def test_level_is_open_when_the_spread_is_wide(tmp_path):
    for batch_size in (32, 2):
        write_cell(tmp_path, "gn", batch_size, 24, sd=1.5)
    row = judge(tmp_path, "GN's test error is level")
    assert row["verdict"] == claims.OPEN
    assert 5 < row["seeds_needed"] < 100


def test_the_winner_may_be_the_other(tmp_path):
    for batch_size in (32, 4, 2):
        write_cell(tmp_path, "bn", batch_size, 25)
        write_cell(tmp_path, "gn", batch_size, 23)
    assert judge(tmp_path, "BN beats GN at batch size 32")["verdict"] == claims.FAILS
    assert judge(tmp_path, "GN beats BN at batch size 2")["verdict"] == claims.HOLDS
    assert judge(tmp_path, "BN's and GN's lines cross")["verdict"] == claims.FAILS


def test_comparisons_over_batch_sizes_are_corrected(tmp_path):
    write_cell(tmp_path / "one", "bn", 2, 24.35)
    write_cell(tmp_path / "one", "gn", 2, 24)
    alone = judge(tmp_path / "one", "GN beats BN at batch size 2")
    for batch_size in (32, 16, 8, 4, 2):
        write_cell(tmp_path / "five", "bn", batch_size, 24.35 if batch_size == 2 else 24)
        write_cell(tmp_path / "five", "gn", batch_size, 24)
    among_five = judge(tmp_path / "five", "GN beats BN at batch size 2")
    assert among_five["p"] == alone["p"] < 0.05
    assert among_five["low"] == alone["low"] > 0  # p and interval are of the one test, and agree
    assert among_five["p_holm"] == pytest.approx(5 * alone["p"])
    assert among_five["test"] == "Welch, Holm over 5 batch sizes"
    assert f"p = {alone['p']:.2g}, Holm over 5 batch sizes: p = {5 * alone['p']:.2g};" in among_five["detail"]
    assert (alone["test"], alone["detail"].count("p = ")) == ("Welch", 1)
    assert math.isnan(alone["p_holm"])
    assert (alone["verdict"], among_five["verdict"]) == (claims.HOLDS, claims.OPEN)


def test_p_and_interval_agree_in_every_row(tmp_path):
    """p < 0.05 exactly where the interval leaves out what it is against; for TOST, where it lies inside the margin."""
    rng = np.random.default_rng(3)
    for norm in ("bn", "gn", "ln"):
        for batch_size in (32, 8, 4, 2):
            shift = rng.normal(0.5, 1) if norm == "bn" else 0
            for seed in range(3):
                write_run(tmp_path, norm, batch_size, seed, test_error=24 + shift + rng.normal(0, 0.5))
    found = claims.claims(table.load(tmp_path)).dropna(subset="p")
    assert len(found) >= 8
    for row in found.to_dict("records"):
        against = re.search(r"against ([+-]\d)", row["test"])
        threshold = float(against[1]) if against else 0
        if row["test"].startswith("TOST"):
            is_seen = row["low"] > -1 and row["high"] < 1
        else:
            is_seen = not row["low"] <= threshold <= row["high"]
        assert is_seen == (row["p"] < 0.05), row
        assert math.isnan(row["p_holm"]) == ("Holm" not in row["test"])
        assert math.isnan(row["p_holm"]) or row["p_holm"] >= row["p"]


def test_p_is_told_with_the_margin_that_it_is_against(tmp_path):
    """An interval that leaves out 0 but not the margin."""
    write_cell(tmp_path, "bn", 32, 24)
    write_cell(tmp_path, "bn", 2, 25)
    row = judge(tmp_path, "BN's test error rises", margin=0.9)
    assert (row["low"] > 0, row["low"] < 0.9, row["verdict"]) == (True, True, claims.OPEN)
    assert row["test"] == "Welch against +0.9"
    assert f"p = {row['p']:.2g} against +0.9" in row["detail"]


def test_the_crossover_is_placed(tmp_path):
    for batch_size, bn in ((32, 22), (16, 23.9), (8, 24.1), (4, 27), (2, 30)):
        write_cell(tmp_path, "bn", batch_size, bn)
        write_cell(tmp_path, "gn", batch_size, 24)
    row = judge(tmp_path, "BN's and GN's lines cross")
    assert row["verdict"] == claims.HOLDS
    assert "the crossover lies between 4 and 32 (the means cross between 8 and 16)" in row["detail"]


def test_lines_that_cross_twice_do_not_cross_as_stated(tmp_path):
    for size, mean in ((32, 20.0), (8, 30.0), (2, 20.0)):
        write_cell(tmp_path, "bn", size, mean)
        write_cell(tmp_path, "gn", size, 25.0)
    row = judge(tmp_path, "BN's and GN's lines cross")
    assert row["verdict"] == claims.FAILS
    assert "the means cross between 8 and 32, 2 and 8" in row["detail"]


def test_of_several_gns_none_is_gn_until_one_is_chosen(tmp_path):
    write_cell(tmp_path, "bn", 32, 20.0)
    for num_groups, mean in ((16, 25.0), (8, 18.0)):
        write_cell(tmp_path, "gn", 32, mean, norm_keys={"num_groups": num_groups})
    row = judge(tmp_path, "BN beats GN at batch size 32")
    assert row["verdict"] == claims.OPEN
    assert "GN is one of GN (G=16), GN (G=8): --where chooses" in row["detail"]
    chosen = claims.claims(table.load(tmp_path, where="norm == 'bn' or num_groups == 8")).set_index("claim")
    assert chosen.loc["BN beats GN at batch size 32.", "verdict"] == claims.FAILS


def test_variants_of_a_new_norm_are_each_judged(tmp_path):
    write_cell(tmp_path, "bn", 32, 20.0)
    for alpha, mean in ((0.1, 25.0), (0.2, 18.0)):
        write_cell(tmp_path, "mynorm", 32, mean, norm_keys={"alpha": alpha})
    assert judge(tmp_path, "mynorm (norm.alpha=0.1) beats BN")["verdict"] == claims.FAILS
    assert judge(tmp_path, "mynorm (norm.alpha=0.2) beats BN")["verdict"] == claims.HOLDS


def test_training_error_must_fall_while_test_error_rises(tmp_path):
    write_cell(tmp_path, "bn", 32, 23, train_error=10.0)
    write_cell(tmp_path, "gn", 32, 24, train_error=8.0)
    start = "GN's training error is below"
    assert judge(tmp_path, start)["verdict"] == claims.HOLDS
    write_cell(tmp_path / "other", "bn", 32, 23, train_error=10.0)
    write_cell(tmp_path / "other", "gn", 32, 24, train_error=12.0)
    assert judge(tmp_path / "other", start)["verdict"] == claims.FAILS


@pytest.mark.parametrize(("ln", "verdict"), [(26, claims.HOLDS), (22, claims.FAILS), (24.1, claims.OPEN)])
def test_gn_between_bn_and_ln(tmp_path, ln, verdict):
    for norm, mean in (("bn", 23), ("gn", 24), ("ln", ln)):
        write_cell(tmp_path, norm, 32, mean)
    assert judge(tmp_path, "GN lies between")["verdict"] == verdict


@pytest.mark.parametrize(
    ("means", "verdict"),
    [
        ({16: 25, 4: 24, 2: 25}, claims.HOLDS),
        ({16: 27, 4: 28, 2: 27}, claims.FAILS),
        ({16: 25, 4: 25, 2: 25}, claims.OPEN),
    ],
)
def test_groupings_against_the_extremes(tmp_path, means, verdict):
    for num_groups, mean in means.items():
        write_cell(tmp_path, "gn", 32, mean, norm_keys={"num_groups": num_groups})
    write_cell(tmp_path, "ln", 32, 25)
    write_cell(tmp_path, "gn", 32, 26, norm_keys={"num_groups": None, "channels_per_group": 1})
    row = judge(tmp_path, "Some grouping")
    assert row["verdict"] == verdict
    family = "Holm over 2 extremes" if verdict == claims.FAILS else "Holm over 3 groupings"
    assert row["test"] == f"Welch, {family}"
    assert f"; {family}: p = {row['p_holm']:.2g}" in row["detail"]
    assert (row["p_holm"] < 0.05) == (verdict != claims.OPEN)


def write_norm_batch_runs(directory, split, small):
    """BN's error is 24 with one batch of 32, `split` with batches of 2 in an update of 32, `small` in one of 2."""
    write_cell(directory, "bn", 32, 24)
    write_cell(directory, "bn", 32, split, norm_batch_size=2)
    write_cell(directory, "bn", 2, small)


@pytest.mark.parametrize(
    ("split", "small", "verdict"), [(34, 34, claims.HOLDS), (24, 34, claims.FAILS), (34, 38, claims.FAILS)]
)
def test_normalization_batch_against_sgd_batch(tmp_path, split, small, verdict):
    write_norm_batch_runs(tmp_path, split, small)
    assert judge(tmp_path, "BN's loss at small batches")["verdict"] == verdict


def test_one_of_the_two_sweeps_is_not_enough(tmp_path):
    write_cell(tmp_path, "bn", 32, 24)
    write_cell(tmp_path, "bn", 32, 30, norm_batch_size=2)
    row = judge(tmp_path, "BN's loss at small batches")
    assert row["verdict"] == claims.NOT_TESTED
    assert row["detail"] == "BN at batch size 2 has no run"


@pytest.mark.parametrize(("gain", "verdict"), [(3.0, claims.HOLDS), (-3.0, claims.FAILS), (0.0, claims.OPEN)])
def test_precise_statistics_are_compared_within_runs(tmp_path, gain, verdict):
    for seed in SEEDS:
        ema = 30 + 3.0 * seed  # runs differ by more than the gain; within a run it is plain
        errors = {"ema": ema, "precise": ema - gain + 0.1 * (seed - 2), "batch": 26}
        write_run(tmp_path, "bn", 2, seed, test_error=ema, result={"test_error_by_statistics": errors})
    row = judge(tmp_path, "Precise statistics")
    assert row["verdict"] == verdict
    assert row["effect"] == pytest.approx(gain)
    assert row["test"] == "paired t"


def test_the_seeds_that_would_tell_are_those_of_the_part_that_would_refute(tmp_path):
    for norm, mean in (("bn", 20.0), ("gn", 20.1), ("ln", 19.3)):
        write_cell(tmp_path, norm, 32, mean, sd=0.5, seeds=range(3))
    row = judge(tmp_path, "GN lies between BN and LN")
    assert row["verdict"] == claims.OPEN
    assert 3 < row["seeds_needed"] < 20  # LN is 0.8 points ahead; that GN is 0.1 behind BN would take hundreds


def test_a_part_refutes_only_after_correction_for_the_number_of_parts():
    part = claims.Part("a − b", -1.0, -2.0, 0.0, "Welch", 0.04, 0.5, 5, support=-1.0, sd=0.5)
    other = claims.Part("c − b", 0.5, -1.0, 2.0, "Welch", 0.50, 0.5, 5, support=0.5, sd=0.5)
    assert claims.decide([part]).verdict == claims.FAILS
    both = claims.decide([part, other])
    assert (both.verdict, both.p, both.p_holm) == (claims.OPEN, 0.04, 0.08)
    assert "p = 0.04, Holm over 2 comparisons: p = 0.08" in both.detail
    assert "p = 0.5" in both.detail


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("diverged", "diverged"),
        ("failed", "failed"),
        ("running", "not finished"),
        ("interrupted", "not finished"),
    ],
)
def test_a_cell_with_a_run_that_has_no_result_is_not_judged(tmp_path, status, words):
    write_cell(tmp_path, "bn", 32, 24)
    write_cell(tmp_path, "bn", 2, 34)
    write_run(tmp_path, "bn", 2, 9, status=status)
    row = judge(tmp_path, "BN's test error rises")
    assert row["verdict"] == claims.OPEN
    assert row["detail"] == f"BN at batch size 2: 1 of 6 runs {words}"


def test_a_missing_cell_is_named(tmp_path):
    write_cell(tmp_path, "bn", 32, 24)
    row = judge(tmp_path, "BN's test error rises")
    assert (row["verdict"], row["detail"]) == (claims.NOT_TESTED, "BN at batch size 2 has no run")


def test_one_seed_is_not_judged(tmp_path):
    for batch_size in (32, 2):
        write_cell(tmp_path, "bn", batch_size, 24 + 30 / batch_size, seeds=range(2))
    write_run(tmp_path, "gn", 32, 0)
    assert judge(tmp_path, "BN's test error rises")["verdict"] == claims.HOLDS
    row = judge(tmp_path, "BN beats GN")
    assert (row["verdict"], row["detail"]) == (claims.OPEN, "GN at batch size 32 has 1 seed; 2 or more are needed")


def test_the_papers_workers_are_read_as_images_per_worker(tmp_path):
    """8 workers with 32 and with 2 images: updates of 256 and of 16 images."""
    for images, mean in ((32, 24), (2, 34)):
        write_cell(tmp_path, "bn", 8 * images, mean, norm_batch_size=images)
        write_cell(tmp_path, "gn", 8 * images, 25)
    assert judge(tmp_path, "BN's test error rises")["verdict"] == claims.HOLDS
    assert judge(tmp_path, "GN's test error is level")["verdict"] == claims.HOLDS
    assert "batch size 256, norm_batch_size 32" in judge(tmp_path, "BN's test error rises")["detail"]


def test_settings_are_judged_apart(tmp_path):
    for epochs, mean in ((30, 34), (3, 24)):
        write_cell(tmp_path, "bn", 32, 24, epochs=epochs)
        write_cell(tmp_path, "bn", 2, mean, epochs=epochs)
    found = claims.claims(table.load(tmp_path))
    rises = found[found["claim"].str.startswith("BN's test error rises")].set_index("setting")["verdict"]
    assert dict(rises) == {"epochs=30": claims.HOLDS, "epochs=3": claims.FAILS}


def test_unreadable_records_make_no_claims(tmp_path):
    write_run(tmp_path).write_text("broken")
    found = claims.claims(table.load(tmp_path))
    assert found.empty
    assert list(found) == list(claims.COLUMNS)


# How often chance alone gives a verdict. 300 made-up experiments each: a rate of 2.5 % is seen as 2.5 ± 1.8 %.
DRAWS = 300


def draw(rng, name, mean, n=4, sd=0.4):
    return claims.Cell(name, pd.Series(rng.normal(mean, sd, n)))


def rates(experiment):
    """Share of each verdict over draws of `experiment(rng)`."""
    rng = np.random.default_rng(0)
    verdicts = [experiment(rng).verdict for _ in range(DRAWS)]
    return {verdict: verdicts.count(verdict) / DRAWS for verdict in (claims.HOLDS, claims.FAILS, claims.OPEN)}


def test_chance_seldom_makes_a_difference_hold_or_fail():
    found = rates(lambda rng: claims.decide([claims.compare(draw(rng, "a", 24), draw(rng, "b", 24))]))
    assert found[claims.HOLDS] < 0.05
    assert found[claims.FAILS] < 0.05


def test_a_true_rise_is_seldom_denied_and_a_missing_one_seldom_claimed():
    def rise(true):
        return lambda rng: claims.decide([claims.compare(draw(rng, "a", 24 + true), draw(rng, "b", 24), 1.0)])

    at_the_margin = rates(rise(1.0))
    assert at_the_margin[claims.HOLDS] < 0.05
    assert at_the_margin[claims.FAILS] < 0.05
    assert rates(rise(4.0)) == {
        claims.HOLDS: pytest.approx(1, abs=0.02),
        claims.FAILS: 0,
        claims.OPEN: pytest.approx(0, abs=0.02),
    }


def test_level_is_seldom_claimed_at_the_margin_and_seldom_denied_within():
    def level(*means):
        def experiment(rng):
            others = [draw(rng, "other", mean) for mean in means]
            return claims.decide_level(draw(rng, "base", 24), others, margin=1.0)

        return experiment

    at_the_margin = rates(level(24, 25, 24))
    assert at_the_margin[claims.HOLDS] < 0.08  # TOST allows 5 %
    assert at_the_margin[claims.FAILS] < 0.08
    assert rates(level(24, 24, 24))[claims.FAILS] < 0.01
    assert rates(level(24, 28, 24))[claims.FAILS] > 0.95


def test_a_statement_of_two_parts_needs_both():
    def two(first, second):
        def experiment(rng):
            base = draw(rng, "base", 24)
            parts = [
                claims.compare(draw(rng, "a", 24 + first), base),
                claims.compare(draw(rng, "b", 24 + second), base),
            ]
            return claims.decide(parts)

        return experiment

    assert rates(two(4, 0))[claims.HOLDS] < 0.05
    assert rates(two(0, 0))[claims.FAILS] < 0.08
    assert rates(two(4, 4))[claims.HOLDS] > 0.95
    assert rates(two(4, -4))[claims.FAILS] > 0.95


def test_trying_many_groupings_seldom_finds_one_that_beats_both_extremes():
    def experiment(rng):
        tried = [draw(rng, f"G={number}", 24) for number in range(6)]
        return claims.decide_groups(tried, draw(rng, "one group", 24), draw(rng, "one channel", 30))

    found = rates(experiment)
    assert found[claims.HOLDS] < 0.06
    assert found[claims.FAILS] < 0.02


def test_the_number_of_seeds_that_is_named_is_enough():
    """What is named from the true effect and spread gives a verdict in about 80 % of new experiments."""
    b = claims.Cell("b", pd.Series([23.6, 24.4]))
    part = claims.compare(claims.Cell("a", b.values + 1), b)
    n, sd = int(part.count_seeds()), float(b.values.std())
    found = rates(lambda rng: claims.decide([claims.compare(draw(rng, "a", 25, n, sd), draw(rng, "b", 24, n, sd))]))
    assert found[claims.HOLDS] == pytest.approx(0.8, abs=0.07)
