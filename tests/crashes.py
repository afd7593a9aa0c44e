"""Runs that are killed and started again: the helper of test_faults.py, and the command behind scripts/torture."""

import argparse
import itertools
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from gnbench.checkpoint import CURRENT, PREVIOUS
from gnbench.crash import POINTS
from gnbench.plan import Run, plan_run
from gnbench.record import LOG, RECORD, load_record

RANDOM = "random time"
KILLED = -9  # exit code of a process that died by SIGKILL
CHECKPOINT_S = 0.05
NORMS = ("bn", "gn", "brn")  # statistics of the batch, none, and one whose training output depends on the running ones
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["gnbench.run", "torch._dynamo", "pytest"])  # once, not once a kill


def plan(results: Path, norm: str, *words: str) -> Run:
    """A run of 24 steps in 2 epochs, which writes a checkpoint about every second step."""
    from conftest import tiny_config

    config = tiny_config(f"norm={norm}", f"results={results}", f"checkpoint_s={CHECKPOINT_S}", *words)
    return plan_run(config, default_threads=1)


def execute(run: Run, environment: dict | None = None, kill_s: float | None = None) -> int:
    """Train in a process of its own and return its exit code.

    Args:
        environment: variables of the process, such as GNBENCH_CRASH_AT.
        kill_s: seconds from its start to its kill; None lets it be.
    """
    process = CONTEXT.Process(target=_execute, args=(run, environment or {}))
    process.start()
    process.join(kill_s)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode


def _execute(run: Run, environment: dict) -> None:
    from gnbench.run import execute

    os.environ.update(environment)
    execute(run)


def outcome(run: Run) -> tuple[dict, int]:
    """What a finished run says but for its times, place and host, and the number of files it leaves."""
    record = load_record(run.directory / RECORD)
    timed = ("time_s", "peak_memory_mb")
    kept = {key: record[key] for key in ("digest", "status", "cause", "num_parameters")}
    kept["history"] = [{key: value for key, value in row.items() if key not in timed} for row in record["history"]]
    kept["result"] = {key: value for key, value in record["result"].items() if key not in timed}
    return kept, len(list(run.directory.iterdir()))


def newest_checkpoint_s(run: Run, started_s: float) -> float:
    """When the state from which the run goes on was written, or when it was started if there is none."""
    times = [path.stat().st_mtime for name in (CURRENT, PREVIOUS) if (path := run.directory / name).exists()]
    return max([started_s, *times])


@dataclass
class Kill:
    """What became of one run that was to be killed at `place`, and was then started again until it ended."""

    norm: str
    place: str
    dead: bool  # whether it was killed at all: a random time may come after its end
    resumed: bool  # whether it went on from a checkpoint
    other: bool  # whether it ended with another record than an uncut run
    lost_s: float  # from its last checkpoint to the kill


def torture(run: Run, place: str, kill_s: float | None, whole: tuple[dict, int]) -> Kill:
    """Kill `run` at a point of gnbench.crash or `kill_s` after its start, start it again and compare with `whole`.

    To reach an exact point on a machine of any speed, a checkpoint is then written at every step.
    """
    if kill_s is None:
        run = replace(run, config={**run.config, "checkpoint_s": 1e-9})
    started_s = time.time()
    code = execute(run, {"GNBENCH_CRASH_AT": place} if kill_s is None else None, kill_s)
    lost_s = time.time() - newest_checkpoint_s(run, started_s)
    again = execute(run)
    log = run.directory / LOG
    resumed = log.exists() and "goes on from step" in log.read_text()
    return Kill(run.config["norm"]["name"], place, code == KILLED, resumed, again != 0 or outcome(run) != whole, lost_s)


def main() -> int:
    """Kill runs at every exact point and at random times, start them again, and print what was lost."""
    parser = argparse.ArgumentParser(prog="scripts/torture", description=main.__doc__)
    parser.add_argument("kills", nargs="?", type=int, default=200, help="how many in all (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the random times (default: 0)")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="gnbench-torture-"))
    runs = {norm: plan(root, norm) for norm in NORMS}
    wholes, whole_s = {}, {}
    for norm, run in runs.items():
        execute(run, kill_s=0.0)  # the first one also starts the server of processes
        started_s = time.monotonic()
        execute(run)
        whole_s[norm] = time.monotonic() - started_s
        wholes[norm] = outcome(run)
    exact = [(norm, f"{point}:{number}") for norm in NORMS for point in POINTS for number in _numbers(point)]
    random_ones = ((norm, RANDOM) for norm in itertools.cycle(NORMS))
    rng = random.Random(options.seed)
    kills: list[Kill] = []
    places = itertools.chain(exact, random_ones)
    while sum(kill.dead for kill in kills) < options.kills:
        norm, place = next(places)
        run = replace(runs[norm], directory=root / str(len(kills)) / runs[norm].name)
        kill_s = rng.uniform(0, whole_s[norm]) if place == RANDOM else None
        kills.append(torture(run, place, kill_s, wholes[norm]))
        if not kills[-1].other:
            shutil.rmtree(run.directory.parent)
        if sys.stderr.isatty():
            print(f"{len(kills)} runs", end="\r", file=sys.stderr)
    return _report(kills, root)


def _numbers(point: str) -> tuple[int, ...]:
    if point == "step":
        return (1, 7, 12, 13, 24)
    return (1,) if point in ("started", "trained", "finished") else (1, 2)


def _report(kills: list[Kill], root: Path) -> int:
    print(f"{'norm':6}{'where':24}{'runs':>6}{'killed':>8}{'resumed':>9}{'other':>7}")
    for norm, place in dict.fromkeys((kill.norm, kill.place) for kill in kills):
        rows = [kill for kill in kills if (kill.norm, kill.place) == (norm, place)]
        counts = (len(rows), *(sum(getattr(kill, key) for kill in rows) for key in ("dead", "resumed", "other")))
        print(f"{norm:6}{place:24}{counts[0]:6}{counts[1]:8}{counts[2]:9}{counts[3]:7}")
    bad = [kill for kill in kills if kill.other]
    lost = sorted(kill.lost_s for kill in kills if kill.dead and kill.resumed)
    print(f"{len(kills)} runs, {sum(kill.dead for kill in kills)} killed, {len(bad)} ended with another record")
    if lost:
        median_s = lost[len(lost) // 2]
        print(f"from the last checkpoint to the kill: median {median_s:.2f} s, most {lost[-1]:.2f} s; a checkpoint "
              f"was due every {CHECKPOINT_S} s, at a step's end")  # fmt: skip
    if bad:
        print(f"kept in {root}: {', '.join(f'{kill.norm}-{kill.place}' for kill in bad)}")
    else:
        shutil.rmtree(root)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
