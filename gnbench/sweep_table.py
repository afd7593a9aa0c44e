"""What a sweep's processes are doing, as a table at the lower end of the terminal that the sweep was started from."""

import contextlib
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gnbench.watch import Row, Screen, Watcher, make_row
from gnbench.words import duration, name_cells, name_seeds, number_of

if TYPE_CHECKING:
    from gnbench.plan import Run
    from hydra_plugins.gnbench.cores import Job

REDRAW_S = 1.0


class SweepTable:
    """A row for each job under way, and how much of the sweep is done and left.

    What the jobs' processes print would land in the midst of it: `words` is a file for that, which is shown above.

    Args:
        jobs: what is to be done.
        sweep: its runs, those that were finished before too: a run is named by what differs among them.
    """

    def __init__(self, jobs: Sequence["Job"], sweep: Sequence["Run"]) -> None:
        self.num_runs = sum(len(job.indices) for job in jobs)
        self.effort = sum(job.effort for job in jobs)
        names = name_cells([run.config for run in sweep])
        self.cells = {run.digest: name for run, name in zip(sweep, names, strict=True)}
        self.watcher = Watcher(fresh=True)
        self.screen = Screen()

    def __enter__(self) -> "SweepTable":
        descriptor, self.words = tempfile.mkstemp(prefix="gnbench-")
        self.file = open(descriptor, errors="replace")
        self.screen.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._pass_on()
        self.screen.__exit__()
        self.file.close()
        Path(self.words).unlink(missing_ok=True)

    def show(self, running: Sequence["Job"], done: int, failed: int, elapsed_s: float, effort_done: float) -> None:
        """Draw it anew.

        Args:
            running: the jobs under way.
            done: how many runs have ended with a result.
            elapsed_s: since the first job was started.
            effort_done: the effort of the jobs that have ended.
        """
        self._pass_on()
        rows = [self._make_row(job) for job in running]
        trained = sum(job.effort * (row.share or 0.0) for job, row in zip(running, rows, strict=True))
        left = self.effort - effort_done - trained
        total = Row("all", share=1 - left / self.effort, left_s=estimate_s(left, running, rows))
        total.images_per_s = sum(row.images_per_s or 0.0 for row in rows) or None
        num_running = sum(len(job.indices) for job in running)
        self.screen.show(
            f"{done} of {number_of(self.num_runs, 'run')} done, {num_running} running, {failed} failed, "
            f"{self.num_runs - done - failed - num_running} left; {duration(elapsed_s)} so far",
            rows,
            total,
        )

    def _make_row(self, job: "Job") -> Row:
        if job.runs is None:
            return Row(" ".join(job.overrides[0]), note="running")
        seeds = [run.config["seed"] for run in job.runs]
        name = f"{self.cells[job.runs[0].digest]} {name_seeds(seeds)}"
        return make_row(name, [self.watcher.look(run.directory) for run in job.runs])

    def _pass_on(self) -> None:
        if words := self.file.read():
            print(words, end="" if words.endswith("\n") else "\n", flush=True)


def estimate_s(left: float, running: Sequence["Job"], rows: Sequence[Row]) -> float | None:
    """Seconds that the effort `left` takes at the speed of the rows, at least the slowest's; None is not known yet."""
    pairs = [(job, row) for job, row in zip(running, rows, strict=True) if row.left_s and math.isfinite(row.left_s)]
    if not pairs:
        return None
    speed = sum(job.effort * (1 - row.share) / row.left_s for job, row in pairs) * len(rows) / len(pairs)
    return max(left / speed, *(row.left_s for _, row in pairs)) if speed else None


def print_into(words: str | None, work: object, *arguments: object) -> None:
    """In a process of its own: do `work`, and let what it prints be appended to the file `words`, if there is one."""
    if words is not None:
        with contextlib.suppress(OSError):  # somebody has cleared the directory of temporary files
            descriptor = os.open(words, os.O_WRONLY | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
    work(*arguments)
