"""What runs with `diagnostics` measured layer by layer: as a tidy table, and drawn by depth.

Each figure takes the frame of `table.curves` and returns its axes, (rows of panels, columns of panels).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from gnbench.analysis import figures
from gnbench.analysis.statistics import name_gaps
from gnbench.analysis.table import find_axes, one_row_a_run, place_cells, slice_axis
from gnbench.record import PERCENTILES

RUN = ("run", "norm", "label", "batch_size", "norm_batch_size", "seed", "epoch")  # of a number: whose it is
LAYER = ("layer", "depth", "quantity", "images", "value")  # and what
LABELS = {
    "sd": "standard deviation",
    "stable_rank": "stable rank",
    "weight_gradient": "gradient norm, weights",
    "norm_gradient": "gradient norm, norms",
    "mean_noise": "noise of the mean",
    "var_noise": "noise of the variance",
}
LINEAR = ("stable_rank",)  # quantities that are not drawn on a logarithmic axis
INDEPENDENT = {"color": "0.6", "linestyle": (0, (1, 1))}
FEW_DECADES = 100.0  # ratio of an axis's ends below which powers of ten alone are too few ticks
LARGE = 20.0  # activations beyond which a row of panels has a logarithmic axis
MOST_EPOCHS = 3  # rows of panels, for one quantity
MEANS = "Means over the seeds of those runs that came to the epoch"
NOTES = {
    "activations": "Percentiles 1, 20, 80 and 99 of what norms put out in training; bands: the last epoch of a run, "
    "black lines: the first",
    "sd": "Of what norms put out in training, over images, positions and channels",
    "stable_rank": "||A||_F² / ||A||_2² of what norms put out in training, A of shape (images · positions, channels): "
    "1 to the number of channels",
    "gradients": "L2 norms of the gradient of a mini-batch's loss, as means over mini-batches; of a norm, all of its "
    "parameters together",
    "noise": "Of what norms are given in the last epoch; lines: medians over the norms of a network, thin: its "
    "first norm; rings: the norm's own normalization batches, whose images the norms before have normalized together. "
    "Noise of the mean: E[(mean − population's)² / population's variance]; of the variance: E[(variance / population's "
    "− 1)²]. Grey: if each image were one number of a normal distribution, 1/NBS and (2 NBS − 1)/NBS²",
}


def has_diagnostics(frame: pd.DataFrame) -> bool:
    """Whether a frame of `table.curves` has runs with diagnostics."""
    return "diagnostics" in frame and bool(frame["diagnostics"].notna().any())


def tabulate(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a number: RUN says of which run and epoch, LAYER of what. docs/record.md defines the quantities.

    `depth` counts from 1, norms and weights each by themselves. `quantity` is percentile_1 to percentile_99, mean, sd,
    stable_rank; mean_noise and var_noise, of mini-batches of `images`; weight_gradient; norm_gradient, of all
    parameters of a norm together, and norm_gradient.<parameter>.

    Args:
        frame: as `table.curves` returns it.
    """
    parts = [
        pd.DataFrame(_list_numbers(row["diagnostics"]), columns=list(LAYER)).assign(**{key: row[key] for key in RUN})
        for row in frame[frame["diagnostics"].notna()].to_dict("records")
    ]
    tidy = pd.concat(parts, ignore_index=True)[[*RUN, *LAYER]]
    return tidy.astype({"norm_batch_size": "Int64", "epoch": int, "images": "Int64", "value": float})


def _list_numbers(measured: dict) -> Iterator[tuple]:
    """LAYER of each number of one epoch."""
    for number, layer in enumerate(measured["layers"]):
        place = (layer, number + 1)
        for percent, value in zip(PERCENTILES, measured["percentiles"][number], strict=True):
            yield *place, f"percentile_{percent}", None, value
        for quantity in ("mean", "sd", "stable_rank"):
            yield *place, quantity, None, measured[quantity][number]
        for quantity in ("mean_noise", "var_noise"):
            for images, value in zip(measured["norm_batch_sizes"], measured[quantity][number], strict=True):
                yield *place, quantity, images, value
        gradients = measured["norm_gradients"][number]
        if gradients:
            yield *place, "norm_gradient", None, _join(gradients.values())
        for name, value in gradients.items():
            yield *place, f"norm_gradient.{name}", None, value
    for depth, (name, value) in enumerate(measured["weight_gradients"].items(), 1):
        yield name, depth, "weight_gradient", None, value


def _join(norms: Sequence[float | None]) -> float:
    """The L2 norm of several vectors together from their own."""
    return math.hypot(*(math.nan if norm is None else norm for norm in norms))


@figures.styled
def activations(frame: pd.DataFrame) -> np.ndarray:
    """Percentiles of activations by depth: a row of panels a norm, a column a batch size."""
    layout = _lay_out(frame)
    labels, styles = list(layout.runs["label"].unique()), figures.style_lines(frame)
    axes = _new_panels(len(labels), len(layout.columns), sharey="row")
    has_large = False
    for line, label in zip(axes, labels, strict=True):
        for ax, (_, tidy) in zip(line, layout.columns, strict=True):
            _draw_percentiles(ax, tidy[tidy["label"] == label], styles[label]["color"])
        if np.abs(line[0].get_ylim()).max() > LARGE:
            has_large = True
            line[0].set_yscale("symlog", linthresh=1)
            line[0].yaxis.set_major_formatter("{x:g}")
        line[0].set_ylabel(f"{label}\nactivation")
    for ax in axes[-1]:
        ax.set_xlabel("depth (norm)")
    note = NOTES["activations"] + "; the axis is logarithmic beyond ±1 where they are large" * has_large
    _finish(axes, layout, note)
    return axes


@figures.styled
def by_depth(frame: pd.DataFrame, quantity: str) -> np.ndarray:
    """The "sd" or the "stable_rank" of activations by depth: a row of panels an epoch, a column a batch size."""
    layout = _lay_out(frame)
    panels = [(quantity, epoch) for epoch in _choose(layout.epochs, MOST_EPOCHS)]
    return _draw_by_depth(frame, layout, panels, NOTES[quantity], sharey=True)


@figures.styled
def gradients(frame: pd.DataFrame) -> np.ndarray:
    """Gradient norms by depth, of weights and of norms, in the first and the last epoch; a column a batch size."""
    layout = _lay_out(frame)
    quantities = ("weight_gradient", "norm_gradient")
    panels = [(quantity, epoch) for quantity in quantities for epoch in _choose(layout.epochs, 2)]
    return _draw_by_depth(frame, layout, panels, NOTES["gradients"], sharey="row")


@figures.styled
def noise(frame: pd.DataFrame) -> np.ndarray:
    """Noise of batch statistics against the images that share them, of the mean and the variance; a column a batch."""
    layout = _lay_out(frame)
    styles = figures.style_lines(frame)
    axes = _new_panels(2, len(layout.columns), sharey="row")
    normal = {"mean_noise": lambda size: 1 / size, "var_noise": lambda size: (2 * size - 1) / size**2}
    for line, (quantity, expect) in zip(axes, normal.items(), strict=True):
        for ax, (_, tidy) in zip(line, layout.columns, strict=True):
            own = tidy[tidy["quantity"] == quantity]
            sizes = sorted(int(size) for size in own["images"].unique())
            ax.plot(sizes, [expect(size) for size in sizes], **INDEPENDENT)
            for label in layout.runs["label"].unique():
                _draw_noise(ax, own[own["label"] == label], styles[label])
            figures.set_log2_axis(ax, sizes, decreasing=False)
            _set_log_axis(ax)
        line[0].set_ylabel(LABELS[quantity])
    _finish(axes, layout, NOTES["noise"])
    for ax in axes[-1]:
        ax.set_xlabel("normalization batch size")
    _add_legend(axes, layout, styles, [("independent images", INDEPENDENT)])
    return axes


def draw(frame: pd.DataFrame) -> dict[str, tuple[str, np.ndarray]]:
    """{file name: (title, axes)} of all figures of a frame that `has_diagnostics`."""
    return {
        "activations": ("Activations by depth", activations(frame)),
        "sd": ("Standard deviation of activations by depth", by_depth(frame, "sd")),
        "stable_rank": ("Stable rank of activations by depth", by_depth(frame, "stable_rank")),
        "gradients": ("Gradient norms by depth", gradients(frame)),
        "noise": ("Noise of batch statistics against normalization batch size", noise(frame)),
    }


@dataclass
class _Layout:
    """What is drawn: the rows of the frame that have diagnostics, the numbers of each column of panels, their title."""

    runs: pd.DataFrame
    columns: list[tuple[str, pd.DataFrame]]
    notes: list[str]

    @property
    def epochs(self) -> list[int]:
        return sorted(self.runs["epoch"].astype(int).unique())


def _lay_out(frame: pd.DataFrame) -> _Layout:
    rows = frame[frame["diagnostics"].notna()]
    x = find_axes(rows)[0]
    kept, left_out = slice_axis(rows, x)
    places = place_cells(kept, x)
    sizes = sorted(places.dropna().astype(int).unique(), reverse=True)
    chosen = _choose(sizes, figures.MOST_COLUMNS)
    columns = [
        (f"{figures.name_axis(x)} {size}", tabulate(kept[(places == size) | places.isna()])) for size in chosen
    ] or [("", tabulate(kept))]
    hidden = [str(size) for size in sizes if size not in chosen]
    more = f"Not shown: {figures.name_axis(x)} {', '.join(hidden)}" if hidden else ""
    every = one_row_a_run(frame)
    means = figures.describe_seeds(every, MEANS)
    return _Layout(kept, columns, [means, figures.describe_runs(every, x), left_out, more, *name_gaps(every)])


def _choose(values: list[int], most: int) -> list[int]:
    """At most so many of the values, at equal distances, the first and the last among them."""
    if len(values) <= most:
        return values
    return [values[round(number * (len(values) - 1) / (most - 1))] for number in range(most)]


def _new_panels(down: int, across: int, sharey: bool | str) -> np.ndarray:
    figure = Figure(figsize=(2.5 * across + 2.0, 1.9 * down + 1.1), layout="constrained")
    return figure.subplots(down, across, squeeze=False, sharey=sharey, sharex="row")


def _draw_percentiles(ax: Axes, tidy: pd.DataFrame, color: str) -> None:
    """Bands of a run's last epoch, lines of its first."""
    percentiles = tidy[tidy["quantity"].str.startswith("percentile_")]
    by_run = percentiles.groupby("run")["epoch"]
    for epoch in ("min", "max"):
        own = percentiles[percentiles["epoch"] == by_run.transform(epoch)]
        mean = own.groupby(["depth", "quantity"])["value"].mean().unstack()
        if mean.empty:
            continue
        low, less, more, high = (mean[f"percentile_{percent}"] for percent in PERCENTILES)
        if epoch == "max":
            ax.fill_between(mean.index, low, high, color=color, alpha=0.2, linewidth=0)
            ax.fill_between(mean.index, less, more, color=color, alpha=0.45, linewidth=0)
            ax.plot(mean.index, mean, color=color, linewidth=1)
            continue
        for outer, inner in ((low, less), (high, more)):
            ax.plot(mean.index, outer, color="0.1", linewidth=0.9, linestyle=(0, (4, 2)))
            ax.plot(mean.index, inner, color="0.1", linewidth=0.9, linestyle=(0, (1, 1)))


def _draw_by_depth(
    frame: pd.DataFrame, layout: _Layout, panels: list[tuple[str, int]], note: str, sharey: bool | str
) -> np.ndarray:
    styles = figures.style_lines(frame)
    axes = _new_panels(len(panels), len(layout.columns), sharey)
    for number, (line, (quantity, epoch)) in enumerate(zip(axes, panels, strict=True)):
        for ax, (_, tidy) in zip(line, layout.columns, strict=True):
            own = tidy[(tidy["quantity"] == quantity) & (tidy["epoch"] == epoch)]
            for label in layout.runs["label"].unique():
                mean = own[own["label"] == label].groupby("depth")["value"].mean()
                ax.plot(mean.index, mean, **{**styles[label], "markersize": 3.5, "linewidth": 1.2})
            if quantity not in LINEAR:
                _set_log_axis(ax)
            if all(other != quantity for other, _ in panels[number + 1 :]):
                ax.set_xlabel("depth (convolution, classifier)" if quantity == "weight_gradient" else "depth (norm)")
        line[0].set_ylabel(f"{LABELS[quantity]}\nepoch {epoch}")
    _finish(axes, layout, note)
    _add_legend(axes, layout, styles)
    return axes


def _draw_noise(ax: Axes, tidy: pd.DataFrame, line: dict) -> None:
    """One norm's noise in the last epoch of its runs: median over its layers, its first, a ring at its own NBS."""
    last = tidy[tidy["epoch"] == tidy.groupby("run")["epoch"].transform("max")]
    by_layer = last.astype({"images": int}).groupby(["images", "depth"])["value"].mean().unstack()
    if by_layer.empty:
        return
    median = by_layer.median(axis="columns")
    ax.plot(by_layer.index, by_layer[1], color=line["color"], linestyle=line["linestyle"], linewidth=0.5)
    ax.plot(median.index, median, **{**line, "markersize": 3.5, "linewidth": 1.2})
    own = [size for size in last["norm_batch_size"].dropna().unique() if size in median.index]
    ring = {"linestyle": "", "marker": "o", "markersize": 10, "markerfacecolor": "none"}
    ax.plot(own, median.loc[own], **ring, markeredgecolor=line["color"])


def _finish(axes: np.ndarray, layout: _Layout, note: str) -> None:
    """Titles, ticks and the small print."""
    for ax, (title, _) in zip(axes[0], layout.columns, strict=True):
        ax.set_title(title)
    for ax in axes.ravel():
        if ax.get_xscale() == "linear":
            figures.set_whole_ticks(ax)
        low, high = ax.get_ylim()
        if ax.get_yscale() == "log" and high < FEW_DECADES * low:
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    figures.add_figure_note(axes[0, 0].figure, [note, *layout.notes])


def _set_log_axis(ax: Axes) -> None:
    """A logarithmic axis whose numbers are plain text, as all text in these figures."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")


def _add_legend(axes: np.ndarray, layout: _Layout, styles: dict, more: Sequence[tuple[str, dict]] = ()) -> None:
    lines = [(label, styles[label]) for label in layout.runs["label"].unique()]
    figures.add_legend(axes[0, -1], [*lines, *more])
