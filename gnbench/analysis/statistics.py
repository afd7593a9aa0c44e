"""What a few seeds can say: summaries by cell, comparisons of two norms, and what is missing. Errors in percent.

A spread over three to five seeds is itself uncertain, so intervals are t-intervals: bootstrap bands are too narrow.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import special, stats

from gnbench.analysis.table import AXES, IDENTITY, WHOLE
from gnbench.words import number_of

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8
MIN_PAIRS = 6  # 2 / 2**6 = 0.03: with fewer pairs no exact sign-flip test can fall below 0.05
MAX_EXACT_PAIRS = 16  # 2**16 sign patterns; above, a fixed sample of them
BY_STATUS = ("diverged", "failed")


def summarize(frame: pd.DataFrame, value: str = "test_error") -> pd.DataFrame:
    """One row a cell: n, mean, sd, t-interval (low, high), min and max of `value` over seeds, and what is missing.

    n counts the seeds with a finished run; two finished runs of one seed (on two devices, say) are averaged first, for
    they are not two samples. `diverged`, `failed` and `missing` (begun, not finished) count runs. A cell without a
    finished run stays, with NaN. The remaining columns are means over finished runs, except the largest memory.
    """
    readable = frame[frame["cell"].notna()]
    rows = [_summarize_cell(rows, value) for _, rows in readable.groupby("cell", sort=False)]
    identity = [key for key in IDENTITY if key != "seed"]
    columns = [*identity, "cell", *_summarize_values([]), "seeds", *BY_STATUS, "missing"]
    summary = pd.DataFrame(rows, columns=None if rows else columns)
    return summary.astype({key: "Int64" for key in WHOLE if key in summary})


def values_by_seed(frame: pd.DataFrame, value: str = "test_error") -> pd.Series:
    """`value` of the finished runs, one number a seed, in the order of seeds."""
    done = frame[(frame["status"] == "done") & frame[value].notna()]
    return done.groupby("seed")[value].mean().sort_index()


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """mean ± t_(n-1) · sd / sqrt(n); NaN for fewer than two values."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return values.mean() - half, values.mean() + half


def compare_welch(a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE) -> dict:
    """Welch's test of mean(a) - mean(b): difference, low, high, p (two-sided).

    low, high and p are NaN for fewer than two values, and where neither a nor b has any spread to judge by.
    """
    difference, error, df = _welch(a, b)
    half = special.stdtrit(df, (1 + confidence) / 2) * error
    p = 2 * special.stdtr(df, -abs(difference) / error)
    return _comparison("Welch", difference, difference - half, difference + half, p, a, b)


def compare_paired(a: pd.Series, b: pd.Series, confidence: float = CONFIDENCE) -> dict:
    """Exact sign-flip permutation test of the differences a - b over the seeds (index) that both have.

    p is the share of the 2^n sign patterns whose mean is at least as far from 0 as the observed one (above
    `MAX_EXACT_PAIRS` pairs, of a fixed sample of patterns). It is never below 2 / 2^n, so with fewer than `MIN_PAIRS`
    pairs it cannot be significant at 0.05; `note` says so. The interval is the t-interval of the differences.
    """
    differences = (a - b).dropna().to_numpy(dtype=float)
    n = len(differences)
    low, high = t_interval(differences, confidence)
    mean = differences.mean() if n else math.nan
    comparison = _comparison("paired sign flips", mean, low, high, _flip_signs(differences), differences, differences)
    pairs = f"{number_of(n, 'pair')} of seeds"
    few = f"{pairs}: this test cannot fall below {2 / 2**n:.2g}; {MIN_PAIRS} pairs are needed for 0.05"
    return {**comparison, "note": few if n < MIN_PAIRS else ""}


def compare_paired_t(a: pd.Series, b: pd.Series, confidence: float = CONFIDENCE) -> dict:
    """Student's test of the differences a - b over the seeds that both have: for two measurements of the same runs.

    low, high and p are NaN for fewer than two differences, and where all are the same.
    """
    differences = (a - b).dropna().to_numpy(dtype=float)
    mean = differences.mean() if len(differences) else math.nan
    if len(differences) < 2 or np.ptp(differences) == 0:
        return _comparison("paired t", mean, math.nan, math.nan, math.nan, differences, differences)
    p = stats.ttest_1samp(differences, 0).pvalue
    return _comparison("paired t", mean, *t_interval(differences, confidence), p, differences, differences)


def compare_equivalence(a: Sequence[float], b: Sequence[float], margin: float) -> dict:
    """Two one-sided Welch tests (TOST) that |mean(a) - mean(b)| < margin: a small p shows equivalence.

    p is the larger of the two; low and high are the 90 % interval, which lies inside ±margin exactly when p < 0.05.
    """
    difference, error, df = _welch(a, b)
    room = margin - abs(difference)
    p = special.stdtr(df, -room / error)
    comparison = compare_welch(a, b, confidence=1 - 2 * ALPHA)
    return {**comparison, "test": f"TOST ±{margin:g}", "p": float(p)}


def adjust_holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down p-values: p_(i) · (m - i + 1), made monotone and cut at 1; NaN stay NaN and are not counted."""
    p_values = np.asarray(p_values, dtype=float)
    adjusted = np.full(len(p_values), math.nan)
    order = [index for index in np.argsort(p_values) if not math.isnan(p_values[index])]
    scaled = [p_values[index] * (len(order) - rank) for rank, index in enumerate(order)]
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1) if order else []
    return adjusted


def seeds_needed(effect: float, sd: float, power: float = POWER, alpha: float = ALPHA, paired: bool = False) -> float:
    """Seeds a cell for a two-sided t-test to see a difference of `effect` points; inf where effect is 0.

    Args:
        sd: over the seeds of a cell, or of the differences if `paired`.
    """
    if effect == 0 or math.isnan(effect) or math.isnan(sd):
        return math.inf
    return _first_sufficient(lambda n: power_of_t_test(n, effect, sd, alpha, paired) >= power)


def seeds_needed_for_equivalence(difference: float, margin: float, sd: float, power: float = POWER) -> float:
    """Seeds a cell for the TOST of cells that truly differ by `difference`; inf where that is not under `margin`."""
    if not abs(difference) < margin or math.isnan(sd):
        return math.inf
    return _first_sufficient(lambda n: power_of_equivalence(n, difference, margin, sd) >= power)


def power_of_t_test(n: int, effect: float, sd: float, alpha: float = ALPHA, paired: bool = False) -> float:
    """Chance that a two-sided t-test of two cells of n seeds (or of n differences) sees `effect`.

    Noncentral t with 2n - 2 degrees of freedom and noncentrality effect / sd · sqrt(n / 2); paired, n - 1 and sqrt(n).
    """
    if sd == 0:
        return 1.0
    df, shift = (n - 1, math.sqrt(n)) if paired else (2 * n - 2, math.sqrt(n / 2))
    shift *= abs(effect) / sd
    limit = stats.t.ppf(1 - alpha / 2, df)
    # The lower tail by symmetry: scipy's nct.cdf is NaN there for a large shift.
    return float(stats.nct.sf(limit, df, shift) + stats.nct.sf(limit, df, -shift))


def power_of_equivalence(n: int, difference: float, margin: float, sd: float) -> float:
    """Chance that a TOST of two cells of n seeds shows equivalence (normal approximation of the spread of means)."""
    if sd == 0:
        return 1.0
    error = sd * math.sqrt(2 / n)
    room = margin - stats.t.ppf(1 - ALPHA, 2 * n - 2) * error
    inside = stats.norm.cdf((room - difference) / error) - stats.norm.cdf((-room - difference) / error)
    return max(0.0, float(inside))


def name_gaps(frame: pd.DataFrame) -> list[str]:
    """Sentences on what a mean does not show: unreadable, failed, diverged, unfinished runs, absent cells and seeds.

    A grid is one sweep directory: what one of its lines has at a batch size, the others of the same setting should too,
    with the same seeds.
    """
    unreadable = frame[frame["status"] == "unreadable"]
    sentences = [f"{row.sweep}/{row.run} is unreadable: {row.cause}" for row in unreadable.itertuples()]
    readable = frame[frame["status"] != "unreadable"]
    for _, grid in readable.groupby(["sweep", "setting"]):
        sentences += _name_cell_gaps(grid) + _name_absent_cells(grid)
    return sentences


def name_cell(label: str, batch_size: int, norm_batch_size: int | None = None) -> str:
    """A cell in words: "BN at batch size 32", with the normalization batch size where it is another."""
    same = norm_batch_size is None or pd.isna(norm_batch_size) or norm_batch_size == batch_size
    return f"{label} at batch size {batch_size}" + ("" if same else f", norm_batch_size {norm_batch_size}")


def _summarize_cell(rows: pd.DataFrame, value: str) -> dict:
    first = rows.iloc[0]
    done = rows[rows["status"] == "done"]
    values = values_by_seed(rows, value)
    means = ("val_error", "train_error", "train_loss", "time_s", "images_per_s")
    by_statistics = [key for key in rows if key.startswith("test_error_") and rows[key].notna().any()]
    return {
        **{key: first[key] for key in (*IDENTITY, "cell") if key != "seed"},
        **_summarize_values(values),
        "seeds": " ".join(map(str, values.index)),
        **{status: int((rows["status"] == status).sum()) for status in BY_STATUS},
        "missing": int((~rows["status"].isin(["done", *BY_STATUS])).sum()),
        **{key: done[key].mean() for key in (*means, *by_statistics)},
        "peak_memory_mb": done["peak_memory_mb"].max(),
    }


def _summarize_values(values: Sequence[float]) -> dict:
    values = np.asarray(values, dtype=float)
    low, high = t_interval(values)
    return {
        "n": len(values),
        "mean": values.mean() if len(values) else math.nan,
        "sd": values.std(ddof=1) if len(values) > 1 else math.nan,
        "low": low,
        "high": high,
        "min": min(values, default=math.nan),
        "max": max(values, default=math.nan),
    }


def _welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """mean(a) - mean(b), its standard error, and the degrees of freedom after Welch and Satterthwaite."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    difference = a.mean() - b.mean() if len(a) and len(b) else math.nan
    if len(a) < 2 or len(b) < 2:
        return difference, math.nan, math.nan
    # Equal values may have a variance of 1e-30 from rounding, which is no spread.
    parts = np.array([values.var(ddof=1) / len(values) if np.ptp(values) > 0 else 0.0 for values in (a, b)])
    if not parts.any():
        return difference, math.nan, math.nan
    return difference, math.sqrt(parts.sum()), parts.sum() ** 2 / (parts**2 / [len(a) - 1, len(b) - 1]).sum()


def _comparison(test: str, difference: float, low: float, high: float, p: float, a: Sequence, b: Sequence) -> dict:
    sizes = {"n_a": len(a), "n_b": len(b)}
    return {"test": test, "difference": difference, "low": low, "high": high, "p": float(p), **sizes}


def _flip_signs(differences: np.ndarray) -> float:
    """Share of sign patterns whose mean is at least as far from 0 as that of `differences`."""
    n = len(differences)
    if n == 0:
        return math.nan
    if n <= MAX_EXACT_PAIRS:
        signs = np.array(list(itertools.product((1, -1), repeat=n)))
    else:
        signs = np.random.default_rng(0).choice((1, -1), size=(2**MAX_EXACT_PAIRS, n))
        signs[0] = 1  # the observed pattern is one of them, so that p is never 0
    sums = np.abs(signs @ differences)
    return float(np.mean(sums >= sums[0] * (1 - 1e-12)))


def _first_sufficient(is_enough: Callable[[int], bool], most: int = 10**6) -> float:
    """The smallest n >= 2 for which `is_enough(n)`, which stays true once it is; inf beyond `most`."""
    if not is_enough(most):
        return math.inf
    low, high = 1, 2
    while not is_enough(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _name_cell_gaps(grid: pd.DataFrame) -> list[str]:
    """Cells that have runs, but not all of them finished or not all the seeds of the grid; lines without some seed."""
    seeds = set(grid["seed"])
    sentences, fewer = [], {}
    for label, line in grid.groupby("label", sort=False):
        if line["cell"].nunique() > 1 and seeds - set(line["seed"]):
            fewer[label] = seeds - set(line["seed"])
            sentences.append(f"{label}: no run of {_name_seeds(fewer[label])}")
    for _, rows in grid.groupby("cell", sort=False):
        parts = []
        for status, runs in rows[rows["status"] != "done"].groupby("status"):
            parts.append(f"{len(runs)} of {number_of(len(rows), 'run')} {status} ({_name_seeds(runs['seed'])})")
        absent = seeds - set(rows["seed"]) - fewer.get(rows.iloc[0]["label"], set())
        if absent:
            parts.append(f"no run of {_name_seeds(absent)}")
        if parts:
            first = rows.iloc[0]
            sentences.append(f"{name_cell(first['label'], *first[list(AXES)])}: {'; '.join(parts)}")
    return sentences


def _name_absent_cells(grid: pd.DataFrame) -> list[str]:
    """Points of an axis at which one line of a grid has runs and another has none."""
    shared = grid["norm_batch_size"].notna()
    pairs = set(grid[shared][list(AXES)].itertuples(index=False, name=None))
    batch_sizes = {batch_size for batch_size, _ in pairs} | set(grid["batch_size"])
    covered = {batch_size for batch_size, _ in pairs}
    sentences = []
    for label, rows in grid.groupby("label", sort=False):
        if rows["norm_batch_size"].notna().any():
            expected = pairs | {(size, size) for size in batch_sizes - covered}
            present = set(rows[list(AXES)].itertuples(index=False, name=None))
        else:
            expected = {(size, None) for size in batch_sizes}
            present = {(size, None) for size in rows["batch_size"]}
        absent = sorted(expected - present, key=lambda point: (-point[0], -(point[1] or 0)))
        sentences += [f"{name_cell(label, *point)}: no run" for point in absent]
    return sentences


def _name_seeds(seeds: Iterable[int]) -> str:
    different = sorted(set(seeds))
    return f"seed{'s' * (len(different) > 1)} {', '.join(map(str, different))}"
