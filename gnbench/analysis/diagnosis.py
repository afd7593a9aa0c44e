"""What lies behind an error, drawn: the statistics at evaluation, the responses of a layer, the learning rate.

Each function takes a frame and axes (or makes them) and returns the axes, as those of `figures` do.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from gnbench.analysis import figures
from gnbench.analysis.statistics import name_gaps, summarize
from gnbench.analysis.table import label_norm, slice_axis

STATISTICS = {  # columns of a frame, and how they are drawn
    "test_error_ema": ("test, running averages", {"color": "#0072B2", "marker": "o", "linestyle": "-"}),
    "test_error_precise": (
        "test, population",
        {"color": "#009E73", "marker": "^", "linestyle": (0, (6, 1.5, 1.2, 1.5))},
    ),
    "test_error_batch": ("test, mini-batch", {"color": "#CC79A7", "marker": "D", "linestyle": (0, (1.2, 1.2))}),
    "train_error": ("training, mini-batch", {"color": "#000000", "marker": "x", "linestyle": (0, (5, 1.5))}),
}
FROZEN = ("test, frozen at the end", {"color": "#D55E00", "marker": "s", "linestyle": (0, (3, 1, 1, 1, 1, 1))})
PARTS = {  # of the test error under running averages, each a difference of columns, arXiv:2105.07576, section 3
    "training error": ("train_error", None, STATISTICS["train_error"][1]),
    "generalization gap": ("test_error_batch", "train_error", STATISTICS["test_error_batch"][1]),
    "train/test inconsistency": ("test_error_precise", "test_error_batch", STATISTICS["test_error_precise"][1]),
    "lag of running averages": ("test_error_ema", "test_error_precise", STATISTICS["test_error_ema"][1]),
}
PERCENTILES = (1, 20, 80, 99)


def has_statistics(frame: pd.DataFrame) -> bool:
    """Whether the frame has runs that were evaluated under more than one choice of statistics, at several NBS."""
    if not {"test_error_precise", "test_error_batch"} <= set(frame.columns):
        return False
    return frame.loc[frame["test_error_precise"].notna(), "norm_batch_size"].nunique() > 1


@figures.styled
def error_by_statistics(
    frame: pd.DataFrame, axes: Sequence[Axes] | None = None, x: str = "norm_batch_size", norm: str = "bn"
) -> Sequence[Axes]:
    """One norm's final error under each choice of statistics (left), and the parts it is made of (right), over `x`.

    Left, as figure 2 of arXiv:2105.07576: test error with running averages (EMA), with population statistics, with
    mini-batch statistics, and of runs whose statistics were frozen in their last epochs, beside the training error.
    Right: test error (EMA) = training error + generalization gap (mini-batch, test - training) + train/test
    inconsistency (test, population - mini-batch) + lag of the running averages (test, EMA - population), in points.

    Args:
        frame: as `table.load` returns it.
        x: "norm_batch_size" or "batch_size".
    """
    rows, left_out = slice_axis(frame[frame["norm"] == norm], x)
    frozen_epochs = rows.get("frozen_epochs", pd.Series(0, index=rows.index)).fillna(0)
    plain, frozen = rows[frozen_epochs == 0], rows[frozen_epochs > 0]
    plain = plain.assign(**{name: plain[a] - (0 if b is None else plain[b]) for name, (a, b, _) in PARTS.items()})
    left, right = figures.new_axes(2, (10.2, 3.9)) if axes is None else axes
    lines = []
    for value, (label, line) in STATISTICS.items():
        lines.append((label, line, plain, value))
    if len(frozen):
        lines.append((*FROZEN, frozen, "test_error_ema"))
    for _, line, own, value in lines:
        _draw_line(left, own, x, value, line)
    for name, (_, _, line) in PARTS.items():
        _draw_line(right, plain, x, name, line)
    right.axhline(0, color="0.6", linewidth=0.8)
    positions = sorted(int(value) for value in rows[x].dropna().unique())
    for ax in (left, right):
        figures.set_log2_axis(ax, positions, decreasing=True)
        ax.set_xlabel(figures.AXIS_LABELS[x])
    left.set(title=label_norm(norm), ylabel="error after the last epoch (%)")
    right.set(title=f"{label_norm(norm)}: parts of the test error", ylabel="points of error")
    figures.add_legend(left, [(label, line) for label, line, _, _ in lines])
    figures.add_legend(right, [(name, line) for name, (_, _, line) in PARTS.items()], **figures.OUTSIDE)
    notes = [
        "Means over seeds, of the last epoch; bars: 95 % t-interval",
        figures.describe_runs(rows, x),
        left_out,
        *name_gaps(rows),
    ]
    figures.add_figure_note(left.figure, notes)
    return left, right


@figures.styled
def responses(frame: pd.DataFrame, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Percentiles 1, 20, 80, 99 of a layer's responses per epoch, a panel a norm (Figure 6 of arXiv:1803.08494).

    Args:
        frame: as `table.curves` returns it, of runs whose model names a `response`.
        axes: one for each label of the frame.
    """
    rows = frame[frame["response_percentiles"].notna()]
    labels = list(rows["label"].unique())
    if axes is None:
        axes = figures.new_axes(len(labels), (2.9 * len(labels) + 0.9, 3.4))
    styles = figures.style_lines(frame)
    for ax, label in zip(axes, labels, strict=True):
        own = rows[rows["label"] == label]
        values = pd.DataFrame(own["response_percentiles"].tolist(), index=own.index, columns=list(PERCENTILES))
        mean = values.groupby(own["epoch"]).mean()
        color = styles[label]["color"]
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
        ax.set(title=label, xlabel=figures.AXIS_LABELS["epoch"])
    axes[0].set_ylabel("response before the last activation")
    note = "Percentiles over images, channels and positions, mean over seeds; each panel has its own scale."
    runs = rows.drop_duplicates(["sweep", "run"])
    figures.add_figure_note(axes[0].figure, [note, figures.describe_runs(runs), *name_gaps(runs)])
    return axes


def has_learning_rates(frame: pd.DataFrame) -> bool:
    """Whether the frame has several base learning rates for one norm and batch size, judged on held-out images."""
    judged = frame[frame["val_error"].notna()]
    return len(judged) > 0 and judged.groupby(["variant", "batch_size"])["base_lr"].nunique().max() > 1


@figures.styled
def error_vs_learning_rate(frame: pd.DataFrame, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Held-out error against base learning rate: a panel a batch size, a line a norm; the least of each is ringed.

    Args:
        frame: as `table.load` returns it, of runs with held-out images.
        axes: one for each batch size.
    """
    sizes = sorted(frame["batch_size"].dropna().unique(), reverse=True)
    axes = figures.new_axes(len(sizes), (2.5 * len(sizes) + 1.1, 3.3), sharey=True) if axes is None else axes
    rates = sorted(frame["base_lr"].dropna().unique())
    norms = list(frame["norm"].dropna().unique())
    for ax, size in zip(axes, sizes, strict=True):
        for norm in norms:
            own = frame[(frame["batch_size"] == size) & (frame["norm"] == norm)]
            style = figures.style_norm(norm)
            line = {"color": style.color, "marker": style.marker, "linestyle": style.linestyle}
            mean = own[own["status"] == "done"].groupby("base_lr")["val_error"].mean().sort_index()
            ax.plot(mean.index, mean, **line)
            lost = sorted(own.loc[own["status"] == "diverged", "base_lr"].unique())
            legal = mean.drop(lost, errors="ignore")
            if len(legal):
                ring = {"marker": "o", "markersize": 12, "markerfacecolor": "none", "markeredgecolor": style.color}
                ax.plot([legal.idxmin()], [legal.min()], linestyle="", **ring)
            cross = {"linestyle": "", "marker": "x", "markersize": 6, "markeredgewidth": 1.5, "color": style.color}
            ax.plot(lost, [0.98] * len(lost), **cross, transform=ax.get_xaxis_transform())
        ax.set_xscale("log", base=2)
        ax.set_xticks(rates, labels=[f"{rate:g}" for rate in rates], rotation=45)
        ax.minorticks_off()
        ax.set(title=f"batch size {size}", xlabel="base learning rate")
    axes[0].set_ylabel("held-out error after the last epoch (%)")
    styles = {norm: figures.style_norm(norm) for norm in norms}
    handles = [
        (label_norm(norm), {"color": style.color, "marker": style.marker, "linestyle": style.linestyle})
        for norm, style in styles.items()
    ]
    figures.add_legend(axes[-1], handles, **figures.OUTSIDE)
    note = "Mean over seeds; ringed: the least, which sweep=tuned takes; crosses: a run diverged."
    figures.add_figure_note(axes[0].figure, [note, figures.describe_runs(frame), *name_gaps(frame)])
    return axes


def _draw_line(ax: Axes, rows: pd.DataFrame, x: str, value: str, line: dict) -> None:
    """The mean of `value` over seeds at each `x`, with its t-interval."""
    summary = summarize(rows, value)
    summary = summary[summary["n"] > 0].sort_values(x)
    bars = [(summary["mean"] - summary["low"]).fillna(0), (summary["high"] - summary["mean"]).fillna(0)]
    ax.errorbar(summary[x].astype(float), summary["mean"], yerr=bars, **line, capsize=2.5, elinewidth=1)
