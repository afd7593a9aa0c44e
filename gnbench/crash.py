"""Death at an exact point, to prove that nothing is lost there: GNBENCH_CRASH_AT=point:n kills at the n-th passing.

GNBENCH_CRASH_AT=step:7 is after the 7th step of the process, checkpoint.pt.half:1 with half of its first checkpoint
written, rotated:1 between the two renames of a checkpoint, finished:1 between the final record and the last cleaning.
"""

import collections
import os

POINTS = (  # in the order in which a run passes them
    *("started", "step", "epoch", "recorded", "rotated", "trained", "finished"),
    *("record.json.half", "record.json.written", "record.json.renamed"),
    *("checkpoint.pt.half", "checkpoint.pt.written", "checkpoint.pt.renamed"),
)
_passed: collections.Counter = collections.Counter()


def crash_at(point: str) -> None:
    """Die here by SIGKILL, which nothing can catch, if GNBENCH_CRASH_AT says so."""
    name, _, number = os.environ.get("GNBENCH_CRASH_AT", "").rpartition(":")
    if name == point:
        _passed[point] += 1
        if _passed[point] == int(number):
            os.kill(os.getpid(), 9)
