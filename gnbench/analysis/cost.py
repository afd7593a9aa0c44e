"""What norms cost, as `sweep=cost` measured it: its table, its figures, and the error against the cost.

    costs = cost.load("results/cost")
    axes = cost.error_vs_cost(gnbench.load("results/zoo"), costs)

A time is a median over rounds with its quartiles, and a ratio is to plain BN's time in the same round.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from gnbench.analysis import figures, table
from gnbench.analysis.statistics import summarize
from gnbench.words import has_value, number_of

COLUMNS = (  # of cost.csv
    *("norm", "variant", "setting", "label", "batch_size", "norm_batch_size", "num_groups", "channels_per_group"),
    *("model", "data", "precision", "memory_format", "norm_format", "bn_format", "status", "cause"),
    *("images_per_s", *table.COSTS, "peak_memory_mb", "num_parameters", "cost_rounds", "cost_round_s"),
    *("num_threads", "device", "processor", "torch", "sweep", "run", "cell"),
)
PAGE_COLUMNS = {
    "label": "norm",
    "batch_size": "batch size",
    "norm_batch_size": "normalization batch size",
    "step": "training step (ms)",
    "images_per_s": "images/s",
    "step_times_bn": "× BN's",
    "inference": "inference (ms)",
    "inference_times_bn": "× BN's",
    "saved_mb": "saved for backward (MiB)",
    "norm_saved_mb": "by the norm (MiB)",
    "peak_memory_mb": "peak memory (MiB)",
    "largest_batch": "largest batch",
}
WAYS = {"step_ratio": "training step", "inference_ratio": "inference"}
TICKS = {  # of ratios whose largest is up to so many times the smallest
    2.2: (0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.4, 1.7, 2),
    5: (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4),
    math.inf: (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64),
}
ROUNDS_NOTE = "Medians over rounds in which BN and the norm took turns; bars: quartiles."
POINT_IN = 1 / 72
LETTERS = 7  # points: size of a label's
PLACES = ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))  # of a label about its point
HEAVY = 5  # of a label over a point or another label, as it were over a bar
AWAY = 1.5  # square points of a bar that a label may cover rather than stand a point further away
DISTANCES = (4, 8, 14, 20, 28, 38)  # points


def load(*directories: Path | str, where: str | None = None) -> pd.DataFrame:
    """The measurements of cost in one or more directories, a row each: no row where there are none.

    Raises:
        UserError: a directory does not exist or holds no records, or `where` is no condition.
    """
    costs = table.load(*directories, measure="cost", where=where)
    return costs.reindex(columns=list(dict.fromkeys([*costs.columns, *COLUMNS])))


def name_gaps(costs: pd.DataFrame) -> list[str]:
    """Sentences on measurements that are not finished."""
    lost = costs[costs["status"] != "done"]
    return [
        f"cost of {row.label or row.run}{_name_place(row.batch_size)}: {row.status}"
        + (f", {row.cause}" if isinstance(row.cause, str) else "")
        for row in lost.itertuples()
    ]


def _name_place(batch_size: object) -> str:
    return f" at batch size {batch_size}" if has_value(batch_size) else ""  # of a record that cannot be read


def headline(costs: pd.DataFrame, most: int = 4) -> str:
    """The cheapest norms in one sentence, at the batch size at which most were measured, the largest of several."""
    done = costs[costs["status"] == "done"]
    if done.empty:
        return "No measurement has finished."
    size = _find_size(done)
    own = done[done["batch_size"] == size].sort_values("step_ratio", kind="stable")
    told = [f"{row.label} {row.step_ratio:.2f}" for row in own.itertuples()]
    if len(told) > most:
        told[most:] = [f"{len(told) - most} more in the table, up to {told[-1]}"]
    return f"Time of a training step at batch size {size} as a multiple of BN's, lowest first: {'; '.join(told)}."


def list_facts(costs: pd.DataFrame) -> list[tuple[str, str]]:
    """(name, value) of what a reader must know before believing a number."""
    counts = ", ".join(f"{count} {status}" for status, count in costs["status"].value_counts(sort=False).items())
    readable = costs[costs["status"] != "unreadable"]
    told = readable.astype({"num_threads": "Int64"})[["device", "processor", "torch", "num_threads"]]
    machines = told.drop_duplicates().astype("string").fillna("?")
    rounds = readable[["cost_rounds", "cost_round_s"]].drop_duplicates()
    values = [
        ("Measurements of cost", f"{len(costs)}: {counts}"),
        ("Cost: model", ", ".join(readable["model"].dropna().unique())),
        ("Cost: images", ", ".join(readable["data"].dropna().unique())),
        (
            "Cost: how",
            "; ".join(
                f"{number_of(int(row.cost_rounds), 'round')}, in each of which BN and the norm take turns, "
                f"{row.cost_round_s:g} s of steps and of inference each"
                for row in rounds.itertuples()
            ),
        ),
        (
            "Cost: machines",
            "; ".join(
                f"{row.device} · {row.processor} · torch {row.torch}, {number_of(row.num_threads, 'thread')}"
                for row in machines.itertuples()
            ),
        ),
    ]
    return [(name, value) for name, value in values if value]


def tabulate_page(costs: pd.DataFrame) -> pd.DataFrame:
    """The rows of the page: `PAGE_COLUMNS`, times and ratios with their quartiles."""
    done = costs[costs["status"] == "done"]
    spreads = {
        "step": ("step_ms", 2),
        "inference": ("inference_ms", 2),
        "step_times_bn": ("step_ratio", 2),
        "inference_times_bn": ("inference_ratio", 2),
    }
    texts = {
        name: [
            f"{middle:.{places}f} ({low:.{places}f} to {high:.{places}f})"
            for middle, low, high in done[[key, f"{key}_low", f"{key}_high"]].itertuples(index=False)
        ]
        for name, (key, places) in spreads.items()
    }
    return done.assign(**texts)[list(PAGE_COLUMNS)]


def draw_figures(errors: pd.DataFrame, costs: pd.DataFrame) -> dict[str, tuple[str, Figure]]:
    """{file name: (title, figure)} of the figures that there are measurements for."""
    drawn = {}
    if (costs["status"] == "done").any():
        drawn["cost_vs_bn"] = ("Time as a multiple of BN's", cost_vs_bn(costs)[0].figure)
        drawn["saved_memory"] = ("What is kept for the backward pass", saved_memory(costs)[0].figure)
    if len(drawn) and len(errors):
        cells = match_costs(errors, costs)
        if (cells["step_ratio"].notna() & (cells["n"] > 0)).any():
            drawn["error_vs_cost"] = ("Test error against the time of a step", error_vs_cost(errors, costs)[0].figure)
    return drawn


def match_costs(errors: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """A row an error cell (as `statistics.summarize` gives it) with its norm's cost in the same model and precision.

    `cost_batch_size` is where the cost was measured: the cell's own batch size if any has been measured there; where
    errors and costs have no batch size in common, the two that are nearest (by their ratio, the larger ones first) are
    kept and put together. Cells of other batch sizes are left out, and those with several normalization batches in an
    update. A norm that was measured in several memory formats has the trainer's own choice, auto, first. Where a norm
    has no measurement, its costs are NaN.
    """
    columns = [*table.norm_columns(errors, costs), "precision"]
    done = costs[(costs["status"] == "done") & _is_plain(costs)]
    cells = summarize(errors[_is_plain(errors)])
    first = errors.dropna(subset="cell").drop_duplicates("cell").set_index("cell")
    pairs = _pair_sizes(cells["batch_size"], done["batch_size"])
    cells = cells[cells["batch_size"].isin(list(pairs))]
    keys = table.identify_norms(first.reindex(cells["cell"]), columns)
    cells = cells.assign(cost_batch_size=cells["batch_size"].map(pairs).astype("Int64"), key=keys.to_numpy())
    known = done.assign(key=table.identify_norms(done, columns), is_auto=done["memory_format"] == "auto")
    known = known.sort_values("is_auto", ascending=False, kind="stable")
    known = known.rename(columns={"batch_size": "cost_batch_size"})
    by = ["key", "cost_batch_size"]
    known = known.reindex(columns=[*by, "memory_format", *table.COSTS]).drop_duplicates(by)
    return cells.merge(known.astype({"cost_batch_size": "Int64"}), on=by, how="left").drop(columns="key")


@figures.styled
def cost_vs_bn(costs: pd.DataFrame, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Time of a training step and of inference as a multiple of BN's: a panel a batch size, a row a norm, log2.

    Norms are sorted by the geometric mean of their steps' multiples. Where precision, memory format or anything else
    was swept, each has a row of panels.

    Args:
        costs: as `load` returns it.
        axes: settings x batch sizes of them, row by row.
    """
    done = _named(costs)
    settings, sizes = list(done["setting"].unique()), sorted(done["batch_size"].unique(), reverse=True)
    order = np.log2(done["step_ratio"]).groupby(done["name"]).mean().sort_values(kind="stable").index
    styles = figures.style_lines(done.assign(label=done["name"]))
    if axes is None:
        height = 0.21 * len(order) + 0.5
        size = (1.7 + 2.1 * len(sizes), 0.9 + height * len(settings))
        axes = _new_grid(len(settings), len(sizes), size)
    for number, ax in enumerate(axes):
        setting, size = settings[number // len(sizes)], sizes[number % len(sizes)]
        own = done[(done["setting"] == setting) & (done["batch_size"] == size)]
        for row, name in enumerate(order):
            for place, value in enumerate(WAYS):
                _draw_spread(ax, own[own["name"] == name], value, row + 0.26 * place, styles[name], small=place == 1)
        ax.axvline(1, color="0.4", linewidth=0.8, zorder=1)
        ax.set_title(f"batch size {size}" + (f"\n{setting}" if setting else ""))
        ax.set_yticks(range(len(order)), labels=list(order))
        ax.set_ylim(len(order) - 0.4, -0.6)
    ends = [f"{value}{end}" for value in WAYS for end in ("", "_low", "_high")]
    set_ratio_axis(axes, done[ends].to_numpy(dtype=float))
    for ax in axes[-len(sizes) :]:
        ax.set_xlabel("time as a multiple of BN's")
    look = {"color": figures.GREY, "linestyle": ""}
    shapes = [{**look, "marker": "o", "markersize": 5.5}, {**look, "marker": "o", "markersize": 3, "alpha": 0.7}]
    figures.add_legend(axes[len(sizes) - 1], list(zip(WAYS.values(), shapes, strict=True)), **figures.OUTSIDE)
    control = "BN's own row is BN beside itself: what is noise." if "BN" in set(order) else ""
    notes = [ROUNDS_NOTE, control, _describe(done), *name_gaps(costs)]
    figures.add_figure_note(axes[0].figure, notes)
    return axes


@figures.styled
def saved_memory(costs: pd.DataFrame, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """MiB that a step keeps for its backward pass: the model's without norms, and the norm's.

    At the batch size at which most norms were measured, the largest of several: the numbers are in proportion to it.

    Args:
        costs: as `load` returns it.
        axes: one for each setting.
    """
    done = _named(costs)
    size = _find_size(done)
    elsewhere = done.loc[~done["name"].isin(done.loc[done["batch_size"] == size, "name"]), "name"].unique()
    done = done[done["batch_size"] == size].drop_duplicates(["setting", "name"])
    settings = list(done["setting"].unique())
    order = done.groupby("name")["saved_mb"].mean().sort_values(kind="stable").index
    if axes is None:
        axes = _new_grid(1, len(settings), (2.6 + 3.1 * len(settings), 1.3 + 0.21 * len(order)))
    for ax, setting in zip(axes, settings, strict=True):
        own = done[done["setting"] == setting].set_index("name").reindex(order)
        without = own["saved_mb"] - own["norm_saved_mb"]
        rows = np.arange(len(order))
        colors = [figures.style_norm(norm).color if isinstance(norm, str) else "none" for norm in own["norm"]]
        ax.barh(rows, np.fmin(without, own["saved_mb"]), color="0.82", edgecolor="0.45", linewidth=0.6, height=0.7)
        ax.barh(rows, own["norm_saved_mb"], left=without, color=colors, edgecolor="0.2", linewidth=0.6, height=0.7)
        for row, share, total in zip(rows, own["norm_saved_mb"], np.fmax(without, own["saved_mb"]), strict=True):
            if not math.isnan(share):
                ax.annotate(f" {share:+.1f}", (total, row), va="center", fontsize=7)
        ax.set_title(setting)
        ax.set_yticks(rows, labels=list(order))
        ax.set_ylim(len(order) - 0.4, -0.6)
        ax.set_xlim(0, 1.13 * np.nanmax(own["saved_mb"]))
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(f"saved for the backward pass at batch size {size} (MiB)")
    notes = [
        "Grey: the model without norms; colour, and the number: what the norm adds. Parameters, buffers and the batch "
        "itself do not count.",
        f"Measured at other batch sizes alone: {', '.join(elsewhere)}" if len(elsewhere) else "",
        _describe(done),
        *name_gaps(costs),
    ]
    figures.add_figure_note(axes[0].figure, notes)
    return axes


@figures.styled
def error_vs_cost(errors: pd.DataFrame, costs: pd.DataFrame, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Test error against the time of a training step as a multiple of BN's: a panel a batch size, a point a norm.

    Args:
        errors: as `table.load` returns it.
        costs: as `load` returns it; `match_costs` says which measurement belongs to which error.
        axes: one for each batch size.
    """
    cells = match_costs(errors, costs)
    drawn = cells[(cells["n"] > 0) & cells["step_ratio"].notna()]
    sizes = sorted(drawn["batch_size"].unique(), reverse=True)[: figures.MOST_COLUMNS]
    styles = figures.style_lines(errors)
    if axes is None:
        axes = figures.new_axes(len(sizes), (1 + 4.2 * len(sizes), 4.4), sharey=True)
    for ax, size in zip(axes, sizes, strict=True):
        own = drawn[drawn["batch_size"] == size]
        for row in own.to_dict("records"):
            point = {**styles[row["label"]], "linestyle": "", "capsize": 2, "elinewidth": 0.9}
            across = [[row["step_ratio"] - row["step_ratio_low"]], [row["step_ratio_high"] - row["step_ratio"]]]
            along = np.nan_to_num([[row["mean"] - row["low"]], [row["high"] - row["mean"]]])
            ax.errorbar([row["step_ratio"]], [row["mean"]], xerr=across, yerr=along, **point)
        elsewhere = own["cost_batch_size"].iloc[0]
        ax.set_title(f"batch size {size}" + ("" if elsewhere == size else f", cost at {elsewhere}"))
        ax.set_xlabel("time of a training step as a multiple of BN's")
    set_ratio_axis(axes, drawn[["step_ratio_low", "step_ratio_high"]].to_numpy(dtype=float))
    axes[0].set_ylabel(figures.AXIS_LABELS["test_error"])
    done = costs[costs["status"] == "done"]
    notes = [
        "Up and down: mean and 95 % t-interval over seeds; across: median and quartiles over rounds.",
        figures.describe_runs(errors, "batch_size"),
        f"Cost: {_describe(done[done['memory_format'].isin(drawn['memory_format'])])}",
        *_name_left_out(cells, sizes),
    ]
    figures.add_figure_note(axes[0].figure, notes)
    for ax, size in zip(axes, sizes, strict=True):
        own = drawn[drawn["batch_size"] == size]
        across = own[["step_ratio_low", "mean", "step_ratio_high", "mean"]].to_numpy(float)
        along = own[["step_ratio", "low", "step_ratio", "high"]].dropna().to_numpy(float)
        label_points(ax, own[["step_ratio", "mean"]].to_numpy(float), list(own["label"]), [*across, *along])
    return axes


def set_ratio_axis(axes: Sequence[Axes], values: np.ndarray) -> None:
    """A log2 axis of ratios, the same for all panels, with ticks like 0.5×, 1×, 2× as far as the values go."""
    low, high = np.nanmin([*values.ravel(), 1]), np.nanmax([*values.ravel(), 1])
    margin = (high / low) ** 0.06 * 1.02
    candidates = next(ticks for most, ticks in TICKS.items() if high / low <= most)
    ticks = [tick for tick in candidates if low / margin <= tick <= high * margin]
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_xlim(low / margin, high * margin)
        ax.set_xticks(ticks, labels=[f"{tick:g}×" for tick in ticks], fontsize=8)
        ax.minorticks_off()


def label_points(
    ax: Axes, points: np.ndarray, labels: Sequence[str], bars: Sequence[tuple[float, float, float, float]] = ()
) -> None:
    """Write each label beside its point, where it covers no point, bar or other label, as near as there is room.

    A label that stands away from its point has a thin line to it.

    Args:
        points: (N, 2), x and y.
        bars: x and y of the one end of each, and of the other.
    """
    ax.figure.draw_without_rendering()  # so that the layout is what it will be
    scale = ax.figure.dpi * POINT_IN  # pixels a point
    places = ax.transData.transform(points) / scale
    ends = ax.transData.transform(np.reshape(bars, (-1, 2))).reshape(-1, 4) / scale
    frame = ax.get_window_extent()
    inside = (frame.x0 / scale, frame.y0 / scale, frame.x1 / scale, frame.y1 / scale)
    taken = [(HEAVY, (x - 4, y - 4, x + 4, y + 4)) for x, y in places]
    taken += [(1, (left - 1, bottom - 1, right + 1, top + 1)) for left, bottom, right, top in ends]
    for point, (x, y), label in zip(points, places, labels, strict=True):
        size = _measure_text(ax, label) / scale
        spots = []
        for distance in DISTANCES:
            for across, up in PLACES:
                left = x + across * distance - size[0] * (1 - across) / 2
                bottom = y + up * distance - size[1] * (1 - up) / 2
                box = (left, bottom, left + size[0], bottom + size[1])
                outside = size[0] * size[1] - _overlap(box, inside)
                covered = sum(weight * _overlap(box, other) for weight, other in taken) + HEAVY * outside
                spots.append((covered + AWAY * distance, distance, box))
        _, distance, box = min(spots, key=lambda spot: spot[:2])
        taken.append((HEAVY, box))
        line = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        text = ax.annotate(
            label,
            tuple(point),
            xytext=(box[0] - x, box[1] - y),
            textcoords="offset points",
            fontsize=LETTERS,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            arrowprops=line if distance > DISTANCES[1] else None,
        )
        text.set_in_layout(False)


def _measure_text(ax: Axes, label: str) -> np.ndarray:
    """Width and height of a label, in pixels."""
    text = ax.text(0, 0, label, fontsize=LETTERS)
    size = np.array(text.get_window_extent().size)
    text.remove()
    return size


def _overlap(a: tuple, b: tuple) -> float:
    """Area that two boxes (left, bottom, right, top) share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _is_plain(frame: pd.DataFrame) -> pd.Series:
    """Whether a row's update holds one normalization batch, or its norm knows none."""
    return frame["norm_batch_size"].isna() | (frame["norm_batch_size"] == frame["batch_size"]).fillna(False)


def _pair_sizes(errors: pd.Series, costs: pd.Series) -> dict[int, int]:
    """Batch sizes of errors -> those of costs: the ones in common, or else the nearest two."""
    of_errors, of_costs = ([int(size) for size in sizes.dropna().unique()] for sizes in (errors, costs))
    common = set(of_errors) & set(of_costs)
    if common or not of_errors or not of_costs:
        return {size: size for size in sorted(common)}
    pairs = [(abs(math.log2(a / b)), -a, -b) for a in of_errors for b in of_costs]
    _, a, b = min(pairs)
    return {-a: -b}


def _find_size(done: pd.DataFrame) -> int:
    """The batch size at which most norms were measured, the largest of several."""
    counts = done.groupby("batch_size")["label"].nunique()
    return int(max(counts[counts == counts.max()].index))


def _named(costs: pd.DataFrame) -> pd.DataFrame:
    """The finished measurements with a `name`: the label without the setting, with an NBS that is not the batch."""
    done = costs[costs["status"] == "done"]
    names = [
        row.label.removesuffix(f" [{row.setting}]") + ("" if plain else f", NBS {row.norm_batch_size}")
        for row, plain in zip(done.itertuples(), _is_plain(done), strict=True)
    ]
    return done.assign(name=names)


def _describe(done: pd.DataFrame) -> str:
    """Model, images, precision, memory format and machine, where all rows have the same."""
    forms = {
        "model": str,
        "data": "{} images".format,
        "precision": str,
        "memory_format": "memory format {}".format,
        "num_threads": lambda number: number_of(int(number), "thread"),
        "device": str,
    }
    values = {key: done[key].dropna().unique() for key in forms}
    return ", ".join(forms[key](found[0]) for key, found in values.items() if len(found) == 1)


def _name_left_out(cells: pd.DataFrame, sizes: Sequence[int]) -> list[str]:
    """Which norms have no point, and why."""
    shown = cells[cells["batch_size"].isin(list(sizes))]
    sentences = []
    for why, missing in (
        ("Without a measured cost", shown["step_ratio"].isna()),
        ("Without a finished run", shown["step_ratio"].notna() & (shown["n"] == 0)),
    ):
        names = [
            f"{label} at {', '.join(str(size) for size in sorted(rows['batch_size'], reverse=True))}"
            for label, rows in shown[missing].groupby("label", sort=False)
        ]
        sentences += [f"{why}, and left out: {'; '.join(names)}"] if names else []
    return sentences


def _draw_spread(ax: Axes, rows: pd.DataFrame, value: str, at: float, style: dict, small: bool) -> None:
    """A dot with its quartiles for each row, at the height `at`."""
    middle = rows[value].to_numpy(float)
    bars = np.array([middle - rows[f"{value}_low"], rows[f"{value}_high"] - middle], dtype=float)
    line = {**style, "linestyle": "", "capsize": 0, "elinewidth": 0.8 if small else 1.2}
    ax.errorbar(middle, np.full(len(rows), at), xerr=bars, **{**line, "markersize": 3 if small else 5.5}, zorder=3)


def _new_grid(down: int, across: int, size: tuple[float, float]) -> Sequence[Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
