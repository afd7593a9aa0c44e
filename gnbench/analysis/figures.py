"""The paper's figures, drawn from tables: each takes a frame and an `ax` (or makes one) and returns the `ax`.

    ax = figures.error_vs_batch_size(gnbench.load("results/batch_size"))
    figures.save(ax.figure, "error.svg")

A norm keeps its colour, marker and line style in every figure. Lines are means over seeds, bars 95 % t-intervals, dots
seeds; what is missing or failed is named under the figure. Legends stand beside the axes, where they cover nothing.
"""

import colorsys
import functools
import hashlib
import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETDOWN, CARETUP
from matplotlib.ticker import MaxNLocator

from gnbench.analysis.statistics import name_gaps, summarize
from gnbench.analysis.table import (
    count_reported_epochs,
    find_groups,
    label_norm,
    one_row_a_run,
    place_cells,
    slice_axis,
)
from gnbench.files import write_atomic
from gnbench.words import number_of

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.handlelength": 3,
    "text.parse_math": False,  # names come from records; a dollar sign in one is a dollar sign
    "svg.fonttype": "path",
}
AXIS_LABELS = {
    "batch_size": "batch size (images in one update)",
    "norm_batch_size": "normalization batch size (images that share statistics)",
    "epoch": "epoch",
    "train_error": "training error (%)",
    "test_error": "test error (%)",
    "val_error": "validation error (%)",
    "train_loss": "training loss (cross-entropy)",
    "test_loss": "test loss (cross-entropy)",
}
GROUP_LABELS = {"num_groups": "number of groups", "channels_per_group": "channels per group"}
LINESTYLES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
LINE_NAMES = dict(zip(LINESTYLES, ("solid", "dashed", "dotted", "dash-dotted", "dash-dot-dotted"), strict=True))
SPARE_COLORS = ("#E69F00", "#56B4E9", "#A6761D", "#7570B3", "#66A61E", "#B2182B")  # no grey, which others' lines have
SPARE_MARKERS = ("v", "P", "X", "<", ">", "p", "h", "*", "d")
FILLS = ("full", "none", "left", "top")  # of the markers of one norm's variants
LIGHTEST, DARKEST = 0.68, 0.2  # lightness of its variants' colours: each is seen on white and is not black
GREY = "0.35"
OUTSIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1)}  # of a legend
NOTE = "note"  # which text of an axis is its small print
LEGEND_WIDTH = 46  # characters of a line
MOST_COLUMNS = 5  # of panels
MOST_LINES = 8  # in one panel that can still be told apart
FAMILIAR = ("bn", "gn")
CURVES_NOTE = "Bold: mean over finished runs; thin: each seed."
CROP_NOTE = "The first epochs go on beyond the upper edge."
LEVEL_NOTE = (
    "Level, with its {}seeds at the end: a norm that looks at one image at a time, or always at the whole batch; "
    "trained once for the whole axis."
)
BAND_NOTE = "95 % t-interval as a band and its "
CUT_NOTE = "Arrowheads: an interval goes on beyond the axis."
REACH, LEAST_REACH = 0.5, 5.0  # of an axis beyond what was measured: a share of that, and points
REFERENCE_NOTE = "Light and hollow: published by others, with other data or recipes, against images per worker."


@dataclass(frozen=True)
class NormStyle:
    """How a norm is drawn, everywhere."""

    color: str
    marker: str
    linestyle: str | tuple


# The paper's are colours of Okabe and Ito, told apart by the colour-blind; in grey, markers and lines tell all apart.
NORM_STYLES = {
    "bn": NormStyle("#0072B2", "o", LINESTYLES[1]),
    "gn": NormStyle("#D55E00", "s", LINESTYLES[0]),
    "ln": NormStyle("#009E73", "^", LINESTYLES[3]),
    "in": NormStyle("#CC79A7", "D", LINESTYLES[2]),
    "none": NormStyle("#000000", "x", LINESTYLES[4]),
    "brn": NormStyle("#332288", "v", LINESTYLES[1]),
    "syncbn": NormStyle("#00838F", "o", LINESTYLES[0]),
    "bn_ws": NormStyle("#6699CC", ">", LINESTYLES[1]),
    "mabn": NormStyle("#AA4499", "*", LINESTYLES[1]),
    "batch_group": NormStyle("#44AA99", "P", LINESTYLES[1]),
    "bcn": NormStyle("#88CCEE", "<", LINESTYLES[1]),
    "bcn_ws": NormStyle("#004488", "h", LINESTYLES[1]),
    "switchable": NormStyle("#999933", "X", LINESTYLES[3]),
    "evonorm_b0": NormStyle("#CC6677", "p", LINESTYLES[3]),
    "gn_ws": NormStyle("#EE8866", "P", LINESTYLES[0]),
    "rms_gn": NormStyle("#994400", "X", LINESTYLES[0]),
    "rms_ln": NormStyle("#117733", "v", LINESTYLES[3]),
    "frn": NormStyle("#DDAA33", "d", LINESTYLES[0]),
    "evonorm_s0": NormStyle("#882255", "p", LINESTYLES[0]),
    "pono": NormStyle("#EE99AA", "<", LINESTYLES[2]),
    "skipinit": NormStyle("#5D4037", "+", LINESTYLES[4]),
}


def style_norm(name: str) -> NormStyle:
    """The style of a norm: configs/norm's are fixed, any other's follows from its name, in spare colours."""
    if name in NORM_STYLES:
        return NORM_STYLES[name]
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    color, rest = SPARE_COLORS[number % len(SPARE_COLORS)], number // len(SPARE_COLORS)
    marker, rest = SPARE_MARKERS[rest % len(SPARE_MARKERS)], rest // len(SPARE_MARKERS)
    return NormStyle(color, marker, LINESTYLES[rest % len(LINESTYLES)])


def style_lines(frame: pd.DataFrame) -> dict[str, dict]:
    """Keyword arguments of `Line2D` for every label of a frame.

    A norm's first label has the norm's own style, its further ones (other parameters, other settings) the same marker,
    filled otherwise, in a lighter or darker shade and with another line.
    """
    styles = {}
    readable = frame[frame["norm"].notna()]
    for norm, labels in readable.groupby("norm", sort=False)["label"]:
        styles |= {label: style_variant(norm, number) for number, label in enumerate(labels.unique())}
    return styles


def style_variant(norm: str, number: int) -> dict:
    """Keyword arguments of `Line2D` for the `number`-th line of a norm, from 0: its own style, then others like it."""
    style = style_norm(norm)
    start = LINESTYLES.index(style.linestyle)
    return {
        "color": _shade(style.color, number) if number else style.color,
        "marker": style.marker,
        "linestyle": LINESTYLES[(start + number) % len(LINESTYLES)],
        "fillstyle": FILLS[number % len(FILLS)],
        "markerfacecoloralt": "white",
    }


def styled(draw: Callable) -> Callable:
    """Draw in this module's style, whatever the notebook's."""

    @functools.wraps(draw)
    def inside(*args: object, **options: object) -> object:
        with mpl.rc_context(STYLE):
            return draw(*args, **options)

    return inside


@styled
def error_vs_batch_size(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    decreasing: bool = True,
    x: str = "batch_size",
    reference: pd.DataFrame | None = None,
) -> Axes:
    """Test error against batch size (Figure 1 of arXiv:1803.08494) or normalization batch size (2105.07576), log2.

    Args:
        frame: as `table.load` returns it.
        decreasing: the axis runs from the largest batch to the smallest, as in the paper.
        x: "batch_size" or "norm_batch_size"; norms that look at one image at a time are level over the latter.
        reference: numbers of others to lay behind, light and hollow: `table.choose_reference(frame, x)`.
    """
    kept, left_out = slice_axis(frame, x)
    summary = summarize(kept)
    summary["x"] = place_cells(summary, x)
    positions = sorted(summary["x"].dropna().astype(int).unique())
    styles = style_lines(frame)
    labels = list(summary["label"].unique())
    published = _crop_reference(reference, positions)
    sources = _style_sources(published)
    if ax is None:
        across, down = measure_legend([*labels, *sources])
        ax = new_axes(1, (4.9 + 0.1 * len(labels) + across, max(4.2, 0.8 + down)))[0]
    limit_errors(ax, summary, kept["test_error"], published.get("test_error"))
    placed = list(summary.loc[summary["x"].notna(), "label"].unique())
    gap = find_gap(len(placed)) * (-1 if decreasing else 1)
    for label in labels:
        cells = summary[summary["label"] == label]
        if label in placed:
            octaves = gap * (placed.index(label) - (len(placed) - 1) / 2)
            _draw_cells(ax, cells.assign(x=cells["x"] * 2**octaves), kept, styles[label], aside=0.5 * gap)
        else:
            _draw_level(ax, cells, kept, positions, styles[label])
    _draw_reference(ax, published, sources)
    set_log2_axis(ax, positions, decreasing)
    ax.set(xlabel=AXIS_LABELS[x], ylabel=AXIS_LABELS["test_error"])
    add_legend(ax, [*((label, styles[label]) for label in labels), *sources.items()])
    notes = [describe_lines(ax, summary), describe_runs(kept, x), describe_test_error(kept)]
    notes += [REFERENCE_NOTE if sources else "", describe_levels(summary)]
    add_note(ax, [*notes, left_out, *name_gaps(frame)])
    return ax


@styled
def error_by_norm(
    frame: pd.DataFrame, axes: Sequence[Axes] | None = None, decreasing: bool = True, x: str = "batch_size"
) -> Sequence[Axes]:
    """Test error against batch size, as `error_vs_batch_size` has it: a panel a norm, each before BN and GN in grey.

    Args:
        frame: as `table.load` returns it.
        axes: one for each label of the frame.
        decreasing: the axis runs from the largest batch to the smallest.
        x: "batch_size" or "norm_batch_size".
    """
    kept, left_out = slice_axis(frame, x)
    summary = summarize(kept)
    summary["x"] = place_cells(summary, x)
    positions = sorted(summary["x"].dropna().astype(int).unique())
    styles, labels = style_lines(frame), list(summary["label"].unique())
    familiar = list(summary[summary["norm"].isin(FAMILIAR)].drop_duplicates("norm")["label"])
    if axes is None:
        across, down = min(len(labels), MOST_COLUMNS), math.ceil(len(labels) / MOST_COLUMNS)
        axes = new_axes(len(labels), (2 * across + 0.8, 1.8 * down + 0.7), sharey=True)
    for number, (ax, label) in enumerate(zip(axes, labels, strict=True)):
        limit_errors(ax, summary, kept["test_error"])
        for other in familiar:
            if other != label:
                _draw_behind(ax, summary[summary["label"] == other], positions, styles[other]["linestyle"])
        own, line = summary[summary["label"] == label], {**styles[label], "markersize": 4.5}
        if own["x"].isna().all():
            _draw_level(ax, own, kept, positions, line)
        else:
            _draw_cells(ax, own, kept, line, aside=-0.25 if decreasing else 0.25)
        set_log2_axis(ax, positions, decreasing)
        ax.set_title(wrap_label(label, 26))
        if number + MOST_COLUMNS >= len(labels):
            ax.set_xlabel(name_axis(x))
        if number % MOST_COLUMNS == 0:
            ax.set_ylabel(AXIS_LABELS["test_error"])
    lines = [f"{label} ({LINE_NAMES[styles[label]['linestyle']]})" for label in familiar]
    grey = f"In grey: {' and '.join(lines)}." if lines else ""
    notes = [describe_lines(axes[0], summary), grey, describe_runs(kept, x), describe_test_error(kept)]
    notes += [describe_levels(summary), left_out, *name_gaps(frame)]
    add_figure_note(axes[0].figure, notes)
    return axes


@styled
def curves(
    frame: pd.DataFrame,
    axes: Sequence[Axes] | None = None,
    batch_size: int | None = None,
    columns: Sequence[str] = ("train_error", "test_error"),
) -> Sequence[Axes]:
    """Training error (left) and test error (right) per epoch at one batch size (Figure 4 of arXiv:1803.08494).

    Args:
        frame: as `table.curves` returns it.
        axes: one for each of `columns`.
        batch_size: the largest of the frame, unless given.
        columns: of the frame, one a panel.
    """
    batch_size = frame["batch_size"].max() if batch_size is None else batch_size
    rows, left_out = slice_axis(frame[frame["batch_size"] == batch_size], "batch_size")
    styles = style_lines(frame)
    labels = list(rows["label"].unique())
    if axes is None:
        across, down = measure_legend(labels)
        axes = new_axes(len(columns), (3.5 * len(columns) + across, max(3.6, 0.8 + down)))
    is_cropped = False
    for ax, column in zip(axes, columns, strict=True):
        is_cropped |= _crop_start(ax, rows, column)
        for label in labels:
            line = {**styles[label], "markersize": 4.5}
            _draw_curve(ax, rows[rows["label"] == label], column, line, labels.index(label) / len(labels))
        set_epoch_axis(ax, rows["epoch"])  # the same epochs in each panel, whichever were tested
        ax.set_ylabel(AXIS_LABELS.get(column, column))
    add_legend(axes[-1], [(label, styles[label]) for label in labels])
    notes = [*describe_curves(rows, columns, is_cropped), describe_runs(rows), left_out]
    notes += name_gaps(one_row_a_run(rows))
    add_figure_note(axes[0].figure, notes)
    return axes


@styled
def curves_by_batch_size(
    frame: pd.DataFrame, axes: Sequence[Axes] | None = None, column: str = "test_error"
) -> Sequence[Axes]:
    """Test error per epoch: one panel a norm, one line a batch size (Figure 5 of arXiv:1803.08494).

    Args:
        frame: as `table.curves` returns it.
        axes: one for each label of the frame.
        column: of the frame.
    """
    rows, left_out = slice_axis(frame, "batch_size")
    labels = list(rows["label"].unique()) or [""]
    sizes = sorted(rows["batch_size"].unique(), reverse=True)
    if axes is None:
        across, down = min(len(labels), MOST_COLUMNS), math.ceil(len(labels) / MOST_COLUMNS)
        axes = new_axes(len(labels), (2.5 * across + 0.6 + measure_legend(sizes)[0], 3 * down + 0.4), sharey=True)
    lines = {size: _style_batch_size(number, len(sizes)) for number, size in enumerate(sizes)}
    is_cropped = False
    for ax, label in zip(axes, labels, strict=True):
        own = rows[rows["label"] == label]
        is_cropped |= _crop_start(ax, rows, column)
        for size in sizes:
            _draw_curve(ax, own[own["batch_size"] == size], column, lines[size], sizes.index(size) / len(sizes))
        set_epoch_axis(ax, rows["epoch"])
        ax.set_title(wrap_label(label, 34))
    for ax in axes[::MOST_COLUMNS]:
        ax.set_ylabel(AXIS_LABELS.get(column, column))
    last = axes[min(len(labels), MOST_COLUMNS) - 1]
    add_legend(last, [(str(size), lines[size]) for size in sizes], title="batch size")
    notes = [*describe_curves(rows, [column], is_cropped), describe_runs(rows), left_out]
    notes += name_gaps(one_row_a_run(frame))
    add_figure_note(axes[0].figure, notes)
    return axes


@styled
def error_vs_groups(
    frame: pd.DataFrame, axes: Sequence[Axes] | None = None, batch_size: int | None = None
) -> Sequence[Axes]:
    """GN's test error against its number of groups (left) and channels per group (right), Table 3 of arXiv:1803.08494.

    LN and IN, GN's two extremes, stand at one group and at one channel a group where the frame has them.

    Args:
        frame: as `table.load` returns it.
        axes: one for each of the two that varies.
        batch_size: the one with most values of the two, unless given.
    """
    batch_size = find_groups(frame) if batch_size is None else batch_size
    rows = frame[frame["batch_size"] == batch_size]
    panels = [key for key in GROUP_LABELS if rows.loc[rows["norm"] == "gn", key].nunique() > 1]
    axes = new_axes(len(panels), (1.8 + 3.25 * len(panels), 3.6), sharey=True) if axes is None else axes
    handles, settings, summary = {}, list(rows["setting"].unique()), summarize(rows)
    for ax, key in zip(axes, panels, strict=True):
        extreme = {"num_groups": "ln", "channels_per_group": "in"}[key]
        extreme_rows = rows[rows["norm"] == extreme]
        own = rows[(rows["norm"] == "gn") & rows[key].notna()]
        drawn = pd.concat([own, extreme_rows.assign(**{key: 1})])
        limit_errors(ax, summary, rows["test_error"])
        for (norm, setting), runs in drawn.groupby(["norm", "setting"], sort=False):
            line, cells = style_variant(norm, settings.index(setting)), summarize(runs)
            _draw_cells(ax, cells.assign(x=cells[key].astype(float)), runs, line, aside=-0.13)
            handles[label_norm(norm) + (f" [{setting}]" if setting else "")] = line
        set_log2_axis(ax, sorted(drawn[key].dropna().unique()), decreasing=True)
        ax.set_xlabel(GROUP_LABELS[key])
    add_legend(axes[-1], list(handles.items()))
    axes[0].set_ylabel(AXIS_LABELS["test_error"])
    notes = [describe_lines(axes[0], summary), describe_runs(rows), *name_gaps(rows)]
    add_figure_note(axes[0].figure, notes)
    return axes


def describe_lines(ax: Axes, summary: pd.DataFrame) -> str:
    """What lines, bars, dots, arrowheads and crosses are, with n."""
    dots = "; small dots beside a mean: its seeds" if summary["n"].max() > 1 else ""
    crosses = " Crosses: failed or diverged runs." if (summary["failed"] + summary["diverged"]).any() else ""
    return f"{describe_means(summary)}{dots}.{describe_cuts(ax, summary)}{crosses}"


def describe_levels(summary: pd.DataFrame) -> str:
    """What level lines and their bands are, where there are any."""
    levels = summary[summary.groupby("label")["x"].transform("count") == 0]
    return LEVEL_NOTE.format(BAND_NOTE if levels["low"].notna().any() else "") if len(levels) else ""


def describe_seeds(frame: pd.DataFrame, means: str = "Means over seeds.") -> str:
    """`means`, or that there is one seed where no cell has a second one, so that a mean is the run itself."""
    return means if frame.groupby("cell")["seed"].nunique().max() > 1 else "n = 1 seed."


def describe_curves(frame: pd.DataFrame, columns: Sequence[str], is_cropped: bool) -> list[str]:
    """What the lines of curves are, where the axis ends early, and which column was measured at one epoch alone."""
    notes = [describe_seeds(frame, CURVES_NOTE)]
    notes += [CROP_NOTE] * is_cropped
    for column in columns:
        epochs = frame.loc[frame[column].notna(), "epoch"].unique()
        if len(epochs) == 1:
            name = AXIS_LABELS.get(column, column).partition(" (")[0]
            notes.append(f"The {name} was measured after epoch {int(epochs[0])} alone.")
    return notes


def describe_test_error(frame: pd.DataFrame) -> str:
    """Which number of a run `test_error` is, where it is not that of the last epoch."""
    counts = count_reported_epochs(frame)
    told = " or ".join(map(str, counts))
    return "" if counts in ([], [1]) else f"A run's test error: the median over its last {told} epochs."


def describe_means(summary: pd.DataFrame) -> str:
    """What points and bars are, with n."""
    n = summary.loc[summary["n"] > 0, "n"]
    if n.empty:
        return "No finished run"
    if n.max() == 1:
        return "n = 1 seed a cell: no interval"
    seeds = f"{n.min()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"
    return f"Mean of n = {seeds} seeds a cell; bars: 95 % t-interval"


def describe_cuts(ax: Axes, summary: pd.DataFrame) -> str:
    """What arrowheads are, where `mark_cuts` draws any."""
    bottom, top = ax.get_ylim()
    return f" {CUT_NOTE}" if ((summary["low"] < bottom) | (summary["high"] > top)).any() else ""


def describe_runs(frame: pd.DataFrame, x: str = "") -> str:
    """Model, data, epochs and batch size, where all rows have the same; `x` is on the axis and not told."""
    forms = {
        "model": str,
        "data": str,
        "train_size": lambda number: number_of(number, "training image"),
        "epochs": lambda number: number_of(number, "epoch"),
        "batch_size": "batch size {}".format,
    }
    values = {key: frame[key].dropna().unique() for key in forms if key != x}
    told = {key: forms[key](found[0]) for key, found in values.items() if len(found) == 1}
    if "data" in told and frame["train_size"].isna().all():
        told["data"] += ", all training images"
    return ", ".join(told.values()) + "." if told else ""


def new_axes(count: int, size: tuple[float, float], **options: object) -> Sequence[Axes]:
    """Panels of a new figure of `size` inches, row by row."""
    across = min(count, MOST_COLUMNS) or 1
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(math.ceil(count / across) or 1, across, squeeze=False, **options).ravel()
    for ax in axes[count:]:
        ax.remove()
    return axes[:count]


def set_log2_axis(ax: Axes, positions: Sequence[int], decreasing: bool) -> None:
    """A log2 axis with a tick and its number at each position and nowhere else."""
    if not positions:
        return
    ax.set_xscale("log", base=2)
    ax.set_xticks(positions, labels=[str(value) for value in positions])
    ax.minorticks_off()
    limits = (positions[0] / 2**0.6, positions[-1] * 2**0.6)
    ax.set_xlim(limits[::-1] if decreasing else limits)


def set_epoch_axis(ax: Axes, epochs: pd.Series) -> None:
    """An axis of whole epochs, with room for a marker at the first and the last of `epochs`."""
    ax.set_xlabel(AXIS_LABELS["epoch"])
    set_whole_ticks(ax)
    if epochs.notna().any():
        room = max(0.5, 0.04 * (epochs.max() - epochs.min()))
        ax.set_xlim(epochs.min() - room, epochs.max() + room)


def set_whole_ticks(ax: Axes) -> None:
    """A few ticks of the x axis, at whole numbers and nowhere else."""
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def limit_errors(ax: Axes, cells: pd.DataFrame, *others: pd.Series | None) -> None:
    """End an axis of errors before they are drawn: at 0 and 100 %, and not far from what was measured.

    Two seeds may have an interval of ±100 points, beside which all lines were one.
    """
    shown = pd.concat([cells["mean"], *(values for values in others if values is not None)]).dropna()
    if shown.empty:
        return
    reach = max(REACH * np.ptp(shown), LEAST_REACH)
    low = min(shown.min(), cells["low"].clip(lower=max(shown.min() - reach, 0)).min())
    high = max(shown.max(), cells["high"].clip(upper=min(shown.max() + reach, 100)).max())
    if high > low:
        margin = mpl.rcParams["axes.ymargin"] * (high - low)
        ax.set_ylim(max(low - margin, 0), min(high + margin, 100))


def mark_cuts(ax: Axes, cells: pd.DataFrame, color: str) -> None:
    """Arrowheads at the ends that `limit_errors` gave the axis, for the intervals that go on beyond."""
    bottom, top = ax.get_ylim()
    for beyond, edge, marker in ((cells["low"] < bottom, bottom, CARETDOWN), (cells["high"] > top, top, CARETUP)):
        if beyond.any():
            x = cells.loc[beyond, "x"]
            ax.plot(x, np.full(len(x), edge), linestyle="", marker=marker, markersize=5, color=color, zorder=3)


def find_gap(count: int) -> float:
    """Octaves of a log2 axis between two of `count` lines that stand beside one another at one of its positions."""
    return min(0.2, 0.5 / max(1, count))


def name_axis(x: str) -> str:
    """An axis' label without what it explains."""
    return AXIS_LABELS[x].partition(" (")[0]


def wrap_label(label: str, width: int = LEGEND_WIDTH) -> str:
    """A label in lines of at most `width` characters, broken between words or after a dot in a config key."""
    wrapper = textwrap.TextWrapper(width, break_on_hyphens=False)
    wrapper.wordsep_simple_re = re.compile(r"(\s+|(?<=\.)(?=[a-z]))")
    return wrapper.fill(label)


def add_legend(ax: Axes, lines: Sequence[tuple[str, dict]], **options: object) -> None:
    """A legend beside the axes, of (label, keyword arguments of `Line2D`); `options` go to `Axes.legend`."""
    handles = [Line2D([], [], label=wrap_label(label), **line) for label, line in lines]
    if handles:
        ax.legend(handles=handles, **{**OUTSIDE, **options})


def measure_legend(labels: Sequence[object]) -> tuple[float, float]:
    """Inches that a legend of these labels takes beside an axis: (across, down)."""
    lines = [line for label in labels for line in wrap_label(str(label)).split("\n")]
    return 0.75 + 0.075 * max(map(len, lines), default=0), 0.21 * len(lines)


@styled
def add_note(ax: Axes, sentences: Sequence[str], most: int = 10) -> None:
    """Small print under an axis: at most `most` sentences, and how many more there are."""
    width = ax.figure.get_figwidth() * ax.get_position().width / 0.775  # in; 0.775 is a lone axis's share
    ax.annotate(
        _wrap(sentences, width, most),
        label=NOTE,
        xy=(0, 0),
        xycoords="axes fraction",
        xytext=(-30, -38),
        textcoords="offset points",
        verticalalignment="top",
        fontsize=7,
        color=GREY,
        annotation_clip=False,
    )


def add_figure_note(figure: Figure, sentences: Sequence[str], most: int = 10) -> None:
    """Small print under a whole figure, as `add_note` under an axis."""
    text = _wrap(sentences, figure.get_figwidth() - 0.2, most)
    figure.supxlabel(text, x=0.01, horizontalalignment="left", fontsize=7, color=GREY)


def describe_figure(figure: Figure) -> str:
    """What a figure shows, for who cannot see it: its axes, panels and lines, and its small print."""
    axes, legends = figure.axes, [legend for ax in figure.axes if (legend := ax.get_legend())]
    rows = [text.get_text() for ax in axes if not ax.get_ylabel() for text in ax.get_yticklabels()]
    kinds = [legend.get_title().get_text() for legend in legends]
    parts = {
        "Vertical axis": [ax.get_ylabel() for ax in axes],
        "Horizontal axis": [ax.get_xlabel() for ax in axes],
        "Rows": [row for row in rows if row[:1].isalpha()],  # of bars; others are numbers
        "Panels": [ax.get_title() for ax in axes],
        " ".join(["Lines", *(f"by {kind}" for kind in kinds if kind)]): [
            text.get_text() for legend in legends for text in legend.get_texts()
        ],
    }
    told = {name: [_unwrap_label(text) for text in dict.fromkeys(texts) if text] for name, texts in parts.items()}
    notes = [text.get_text() for ax in axes for text in ax.texts if text.get_label() == NOTE]
    notes = [note.replace("\n", " ") for note in (*notes, figure.get_supxlabel()) if note]
    return " ".join([*(f"{name}: {'; '.join(texts)}." for name, texts in told.items() if texts), *notes])


def save(figure: Figure, *paths: Path | str) -> None:
    """Write a figure, its format following each path's suffix; the same figure gives the same bytes every time.

    Raises:
        UserError: the place cannot be written.
    """
    for path in map(Path, paths):
        kind = path.suffix.removeprefix(".")
        metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}.get(kind)
        content = io.BytesIO()
        with mpl.rc_context({**STYLE, "svg.hashsalt": "gnbench"}):
            figure.savefig(content, format=kind, dpi=200, metadata=metadata)
        write_atomic(path, content.getvalue())


def _draw_cells(ax: Axes, cells: pd.DataFrame, frame: pd.DataFrame, line: dict, aside: float) -> None:
    """Mean line, intervals, a dot a seed beside the mean; a cross at the upper edge where a run failed or diverged.

    `aside` is octaves from a mean to the middle of its dots, which stand in a row, so that equal ones are seen.
    """
    finished = cells[cells["n"] > 0].sort_values("x")
    bars = np.array([finished["mean"] - finished["low"], finished["high"] - finished["mean"]], dtype=float)
    thin = {"capsize": 2.5, "elinewidth": 1, "markeredgewidth": 1.2}
    ax.errorbar(finished["x"], finished["mean"], yerr=np.nan_to_num(bars), **line, **thin, zorder=3)
    mark_cuts(ax, finished, line["color"])
    done = frame[frame["status"] == "done"].merge(finished.loc[finished["n"] > 1, ["cell", "x"]], on="cell")
    octaves = aside * (1 + _spread(done))
    dot = {"linestyle": "", "marker": "o", "markersize": 3, "markeredgewidth": 0.5, "markeredgecolor": "white"}
    ax.plot(done["x"] * 2**octaves, done["test_error"], **dot, color=line["color"], zorder=4)
    lost = cells[cells["diverged"] + cells["failed"] > 0]
    if len(lost):
        cross = {"linestyle": "", "marker": "x", "markersize": 6, "markeredgewidth": 1.5, "color": line["color"]}
        x = lost["x"] * 2**aside  # beside an arrowhead
        ax.plot(x, np.full(len(lost), 0.98), **cross, transform=ax.get_xaxis_transform())


def _spread(runs: pd.DataFrame) -> pd.Series:
    """-0.4 to 0.4 in equal steps over the runs of each cell, by their order; 0 for one alone."""
    number = runs.groupby("cell").cumcount()
    last = runs.groupby("cell")["cell"].transform("size").astype(int) - 1
    return (0.8 * number / last.clip(lower=1) - 0.4).where(last > 0, 0)


def _draw_level(ax: Axes, cells: pd.DataFrame, frame: pd.DataFrame, positions: Sequence[int], line: dict) -> None:
    """Cells that hold for the whole axis: level lines with their intervals as bands, and their seeds at one end."""
    low, high = positions[0] / 2**0.3, positions[-1] * 2**0.3  # beyond cells that stand beside one another
    for index, cell in cells.iterrows():
        own = cells.loc[[index]].assign(x=low)
        ax.plot([low, high], [cell["mean"]] * 2, **{**line, "marker": ""}, zorder=2.5)
        ax.fill_between([low, high], cell["low"], cell["high"], color=line["color"], alpha=0.15, linewidth=0)
        mark_cuts(ax, own, line["color"])
        _draw_cells(ax, own.assign(low=cell["mean"], high=cell["mean"]), frame, line, aside=-0.17)


def _draw_behind(ax: Axes, cells: pd.DataFrame, positions: Sequence[int], linestyle: str | tuple) -> None:
    """Means alone, in grey, for comparison."""
    finished = cells[cells["n"] > 0].sort_values("x")
    if finished["x"].isna().all():  # one cell that holds for the whole axis
        finished = finished.loc[finished.index.repeat(2)].assign(x=[positions[0], positions[-1]] * len(finished))
    ax.plot(finished["x"], finished["mean"], color="0.6", linestyle=linestyle, linewidth=1, zorder=1)


def _crop_reference(reference: pd.DataFrame | None, positions: Sequence[int]) -> pd.DataFrame:
    """The numbers of others as far as our axis goes, with their `name` in the legend."""
    if reference is None or not positions:
        return pd.DataFrame({"name": []})
    inside = reference[reference["images_per_worker"].between(min(positions), max(positions))]
    return inside.assign(name=inside["source"] + " (" + inside["model"] + ", " + inside["data"] + ")")


def _style_sources(reference: pd.DataFrame) -> dict[str, dict]:
    """Keyword arguments of `Line2D` for each source's entry in the legend."""
    look = {"linewidth": 0.9, "color": "0.55", "marker": "o", "markersize": 4, "markerfacecolor": "white"}
    names = reference["name"].unique()
    return {name: {**look, "linestyle": LINESTYLES[number % len(LINESTYLES)]} for number, name in enumerate(names)}


def _draw_reference(ax: Axes, reference: pd.DataFrame, sources: dict[str, dict]) -> None:
    """Lines of others behind ours: a norm's colour, lighter, its marker, hollow, and a line style of the source."""
    for name, source in sources.items():
        rows = reference[reference["name"] == name]
        for norm, line in rows.sort_values("images_per_worker").groupby("norm"):
            style = style_norm(norm)
            look = {**source, "color": _lighten(style.color), "marker": style.marker}
            ax.plot(line["images_per_worker"], line["test_error"], **look, zorder=1.5)


def _draw_curve(ax: Axes, rows: pd.DataFrame, column: str, line: dict, offset: float) -> None:
    """Thin lines for every run, a bold one for the mean of the finished, over the epochs that all of them have.

    Markers stand where the axis, whose limits are set, shows all of them.
    """
    thin = {"color": line["color"], "linestyle": "-", "linewidth": 0.5, "alpha": 0.35}
    measured = rows[rows[column].notna()]
    for _, run in measured.groupby(["sweep", "run"]):
        ax.plot(run["epoch"], run[column], **thin)
    done = measured[measured["status"] == "done"]
    by_epoch = done.groupby("epoch")[column].agg(["mean", "count"])
    mean = by_epoch.loc[by_epoch["count"] == by_epoch["count"].max(), "mean"]
    every = max(1, len(mean) // 6)
    low, high = ax.get_ylim()
    inside = mean.between(low + 0.02 * (high - low), high - 0.02 * (high - low)).to_numpy()
    marked = [number for number in range(int(offset * every), len(mean), every) if inside[number]]
    ax.plot(mean.index, mean, **line, markevery=marked, zorder=3)


def _crop_start(ax: Axes, rows: pd.DataFrame, column: str) -> bool:
    """End the axis at the largest value after the first tenth of the epochs, so that the end can be read.

    Where the start takes but little more room, it stays. Returns whether something is cut off.
    """
    every = rows[column].dropna()
    later = rows.loc[rows["epoch"] > rows["epoch"].max() / 10, column].dropna()
    shown = later if len(later) and np.ptp(every) > 1.5 * np.ptp(later) else every
    if len(shown):
        margin = 0.05 * (shown.max() - shown.min()) or 1
        ax.set_ylim(shown.min() - margin, shown.max() + margin)
    return len(shown) < len(every)


def _wrap(sentences: Sequence[str], width_in: float, most: int) -> str:
    told = [sentence for sentence in sentences if sentence]
    more = [f"{len(told) - most} more: see the table."] if len(told) > most else []
    parts = [sentence if sentence.endswith(".") else f"{sentence}." for sentence in told[:most]]
    return textwrap.fill(" ".join(parts + more), int(width_in * 18.5))


def _unwrap_label(text: str) -> str:
    """A label without the line breaks of `wrap_label`."""
    return re.sub(r"(?<=[a-z]\.)\n(?=[a-z])", "", text).replace("\n", " ")


def _style_batch_size(number: int, count: int) -> dict:
    """Dark for the largest batch, light for the smallest, each with its own line and marker."""
    shade = mpl.colormaps["viridis"](0.85 * number / max(1, count - 1))
    markers = ("o", "s", "^", "D", *SPARE_MARKERS)
    marker, linestyle = markers[number % len(markers)], LINESTYLES[number % len(LINESTYLES)]
    return {"color": to_hex(shade), "linestyle": linestyle, "marker": marker, "markersize": 4}


def _shade(color: str, number: int) -> str:
    """The colour by turns lighter (1, 3, ...) and darker (2, 4, ...), but neither near white nor black."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(color))
    start, end = min(max(lightness, 0.35), 0.5), LIGHTEST if number % 2 else DARKEST
    return to_hex(colorsys.hls_to_rgb(hue, end + (start - end) * 0.5 ** ((number + 1) // 2), saturation))


def _lighten(color: str) -> str:
    """A third of the way to white."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(color))
    return to_hex(colorsys.hls_to_rgb(hue, lightness + 0.35 * (1 - lightness), saturation))
