"""Watching a directory of runs until Ctrl-C: `gnbench-runs --watch` and `gnbench-report --watch`. Only reads runs."""

import argparse
import contextlib
import math
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from gnbench.errors import UserError
from gnbench.lock import is_held
from gnbench.record import FINISHED, find_runs
from gnbench.watch import QUIET_S, Row, Screen, View, Watcher, is_terminal, make_row
from gnbench.words import describe, name_cells, name_seeds, number_of

FRESH_S = 3.0  # a run that moved so short ago is trained, whether its lock can be seen or not
COUNTED = ("running", "failed", "interrupted", "unreadable")
MOST_NEWS = 3  # runs that a line names


def add_watch(parser: argparse._ActionsContainer, seconds: float, what: str) -> None:
    """Let a command line take `--watch [SECONDS]`."""
    parser.add_argument(
        "--watch", nargs="?", type=_read_seconds, const=seconds, metavar="SECONDS",
        help=f"{what}, until Ctrl-C; looks every so many seconds (default: {seconds:g})",
    )  # fmt: skip


def _read_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds; directories stand before --watch") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not legal: it is a number of seconds above 0")
    return value


def watch_runs(directories: Sequence[Path | str], every_s: float) -> None:
    """Show what the runs of directories are doing, and print a line as each ends.

    It is a table on a terminal, and elsewhere a first line and then those of the runs that end. Runs that have not
    begun have left no trace and are not known.
    """
    with contextlib.suppress(KeyboardInterrupt):
        watcher, before = Watcher(), None
        with Screen(keep=True) if is_terminal() else contextlib.nullcontext() as screen:
            while True:
                views = _look(watcher, directories)
                if before is not None:
                    _tell_ends(before, views)
                elif screen is None:
                    print(_count(views), flush=True)
                if screen is not None:
                    screen.show(_count(views), *_make_rows(views))
                before = views
                time.sleep(every_s)


def watch_report(write: Callable[[], object], directories: Sequence[Path | str], every_s: float) -> None:
    """Call `write`, which draws a report, at once and whenever a record in directories has changed; say what is new.

    A refusal of `write`, where no run has begun or the disk is full, is said once, and `write` is called again.
    """
    watcher, before, drawn, refused = Watcher(), None, None, None
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            stamps = _stamp(directories)
            if stamps != drawn:
                views = _look(watcher, directories)
                try:
                    write()
                    print(f"{time.strftime('%H:%M:%S')} {_count(views)}{_tell_news(before, views)}", flush=True)
                    before, drawn, refused = views, stamps, None
                except UserError as error:
                    if str(error) != refused:
                        print(f"gnbench-report: {error}; watching goes on", file=sys.stderr, flush=True)
                    refused = str(error)
            time.sleep(every_s)


def _stamp(directories: Sequence[Path | str]) -> dict[Path, tuple[int, int]]:
    """What changes when a record does."""
    stamps = {}
    for directory in directories:
        for path in find_runs(directory):
            with contextlib.suppress(OSError):  # it is being deleted
                stamps[path] = (path.stat().st_mtime_ns, path.stat().st_size)
    return stamps


def _look(watcher: Watcher, directories: Sequence[Path | str]) -> list[View]:
    """Every run that has begun; one that says running although no process trains it is interrupted."""
    views = []
    for directory in dict.fromkeys(Path(directory).resolve() for directory in directories):
        for path in find_runs(directory):
            view = watcher.look(path.parent)
            if view.status == "running" and not _is_running(view):
                end = {"status": "interrupted", "cause": "no process trains it"}
                view = replace(view, record={**view.record, **end})
            views.append(view)
    return views


def _is_running(view: View) -> bool:
    """Whether a process trains it, as far as can be told: another machine's locks may not be seen here."""
    here = view.progress.get("host") == socket.gethostname()
    return view.quiet_s < (FRESH_S if here else QUIET_S) or is_held(view.directory)


def _count(views: Sequence[View]) -> str:
    counts = Counter(view.status or "unreadable" for view in views)
    done = sum(counts[status] for status in FINISHED)
    others = [f"{counts[status]} {status}" for status in COUNTED if counts[status]]
    have = "has" if len(views) == 1 else "have"
    return f"{number_of(len(views), 'run')} {have} begun: {', '.join([f'{done} done', *others])}"


def _make_rows(views: Sequence[View]) -> tuple[list[Row], Row]:
    """A row for each process that trains, and one for all of them."""
    readable = [view for view in views if view.record]
    names = name_cells([view.record["config"] for view in readable])
    cells = {view.directory: name for view, name in zip(readable, names, strict=True)}
    processes: dict[object, list[View]] = {}
    for view in readable:
        if view.status == "running":
            process = (view.progress.get("host"), view.progress.get("pid")) if view.progress else view.directory
            processes.setdefault(process, []).append(view)
    rows = [
        make_row(
            f"{cells[group[0].directory]} {name_seeds([view.record['config'].get('seed') for view in group])}", group
        )
        for group in processes.values()
    ]
    speed = sum(row.images_per_s or 0.0 for row in rows) or None
    left_s = max((row.left_s for row in rows if row.left_s is not None), default=None)
    return rows, Row("all", images_per_s=speed, left_s=left_s)


def _tell_ends(before: Sequence[View], views: Sequence[View]) -> None:
    """A line for each run that has ended since."""
    known = {view.directory: view.status for view in before}
    ended = sum(view.status not in (None, "running") for view in views)
    for view in _find_changed(known, views):
        print(f"[{ended}/{len(views)}] {_describe(view)}", flush=True)


def _tell_news(before: Sequence[View] | None, views: Sequence[View]) -> str:
    """The runs that have ended since, a few of them by name."""
    if before is None:
        return ""
    news = [_describe(view) for view in _find_changed({view.directory: view.status for view in before}, views)]
    more = f" and {len(news) - MOST_NEWS} more" if len(news) > MOST_NEWS else ""
    return f"; new: {'; '.join(news[:MOST_NEWS])}{more}" if news else ""


def _find_changed(known: dict[Path, str | None], views: Sequence[View]) -> list[View]:
    return [view for view in views if view.status not in (None, "running", known.get(view.directory))]


def _describe(view: View) -> str:
    try:
        return describe(view.record)
    except (KeyError, TypeError, AttributeError):  # the record of another program, though its checksum holds
        return f"{view.directory.name}: {view.status}"
