"""What lies behind an error, drawn: the statistics at evaluation, the responses of a layer, the learning rate.

Each function takes a frame and axes (or makes them) and returns the axes, as those of `figures` do.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gnbench.analysis import figures
from gnbench.analysis.statistics import name_cell, name_gaps, summarize
from gnbench.analysis.table import AXES, one_row_a_run, place_cells, slice_axis
from gnbench.record import PERCENTILES

STATISTICS = {  # columns of a frame, and how they are drawn
    "test_error_ema": (
        "test, running averages",
        {"color": "#0072B2", "marker": "o", "linestyle": figures.LINESTYLES[0]},
    ),
    "test_error_precise": (
        "test, population",
        {"color": "#009E73", "marker": "^", "linestyle": figures.LINESTYLES[3]},
    ),
    "test_error_batch": ("test, mini-batch", {"color": "#CC79A7", "marker": "D", "linestyle": figures.LINESTYLES[2]}),
    "train_error": ("training, mini-batch", {"color": "#000000", "marker": "x", "linestyle": figures.LINESTYLES[1]}),
}
FROZEN = ("test, frozen at the end", {"color": "#D55E00", "marker": "s", "linestyle": figures.LINESTYLES[4]})
PARTS = {  # of test error (EMA) - training error, each a difference of columns, arXiv:2105.07576, section 3
    "generalization gap": ("test_error_batch", "train_error", STATISTICS["test_error_batch"][1]),
    "train/test inconsistency": ("test_error_precise", "test_error_batch", STATISTICS["test_error_precise"][1]),
    "lag of running averages": ("test_error_ema", "test_error_precise", STATISTICS["test_error_ema"][1]),
}


def has_statistics(frame: pd.DataFrame) -> bool:
    """Whether the frame has runs that were evaluated under more than one choice of statistics, at several NBS.

    The images of a run whose norm names no NBS are its batch.
    """
    if not {"test_error_precise", "test_error_batch"} <= set(frame.columns):
        return False
    sizes = frame["norm_batch_size"].fillna(frame["batch_size"])
    return sizes[frame["test_error_precise"].notna()].nunique() > 1


@figures.styled
def error_by_statistics(
    frame: pd.DataFrame, axes: Sequence[Axes] | None = None, x: str = "norm_batch_size"
) -> Sequence[Axes]:
    """Final errors under each choice of statistics, and what lies between test and training error, over `x`.

    Two panels for each norm that keeps statistics, one above the other. Above, as figure 2 of arXiv:2105.07576: test
    error with running averages (EMA), with population statistics, with mini-batch statistics, and of runs whose
    statistics were frozen in their last epochs, beside the training error. Below, in points: test error (EMA) -
    training error = generalization gap (mini-batch, test - training) + train/test inconsistency (test, population -
    mini-batch) + lag of the running averages (test, EMA - population).

    Args:
        frame: as `table.load` returns it.
        axes: two for each norm, in the frame's order: the upper one of the first norm, its lower one, and so on.
        x: "norm_batch_size" or "batch_size".
    """
    evaluated = frame.loc[frame[[key for key in STATISTICS if key != "train_error"]].notna().any(axis="columns")]
    rows, left_out = slice_axis(frame[frame["label"].isin(evaluated["label"])], x)
    rows = rows.assign(x=place_cells(rows, x), panel=_name_without(rows, "frozen_epochs"))
    rows = rows.assign(**{name: rows[a] - rows[b] for name, (a, b, _) in PARTS.items()})
    frozen_epochs = rows.get("frozen_epochs", pd.Series(0, index=rows.index)).fillna(0)
    plain, frozen = rows[frozen_epochs == 0], rows[frozen_epochs > 0]
    errors = [(label, line, plain, column) for column, (label, line) in STATISTICS.items()]
    errors += [(*FROZEN, frozen, "test_error_ema")] if len(frozen) else []
    parts = [(name, line, plain, name) for name, (_, _, line) in PARTS.items()]
    norms = list(rows["panel"].unique())
    axes = _new_pairs(len(norms), [label for label, *_ in [*errors, *parts]]) if axes is None else axes
    positions = sorted(int(value) for value in rows["x"].dropna().unique())
    summaries = pd.concat([summarize(own, column) for _, _, own, column in errors])
    for number, norm in enumerate(norms):
        above, below = axes[2 * number : 2 * number + 2]
        figures.limit_errors(above, summaries)
        for ax, lines in ((above, errors), (below, parts)):
            _draw_lines(ax, norm, lines, positions)
            figures.set_log2_axis(ax, positions, decreasing=True)
        below.axhline(0, color="0.6", linewidth=0.8)
        above.set_title(figures.wrap_label(norm, 26))
        below.set_xlabel(figures.AXIS_LABELS[x] if len(norms) == 1 else figures.name_axis(x))
        if number % figures.MOST_COLUMNS == 0:
            above.set_ylabel("error after the\nlast epoch (%)")
            below.set_ylabel("points of error")
    last = 2 * min(len(norms), figures.MOST_COLUMNS)
    figures.add_legend(axes[last - 2], [(label, line) for label, line, *_ in errors])
    figures.add_legend(axes[last - 1], [(name, line) for name, line, *_ in parts])
    notes = [
        f"{figures.describe_means(summaries)}.{figures.describe_cuts(axes[0], summaries)}",
        "In points: the parts of the test error with running averages minus the training error",
        figures.describe_runs(rows, x),
        left_out,
        *name_gaps(rows),
    ]
    figures.add_figure_note(axes[0].figure, notes)
    return axes


@figures.styled
def responses(frame: pd.DataFrame, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Percentiles 1, 20, 80, 99 of a layer's responses per epoch, a panel a norm (Figure 6 of arXiv:1803.08494).

    Runs that failed or diverged are left out.

    Args:
        frame: as `table.curves` returns it, of runs whose model names a `response`.
        axes: one for each label and batch size of the frame.
    """
    rows = frame[frame["response_percentiles"].notna() & ~frame["status"].isin(["failed", "diverged"])]
    names = [name_cell(*place) for place in rows[["label", *AXES]].itertuples(index=False)]
    rows = rows.assign(panel=names if rows[list(AXES)].nunique().max() > 1 else rows["label"])
    panels = list(rows["panel"].unique())
    if axes is None:
        axes = figures.new_axes(len(panels), (2.9 * len(panels) + 0.9, 3.4))
    styles = figures.style_lines(frame)
    for ax, panel in zip(axes, panels, strict=True):
        own = rows[rows["panel"] == panel]
        values = pd.DataFrame(own["response_percentiles"].tolist(), index=own.index, columns=list(PERCENTILES))
        mean = values.groupby(own["epoch"]).mean()
        color = styles[own["label"].iloc[0]]["color"]
        ax.fill_between(mean.index, mean[1], mean[99], color=color, alpha=0.15, linewidth=0)
        ax.fill_between(mean.index, mean[20], mean[80], color=color, alpha=0.25, linewidth=0)
        for percent in PERCENTILES:
            ax.plot(mean.index, mean[percent], color=color, linewidth=1.2)
            ax.annotate(
                f" {percent} %",
                (mean.index[-1], mean[percent].iloc[-1]),
                fontsize=7,
                va="center",
                annotation_clip=False,
            )
        figures.set_epoch_axis(ax, mean.index.to_series())
        ax.set_title(figures.wrap_label(panel, 34))
    axes[0].set_ylabel("response before the last activation")
    note = "Percentiles over images, channels and positions; each panel has its own scale."
    runs = one_row_a_run(rows)
    notes = [note, figures.describe_seeds(rows), figures.describe_runs(runs), *name_gaps(runs)]
    figures.add_figure_note(axes[0].figure, notes)
    return axes


def has_learning_rates(frame: pd.DataFrame) -> bool:
    """Whether the frame has several base learning rates for one norm and batch size, judged on held-out images."""
    judged = frame[frame["val_error"].notna()]
    return len(judged) > 0 and judged.groupby(["variant", "batch_size"])["base_lr"].nunique().max() > 1


@figures.styled
def error_vs_learning_rate(frame: pd.DataFrame, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Held-out error against base learning rate: a panel a batch size, a line a norm; the least of each is ringed.

    A norm's variants, its normalization batch sizes and other settings are lines of their own.

    Args:
        frame: as `table.load` returns it, of runs with held-out images.
        axes: one for each batch size.
    """
    sizes = sorted(frame["batch_size"].dropna().unique(), reverse=True)
    axes = figures.new_axes(len(sizes), (2.5 * len(sizes) + 1.1, 3.3), sharey=True) if axes is None else axes
    rates = sorted(frame["base_lr"].dropna().unique())
    frame = frame.assign(line=_name_without(frame, "base_lr"))
    several = frame.groupby(["line", "batch_size"])["norm_batch_size"].transform("nunique") > 1
    nbs = ", NBS " + frame["norm_batch_size"].astype("string")
    frame["line"] += nbs.where(several, "").fillna("")
    styles = {}
    for norm, names in frame[frame["norm"].notna()].groupby("norm", sort=False)["line"]:
        styles |= {name: figures.style_variant(norm, number) for number, name in enumerate(names.unique())}
    for ax, size in zip(axes, sizes, strict=True):
        for name, style in styles.items():
            own = frame[(frame["batch_size"] == size) & (frame["line"] == name)]
            mean = own[own["status"] == "done"].groupby("base_lr")["val_error"].mean().sort_index()
            ax.plot(mean.index, mean, **style)
            lost = sorted(own.loc[own["status"] == "diverged", "base_lr"].unique())
            legal = mean.drop(lost, errors="ignore")
            if len(legal):
                ring = {"marker": "o", "markersize": 12, "markerfacecolor": "none", "markeredgecolor": style["color"]}
                ax.plot([legal.idxmin()], [legal.min()], linestyle="", **ring)
            cross = {"linestyle": "", "marker": "x", "markersize": 6, "markeredgewidth": 1.5, "color": style["color"]}
            ax.plot(lost, [0.98] * len(lost), **cross, transform=ax.get_xaxis_transform())
        ax.set_xscale("log", base=2)
        ax.set_xticks(rates, labels=[f"{rate:g}" for rate in rates], rotation=45)
        ax.minorticks_off()
        ax.set(title=f"batch size {size}", xlabel="base learning rate")
    axes[0].set_ylabel("held-out error (%)")
    figures.add_legend(axes[-1], list(styles.items()))
    notes = ["Error after the last epoch; ringed: the least, which sweep=tuned takes.", figures.describe_seeds(frame)]
    notes += ["Crosses: a run diverged."] if (frame["status"] == "diverged").any() else []
    figures.add_figure_note(axes[0].figure, [*notes, figures.describe_runs(frame), *name_gaps(frame)])
    return axes


def _name_without(rows: pd.DataFrame, key: str) -> list[str]:
    """The label of each row without one key of its setting, by which lines or points differ."""
    names = []
    for label, setting in zip(rows["label"], rows["setting"], strict=True):
        rest = ", ".join(part for part in setting.split(", ") if not part.startswith(f"{key}="))
        names.append(label.removesuffix(f" [{setting}]") + (f" [{rest}]" if rest else ""))
    return names


def _new_pairs(count: int, legend: Sequence[str]) -> list[Axes]:
    """Two panels a norm, one above the other; upper ones have one scale, lower ones another."""
    across = min(count, figures.MOST_COLUMNS)
    down = math.ceil(count / across)
    width, height = (4.2, 2.3) if count == 1 else (2.0, 1.8)
    size = (width * across + 0.8 + figures.measure_legend(legend)[0], 2 * height * down + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(2 * down, across, squeeze=False)
    pairs = [grid[row : row + 2, column] for row in range(0, 2 * down, 2) for column in range(across)]
    for number, pair in enumerate(pairs):
        for ax, first in zip(pair, pairs[0], strict=True):
            if number >= count:
                ax.remove()
            elif ax is not first:
                ax.sharey(first)
                ax.tick_params(labelleft=number % across == 0)
    return [ax for pair in pairs[:count] for ax in pair]


def _draw_lines(ax: Axes, norm: str, lines: Sequence[tuple], positions: Sequence[int]) -> None:
    """One norm's means over seeds at each place, with their t-intervals, a line a column, beside one another."""
    gap = 0.8 * figures.find_gap(len(lines))
    for number, (_, line, rows, column) in enumerate(lines):
        own = rows[rows["panel"] == norm]
        summary = summarize(own, column)
        summary = summary.assign(x=summary["cell"].map(dict(zip(own["cell"], own["x"], strict=True))).astype(float))
        summary = summary[summary["n"] > 0].sort_values("x")
        if summary["x"].isna().all():  # one cell that holds for the whole axis
            ends = [positions[0], positions[-1]] * len(summary)
            summary = summary.loc[summary.index.repeat(2)].assign(x=ends)
        summary["x"] *= 2 ** (gap * ((len(lines) - 1) / 2 - number))
        bars = [(summary["mean"] - summary["low"]).fillna(0), (summary["high"] - summary["mean"]).fillna(0)]
        look = {**line, "markersize": 4.5, "capsize": 2, "elinewidth": 1}
        ax.errorbar(summary["x"], summary["mean"], yerr=np.array(bars, dtype=float), **look)
        if column in STATISTICS:  # a percentage, and no difference
            figures.mark_cuts(ax, summary, line["color"])
