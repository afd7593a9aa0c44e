"""The statements of arXiv:1803.08494 (and of 2105.07576), and the like of any further norm, as tests over the records.

    claims(gnbench.load("results/batch_size"))  # a row a statement: holds, does not hold, cannot tell yet, not tested

A statement holds, or does not, when a test at 5 % says so; where n is too small, that is the verdict, with the number
of seeds that would do. Nothing is judged on a cell with a failed, diverged or unfinished run. A statement about a cell
that has no run is not tested. docs/report.md tells the tests and the columns.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pandas as pd

from gnbench.analysis.statistics import (
    ALPHA,
    adjust_holm,
    compare_equivalence,
    compare_paired,
    compare_paired_t,
    compare_welch,
    name_cell,
    seeds_needed,
    seeds_needed_for_equivalence,
    values_by_seed,
)
from gnbench.analysis.table import count_norm_batches, find_groups, label_norm, slice_axis
from gnbench.words import number_of

HOLDS, FAILS, OPEN, NOT_TESTED = "holds", "does not hold", "cannot tell yet", "not tested"
MARGIN = 1.0  # points of test error: less counts as level, more as a rise
LARGE, SMALL = 32, 2  # the paper's ends of the axis, images that share statistics
RIVALS = ("bn", "gn")  # with which every other norm is compared
NO_SPREAD = "the seeds' numbers are all the same, so there is no spread to judge by"
OF_ANY = "asked of every norm"  # the source of a statement that no paper makes
MOST_SEEDS = 1000  # beyond, nobody will train them
COLUMNS = (
    *("claim", "setting", "verdict", "effect", "low", "high", "test", "p", "p_holm", "p_paired", "n", "seeds_needed"),
    *("detail", "source"),
)


class CannotTell(Exception):
    """A cell that a statement needs cannot be judged; the message says which and why."""


class NotTested(CannotTell):
    """A cell that a statement needs was never trained; the message says which."""


@dataclass(frozen=True)
class Cell:
    """One cell that has runs. Whether it can be judged shows when its values are asked for: all cells come first."""

    name: str
    by_seed: pd.Series  # percent
    problem: str = ""  # why it cannot be judged

    @property
    def values(self) -> pd.Series:
        """The values in percent, by seed.

        Raises:
            CannotTell: the cell has a problem.
        """
        check_cells(self)
        return self.by_seed


@dataclass(frozen=True)
class Part:
    """One comparison: the claim that `difference` (points) is above `threshold`, or below it.

    `p` is of this test alone, as is the interval; `p_holm`, where there is one, is corrected over the `family` and
    decides.
    """

    name: str
    difference: float
    low: float
    high: float
    test: str
    p: float
    p_paired: float
    n: int
    support: float  # distance from the threshold, in points, above 0 on the claim's side
    sd: float  # of a cell over its seeds, or of paired differences
    threshold: float = 0.0
    paired: bool = False
    family: str = ""  # "Holm over 5 batch sizes"
    p_holm: float = math.nan
    alpha: float = ALPHA  # below 0.05 in a family, for the number of seeds

    @property
    def deciding_p(self) -> float:
        """The p that a verdict rests on."""
        return self.p if math.isnan(self.p_holm) else self.p_holm

    def is_shown(self) -> bool:
        """Whether the difference is on the claim's side, beyond chance."""
        return self.support > 0 and self.deciding_p < ALPHA

    def is_refuted(self) -> bool:
        """Whether it is on the other side, beyond chance."""
        return self.support < 0 and self.deciding_p < ALPHA

    def name_test(self) -> str:
        """The test in words: "Welch against 1, Holm over 5 batch sizes"."""
        against = f" against {self.threshold:+g}" if self.threshold else ""
        return f"{self.test}{against}" + (f", {self.family}" if self.family else "")

    def count_seeds(self) -> float:
        """Seeds a cell with which such a difference would be seen with 80 % power; more than there are now."""
        return max(self.n + 1, seeds_needed(self.support, self.sd, alpha=self.alpha, paired=self.paired))

    def tell(self) -> str:
        """The comparison in words and numbers."""
        numbers = f"{self.difference:+.2f} points [{self.low:+.2f}, {self.high:+.2f}]".replace("-", "−")
        against = f" against {self.threshold:+g}".replace("-", "−") if self.threshold else ""
        return f"{self.name}: {numbers}, {tell_p(self.p, self.p_holm, self.family, against)}"


@dataclass(frozen=True)
class Finding:
    """A verdict and the numbers that it rests on: those of its weakest part."""

    verdict: str
    detail: str
    effect: float = math.nan
    low: float = math.nan
    high: float = math.nan
    test: str = ""
    p: float = math.nan
    p_holm: float = math.nan
    p_paired: float = math.nan
    n: int = 0
    seeds_needed: float = math.nan


@dataclass
class Grid:
    """The runs of one setting, with the cells that statements ask for."""

    frame: pd.DataFrame
    rows: pd.DataFrame = field(init=False)  # those on the axis of batch sizes
    per_update: float = field(init=False)  # normalization batches in an update; the paper's setting has 8
    families: dict[tuple[str, int], dict[str, Part]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.rows, _ = slice_axis(self.frame, "batch_size")
        self.per_update = count_norm_batches(self.rows)
        if self.rows["norm_batch_size"].nunique() < 2:  # one point shows no number of workers for the others
            self.per_update = 1.0

    def pick(self, norm: str) -> pd.DataFrame:
        """The runs of a norm, or of one label, on the axis: of its variants, that with the most batch sizes.

        Raises:
            NotTested: there are none.
        """
        rows = self._find(norm)
        if rows.empty:
            workers = "" if self.per_update == 1 else f"{self.per_update:g} · "
            where = f" with batch_size = {workers}norm_batch_size" if (self.frame["norm"] == norm).any() else ""
            raise NotTested(f"{label_norm(norm)} has no run{where}")
        return rows[rows["label"] == rows.groupby("label", sort=False)["batch_size"].nunique().idxmax()]

    def _find(self, norm: str) -> pd.DataFrame:
        return self.rows[(self.rows["norm"] == norm) | (self.rows["label"] == norm)]

    def _find_rivals(self, norm: str) -> str:
        """Why none of a norm's variants is the norm: several have the most batch sizes. Nothing where one has."""
        counts = self._find(norm).groupby("label", sort=False)["batch_size"].nunique()
        most = list(counts.index[counts == counts.max()])
        return f"{label_norm(norm)} is one of {', '.join(most)}: --where chooses" if len(most) > 1 else ""

    def sizes(self, norm: str) -> list[int]:
        """Images that share statistics (for other norms: that would), falling."""
        return sorted((int(size / self.per_update) for size in self.pick(norm)["batch_size"].unique()), reverse=True)

    def cell(self, norm: str, size: int, measure: str = "test_error") -> Cell:
        """The cell of a norm at a size of the axis.

        Raises:
            NotTested: it has no run.
        """
        rows = self.pick(norm)
        batch_size = int(size * self.per_update)
        norm_batch_size = size if rows["norm_batch_size"].notna().any() else None
        name = name_cell(rows["label"].iloc[0], batch_size, norm_batch_size)
        is_there = (rows["batch_size"] == batch_size) & (rows["norm_batch_size"].fillna(size) == size)
        cell = make_cell(rows[is_there], name, measure)
        return replace(cell, problem=cell.problem or self._find_rivals(norm))

    def list_others(self) -> list[str]:
        """The labels on the axis beside those of BN and GN, in the order of every table; no norm is not one."""
        others = self.rows["norm"].notna() & ~self.rows["norm"].isin([*RIVALS, "none"])
        return list(self.rows.loc[others, "label"].unique())

    def others(self, rival: str, size: int) -> dict[str, Part]:
        """How far each of them is below `rival` at a size, where both can be judged, corrected after Holm."""
        if (rival, size) not in self.families:
            parts = {}
            for norm in self.list_others():
                with contextlib.suppress(CannotTell):
                    parts[norm] = compare(self.cell(rival, size), self.cell(norm, size))
            corrected = _correct(list(parts.values()), "norms")
            self.families[rival, size] = dict(zip(parts, corrected, strict=True))
        return self.families[rival, size]


def claims(frame: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """Every statement, judged for every setting of a frame as `table.load` returns it; the columns are `COLUMNS`.

    `effect`, `low` and `high` are points of error with their 95 % interval (90 % for equivalence), `p` is of the same
    test, and neither is corrected; `p_holm` is p after Holm where a family is tested, and then decides; `p_paired` is
    the exact test over pairs of seeds, uncorrected; n is the smallest number of seeds in a cell. Statements that are
    not tested come last.

    Args:
        margin: points that count as a change.
    """
    found, points = [], number_of(f"{margin:g}", "point")
    for setting, rows in frame[frame["cell"].notna()].groupby("setting", sort=False):
        grid = Grid(rows)
        for statement, judge, source in (*STATEMENTS, *state_others(grid)):
            row = {"claim": statement.format(margin=points), "setting": setting, "source": source}
            found.append({**row, **asdict(_judge(judge, grid, margin))})
    found.sort(key=lambda row: row["verdict"] == NOT_TESTED)
    return pd.DataFrame(found, columns=list(COLUMNS))


def make_cell(rows: pd.DataFrame, name: str, measure: str = "test_error") -> Cell:
    """The cell of these runs; it cannot be judged where some are not finished, or there is only one seed.

    Raises:
        NotTested: there are none.
    """
    if rows.empty:
        raise NotTested(f"{name} has no run")
    values = values_by_seed(rows, measure)
    return Cell(name, values, _find_problem(rows, name, len(values)))


def check_cells(*cells: Cell) -> None:
    """See that cells can be judged, all of which were trained.

    Raises:
        CannotTell: one of them cannot.
    """
    for cell in cells:
        if cell.problem:
            raise CannotTell(cell.problem)


def tell_p(p: float, p_holm: float, family: str, against: str = "") -> str:
    """p of a test, and after correction: "p = 0.02, Holm over 5 batch sizes: p = 0.1"."""
    corrected = "" if math.isnan(p_holm) else f", {family}: p = {p_holm:.2g}"
    return f"p = {p:.2g}{against}{corrected}"


def compare(a: Cell, b: Cell, threshold: float = 0.0, below: bool = False) -> Part:
    """The claim that mean(a) - mean(b) is above `threshold` (or below it), by Welch's two-sided test.

    Raises:
        CannotTell: a cell has a problem, or neither has any spread.
    """
    welch = compare_welch(a.values - threshold, b.values)
    if math.isnan(welch["p"]):
        raise CannotTell(f"{a.name} and {b.name}: {NO_SPREAD}")
    side = -1 if below else 1
    return Part(
        name=f"{a.name} − {b.name}",
        difference=welch["difference"] + threshold,
        low=welch["low"] + threshold,
        high=welch["high"] + threshold,
        test="Welch",
        p=welch["p"],
        p_paired=compare_paired(a.values - threshold, b.values)["p"],
        n=min(len(a.values), len(b.values)),
        support=side * welch["difference"],
        sd=math.sqrt((a.values.var() + b.values.var()) / 2),
        threshold=threshold,
    )


def decide(parts: Sequence[Part]) -> Finding:
    """All parts of a statement must hold; it does not hold when one of them, after Holm, is refuted."""
    if len(parts) > 1:  # that all hold needs no correction; that any of several is refuted, does
        corrected = _correct(parts, "comparisons")
        parts = [other if part.support < 0 else part for part, other in zip(parts, corrected, strict=True)]
    if all(part.is_shown() for part in parts):
        verdict = HOLDS
    elif any(part.is_refuted() for part in parts):
        verdict = FAILS
    else:
        verdict = OPEN
    told = "; ".join(part.tell() for part in parts)
    against = [part for part in parts if part.support < 0]  # one of them decides
    needed = (lambda: min(part.count_seeds() for part in against)) if against else (lambda: _count_seeds(parts))
    return _report(verdict, _choose_part(parts, verdict), told, needed)


def judge_level(norm: str, large: int, small: int) -> Callable[[Grid, float], Finding]:
    """Equivalence (TOST) of a norm at every batch size from `small` on with itself at `large`."""

    def judge(grid: Grid, margin: float) -> Finding:
        base = grid.cell(norm, large)
        grid.cell(norm, small)
        others = [grid.cell(norm, size) for size in grid.sizes(norm) if small <= size < large]
        return decide_level(base, others, margin)

    return judge


def decide_level(base: Cell, others: Sequence[Cell], margin: float) -> Finding:
    """Every other cell must be equivalent to `base`; one that, after Holm, is further off than `margin` refutes."""
    inside = [compare_equivalence(other.values, base.values, margin) for other in others]
    signs = [1 if test["difference"] >= 0 else -1 for test in inside]
    outside = [compare(other, base, sign * margin, sign < 0) for other, sign in zip(others, signs, strict=True)]
    outside = _correct(outside, "batch sizes")
    if all(test["p"] < ALPHA for test in inside):
        verdict = HOLDS
    elif any(part.is_shown() for part in outside):
        verdict = FAILS
    else:
        verdict = OPEN
    if verdict == FAILS:
        shown = min((part for part in outside if part.is_shown()), key=lambda part: part.deciding_p)
        return _report(verdict, shown, f"too far off is {shown.tell()}", lambda: math.nan)

    weakest = max(range(len(others)), key=lambda index: inside[index]["p"])
    test = inside[weakest]
    level = {"low": test["low"], "high": test["high"], "test": f"{test['test']}, 90 % interval", "p": test["p"]}
    shown = replace(outside[weakest], **level, threshold=0.0, family="", p_holm=math.nan, p_paired=math.nan)
    told = f"the least certain to be level is {shown.tell()} ({test['test']})"
    if verdict == OPEN:
        beyond = min(part.deciding_p if part.support > 0 else 1.0 for part in outside)
        family = f", {outside[0].family}" if outside[0].family else ""
        told += f"; that one is further off: Welch against ±{margin:g}{family}, p = {beyond:.2g}"

    def count_seeds() -> float:
        still_open = [part for test, part in zip(inside, outside, strict=True) if test["p"] >= ALPHA]
        inner = max(seeds_needed_for_equivalence(part.difference, margin, part.sd) for part in still_open)
        return max(shown.n + 1, min(inner, outside[weakest].count_seeds()))

    return _report(verdict, shown, told, count_seeds)


def judge_bn_rise(grid: Grid, margin: float) -> Finding:
    """BN at 2 against BN at 32."""
    return decide([compare(grid.cell("bn", SMALL), grid.cell("bn", LARGE), margin)])


def judge_winner(winner: str, loser: str, size: int) -> Callable[[Grid, float], Finding]:
    """Whether `winner` has the lower error at `size`, corrected over all the sizes at which both norms were trained."""

    def judge(grid: Grid, _: float) -> Finding:
        compare(grid.cell(loser, size), grid.cell(winner, size))  # says why they cannot be
        return decide([compare_family(grid, loser, winner)[size]])

    return judge


def judge_other(norm: str, rival: str, size: int) -> Callable[[Grid, float], Finding]:
    """Whether `norm` has a lower error than `rival` at `size`, corrected over all the norms that are asked the same."""

    def judge(grid: Grid, _: float) -> Finding:
        compare(grid.cell(rival, size), grid.cell(norm, size))  # says why they cannot be
        return decide([grid.others(rival, size)[norm]])

    return judge


def compare_family(grid: Grid, a: str, b: str) -> dict[int, Part]:
    """a - b at every size at which both can be judged, corrected after Holm."""
    parts = {}
    for size in grid.sizes(a):
        try:
            parts[size] = compare(grid.cell(a, size), grid.cell(b, size))
        except CannotTell:
            continue
    return dict(zip(parts, _correct(list(parts.values()), "batch sizes"), strict=True))


def judge_crossover(grid: Grid, _: float) -> Finding:
    """BN ahead at some size and GN at a smaller one, both after Holm."""
    sizes = dict.fromkeys((LARGE, SMALL, *grid.sizes("bn"), *grid.sizes("gn")))
    for size in sizes:
        compare(grid.cell("bn", size), grid.cell("gn", size))  # says why one cannot be
    parts = compare_family(grid, "gn", "bn")
    bn_ahead = [size for size, part in parts.items() if part.is_shown()]
    gn_ahead = [size for size, part in parts.items() if part.is_refuted()]
    ahead = [size for size, part in parts.items() if part.support != 0]  # where the means are equal, nobody is
    between = [
        f"{low} and {high}" for high, low in itertools.pairwise(ahead) if parts[high].support * parts[low].support < 0
    ]
    means = f"the means cross between {', '.join(between)}" if between else "the means do not cross"
    largest, smallest = parts[max(parts)], parts[min(parts)]
    ends = f"{largest.tell()}; {smallest.tell()}"
    if bn_ahead and gn_ahead and min(bn_ahead) > max(gn_ahead):
        verdict = HOLDS
        detail = f"the crossover lies between {max(gn_ahead)} and {min(bn_ahead)} ({means}); {ends}"
    elif len(bn_ahead) == len(parts) or len(gn_ahead) == len(parts) or (bn_ahead and gn_ahead):
        verdict, detail = FAILS, f"{means}; {ends}"
    else:
        verdict, detail = OPEN, f"{means}; {ends}"
    weakest = max((largest, smallest), key=lambda part: (part.deciding_p, part.p))
    ends = [largest, replace(smallest, support=-smallest.support)]
    return _report(verdict, weakest, detail, lambda: _count_seeds(ends))


def judge_regularization(grid: Grid, _: float) -> Finding:
    """At 32: GN's training error below BN's, its test error above."""
    training = compare(grid.cell("bn", LARGE, "train_error"), grid.cell("gn", LARGE, "train_error"))
    testing = compare(grid.cell("gn", LARGE), grid.cell("bn", LARGE))
    return decide([replace(training, name=f"training error, {training.name}"), testing])


def judge_between(grid: Grid, _: float) -> Finding:
    """At 32: BN, then GN, then LN."""
    bn, gn, ln = (grid.cell(norm, LARGE) for norm in ("bn", "gn", "ln"))
    return decide([compare(gn, bn), compare(ln, gn)])


def judge_groups(grid: Grid, _: float) -> Finding:
    """The best grouping against both extremes, corrected over the groupings tried."""
    size = find_groups(grid.frame)
    if size is None:
        raise NotTested("GN was not trained with different groups")
    rows = grid.frame[grid.frame["batch_size"] == size]
    gn = rows[rows["norm"] == "gn"]
    one_group = _choose_extreme(
        gn[gn["num_groups"] == 1], rows[rows["norm"] == "ln"], f"one group at batch size {size}"
    )
    one_channel = _choose_extreme(
        gn[gn["channels_per_group"] == 1], rows[rows["norm"] == "in"], f"one channel a group at batch size {size}"
    )
    middle = gn[(gn["num_groups"] > 1).fillna(False) | (gn["channels_per_group"] > 1).fillna(False)]
    if middle.empty:
        raise NotTested("GN was not trained between one group and one channel a group")
    tried = [make_cell(own, name_cell(label, own["batch_size"].iloc[0])) for label, own in middle.groupby("label")]
    return decide_groups(tried, one_group, one_channel)


def decide_groups(tried: Sequence[Cell], one_group: Cell, one_channel: Cell) -> Finding:
    """Holds when one grouping beats both extremes after Holm; does not when each of them loses to an extreme."""
    pairs = [(compare(one_group, cell), compare(one_channel, cell)) for cell in tried]
    wins = adjust_holm([_combine(pair) for pair in pairs])
    losses = [min(2 * part.p if part.support < 0 else 1 for part in pair) for pair in pairs]
    if min(wins) < ALPHA:
        verdict, index = HOLDS, int(np.argmin(wins))
    elif max(losses) < ALPHA:
        verdict, index = FAILS, int(np.argmax(losses))
    else:
        verdict, index = OPEN, min(range(len(tried)), key=lambda index: tried[index].values.mean())
    family, p = f"Holm over {number_of(len(tried), 'grouping')}", wins[index]
    if verdict == FAILS:
        family, p = "Holm over 2 extremes", losses[index]
    parts = [replace(part, p_holm=p, family=family, alpha=ALPHA / len(tried)) for part in pairs[index]]
    told = "; ".join(part.tell() for part in pairs[index])
    told = f"{told}; {family}: p = {p:.2g}"
    return _report(verdict, _choose_part(parts, verdict), told, lambda: _count_seeds(parts))


def judge_norm_batch(grid: Grid, margin: float) -> Finding:
    """BN: the normalization batch alone raises the error, and the SGD batch alone does not."""
    rows, _ = slice_axis(grid.frame[grid.frame["norm"] == "bn"], "norm_batch_size")
    if rows["batch_size"].nunique() != 1 or rows["norm_batch_size"].nunique() < 2:
        raise NotTested("BN was not trained at one batch size with different norm_batch_size")
    large = int(rows["batch_size"].iloc[0])
    whole = _find_bn(grid, large, large)
    split = _find_bn(grid, large, SMALL)
    small = _find_bn(grid, SMALL, SMALL)
    return decide([compare(split, whole, margin), compare(small, split, margin, below=True)])


def judge_precise(grid: Grid, _: float) -> Finding:
    """BN at 2: the error with running averages against that with precise statistics, of the same weights."""
    if "test_error_precise" not in grid.frame:
        check_cells(grid.cell("bn", SMALL))
        raise NotTested("the records hold no errors by statistics")
    averages = grid.cell("bn", SMALL, "test_error_ema")
    precise = grid.cell("bn", SMALL, "test_error_precise")
    test = compare_paired_t(averages.values, precise.values)
    if math.isnan(test["p"]):
        raise CannotTell(f"{averages.name}, running averages − precise: {NO_SPREAD}")
    part = Part(
        name=f"{averages.name}, running averages − precise",
        **{key: test[key] for key in ("difference", "low", "high", "test", "p")},
        p_paired=compare_paired(averages.values, precise.values)["p"],
        n=test["n_a"],
        support=test["difference"],
        sd=(averages.values - precise.values).std(),
        paired=True,
    )
    return decide([part])


STATEMENTS = (  # statement, its test, where it is made
    (
        "GN's test error is level from batch size 32 to 2: within {margin} of that at 32.",
        judge_level("gn", LARGE, SMALL),
        "1803.08494, Figure 1",
    ),
    (
        "BN's test error rises by more than {margin} from batch size 32 to 2.",
        judge_bn_rise,
        "1803.08494, Figure 1",
    ),
    ("BN beats GN at batch size 32.", judge_winner("bn", "gn", 32), "1803.08494, Table 2"),
    ("GN beats BN at batch size 4.", judge_winner("gn", "bn", 4), "1803.08494, Table 2"),
    ("GN beats BN at batch size 2.", judge_winner("gn", "bn", 2), "1803.08494, Table 2"),
    (
        "BN's and GN's lines cross: BN is ahead at larger batch sizes, GN at smaller ones.",
        judge_crossover,
        "1803.08494, Figure 1",
    ),
    (
        "GN's training error is below BN's at batch size 32, while its test error is above.",
        judge_regularization,
        "1803.08494, Figure 4",
    ),
    ("GN lies between BN and LN at batch size 32.", judge_between, "1803.08494, Table 1"),
    ("Some grouping beats both one group (LN) and one channel a group (IN).", judge_groups, "1803.08494, Table 3"),
    (
        "BN's loss at small batches comes from the normalization batch, not the SGD batch: alone, the first raises the "
        "error by more than {margin} and the second does not.",
        judge_norm_batch,
        "2105.07576",
    ),
    ("Precise statistics recover part of BN's loss at batch size 2.", judge_precise, "2105.07576"),
)


def state_others(grid: Grid) -> list[tuple[str, Callable[[Grid, float], Finding], str]]:
    """Asked of every other norm: is it level from 32 or its largest on, and does it beat BN and GN at its last?"""
    stated = []
    for label in grid.list_others():
        sizes, name = grid.sizes(label), label.replace("{", "{{").replace("}", "}}")
        small = sizes[-1]
        large = LARGE if small < LARGE in sizes else sizes[0]
        if large > small:
            level = f"{name}'s test error is level from batch size {large} to {small}: within {{margin}}."
            stated.append((level, judge_level(label, large, small), OF_ANY))
        for rival in RIVALS:
            if (grid.rows["norm"] == rival).any() and small in grid.sizes(rival):
                beats = f"{name} beats {label_norm(rival)} at batch size {small}."
                stated.append((beats, judge_other(label, rival, small), OF_ANY))
    return stated


def _judge(judge: Callable[[Grid, float], Finding], grid: Grid, margin: float) -> Finding:
    try:
        return judge(grid, margin)
    except NotTested as reason:
        return Finding(NOT_TESTED, str(reason))
    except CannotTell as reason:
        return Finding(OPEN, str(reason))


def _report(verdict: str, part: Part, told: str, count_seeds: Callable[[], float]) -> Finding:
    """A finding that shows `part`; of an open one, the seeds that would close it."""
    seeds = count_seeds() if verdict == OPEN else math.nan
    if verdict == OPEN:
        enough = (
            f"about {seeds:.0f} seeds a cell would tell"
            if seeds <= MOST_SEEDS
            else "no affordable number of seeds would tell"
        )
        told = f"{told}; {enough}, if difference and spread are what they now seem"
    return Finding(
        verdict,
        told,
        effect=part.difference,
        low=part.low,
        high=part.high,
        test=part.name_test(),
        p=part.p,
        p_holm=part.p_holm,
        p_paired=part.p_paired,
        n=part.n,
        seeds_needed=seeds if seeds <= MOST_SEEDS else math.nan,
    )


def _choose_part(parts: Sequence[Part], verdict: str) -> Part:
    """The part on which a verdict hangs: the weakest, or the one that refutes most clearly."""
    if verdict == FAILS:
        return min((part for part in parts if part.support < 0), key=lambda part: part.p)
    return max(parts, key=lambda part: (part.support <= 0, part.deciding_p, part.p))


def _count_seeds(parts: Sequence[Part]) -> float:
    """Seeds with which all the parts that are open now would be told."""
    return max((part.count_seeds() for part in parts if not part.is_shown()), default=math.inf)


def _correct(parts: Sequence[Part], what: str) -> list[Part]:
    """The parts as one family, each of which may decide by itself; one part is none."""
    if len(parts) < 2:
        return list(parts)
    family = {"family": f"Holm over {len(parts)} {what}", "alpha": ALPHA / len(parts)}
    adjusted = adjust_holm([part.deciding_p for part in parts])
    return [replace(part, p_holm=p, **family) for part, p in zip(parts, adjusted, strict=True)]


def _find_problem(rows: pd.DataFrame, name: str, num_seeds: int) -> str:
    """Why a cell cannot be judged, or nothing."""
    for status in ("diverged", "failed"):
        if (rows["status"] == status).any():
            return f"{name}: {(rows['status'] == status).sum()} of {number_of(len(rows), 'run')} {status}"
    if (rows["status"] != "done").any():
        return f"{name}: {(rows['status'] != 'done').sum()} of {number_of(len(rows), 'run')} not finished"
    if rows["cell"].nunique() > 1:
        return f"{name} is {rows['cell'].nunique()} cells of different configurations"
    return f"{name} has {number_of(num_seeds, 'seed')}; 2 or more are needed" if num_seeds < 2 else ""


def _combine(parts: Sequence[Part]) -> float:
    """p of the claim that all parts hold: that of the weakest; 1 where one points the other way."""
    return max(part.p if part.support > 0 else 1.0 for part in parts)


def _choose_extreme(as_gn: pd.DataFrame, as_norm: pd.DataFrame, words: str) -> Cell:
    rows = as_gn if len(as_gn) else as_norm
    if rows.empty:
        raise NotTested(f"{words} has no run")
    return make_cell(rows, f"{words} ({rows['label'].iloc[0]})")


def _find_bn(grid: Grid, batch_size: int, norm_batch_size: int) -> Cell:
    rows = grid.frame[grid.frame["norm"] == "bn"]
    rows = rows[rows["label"] == rows["label"].iloc[0]]
    own = rows[(rows["batch_size"] == batch_size) & (rows["norm_batch_size"] == norm_batch_size)]
    return make_cell(own, name_cell(rows["label"].iloc[0], batch_size, norm_batch_size))
