"""Records -> tidy frames: a row a run (`load`) or a row an epoch (`curves`). Nothing is averaged or left out here."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from gnbench.errors import UserError, first_line
from gnbench.record import NOT_IDENTITY, WRONG_KIND, find_runs, is_number, load_record, name_wrong_kind
from gnbench.words import as_typed, distinguish

REFERENCE = Path(__file__).with_name("reference.csv")
NORM_LABELS = {  # in the order of every table
    "bn": "BN",
    "gn": "GN",
    "ln": "LN",
    "in": "IN",
    "none": "no norm",
    "brn": "Batch Renorm",
    "syncbn": "SyncBN",
    "bn_ws": "BN + WS",
    "mabn": "MABN",
    "batch_group": "Batch Group",
    "bcn": "BCN",
    "bcn_ws": "BCN + WS",
    "switchable": "Switchable",
    "evonorm_b0": "EvoNorm-B0",
    "gn_ws": "GN + WS",
    "rms_gn": "RMS GN",
    "rms_ln": "RMS LN",
    "frn": "FRN + TLU",
    "evonorm_s0": "EvoNorm-S0",
    "pono": "PONO",
    "skipinit": "SkipInit",
}
RENAMED = {  # keys of a flattened config -> columns
    "norm.name": "norm",
    "norm.num_groups": "num_groups",
    "norm.channels_per_group": "channels_per_group",
    "model.name": "model",
    "data.name": "data",
    "data.train_size": "train_size",
}
TEXTS = ("cause", "data_fingerprint", "device", "processor", "torch", "engine_used")
SHORT = {"num_groups": "G", "channels_per_group": "C/G"}  # in labels
WHOLE = ("batch_size", "norm_batch_size", "num_groups", "channels_per_group", "seed", "train_size", "epochs")
MEASURED = (
    *("test_error", "final_test_error", "val_error", "train_error", "train_loss"),
    *("time_s", "images_per_s", "peak_memory_mb"),
)
COLUMNS = (
    *("norm", "variant", "setting", "label", "batch_size", "norm_batch_size", "num_groups", "channels_per_group"),
    *("seed", "model", "data", "train_size", "epochs", "base_lr", "status", "cause", *MEASURED),
    *("epochs_done", "num_parameters", "device", "processor", "torch", "engine_used", "sweep", "run", "cell"),
)
CURVES = ("train_loss", "train_error", "test_loss", "test_error", "val_error")  # of every epoch
SPREAD = ("step_ms", "step_ratio", "inference_ms", "inference_ratio", "bn_step_ms", "bn_inference_ms")
COSTS = (  # of a measurement, beside images_per_s, time_s and peak_memory_mb
    *(f"{key}{end}" for key in SPREAD for end in ("", "_low", "_high")),
    *("inference_images_per_s", "saved_mb", "norm_saved_mb", "largest_batch"),
)
IDENTITY = COLUMNS[: COLUMNS.index("status")]  # what a row is, before what it measured

# How a run is executed, not what is trained: these may differ inside one cell.
NOT_CELL = ("seed", *NOT_IDENTITY, "num_threads", "data.root", "data.cache")
# Tuned for every norm and batch size by itself: a line may join cells that differ in these, one value a point.
TUNED = ("base_lr", "momentum", "weight_decay", "warmup_epochs")
OF_STATISTICS = ("precise_images", "frozen_epochs")  # keys that only batch statistics notice
AXES = ("batch_size", "norm_batch_size")


def load(*directories: Path | str, measure: str | None = "error", where: str | None = None) -> pd.DataFrame:
    """The runs of one or more sweep directories (`directory/<run>/record.json`) as a frame, a row a run.

    `cell` is a digest of all of a run's config but its seed and how it was executed: rows with the same cell are the
    same experiment. `variant` is the norm with those of its parameters that vary among the rows of that norm,
    `setting` whatever else varies, and `label` both, as figures show them. Errors are in percent. Columns that are not
    in `COLUMNS` are the rest of the config, flattened. A record that cannot be read is a row of status "unreadable"
    whose `cause` says why.

    Args:
        measure: "error" is trainings; "cost" is measurements of cost (`COSTS`), no row where there are none; None is
            both, for lists.
        where: the runs that are wanted, as a condition on the columns ("norm in ['bn', 'gn']"); see `choose`.

    Raises:
        UserError: a directory does not exist or holds no records, or `where` is no condition.
    """
    return _tabulate(directories, measure, where).drop(columns="history")


def curves(*directories: Path | str, where: str | None = None) -> pd.DataFrame:
    """The same runs, a row an epoch: what a run is (the first columns of `load`), and the history of its record.

    A run without a finished epoch is one row whose `epoch` is NaN.

    Raises:
        UserError: a directory does not exist or holds no records, or `where` is no condition.
    """
    runs = _tabulate(directories, "error", where)[[*IDENTITY, "status", "cause", "cell", "sweep", "run", "history"]]
    runs = runs.explode("history", ignore_index=True)
    entries = [entry if isinstance(entry, dict) else {} for entry in runs["history"]]
    epochs = pd.DataFrame(entries, index=runs.index)
    epochs = epochs.reindex(columns=list(dict.fromkeys(["epoch", *CURVES, *epochs.columns])))
    epochs = epochs[[key for key in epochs if key not in runs]]
    plain = [key for key in epochs if not epochs[key].map(lambda value: isinstance(value, list | dict)).any()]
    return runs.drop(columns="history").join(epochs.assign(**epochs[plain].apply(pd.to_numeric, errors="coerce")))


def choose(frame: pd.DataFrame, where: str | None) -> pd.DataFrame:
    """The rows for which `where` is true, a condition in pandas' words on the columns; all of them where it is None.

    Raises:
        UserError: it cannot be read, or is no condition on the frame's columns.
    """
    if where is None:
        return frame
    try:
        fits = frame.eval(where, engine="python", local_dict={}, global_dict={})
    except Exception as error:  # pandas raises errors of many kinds
        raise UserError(f"--where {where!r} is no condition on these runs: {first_line(error)}") from error
    if isinstance(fits, bool | np.bool_):
        return frame if fits else frame.iloc[:0]
    if getattr(fits, "dtype", None) not in ("bool", "boolean"):
        raise UserError(f"--where {where!r} is no condition: it is to be true or false of each run, as batch_size == 2")
    return frame[fits]


def slice_axis(frame: pd.DataFrame, x: str) -> tuple[pd.DataFrame, str]:
    """The rows that belong on an axis of `x`, the other batch being held, and a sentence where that needs saying.

    x = "batch_size" holds batch_size / norm_batch_size at its commonest value (1, unless every update holds several
    normalization batches). x = "norm_batch_size" holds batch_size at the value with the most normalization batch
    sizes, or lets it follow where each has but one. Norms without normalization batches stay wherever the others do.
    """
    shared = frame[frame["norm_batch_size"].notna()]
    if shared.empty:
        return frame[frame["batch_size"].notna()], ""
    counts = shared.groupby("batch_size")["norm_batch_size"].nunique()
    if x == "batch_size" or counts.max() == 1:
        ratio = count_norm_batches(shared)
        off = shared.index[shared["batch_size"] != ratio * shared["norm_batch_size"]]
        sizes, plain = frame["batch_size"].dropna().unique(), ratio == 1
        held = "batch_size = norm_batch_size" if plain else f"batch_size = {ratio:g} · norm_batch_size"
    else:
        off, size = [], max(counts[counts == counts.max()].index)
        sizes, held, plain = [size], f"batch_size = {size}", True
    stays = frame["batch_size"].isin(sizes) & ~frame.index.isin(off)
    left_out = len(one_row_a_run(frame[frame["batch_size"].notna() & ~stays]))
    more = f"; runs of other sizes are in the table: {left_out}" if left_out else ""
    return frame[stays], "" if plain and not left_out else f"Shown: {held}{more}."


def count_reported_epochs(frame: pd.DataFrame) -> list[int]:
    """Of how many last epochs the test errors of a frame's finished runs are medians, each number once, rising."""
    keys = ["report_epochs", "frozen_epochs", "epochs_done"]
    done = frame[frame["status"] == "done"].reindex(columns=keys)
    counts = done[done["report_epochs"].notna()].apply(pd.to_numeric, errors="coerce").min(axis="columns")
    return sorted(counts.dropna().astype(int).unique())


def one_row_a_run(frame: pd.DataFrame) -> pd.DataFrame:
    """The first row of each run of a frame that has several, as that of `curves`."""
    return frame.drop_duplicates(["sweep", "run"])


def count_norm_batches(frame: pd.DataFrame) -> float:
    """Normalization batches in an update, batch_size / norm_batch_size, at most batch sizes; 1 where no norm has any.

    The paper's setting of 8 workers is 8.
    """
    points = frame.dropna(subset="norm_batch_size").drop_duplicates(list(AXES))
    ratios = (points["batch_size"] / points["norm_batch_size"]).astype(float).value_counts()
    return float(min(ratios[ratios == ratios.max()].index, default=1))


def place_cells(cells: pd.DataFrame, x: str) -> pd.Series:
    """Where rows stand on the axis `x`; NaN for those that are level over it.

    On the axis of normalization batch sizes, a norm that has none stands where the others of its batch size do, if
    that is one place.
    """
    shared = cells[cells["norm_batch_size"].notna()]
    if x == "batch_size" or shared.empty:
        return cells["batch_size"].astype(float)
    partners = shared.groupby("batch_size")["norm_batch_size"].agg(["nunique", "first"])
    alone = partners.loc[partners["nunique"] == 1, "first"].astype(float)
    return cells["norm_batch_size"].astype(float).fillna(cells["batch_size"].map(alone).astype(float))


def find_axes(frame: pd.DataFrame) -> list[str]:
    """Which of "batch_size" and "norm_batch_size" the runs sweep; the first of them where they sweep neither.

    Where every update holds several normalization batches, as with the paper's 8 workers, the second is the axis.
    """
    found = []
    if slice_axis(frame, "batch_size")[0]["batch_size"].nunique() > 1:
        found.append(AXES[0] if count_norm_batches(frame) == 1 else AXES[1])
    if frame.groupby("batch_size")["norm_batch_size"].nunique().max() > 1:
        found.append(AXES[1])
    return list(dict.fromkeys(found)) or [AXES[0]]


def find_groups(frame: pd.DataFrame) -> int | None:
    """The batch size at which most group counts or channel counts of GN were trained; None if nowhere two of one."""
    groups = frame[frame["norm"] == "gn"].groupby("batch_size")[["num_groups", "channels_per_group"]].nunique()
    counts = groups.sort_index(ascending=False).where(groups > 1, 0).sum(axis="columns")
    return None if counts.empty or counts.max() == 0 else int(counts.idxmax())


def load_reference() -> pd.DataFrame:
    """Numbers that others published, a row a number with its `source`, from reference.csv.

    The batch axis is `images_per_worker`, the images that share statistics; an update has `workers` times as many.
    `test_error` is top-1 in percent, `sd` over `n` runs where the source has several.
    """
    return pd.read_csv(REFERENCE, dtype={"n": "Int64", "num_groups": "Int64", "channels_per_group": "Int64"})


def choose_reference(frame: pd.DataFrame, x: str) -> pd.DataFrame:
    """The published lines over the axis `x` for the norms of a frame: the papers', and those on the same data."""
    reference = load_reference()
    names = frame["data"].dropna().unique()
    same_data = [data for data in reference["data"].unique() if any(_is_kind(name, data) for name in names)]
    paper = reference["source"].isin(["Wu & He 2018", "Wu & Johnson 2021"]) & (reference["model"] == "resnet50")
    usual = reference["statistics"].isna() | (reference["statistics"] == "population")
    chosen = reference[(paper | reference["data"].isin(same_data)) & usual & reference["norm"].isin(frame["norm"])]
    lines = chosen.groupby(["source", "place", "data", "model", "norm"])
    spans = lines["images_per_worker"].transform("nunique") > 1
    update = chosen["images_per_worker"] * chosen["workers"]
    held = update.groupby([chosen[key] for key in lines.keys]).transform("nunique") == 1
    return chosen[spans & (held if x == "norm_batch_size" else ~held)]


def label_norm(name: str) -> str:
    """BN for bn, and so on; a norm that is not in configs/norm keeps its name, but is never called as one that is."""
    label = NORM_LABELS.get(name, name)
    return f"{name} (custom)" if name not in NORM_LABELS and label in NORM_LABELS.values() else label


def rank_norm(name: str) -> tuple[int, str]:
    """Sort key: the norms of configs/norm in the order of their labels, then others by name."""
    order = list(NORM_LABELS)
    return (order.index(name), "") if name in order else (len(order), str(name))


def identify_norms(frame: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """One text a row, the same for the same norm with the same parameters in the same model.

    Args:
        columns: of the parameters: the `norm_columns` of all frames that are to be joined.
    """
    keys = ["norm", "model", *columns]
    rows = frame.reindex(columns=keys).to_dict("records")
    texts = [json.dumps([write_value(row[key]) for key in keys]) for row in rows]
    return pd.Series(texts, index=frame.index, dtype=object)


def norm_columns(*frames: pd.DataFrame) -> list[str]:
    """The columns of frames that are a norm's parameters, but for its normalization batch size."""
    own = {key for frame in frames for key in frame if key.startswith("norm.")}
    return ["num_groups", "channels_per_group", *sorted(own)]


def write_value(value: object) -> str:
    """A config value as typed: the same for 8 and 8.0, which a frame does not keep apart, and nothing for no value."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else as_typed(value)


def _read_directory(directory: Path, sweep: str) -> list[dict]:
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give one that holds runs (<directory>/<run>/record.json)")
    paths = find_runs(directory)
    if not paths:
        raise UserError(f"{directory}: holds no records; runs stand directly in it, as <run>/record.json")
    rows = [_read_run(path, sweep) for path in paths]
    measures = {row["measure"] for row in rows} - {None}
    return [{**row, "measure": row["measure"] or ("cost" if measures == {"cost"} else "error")} for row in rows]


def _read_run(path: Path, sweep: str) -> dict:
    place = {"sweep": sweep, "run": path.parent.name}
    try:
        return {**_flatten_record(load_record(path)), **place}
    except UserError as error:
        cause = str(error).removeprefix(f"{path}: ")
    except WRONG_KIND as error:
        cause = name_wrong_kind(error)
    return {"status": "unreadable", "cause": cause, "history": [], "measure": None, **place}


def _flatten_record(record: dict) -> dict:
    """One row; config keys first, so that a config cannot shadow what was measured."""
    config = {RENAMED.get(key, key): value for key, value in _flatten(record["config"]).items()}
    config["norm_batch_size"] = config.get("norm_batch_size") or config.get("norm.norm_batch_size")
    config.pop("norm.norm_batch_size", None)
    _check_config(config)
    config["tuned"] = True if config.get("tuned_from") else None  # its base_lr is its own, not a setting of the sweep
    config["frozen_epochs"] = config.get("frozen_epochs") or None  # where none are, that is no setting to tell
    config["data_fingerprint"] = record.get("data_fingerprint")  # of the images' content, beside their name
    history = [entry for entry in record.get("history") or [] if isinstance(entry, dict)]
    environment = record.get("environment") or {}
    measures_cost = config.get("measure") == "cost"
    if measures_cost:  # a time, other than an error, is of so many threads on such a device
        config.update(threads=config.get("num_threads"), measured_on=environment.get("device"))
    row = {
        **config,
        "measure": "cost" if measures_cost else "error",
        "cell": _digest_cell(config),
        "status": str(record.get("status")),
        "cause": record.get("cause"),
        **(_read_cost(record) if measures_cost else _measure(record, config, history)),
        "epochs_done": None if measures_cost else len(history),
        "num_parameters": record.get("num_parameters"),
        "device": environment.get("device", config.get("device")),
        "processor": environment.get("processor"),
        "torch": environment.get("torch"),
        "engine_used": environment.get("engine"),
        "history": history,
    }
    for key in TEXTS:
        if not isinstance(row[key], str | None):
            raise UserError(f"{key} is {row[key]!r}, a text is needed")
    _check_whole("num_parameters", row["num_parameters"])
    return row


def _flatten(config: dict, prefix: str = "") -> dict:
    """{"norm": {"eps": 1}} -> {"norm.eps": 1}; lists become JSON, so that every value can be compared."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return flat


def _check_config(config: dict) -> None:
    if not isinstance(config.get("norm"), str):
        raise UserError(f"config.norm.name is {config.get('norm')!r}, a name is needed")
    for key in WHOLE:
        _check_whole(f"config.{key}", config.get(key), required=key in ("batch_size", "seed"))


def _check_whole(key: str, value: object, required: bool = False) -> None:
    if (value is None and required) or (value is not None and (type(value) is not int or not 0 <= value < 2**63)):
        raise UserError(f"{key} is {value!r}, a whole number is needed")


def _digest_cell(config: dict) -> str:
    kept = {key: value for key, value in config.items() if value is not None and not _is_how(key)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def _is_how(key: str) -> bool:
    return key in NOT_CELL or key.split(".")[0] in NOT_CELL


def _measure(record: dict, config: dict, history: list[dict]) -> dict:
    """Results of a finished run; time and memory of any."""
    done = record.get("status") == "done"
    result = (record.get("result") or {}) if done else {}
    if done and not is_number(result.get("test_error")):
        raise UserError(f"status is done, but result.test_error is {result.get('test_error')!r}")
    by_statistics = result.get("test_error_by_statistics") or {}  # ema, precise, batch: what BN may evaluate with
    spent = [entry["time_s"] for entry in history if is_number(entry.get("time_s"))]
    memory = [entry["peak_memory_mb"] for entry in history if is_number(entry.get("peak_memory_mb"))]
    steps = history[-1].get("step") if history else None
    known_speed = is_number(steps) and sum(spent) > 0
    measured = {key: value for key, value in result.items() if is_number(value)}
    return {
        **{key: measured.get(key, math.nan) for key in MEASURED},
        **{f"test_error_{key}": value for key, value in by_statistics.items() if is_number(value)},
        "time_s": measured.get("time_s", sum(spent)),
        "images_per_s": steps * config["batch_size"] / sum(spent) if known_speed else math.nan,
        "peak_memory_mb": max(memory, default=math.nan),
    }


def _read_cost(record: dict) -> dict:
    """The numbers of a finished measurement of cost."""
    done = record.get("status") == "done"
    cost = (record.get("cost") or {}) if done else {}
    if done and not is_number(cost.get("step_ms")):
        raise UserError(f"status is done, but cost.step_ms is {cost.get('step_ms')!r}")
    names = (*COSTS, "images_per_s", "time_s", "peak_memory_mb")
    formats = {key: cost.get(key) for key in ("norm_format", "bn_format")}
    return {**formats, **{key: cost[key] if is_number(cost.get(key)) else math.nan for key in names}}


def _tabulate(directories: tuple[Path | str, ...], measure: str | None, where: str | None) -> pd.DataFrame:
    rows = [row for directory, name in _name_sweeps(directories).items() for row in _read_directory(directory, name)]
    if where is not None:
        rows = _choose_rows(rows, where)
    rows = [row for row in rows if measure in (row["measure"], None)]
    if measure == "error":  # no column for what all have
        rows = [{key: value for key, value in row.items() if key != "measure"} for row in rows]
    return _arrange(_label(pd.DataFrame(rows, columns=None if rows else [*COLUMNS, "history"])))


def _name_sweeps(directories: Sequence[Path | str]) -> dict[Path, str]:
    """The directories, each once, with the name of its sweep: its last part, or the whole path where two share that."""
    paths = {Path(directory).resolve(): directory for directory in reversed(directories)}
    names = [path.name for path in paths]
    return {
        Path(directory): path.name if names.count(path.name) == 1 else str(directory)
        for path, directory in reversed(paths.items())
    }


def _choose_rows(rows: list[dict], where: str) -> list[dict]:
    """The rows that fit a condition, and those that cannot be read, of which nobody knows."""
    frame = _arrange(_label(pd.DataFrame([{**row, "place": place} for place, row in enumerate(rows)])))
    chosen = set(choose(frame, where)["place"])
    return [row for place, row in enumerate(rows) if place in chosen or row["status"] == "unreadable"]


def _label(frame: pd.DataFrame) -> pd.DataFrame:
    """Add `variant`, `setting` and `label`: what tells the rows of one point of an axis apart, and no more."""
    frame = frame.reindex(columns=list(dict.fromkeys([*COLUMNS, *frame.columns]))).copy()
    frame[["variant", "setting", "label"]] = ""
    readable = frame[frame["status"] != "unreadable"]
    for norm, rows in readable.groupby("norm"):
        keys = _find_varied(rows, norm_columns(frame))
        if set(keys) & set(SHORT):  # a run gives one of the two and leaves the other empty
            keys = list(dict.fromkeys([*SHORT, *keys]))
        variants, parts = _describe(rows, keys, {}), _describe(rows, keys, SHORT)
        frame.loc[rows.index, "variant"] = [f"{norm} {variant}".strip() for variant in variants]
        frame.loc[rows.index, "label"] = [
            f"{label_norm(norm)} ({part})" if part else label_norm(norm) for part in parts
        ]
    settings = _setting_keys(frame.loc[readable.index])
    frame.loc[readable.index, "setting"] = _describe(readable, settings, {})
    titles = frame.loc[readable.index, "setting"].map(lambda setting: f" [{setting}]" if setting else "")
    frame.loc[readable.index, "label"] = frame.loc[readable.index, "label"] + titles
    return frame


def _setting_keys(frame: pd.DataFrame) -> list[str]:
    """Config keys, not of a norm and no axis, by which runs differ; a tuned one only if it differs at a point."""
    first = ("data", "model", "train_size", "epochs")
    measured = (*COLUMNS, *COSTS, "norm_format", "bn_format", "measure", "history")
    others = sorted(key for key in frame if key not in measured and not key.startswith(("norm.", "test_error_")))
    of_batch = frame[frame["norm_batch_size"].notna()]  # other norms' runs have a default here that says nothing
    alike = [key for key in OF_STATISTICS if key in frame and of_batch[key].map(write_value).nunique() == 1]
    left_out = (*TUNED, *alike)
    kept = _find_varied(frame, [key for key in (*first, *others) if not _is_how(key) and key not in left_out])
    texts = {key: frame[key].map(write_value) for key in kept}
    points = frame.assign(**texts).groupby(["variant", *AXES, *kept], dropna=False)
    for key in TUNED:
        if key in frame and any(rows[key].map(write_value).nunique() > 1 for _, rows in points):
            kept.append(key)
    return kept


def _find_varied(frame: pd.DataFrame, keys: list[str]) -> list[str]:
    """The keys needed to tell the frame's configs apart."""
    return distinguish(frame[keys].map(write_value).to_dict("records"), keys)


def _describe(frame: pd.DataFrame, keys: list[str], short: dict) -> list[str]:
    """One text a row, like "num_groups=8, eps=1e-05"; a key without a value is not told, a long digest by its start."""
    rows = [{key: write_value(row[key]) for key in keys} for row in frame.to_dict("records")]
    return [
        ", ".join(
            f"{short.get(key, key)}={value[:8] if key == 'data_fingerprint' else value}"
            for key, value in row.items()
            if value
        )
        for row in rows
    ]


def _is_kind(name: str, data: str) -> bool:
    """Whether a data set is a kind of another: cifar10-jpeg of cifar10, but not cifar100."""
    return name == data or name.startswith((f"{data}-", f"{data}_"))


def _arrange(frame: pd.DataFrame) -> pd.DataFrame:
    """Settle types, columns and the order of rows: by norm, variant, setting, falling batch sizes and seed."""
    for key in (*WHOLE, "epochs_done", "num_parameters"):
        frame[key] = pd.to_numeric(frame[key], errors="coerce").astype("Int64")
    numbers = [*MEASURED, "base_lr"]
    frame[numbers] = frame[numbers].apply(pd.to_numeric, errors="coerce").astype(float)
    frame = frame[[*COLUMNS, *sorted(key for key in frame if key not in COLUMNS)]]
    ranks = {norm: rank for rank, norm in enumerate(sorted(frame["norm"].dropna().unique(), key=rank_norm))}
    falling = ("num_groups", "channels_per_group", *AXES)
    by = ["rank", "num_groups", "channels_per_group", "variant", "setting", *AXES, "seed", "sweep", "run"]
    ordered = frame.assign(rank=frame["norm"].map(ranks)).sort_values(by, ascending=[key not in falling for key in by])
    return ordered.drop(columns="rank").reset_index(drop=True)
