"""Summaries and tests against naive formulas, and what a mean does not show."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from synthetic import write_run, write_sweep

from gnbench.analysis import statistics, table


def t_density(x, df):
    return math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi) * (1 + x * x / df) ** (-(df + 1) / 2)


def t_tail(t, df):
    return integrate.quad(t_density, t, np.inf, args=(df,))[0]


A = [23.4, 23.9, 23.1, 24.0]
B = [24.6, 24.1, 25.3]


def test_a_t_interval_holds_95_percent_of_students_distribution():
    low, high = statistics.t_interval(A)
    n, mean = len(A), sum(A) / len(A)
    error = math.sqrt(sum((a - mean) ** 2 for a in A) / (n - 1) / n)
    assert (low + high) / 2 == pytest.approx(mean)
    assert t_tail((high - mean) / error, n - 1) == pytest.approx(0.025, rel=1e-6)


def test_one_value_has_no_interval():
    assert all(math.isnan(end) for end in statistics.t_interval([1.0]))


def test_welch_is_scipys():
    expected = stats.ttest_ind(A, B, equal_var=False)
    result = statistics.compare_welch(A, B)
    assert result["difference"] == pytest.approx(sum(A) / 4 - sum(B) / 3)
    assert result["p"] == pytest.approx(expected.pvalue)
    assert (result["low"], result["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert (result["n_a"], result["n_b"]) == (4, 3)


def test_equivalence_is_two_one_sided_tests():
    for margin in (0.5, 1.0, 3.0):
        above = stats.ttest_ind(np.add(A, margin), B, equal_var=False, alternative="greater").pvalue
        below = stats.ttest_ind(np.subtract(A, margin), B, equal_var=False, alternative="less").pvalue
        assert statistics.compare_equivalence(A, B, margin)["p"] == pytest.approx(max(above, below))


def test_paired_t_is_scipys():
    a, b = pd.Series(A), pd.Series([*B, 24.2])
    result = statistics.compare_paired_t(a, b)
    assert result["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert result["difference"] == pytest.approx(np.mean(a - b))
    assert math.isnan(statistics.compare_paired_t(a[:1], b[:1])["p"])


def test_welch_of_too_few_values_judges_nothing():
    result = statistics.compare_welch([1.0], B)
    assert math.isnan(result["p"])
    assert math.isnan(result["low"])
    assert result["difference"] == pytest.approx(1 - sum(B) / 3)


@pytest.mark.parametrize("other", [80.0, 90.0])
def test_without_any_spread_there_is_nothing_to_judge_by(other):
    """Two seeds that agree to the last image are luck, or collapsed; they are no proof."""
    a, b = pd.Series([90.0, 90.0]), pd.Series([other, other])
    results = [statistics.compare_welch(a, b), statistics.compare_paired_t(a, b)]
    for result in [*results, statistics.compare_equivalence(a, b, 20.0)]:
        assert result["difference"] == 90 - other
        assert np.isnan([result["low"], result["high"], result["p"]]).all()


def naive_sign_flips(differences):
    means = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=False)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    observed = abs(sum(differences))
    return sum(mean >= observed - 1e-9 for mean in means) / len(means)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-20, 20).map(lambda tenths: tenths / 10), min_size=1, max_size=8))
def test_paired_counts_sign_patterns(differences):
    a, b = pd.Series(differences) + 20.0, pd.Series([20.0] * len(differences))
    assert statistics.compare_paired(a, b)["p"] == pytest.approx(naive_sign_flips(differences))


def test_paired_takes_only_seeds_that_both_have():
    a, b = pd.Series({0: 5.0, 1: 6.0, 2: 7.0}), pd.Series({1: 5.5, 2: 6.0, 3: 1.0})
    result = statistics.compare_paired(a, b)
    assert result["difference"] == pytest.approx(0.75)
    assert result["n_a"] == 2


@pytest.mark.parametrize("n", range(1, 9))
def test_paired_says_where_it_can_never_be_significant(n):
    result = statistics.compare_paired(pd.Series([9.0] * n), pd.Series([1.0] * n))
    assert result["p"] == pytest.approx(2 / 2**n)
    assert (result["p"] < 0.05) == (n >= 6) == (result["note"] == "")


def test_paired_samples_patterns_when_there_are_too_many():
    differences = pd.Series(np.random.default_rng(1).normal(0.25, 1, size=40))
    result = statistics.compare_paired(differences, differences * 0)
    exact_enough = 2 * t_tail(abs(differences.mean()) / (differences.std() / math.sqrt(40)), 39)
    assert result["p"] == pytest.approx(exact_enough, abs=0.02)
    assert result == statistics.compare_paired(differences, differences * 0)


def test_equivalence_is_the_90_percent_interval_inside_the_margin():
    rng = np.random.default_rng(0)
    verdicts = set()
    for _ in range(50):
        a, b = rng.normal(24, 0.4, 4), rng.normal(24 + rng.uniform(-1, 1), 0.4, 5)
        result = statistics.compare_equivalence(a, b, margin=1.0)
        inside = result["low"] > -1 and result["high"] < 1
        assert (result["p"] < 0.05) == inside
        verdicts.add(inside)
    assert verdicts == {True, False}


def test_equivalence_without_values():
    assert math.isnan(statistics.compare_equivalence([1.0], [1.0, 1.1], 1.0)["p"])


def test_holm_by_hand():
    adjusted = statistics.adjust_holm([0.01, 0.04, 0.03, math.nan, 0.6])
    assert adjusted == pytest.approx([0.04, 0.09, 0.09, math.nan, 0.6], nan_ok=True)
    assert list(statistics.adjust_holm([])) == []
    assert statistics.adjust_holm([0.5, 0.6]) == pytest.approx([1, 1])


@pytest.mark.parametrize(("effect", "seeds"), [(0.8, 6), (0.53, 10), (0.4, 17)])
def test_seeds_needed_is_what_cifar_experience_says(effect, seeds):
    assert statistics.seeds_needed(effect, sd=0.4) == seeds


def test_seeds_needed_has_the_power_it_promises_and_not_one_seed_more():
    n = statistics.seeds_needed(0.5, sd=0.4)
    rng = np.random.default_rng(0)
    seen = [
        np.mean(
            [statistics.compare_welch(rng.normal(0, 0.4, k), rng.normal(0.5, 0.4, k))["p"] < 0.05 for _ in range(600)]
        )
        for k in (n, n - 3)
    ]
    assert seen[0] == pytest.approx(0.8, abs=0.05)
    assert seen[1] < 0.77


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 17])
def test_power_rises_with_the_effect_to_1_however_large(alpha):
    effects = np.linspace(0.1, 40, 200)
    for n in (2, 3, 5, 20):
        powers = np.array([statistics.power_of_t_test(n, effect, 1.0, alpha) for effect in effects])
        assert np.all(np.diff(powers) > -1e-9)
        assert powers[-1] == pytest.approx(1, abs=0.02 if n > 2 or alpha == 0.05 else 0.6)
    assert statistics.seeds_needed(8.05, sd=1.0) == 2


def test_seeds_needed_for_equivalence_has_the_power_it_promises():
    n = statistics.seeds_needed_for_equivalence(0.2, margin=1.0, sd=0.4)
    rng = np.random.default_rng(0)
    draws = [(rng.normal(0, 0.4, n), rng.normal(0.2, 0.4, n)) for _ in range(600)]
    power = np.mean([statistics.compare_equivalence(a, b, 1.0)["p"] < 0.05 for a, b in draws])
    assert 0.74 < power < 0.97


def test_no_number_of_seeds_sees_nothing():
    assert statistics.seeds_needed(0.0, 0.4) == math.inf
    assert statistics.seeds_needed_for_equivalence(1.0, 1.0, 0.4) == math.inf
    assert statistics.seeds_needed_for_equivalence(0.0, 1.0, math.nan) == math.inf
    assert statistics.seeds_needed(0.5, 0.0) == 2


def test_summary_is_mean_sd_and_interval_of_each_cell(tmp_path):
    for seed, error in enumerate((8.0, 9.0, 10.0)):
        write_run(tmp_path, "bn", 32, seed, test_error=error)
    write_run(tmp_path, "gn", 32, 0, test_error=9.5)
    summary = statistics.summarize(table.load(tmp_path)).set_index("label")
    bn, gn = summary.loc["BN"], summary.loc["GN"]
    assert (bn["n"], bn["mean"], bn["sd"], bn["min"], bn["max"], bn["seeds"]) == (3, 9, 1, 8, 10, "0 1 2")
    assert bn["high"] - bn["mean"] == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert (gn["n"], gn["mean"]) == (1, 9.5)
    assert math.isnan(gn["sd"])
    assert math.isnan(gn["low"])


def test_summary_never_averages_what_differs(tmp_path):
    write_run(tmp_path, "bn", 32, 0, epochs=10, test_error=50)
    write_run(tmp_path, "bn", 32, 1, epochs=30, test_error=10)
    assert sorted(statistics.summarize(table.load(tmp_path))["mean"]) == [10, 50]


def test_one_seed_run_twice_is_one_sample(tmp_path):
    write_run(tmp_path / "a", "bn", 32, 0, test_error=10.0)
    write_run(tmp_path / "b", "bn", 32, 0, test_error=11.0, device="NVIDIA H200")
    write_run(tmp_path / "a", "bn", 32, 1, test_error=12.5)
    summary = statistics.summarize(table.load(tmp_path / "a", tmp_path / "b"))
    assert list(summary["n"]) == [2]
    assert summary["mean"][0] == pytest.approx((10.5 + 12.5) / 2)


def test_summary_keeps_cells_that_have_no_result_and_counts_why(tmp_path):
    for seed, status in enumerate(("diverged", "diverged", "failed", "running", "interrupted")):
        write_run(tmp_path, "bn", 2, seed, status=status)
    write_run(tmp_path, "bn", 2, 9).write_text("broken")
    summary = statistics.summarize(table.load(tmp_path))
    row = summary.iloc[0]
    assert len(summary) == 1
    assert (row["n"], row["diverged"], row["failed"], row["missing"]) == (0, 2, 1, 2)
    assert math.isnan(row["mean"])
    assert math.isnan(row["min"])


def test_summary_of_nothing_readable_is_empty_with_its_columns(tmp_path):
    write_run(tmp_path).write_text("broken")
    summary = statistics.summarize(table.load(tmp_path))
    assert summary.empty
    assert {"label", "n", "mean", "low", "diverged"} <= set(summary)


def test_a_whole_grid_has_no_gaps(tmp_path):
    write_sweep(tmp_path, norms=("bn", "gn", "ln"))
    assert statistics.name_gaps(table.load(tmp_path)) == []


def test_every_gap_is_named(tmp_path):
    write_sweep(tmp_path, norms=("bn", "gn"), batch_sizes=(32, 2), seeds=(0, 1))
    write_run(tmp_path, "gn", 8, 0)
    write_run(tmp_path, "gn", 8, 1, status="failed", cause="no memory")
    write_run(tmp_path, "ln", 32, 0)
    write_run(tmp_path, "ln", 32, 1, status="diverged")
    broken = write_run(tmp_path, "ln", 8)
    broken.write_text("broken")
    assert statistics.name_gaps(table.load(tmp_path)) == [
        f"{tmp_path.name}/{broken.parent.name} is unreadable: not a whole JSON file",
        "GN at batch size 8: 1 of 2 runs failed (seed 1)",
        "LN at batch size 32: 1 of 2 runs diverged (seed 1)",
        "BN at batch size 8: no run",
        "LN at batch size 8: no run",
        "LN at batch size 2: no run",
    ]


def test_a_seed_that_others_have_is_a_gap(tmp_path):
    write_sweep(tmp_path, norms=("bn", "gn"), batch_sizes=(32,), seeds=(0, 1))
    write_run(tmp_path, "bn", 32, 2)
    assert statistics.name_gaps(table.load(tmp_path)) == ["GN at batch size 32: no run of seed 2"]


def test_a_line_of_fewer_seeds_is_one_gap(tmp_path):
    write_sweep(tmp_path, norms=("bn",), batch_sizes=(32, 8, 2), seeds=(0, 1, 2, 3))
    for batch_size, seed in itertools.product((32, 8, 2), (0, 1)):
        if (batch_size, seed) != (8, 1):
            write_run(tmp_path, "gn", batch_size, seed)
    assert statistics.name_gaps(table.load(tmp_path)) == [
        "GN: no run of seeds 2, 3",
        "GN at batch size 8: no run of seed 1",
    ]


def test_gaps_of_a_norm_batch_sweep(tmp_path):
    for norm_batch_size in (32, 8, 2):
        write_run(tmp_path, "bn", 32, norm_batch_size=norm_batch_size)
    write_run(tmp_path, "gn", 32)
    write_run(tmp_path, "bn", 32, norm_batch_size=8, norm_keys={"momentum": 0.01})
    assert statistics.name_gaps(table.load(tmp_path)) == [
        "BN (norm.momentum=0.01) at batch size 32: no run",
        "BN (norm.momentum=0.01) at batch size 32, norm_batch_size 2: no run",
    ]


def test_two_sweeps_with_other_grids_have_no_gaps_between_them(tmp_path):
    write_sweep(tmp_path / "batch", norms=("bn", "gn"), seeds=(0,))
    for num_groups in (8, 4):
        write_run(tmp_path / "groups", "gn", 32, norm_keys={"num_groups": num_groups})
    assert statistics.name_gaps(table.load(tmp_path / "batch", tmp_path / "groups")) == []
