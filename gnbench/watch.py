"""What runs are doing at this moment, read from their directories and drawn as a table that redraws itself in place.

The launcher draws it for the sweep that it runs, `gnbench-runs --watch` for whatever a directory holds. rich is
imported where there is a terminal to draw on.
"""

import itertools
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gnbench.errors import UserError
from gnbench.record import PROGRESS, RECORD, is_number, load_record
from gnbench.words import duration

if TYPE_CHECKING:
    from rich.console import RenderableType

QUIET_S = 60.0  # without news, after which a run's row says so
GAP = 2  # characters between two columns
BAR = ""  # the title of the column of bars
LEAST_BAR, MOST_BAR = 6, 30  # characters
LEAST_NAME = 20  # characters of a run's name on a line, from which on columns are dropped rather
LEAST = {"done": 5, "left": 6}  # characters of a column, so that it does not change its width with every number
DROPPED = (BAR, "epoch", "train %", "images/s", "left", "test %")  # where a window is too narrow, in this order


@dataclass(frozen=True)
class View:
    """A run as its directory shows it; `record` and `progress` are {} where there is none that can be read."""

    directory: Path
    record: dict
    progress: dict
    quiet_s: float  # since either has changed

    @property
    def status(self) -> str | None:
        return self.record.get("status")


class Watcher:
    """Reads directories again and again: a file that has not changed only once, and one that is damaged not at all.

    Args:
        fresh: whether a run has just moved when it is first seen, whatever the times of its files say.
    """

    def __init__(self, fresh: bool = False) -> None:
        self.fresh = fresh
        self.files: dict[Path, tuple[object, dict]] = {}  # path: (stamp, content)
        self.moved_s: dict[Path, float] = {}

    def look(self, directory: Path) -> View:
        """The run in `directory`, as it is now."""
        before = [self.files.get(directory / name) for name in (RECORD, PROGRESS)]
        record, progress = self._read(directory / RECORD, load_record), self._read(directory / PROGRESS, _load_progress)
        now_s = time.monotonic()
        if directory not in self.moved_s:
            self.moved_s[directory] = now_s - (0.0 if self.fresh else _age(directory))
        elif before != [self.files.get(directory / name) for name in (RECORD, PROGRESS)]:
            self.moved_s[directory] = now_s
        return View(directory, record, progress, now_s - self.moved_s[directory])

    def _read(self, path: Path, load: Callable[[Path], dict]) -> dict:
        try:
            status = path.stat()
        except OSError:
            self.files.pop(path, None)
            return {}
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        known = self.files.get(path)
        if known is None or known[0] != stamp:
            try:
                self.files[path] = (stamp, load(path))
            except (UserError, OSError, ValueError):  # it is being written, or damaged: what was there still counts
                return known[1] if known else {}
        return self.files[path][1]


def _load_progress(path: Path) -> dict:
    """What gnbench.progress wrote; raises ValueError where it is not that, or not all of it."""
    content = json.loads(path.read_bytes())
    keys = ("step", "num_steps", "epoch", "num_epochs", "images_per_s")
    if not isinstance(content, dict) or not all(is_number(content.get(key)) for key in keys):
        raise ValueError(f"{path}: not a run's progress")
    return content


def _age(directory: Path) -> float:
    """Seconds since a run's files changed, by the clocks of this machine and of the disk."""
    times = [path.stat().st_mtime for name in (RECORD, PROGRESS) if (path := directory / name).is_file()]
    return max(0.0, time.time() - max(times, default=0.0))


@dataclass
class Row:
    """A line of the table: a run, or the seeds that one process trains as one network. None is not known yet."""

    name: str
    epoch: str = ""
    share: float | None = None  # of its steps, done
    images_per_s: float | None = None
    left_s: float | None = None
    test_errors: list[float] = field(default_factory=list)  # percent, of each seed
    train_errors: list[float] = field(default_factory=list)
    note: str = ""


def make_row(name: str, views: Sequence[View]) -> Row:
    """The row of runs that one process trains; of those that have ended, where others have not, nothing is said."""
    views = [view for view in views if view.status == "running"] or list(views)
    row = Row(name)
    row.test_errors = [value for view in views if (value := _last(view.record, "test_error")) is not None]
    row.train_errors = [value for view in views if (value := _last(view.record, "train_error")) is not None]
    told = [view for view in views if view.progress]
    if told:
        last = min((view.progress for view in told), key=lambda progress: progress["step"])
        row.epoch = f"{last['epoch']}/{last['num_epochs']}"
        row.share = last["step"] / max(1, last["num_steps"])
        row.images_per_s = sum(view.progress["images_per_s"] for view in told)
        row.left_s = max(map(_left, told))
    elif history := min((view.record.get("history") or [] for view in views), key=len, default=[]):
        epochs = views[0].record["config"].get("epochs")
        row.epoch = f"{len(history)}/{epochs}"
        row.share = len(history) / epochs if is_number(epochs) and epochs else None
    quiet_s = min((view.quiet_s for view in views), default=0.0)
    if quiet_s > QUIET_S:
        row.note = f"quiet {duration(quiet_s)}"
    elif views and row.share is None:
        row.note = "starting"
    return row


def _last(record: dict, key: str) -> float | None:
    """The newest value of a history that has it."""
    rows = [row for row in record.get("history") or () if isinstance(row, dict)]  # others may write records too
    return next((row[key] for row in reversed(rows) if is_number(row.get(key))), None)


def _left(view: View) -> float:
    """Seconds to a run's last step at the speed that it has; infinite for one that stands still."""
    progress, batch_size = view.progress, view.record.get("config", {}).get("batch_size", 0)
    images = (progress["num_steps"] - progress["step"]) * batch_size
    return images / progress["images_per_s"] if progress["images_per_s"] else math.inf


def is_terminal() -> bool:
    """Whether standard output is a terminal that can draw over what it has drawn."""
    return sys.stdout.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


class Screen:
    """The lower end of a terminal, where one table replaces the other; what is printed meanwhile goes above it.

    Args:
        keep: whether the last table stays when the screen is left.
    """

    def __init__(self, keep: bool = False) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(highlight=False, force_terminal=True, force_interactive=True)
        self.live = Live(console=self.console, auto_refresh=False, transient=not keep)
        self.lengths: list[int] = []  # of the lines that stand there

    def __enter__(self) -> "Screen":
        self.live.start()
        self.console.show_cursor(True)  # it stays so after a kill that nobody hears of
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def show(self, head: str, rows: Sequence[Row], total: Row) -> None:
        """Replace the table."""
        self._take_back_wrapped()
        table = draw(head, rows, total, *self.console.size)
        self.live.update(table, refresh=True)
        self.lengths = [sum(part.cell_length for part in line) for line in self.console.render_lines(table, pad=False)]

    def _take_back_wrapped(self) -> None:
        """Erase the lines that the table has gained since the window became narrower: most terminals wrap them."""
        from rich.control import Control
        from rich.segment import ControlType

        gained = sum(max(0, length - 1) // self.console.width for length in self.lengths)
        erase = (ControlType.ERASE_IN_LINE, 2)
        self.console.control(Control(*[erase, (ControlType.CURSOR_UP, 1)] * gained))


def draw(head: str, rows: Sequence[Row], total: Row, width: int, height: int) -> "RenderableType":
    """The table, as large as it must be and no larger than a window of `width` and `height` characters.

    Columns for which there is no room are left out, and so are rows, which are counted instead.
    """
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head_line = Text(head, style="bold", no_wrap=True, overflow="ellipsis")
    if not rows:
        return head_line
    titles, widths = _fit([_format(row) for row in (*rows, total)], width)
    shown = _choose_rows(rows, widths["run"], max(1, height - 4))  # but head, titles, total, a line for the cursor
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    for title in titles:
        justify = "left" if title in ("run", BAR) else "right"
        table.add_column(title, justify=justify, no_wrap=title != "run", width=widths[title], overflow="ellipsis")
    for row in (*shown, total):
        cells = _format(row)
        line = [Text(cells[title]) for title in titles]
        if BAR in titles and row.share is not None:
            line[titles.index(BAR)] = ProgressBar(total=1.0, completed=row.share, width=widths[BAR])
        table.add_row(*line, style="bold" if row is total else "")
    return Group(*[Text()] * (len(shown) + 3 < height), head_line, table)


def _choose_rows(rows: Sequence[Row], width: int, most: int) -> list[Row]:
    """The first rows, as many as fit on `most` lines with names wrapped at `width`, and one that counts the others."""
    ends = itertools.accumulate(len(textwrap.wrap(row.name, width)) for row in rows)
    num_shown = sum(end <= most for end in ends)
    if num_shown == len(rows):
        return list(rows)
    num_shown = max(0, num_shown - 1)
    return [*rows[:num_shown], Row(f"and {len(rows) - num_shown} more")]


def _format(row: Row) -> dict[str, str]:
    """The cells of a row by title; the bar is not text."""
    left = "" if row.left_s is None or math.isinf(row.left_s) else duration(row.left_s)
    return {
        "run": row.name,
        "epoch": row.epoch,
        BAR: "",
        "done": "" if row.share is None else f"{100 * row.share:.0f} %",
        "images/s": "" if row.images_per_s is None else f"{row.images_per_s:.0f}",
        "left": row.note or left,
        "test %": _span(row.test_errors),
        "train %": _span(row.train_errors),
    }


def _span(errors: Sequence[float]) -> str:
    """The lowest and the highest of several seeds."""
    low, high = (f"{end:.1f}" for end in (min(errors), max(errors))) if errors else ("", "")
    return low if low == high else f"{low}-{high}"


def _fit(cells: Sequence[dict[str, str]], width: int) -> tuple[list[str], dict[str, int]]:
    """The columns for which a window has room, and how wide each is: a name may wrap, and a bar takes what is left."""
    titles = list(cells[0])
    wanted = {title: max(LEAST.get(title, len(title)), *(len(row[title]) for row in cells)) for title in titles}
    wanted[BAR] = MOST_BAR
    widths = {**wanted, "run": min(wanted["run"], LEAST_NAME), BAR: LEAST_BAR}
    for dropped in (*DROPPED, None):
        room = width - sum(widths[title] + GAP for title in titles) + GAP
        if room >= 0 or dropped is None:
            break
        titles.remove(dropped)
    for title in ("run", BAR):
        more = min(room, wanted[title] - widths[title]) if title in titles else 0
        widths[title], room = max(1, widths[title] + more), room - more
    return titles, widths
