"""Tables, figures and the HTML page of a report: what `gnbench-report` writes. Needs no torch."""

import base64
import math
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import pandas as pd

from gnbench.analysis import behind_errors, cost, diagnostics, figures, statistics, table
from gnbench.analysis.claims import NOT_TESTED, claims
from gnbench.configs import choices, describe_norm
from gnbench.errors import UserError
from gnbench.files import write_atomic
from gnbench.record import TOGETHER
from gnbench.words import has_value, number_of

TEMPLATE = Path(__file__).with_name("report.html.j2")
REFRESH = '<meta http-equiv="refresh" content="{}">\n'
MOST_CLAUSES = 4  # of the headline
AXES = {"batch_size": "batch size", "norm_batch_size": "normalization batch size"}
SUMMARY_COLUMNS = {  # of the page; summary.csv has more
    "label": "norm",
    "batch_size": "batch size",
    "norm_batch_size": "normalization batch size",
    "n": "n",
    "mean": "test error (%)",
    "interval": "95 % interval",
    "sd": "sd",
    "min": "min",
    "max": "max",
    "train_error": "training error (%)",
    "time_s": "time (s)",
    "images_per_s": "images/s",
    "peak_memory_mb": "memory (MiB)",
    "gaps": "gaps",
}
RUN_COLUMNS = {
    "run": "run",
    "status": "status",
    "test_error": "test error (%)",
    "final_test_error": "last epoch (%)",
    "train_error": "training error (%)",
    "time_s": "time (s)",
    "device": "device",
    "engine_used": "engine",
    "cause": "cause",
}
NORM_COLUMNS = {
    "norm": "norm",
    "description": "what it is",
    "depends_on": "an output depends on",
    "parameters": "parameters of a layer of C channels",
    "num_parameters": "of the model",
    "source": "source",
}
TIME_NOTE = (
    "Where several seeds were trained as one network (the engine of a run says so), each one's time is its share of "
    "the process's, and its images/s are those of the whole process."
)
DECIMALS = {"time_s": 0, "images_per_s": 0, "peak_memory_mb": 0}


def write_report(
    directories: Sequence[Path | str],
    out: Path,
    decreasing: bool = True,
    reference: bool = False,
    margin: float = 1.0,
    where: str | None = None,
    refresh_s: int | None = None,
) -> tuple[list[Path], str]:
    """Write everything into `out`; returns the paths written and the headline.

    Args:
        decreasing: batch sizes run from the largest to the smallest.
        reference: numbers of others lie behind ours.
        margin: points of error that count as a change in the claims.
        where: the runs that are wanted, as in `table.load`.
        refresh_s: seconds after which a browser is to load the page anew.

    Raises:
        UserError: a directory holds no records, `where` is no condition or fits none, or `out` cannot be written.
    """
    frame, costs, curves_frame = (load(*directories, where=where) for load in (table.load, cost.load, table.curves))
    if {*frame["status"], *costs["status"]} <= {"unreadable"} and where is not None:
        raise UserError(f"--where {where!r} fits none of the runs")
    tables = make_tables(frame, costs, curves_frame, margin)
    written = []
    for name, content in tables.items():
        if len(content):
            written.append(out / f"{name}.csv")
            write_atomic(written[-1], content.to_csv(index=False, lineterminator="\n").encode())
    drawn = draw_figures(frame, curves_frame, decreasing, reference) if len(frame) else {}
    drawn.update(cost.draw_figures(frame, costs))
    for name, (_, figure) in drawn.items():
        paths = [out / f"{name}.svg", out / f"{name}.png"]
        figures.save(figure, *paths)
        written += paths
    images = [
        (title, figures.describe_figure(figure), _encode(out / f"{name}.svg"))
        for name, (title, figure) in drawn.items()
    ]
    written.append(out / "report.html")
    write_atomic(written[-1], render_page(frame, costs, tables, images, where, refresh_s).encode())
    return written, headline(frame) if len(frame) else cost.headline(costs)


def stop_refreshing(out: Path) -> None:
    """Let the page in `out`, if it is there, load itself anew no more.

    Raises:
        UserError: it cannot be written.
    """
    path = out / "report.html"
    if path.is_file():
        write_atomic(path, re.sub(REFRESH.format(r"\d+").encode(), b"", path.read_bytes()))


def make_tables(
    frame: pd.DataFrame, costs: pd.DataFrame, curves_frame: pd.DataFrame, margin: float = 1.0
) -> dict[str, pd.DataFrame]:
    """{file name: table} of all CSV files; one without rows is not written. docs/report.md tells their columns."""
    tables = {
        "runs": frame,
        "summary": statistics.summarize(frame),
        "groups": tabulate_groups(frame),
        "claims": claims(frame, margin),
        "cost": costs.reindex(columns=cost.COLUMNS),
    }
    if diagnostics.has_diagnostics(curves_frame):
        tables["diagnostics"] = diagnostics.tabulate(curves_frame)
    return tables


def draw_figures(
    frame: pd.DataFrame, curves_frame: pd.DataFrame, decreasing: bool = True, reference: bool = False
) -> dict:
    """{file name: (title, figure)} of the figures that the runs have data for."""
    drawn = {}
    for x, words in AXES.items():
        if x in table.find_axes(frame):
            others = table.choose_reference(frame, x) if reference else None
            ax = figures.error_vs_batch_size(frame, decreasing=decreasing, x=x, reference=others)
            drawn[f"error_vs_{x}"] = (f"Test error against {words}", ax.figure)
            if frame["label"].nunique() > figures.MOST_LINES and table.slice_axis(frame, x)[0][x].nunique() > 1:
                axes = figures.error_by_norm(frame, decreasing=decreasing, x=x)
                drawn[f"error_vs_{x}_by_norm"] = (f"Test error against {words}, each norm by itself", axes[0].figure)
    if curves_frame["epoch"].notna().any():
        drawn["curves"] = ("Training and test error per epoch", figures.curves(curves_frame)[0].figure)
        tested = curves_frame.loc[curves_frame["test_error"].notna(), "epoch"].nunique()
        if tested > 1 and table.slice_axis(frame, "batch_size")[0]["batch_size"].nunique() > 1:
            axes = figures.curves_by_batch_size(curves_frame)
            drawn["curves_by_batch_size"] = ("Test error per epoch at every batch size", axes[0].figure)
    if table.find_groups(frame) is not None:
        drawn["groups"] = ("Test error against the groups of GN", figures.error_vs_groups(frame)[0].figure)
    if behind_errors.has_statistics(frame):
        axes = behind_errors.error_by_statistics(frame, x=table.find_axes(frame)[-1])
        drawn["error_by_statistics"] = ("Test error under each choice of statistics", axes[0].figure)
    if behind_errors.has_learning_rates(frame):
        axes = behind_errors.error_vs_learning_rate(frame)
        drawn["error_vs_learning_rate"] = ("Held-out error against learning rate", axes[0].figure)
    if "response_percentiles" in curves_frame:
        axes = behind_errors.responses(curves_frame)
        drawn["responses"] = ("Responses of the last layer per epoch", axes[0].figure)
    if diagnostics.has_diagnostics(curves_frame):
        drawn |= {name: (title, axes[0, 0].figure) for name, (title, axes) in diagnostics.draw(curves_frame).items()}
    return drawn


def tabulate_groups(frame: pd.DataFrame) -> pd.DataFrame:
    """Table 3 of arXiv:1803.08494: the cells of GN by number of groups and channels per group, where they vary."""
    batch_size = table.find_groups(frame)
    cells = statistics.summarize(frame[(frame["norm"] == "gn") & (frame["batch_size"] == batch_size)])
    columns = ["num_groups", "channels_per_group", "setting", "batch_size", "n", "mean", "sd", "low", "high"]
    return cells[[*columns, "diverged", "failed", "missing"]] if batch_size is not None else cells.iloc[:0]


def tabulate_norms(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a norm of the frame: what it is, what it depends on, its parameters and its source.

    gnbench's own norms say it in their files; another one is told by its import path and the hash of its source.
    """
    keys = ["norm", "norm._target_", "norm.source"]
    readable = frame[frame["status"] != "unreadable"].reindex(columns=[*dict.fromkeys([*frame.columns, *keys])])
    return pd.DataFrame(
        [
            {
                "norm": table.label_norm(norm),
                "num_parameters": _names(rows["num_parameters"].dropna()),
                **_describe_norm(norm, rows.iloc[0]),
            }
            for (norm, _, _), rows in readable.groupby(keys, sort=False, dropna=False)
        ],
        columns=list(NORM_COLUMNS),
    )


def headline(frame: pd.DataFrame) -> str:
    """The runs in one sentence, from their numbers: how each norm's test error changes over the axis they sweep."""
    x = table.find_axes(frame)[0]
    kept, _ = table.slice_axis(frame, x)
    summary = statistics.summarize(kept)
    summary["x"] = table.place_cells(summary, x)
    if summary.empty or not summary["n"].sum():
        counts = ", ".join(f"{count} {status}" for status, count in frame["status"].value_counts(sort=False).items())
        return f"No run has finished ({counts})."
    sizes = sorted(summary["x"].dropna().astype(int).unique(), reverse=True)
    words = AXES[x]
    if len(sizes) < 2:
        return _headline_of_one_size(summary, f"{words} {sizes[0]}" if sizes else "every batch size")
    labels = summary["label"].unique()
    found = [_find_ends(label, summary[summary["label"] == label], x, (sizes[0], sizes[-1])) for label in labels]
    decimals = max(_find_decimals(used) for used, _ in found[:MOST_CLAUSES])
    clauses, cells, has_interval = [], [], False
    for label, (used, problem) in zip(labels, found, strict=True):
        clauses.append(problem or _tell_change(_name_error(label, is_first=not cells), used, kept, decimals))
        cells += used
        has_interval |= len(used) == 2 and min(cell["n"] for cell in used) > 1
    if len(clauses) > MOST_CLAUSES:
        clauses[MOST_CLAUSES:] = [f"{len(clauses) - MOST_CLAUSES} more in the table"]
    intervals = ", 95 % intervals in brackets" if has_interval else ""
    return f"From {words} {sizes[0]} to {sizes[-1]}, {'; '.join(clauses)}{_tell_seeds(cells)}{intervals}."


def render_page(
    frame: pd.DataFrame,
    costs: pd.DataFrame,
    tables: dict,
    images: Sequence[tuple[str, str, str]],
    where: str | None = None,
    refresh_s: int | None = None,
) -> str:
    """The HTML page: needs nothing from outside itself; whatever comes from records is escaped.

    Args:
        images: of each figure its title, what it shows, and its SVG in base64.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    unfinished = frame[frame["status"] != "done"]
    statements = _format_claims(tables["claims"])
    facts = [("Shown", f"the runs with {where}")] if where else []
    facts += (list_facts(frame) if len(frame) else []) + (cost.list_facts(costs) if len(costs) else [])
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        refresh=REFRESH.format(refresh_s) if refresh_s else "",
        headline=headline(frame) if len(frame) else cost.headline(costs),
        facts=facts,
        gaps=statistics.name_gaps(frame) + cost.name_gaps(costs),
        images=images,
        summary=_format_summary(tables["summary"]),
        claims=statements,
        costs=_format(cost.tabulate_page(costs), cost.PAGE_COLUMNS),
        norms=_format(tabulate_norms(frame if len(frame) else costs), NORM_COLUMNS),
        unfinished=_format(unfinished, {"run": "run", "status": "status", "cause": "cause"}),
        runs=_format(frame, RUN_COLUMNS),
        num_runs=number_of(len(frame), "run"),
        num_not_tested=number_of(sum(not row["is_tested"] for row in statements), "statement"),
        test_error_note=f"Test error: {_describe_test_error(frame)}, never the best.",
        time_note=TIME_NOTE if frame["engine_used"].astype("string").str.contains(TOGETHER).any() else "",
    )


def list_facts(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """(name, value) of what a reader must know before believing a figure."""
    summary = statistics.summarize(frame)
    readable = frame[frame["status"] != "unreadable"]
    counts = ", ".join(f"{count} {status}" for status, count in frame["status"].value_counts(sort=False).items())
    torch = "torch " + readable["torch"].astype("string")
    machines = readable.assign(torch=torch)[["device", "processor", "torch"]].drop_duplicates()
    settings = [setting or "unmarked" for setting in readable["setting"].unique()]
    tuned = [key for key in table.TUNED if key in readable and readable[key].nunique() > 1]
    mixed = f"{len(settings)} configurations, drawn apart: {'; '.join(settings)}"
    facts = [
        ("Runs", f"{len(frame)}: {counts}"),
        ("Seeds a cell", _span(summary["n"])),
        ("Model", _names(readable["model"])),
        ("Data", _names(readable["data"])),
        ("Training images", _names(readable["train_size"].dropna()) or "all"),
        ("Epochs", _names(readable["epochs"])),
        ("Configuration besides norm, batch size and seed", mixed if len(settings) > 1 else "the same for all"),
        ("Tuned by norm or batch size", "; ".join(f"{key}: {_names(readable[key])}" for key in tuned)),
        ("Norms", "; ".join(_describe_norms(readable))),
        (
            "Machines",
            "; ".join(
                " · ".join(str(part) for part in machine if has_value(part))
                for machine in machines.itertuples(index=False)
            ),
        ),
        ("Test error", f"percent, top-1; {_describe_test_error(readable)}"),
    ]
    return [(name, value) for name, value in facts if value]


def _name_error(label: str, is_first: bool) -> str:
    """Whose error it is: BN's test error at first, then GN's; a network without norms has no possessive."""
    none = table.label_norm("none")
    if label.startswith(none):
        return f"the test error without a norm{label.removeprefix(none)}"
    return f"{label}'s test error" if is_first else f"{label}'s"


def _headline_of_one_size(summary: pd.DataFrame, place: str) -> str:
    told = summary[summary["n"] > 0].sort_values("mean", kind="stable")
    errors = [f"{row.label} {row.mean:.1f} %" for row in told[["label", "mean"]].itertuples()]
    if len(errors) > MOST_CLAUSES:
        errors[MOST_CLAUSES:] = [f"{len(errors) - MOST_CLAUSES} more in the table"]
    seeds = _tell_seeds(told.to_dict("records"))
    return f"Mean test error at {place}, lowest first: {'; '.join(errors)}{seeds}."


def _encode(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _find_ends(label: str, cells: pd.DataFrame, x: str, ends: tuple) -> tuple[list[pd.Series], str]:
    """A line's cells at both ends of the axis, or the one that holds for all of it; or none, and why not."""
    if cells["x"].isna().all():  # one image at a time: the same run everywhere
        problem = _find_problem(cells.iloc[0], "its batch size")
        return ([], f"{label} {problem}") if problem else ([cells.iloc[0]], "")
    used = []
    for size in ends:
        found = cells[cells["x"] == size]
        if found.empty:
            return [], f"{label} has no run at {AXES[x]} {size}"
        if problem := _find_problem(found.iloc[0], f"{AXES[x]} {size}"):
            return [], f"{label} {problem}"
        used.append(found.iloc[0])
    return used, ""


def _tell_change(subject: str, used: Sequence[pd.Series], frame: pd.DataFrame, decimals: int) -> str:
    """ "BN's test error rises by 11.0 points [10.3, 11.7] (23.5 to 34.5 %)", of the cells of `_find_ends`.

    The interval is that of the rise, or of the fall: where it goes below 0, the other is not excluded.
    """
    if len(used) == 1:
        return f"{subject} does not depend on it ({used[0]['mean']:.{decimals}f} %)"
    before, after = (statistics.values_by_seed(frame[frame["cell"] == cell["cell"]]) for cell in used)
    change = statistics.compare_welch(after, before)
    values = f"({used[0]['mean']:.{decimals}f} to {used[1]['mean']:.{decimals}f} %)"
    is_seen = round(change["difference"], decimals) != 0
    sign = -1 if is_seen and change["difference"] < 0 else 1
    ends = sorted(sign * change[key] for key in ("low", "high"))
    low, high = (f"{round(end, decimals) + 0.0:.{decimals}f}" for end in ends)  # + 0.0: no -0.0
    interval = "" if math.isnan(change["low"]) else f" [{low}, {high}]"
    if not is_seen:
        return f"{subject} changes by less than {10**-decimals:g} points{interval} {values}"
    verb = "rises" if sign > 0 else "falls"
    return f"{subject} {verb} by {abs(change['difference']):.{decimals}f} points{interval} {values}"


def _find_decimals(used: Sequence[pd.Series]) -> int:
    """1, or 2 where at one decimal the difference of two cells' means is not the difference shown."""
    means = [cell["mean"] for cell in used]
    if len(means) < 2:
        return 1
    shown = round(means[1], 1) - round(means[0], 1)
    return 1 if round(shown, 1) == round(means[1] - means[0], 1) else 2


def _find_problem(cell: pd.Series, place: str) -> str:
    """Why a cell's mean must not stand in a headline, or nothing."""
    lost = [number_of(cell[status], f"{status} run") for status in statistics.BY_STATUS if cell[status]]
    if lost:
        return f"cannot be told, having {' and '.join(lost)} at {place}"
    return f"has no finished run at {place}" if not cell["n"] else ""


def _tell_seeds(cells: Sequence[pd.Series]) -> str:
    counts = [cell["n"] for cell in cells]
    if not counts:
        return ""
    few = ", too few for an interval" if max(counts) == 1 else ""
    return f"; n = {number_of(_span(counts), 'seed')} a cell{few}"


def _format_summary(summary: pd.DataFrame) -> list[list[str]]:
    gaps = summary[["diverged", "failed", "missing"]].astype(int).to_dict("records")
    told = [", ".join(f"{count} {name}" for name, count in row.items() if count) for row in gaps]
    half = (summary["high"] - summary["low"]) / 2
    intervals = ["" if math.isnan(value) else f"± {value:.2f}" for value in half]
    return _format(summary.assign(interval=intervals, gaps=told), SUMMARY_COLUMNS)


def _format_claims(statements: pd.DataFrame) -> list[dict]:
    """One dict a statement, for the page."""
    return [
        {
            **{key: row[key] for key in ("claim", "setting", "verdict", "detail", "source")},
            "test": f"{row['test']}, n = {row['n']}" if row["test"] else "",
            "is_tested": row["verdict"] != NOT_TESTED,
        }
        for row in statements.to_dict("records")
    ]


def _format(frame: pd.DataFrame, columns: dict) -> list[list[str]]:
    """Rows of text, the first one the titles."""
    rows = [[_format_value(row[key], DECIMALS.get(key, 2)) for key in columns] for row in frame.to_dict("records")]
    return [list(columns.values()), *rows]


def _format_value(value: object, decimals: int) -> str:
    if not has_value(value):
        return "–"
    return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)


def _span(counts: Sequence[int]) -> str:
    counts = list(counts)
    low, high = min(counts, default=0), max(counts, default=0)
    return f"{low}" if low == high else f"{low} to {high}"


def _names(values: pd.Series) -> str:
    return ", ".join(table.write_value(value) for value in values.unique() if has_value(value))


def _describe_norm(norm: str, row: pd.Series) -> dict[str, str]:
    target = str(row["norm._target_"])
    if target.startswith("gnbench.") and norm in choices("norm"):
        return describe_norm(norm)
    depends_on = "batch" if has_value(row["norm_batch_size"]) else "sample"
    weights = ", weights" if has_value(row.get("norm.weight._target_")) else ""
    source = f"hash {row['norm.source']}" if has_value(row["norm.source"]) else ""
    return {"description": target, "depends_on": depends_on + weights, "parameters": "", "source": source}


def _describe_norms(frame: pd.DataFrame) -> list[str]:
    keys = ["num_groups", "channels_per_group", *(key for key in frame if key.startswith("norm.") and key[5] != "_")]
    rows = frame.drop_duplicates("label")[["label", *keys]].to_dict("records")
    params = [
        [f"{key.removeprefix('norm.')} = {table.write_value(row[key])}" for key in keys if has_value(row[key])]
        for row in rows
    ]
    return [f"{row['label']}: {', '.join(own)}" if own else row["label"] for row, own in zip(rows, params, strict=True)]


def _describe_test_error(frame: pd.DataFrame) -> str:
    counts = table.count_reported_epochs(frame)
    if counts == [1]:
        return "of the last epoch"
    return f"of a run, the median over its last {' or '.join(map(str, counts))} epochs".replace("  ", " ")
