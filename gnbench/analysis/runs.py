"""`gnbench-runs`: list, compare, delete runs and train them again, chosen by a query. Needs no torch.

gnbench-runs results/x --where "norm == 'bn' and batch_size == 2"   the runs that fit
gnbench-runs results/x --where "status == 'failed'" --command       the command line of each
gnbench-runs results/x --watch                                      what is trained at this moment
"""

import argparse
import contextlib
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gnbench.analysis.watch import add_watch, watch_runs
from gnbench.console import as_command
from gnbench.errors import UserError
from gnbench.lock import held, is_held
from gnbench.record import LOCK, NOT_IDENTITY, RECORD, load_record
from gnbench.words import as_typed, distinguish, has_value, number_of

if TYPE_CHECKING:  # --help need not wait for pandas
    import pandas as pd

RUN_NAME = re.compile(r".+-s\d+-[0-9a-f]{12}")  # as record.run_name makes it
NOT_CONFIG = (  # columns that do not say what was asked for
    *("variant", "setting", "label", "status", "cause", "cell", "sweep", "run", "directory", "tuned", "results"),
    *("epochs_done", "num_parameters", "images_per_s", "peak_memory_mb", "norm_format", "bn_format"),
    *("threads", "measured_on", "engine_used"),
)
NOT_RUN = (*NOT_IDENTITY, "processor", "torch", "data.root", "data.cache")  # columns in which one run may differ
LISTED = ("norm", "batch_size", "norm_batch_size", "seed", "epochs")  # columns of the list that say what a run is
WATCH_S = 2.0  # between two looks of --watch
NUMBERS = ("test_error", "final_test_error", "val_error", "train_error", "train_loss", "time_s")


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 if a run was left out, 2 with a sentence where it was refused."""
    options = make_parser().parse_args(argv)
    if not {"", os.getcwd()} & set(sys.path):  # `gnbench` has it too: a norm of one's own, which is a part of its run
        sys.path.append(os.getcwd())
    try:
        if (options.delete or options.rerun) and options.where is None:
            raise UserError("--delete and --rerun need --where, which says what is deleted; --where True is every run")
        if options.watch is not None:
            return _watch(options.directories, options.watch, options.where)
        from gnbench.analysis import table

        frame = load_runs(options.directories)
        chosen = table.choose(frame, options.where)
        if chosen.empty:
            print(f"gnbench-runs: none of the {number_of(len(frame), 'run')} fits", file=sys.stderr)
            return 0
        if options.compare:
            return _print_comparison(chosen)
        if options.command:
            return _print_commands(chosen)
        if options.delete or options.rerun:
            return _delete(chosen, options.yes, options.rerun)
        return _print_list(chosen, len(frame))
    except UserError as error:
        print(f"gnbench-runs: {error}", file=sys.stderr)
        return 2


def _watch(directories: Sequence[str], every_s: float, where: str | None) -> int:
    if where is not None:
        raise UserError("--watch shows all runs of its directories: it takes no --where")
    watch_runs(directories, every_s)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    parser = argparse.ArgumentParser(
        prog="gnbench-runs", description="List, compare, delete runs and train them again, chosen by a query."
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", help="holds runs, as DIR/<run>/record.json")
    parser.add_argument(
        "--where",
        metavar="QUERY",
        help="""a condition in pandas' words on the columns of gnbench.load: "norm == 'bn' and batch_size == 2", """
        '"test_error > 50", "status in [\'failed\', \'diverged\']", "`norm.eps` > 1e-5"',
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--compare", action="store_true", help="what the runs' configs differ in, and their numbers")
    action.add_argument(
        "--command", action="store_true", help="the command line that trains each run, or goes on with it"
    )
    action.add_argument("--delete", action="store_true", help="delete the runs' directories")
    action.add_argument("--rerun", action="store_true", help="delete, and print the command lines that start afresh")
    add_watch(action, WATCH_S, "a table of the runs that are trained at this moment")
    parser.add_argument("--yes", action="store_true", help="do delete; without it, only say what would be deleted")
    return parser


def load_runs(directories: Sequence[Path | str]) -> "pd.DataFrame":
    """The runs of all directories, a row a run as `table.load` gives it, with its `directory` as it was typed.

    Raises:
        UserError: a directory does not exist or holds no records.
    """
    import pandas as pd

    from gnbench.analysis import table

    places = {Path(directory).resolve(): directory for directory in reversed(directories)}
    frames = [
        table.load(directory, measure=None).assign(directory=str(directory)) for directory in reversed(places.values())
    ]
    columns = list(dict.fromkeys(key for frame in frames for key in frame))
    told = [frame.dropna(axis="columns", how="all") for frame in frames]  # a column without values has no type to keep
    return pd.concat(told, ignore_index=True).reindex(columns=columns)


def delete_run(place: Path) -> None:
    """Delete the directory of a run, with all that it holds.

    Raises:
        UserError: it is not a run's directory, a process trains the run, or it cannot be deleted.
    """
    _require_run(place)
    try:
        with held(place) as is_free:
            if not is_free:
                raise UserError("a process trains it")
            for path in sorted(place.iterdir(), key=lambda path: path.name == LOCK):  # the lock last
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        with contextlib.suppress(OSError):  # a process has begun to train it anew
            place.rmdir()
    except (OSError, NotImplementedError) as error:
        raise UserError(f"it cannot be deleted ({getattr(error, 'strerror', None) or error})") from error


def _require_run(place: Path) -> None:
    if place.is_symlink():
        raise UserError("it is a link")
    if not RUN_NAME.fullmatch(place.name) or not (place / RECORD).is_file():
        raise UserError("it is not named as a run's directory is")


def _print_list(chosen: "pd.DataFrame", num_all: int) -> int:
    several = chosen["directory"].nunique() > 1
    apart = _tell_apart(chosen)
    rows = [
        {
            "run": str(_place(row)) if several else row["run"],
            "status": row["status"],
            **{key: row[key] for key in ("norm", "batch_size", "norm_batch_size", "seed")},
            **({"differs in": words} if any(apart) else {}),
            "epochs": f"{row['epochs_done']}/{row['epochs']}" if has_value(row["epochs_done"]) else None,
            "test_error": row["test_error"],
            "time": f"{row['time_s']:.0f} s" if has_value(row["time_s"]) else None,
            "cause": _explain(row),
        }
        for row, words in zip(_rows(chosen), apart, strict=True)
    ]
    _print_table(rows)
    counts = ", ".join(f"{count} {status}" for status, count in chosen["status"].value_counts(sort=False).items())
    of_all = f"{len(chosen)} of " if len(chosen) < num_all else ""
    print(f"\n{of_all}{number_of(num_all, 'run')}: {counts}")
    return 0


def _tell_apart(chosen: "pd.DataFrame") -> list[str]:
    """What tells each run from those that are LISTED alike, as "base_lr=0.1, epochs=3"."""
    frame = _shorten(chosen.reset_index(drop=True))
    keys = [key for key in frame if _is_config(key) and key.split(".")[0] not in NOT_RUN and key not in NOT_RUN]
    told = [""] * len(frame)
    for _, alike in frame.groupby(list(LISTED), dropna=False):
        texts = alike[keys].map(_to_text)
        varied = distinguish(texts.to_dict("records"), keys)
        for number, row in zip(alike.index, texts[varied].to_dict("records"), strict=True):
            known = {key: value for key, value in row.items() if value} or row
            told[number] = ", ".join(f"{key}={value or '–'}" for key, value in known.items())
    return told


def _explain(row: dict) -> str | None:
    """Why a run has no result; of one that says running, whether that is so."""
    if row["status"] == "running" and not is_held(_place(row)):
        return "no process trains it: start its sweep again"
    return row["cause"]


def _print_comparison(chosen: "pd.DataFrame") -> int:
    readable = _shorten(chosen[chosen["status"] != "unreadable"])
    keys = [key for key in chosen if _is_config(key) and readable[key].map(_to_text).nunique() > 1]
    keys = [key for key in keys if not _is_named(key, readable)]
    numbers = [key for key in chosen if _is_measured(key) and readable[key].notna().any()]
    numbers = [key for key in numbers if not key.endswith(("_low", "_high"))]
    several = chosen["directory"].nunique() > 1
    rows = [{**row, "run": str(_place(row)) if several else row["run"]} for row in _rows(readable)]
    _print_table([{key: row[key] for key in ("run", *keys, "status", *numbers)} for row in rows])
    differ, their = ("differs", "its") if len(readable) == 1 else ("differ", "their")
    what = ", ".join(keys) or f"nothing of {their} config"
    print(f"\n{number_of(len(readable), 'run')}, which {differ} in {what}")
    for row in _rows(chosen[chosen["status"] == "unreadable"]):
        _complain(row, row["cause"])
    return int(len(readable) < len(chosen))


def _is_config(key: str) -> bool:
    """Whether a column says what was asked for, or on what it ran."""
    return not _is_measured(key) and key not in NOT_CONFIG and not key.startswith("tuning.")


def _is_named(key: str, frame: "pd.DataFrame") -> bool:
    """Whether a column, an import path or the fingerprint of images, says no more than a name does."""
    name = re.match(r"(norm|model|data)(?:\..+)?(?:\._target_|_fingerprint)$", key)
    return bool(name) and frame.groupby(name[1])[key].nunique(dropna=False).max() == 1


def _shorten(frame: "pd.DataFrame") -> "pd.DataFrame":
    """A frame whose import paths have only their last parts, as many as tell them apart, and the images 12 digits."""
    short = {key: _shorten_paths(frame[key]) for key in frame if key.endswith("_target_")}
    if "data_fingerprint" in frame:
        short["data_fingerprint"] = [
            str(value)[:12] if has_value(value) else None for value in frame["data_fingerprint"]
        ]
    return frame.assign(**short)


def _shorten_paths(paths: Iterable[str]) -> list[str]:
    parts = [tuple(re.split("[.:]", path)) if has_value(path) else () for path in paths]
    counts = itertools.count(1)
    least = next(count for count in counts if len({path[-count:] for path in parts}) == len(set(parts)))
    return [".".join(path[-least:]) for path in parts]


def _print_commands(chosen: "pd.DataFrame") -> int:
    left_out = 0
    for row in _rows(chosen):
        try:
            print(_find_command(row))
        except UserError as error:
            _complain(row, f"no command for it: {error}")
            left_out = 1
    return left_out


def _find_command(row: dict) -> str:
    from gnbench.command_line import command_line  # it waits for Hydra

    try:
        return command_line(row["directory"], load_record(_place(row) / RECORD))
    except UserError as error:
        raise UserError(str(error).removeprefix(f"{_place(row) / RECORD}: ")) from error


def _delete(chosen: "pd.DataFrame", yes: bool, rerun: bool) -> int:
    """Delete what may be deleted, or say what would be. With `rerun`, standard output has the commands alone."""
    left_out, commands = 0, []
    for row in _rows(chosen):
        place = _place(row)
        try:
            command = _find_command(row) if rerun else None
            _require_run(place)
            if is_held(place):
                raise UserError("a process trains it")
            told = f"{place} ({row['status']}, {_measure(place)})"
            if yes:
                delete_run(place)
            print("deleted" if yes else "would delete", told, file=sys.stderr if rerun else sys.stdout)
            commands.append(command)
        except UserError as error:
            _complain(row, f"is left alone: {error}")
            left_out = 1
    if rerun:
        print(*commands, sep="\n", end="\n" if commands else "")
    if not yes:
        print("gnbench-runs: nothing is deleted without --yes", file=sys.stderr)
    return left_out


def _measure(place: Path) -> str:
    files = [path for path in place.rglob("*") if path.is_file()]
    return f"{number_of(len(files), 'file')}, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB"


def _complain(row: dict, sentence: str) -> None:
    print(f"gnbench-runs: {_place(row)}: {sentence}", file=sys.stderr)


def _rows(frame: "pd.DataFrame") -> list[dict]:
    return frame.to_dict("records")


def _place(row: dict) -> Path:
    return Path(row["directory"], row["run"])


def _print_table(rows: Sequence[dict]) -> None:
    """Columns as wide as they must be: numbers to the right, text to the left, a line a row."""
    columns = {key: [_show(key, row[key]) for row in rows] for key in rows[0]} if rows else {}
    lines = [[] for _ in range(len(rows) + 1)]
    for key, cells in columns.items():
        width = max(map(len, [key, *cells]))
        numeric = all(isinstance(row[key], int | float) or not has_value(row[key]) for row in rows)
        for line, cell in zip(lines, [key, *cells], strict=True):
            line.append(cell.rjust(width) if numeric else cell.ljust(width))
    print("\n".join("  ".join(line).rstrip() for line in lines))


def _show(key: str, value: object) -> str:
    if isinstance(value, float) and _is_measured(key) and has_value(value):
        return f"{value:.{0 if key == 'time_s' else 2}f}"
    return _to_text(value) or "–"


def _is_measured(key: str) -> bool:
    """Whether a column is a number that a run reports."""
    from gnbench.analysis.table import COSTS

    return key in (*NUMBERS, *COSTS) or key.startswith("test_error_")


def _to_text(value: object) -> str:
    """A value on one line; nothing for no value."""
    if not has_value(value):
        return ""
    return f"{value:.10g}" if isinstance(value, float) else " ".join(as_typed(value).split())


if __name__ == "__main__":
    sys.exit(main())
