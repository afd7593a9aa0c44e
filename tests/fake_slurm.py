"""Slurm's commands on one machine: sbatch, srun, scontrol requeue, scancel and sacct, with processes as nodes.

What a task's processes see is as on a cluster: its variables; a signal to all of them at once but for the batch shell;
the death of those that are left when the batch shell ends; the same script once more after `scontrol requeue`. All
state is in the directory $FAKE_SLURM. There are no limits of time: a test sends the signal.
"""

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol", "scancel", "sacct")


def install(directory: Path) -> dict[str, str]:
    """Put the commands into `directory`; returns the variables with which a process finds them."""
    for name in COMMANDS:
        path = directory / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        path.chmod(0o755)
    state = directory / "state"
    state.mkdir()
    return {"PATH": f"{directory}{os.pathsep}{os.environ['PATH']}", "FAKE_SLURM": str(state)}


def stop(directory: Path) -> None:
    """Kill every process of every job."""
    for path in sorted((directory / "state").rglob("session*")):  # a node's first
        kill_session(path.read_text(), signal.SIGKILL)


def find_processes(session: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if path.read_text().rpartition(")")[2].split()[3] == session:
                found.append(int(path.parent.name))
    return found


def kill_session(session: str, number: int) -> None:
    for process in find_processes(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def places(state: Path, job: str) -> list[Path]:
    """The directories of the tasks of `7_1`, or of all of `7`."""
    if (state / job / "state").exists():
        return [state / job]
    return sorted(path for path in state.glob(f"{job}_*") if path.is_dir())


def sbatch(words: list[str], state: Path) -> None:
    typed, rest = parse(words)
    script = f"#!/bin/bash\n{typed['wrap']}\n" if "wrap" in typed else Path(rest[0]).read_text()
    lines = [shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH ")]
    options = {**parse(lines)[0], **typed}
    if options.get("partition") == "refused":
        sys.exit("sbatch: error: invalid partition specified: refused")
    job = str(7 + len(list(state.glob("*.sh"))))
    (state / f"{job}.sh").write_text(script)
    (state / f"{job}.json").write_text(json.dumps(options))
    tasks, most = [job], "1"
    if "array" in options:
        first, last, most = re.fullmatch(r"(\d+)-(\d+)(?:%(\d+))?", options["array"]).groups(default="256")
        tasks = [f"{job}_{index}" for index in range(int(first), int(last) + 1)]
    for task in tasks:
        (state / task).mkdir()
        (state / task / "state").write_text("PENDING")
    command = [sys.executable, __file__, "node", job, most, options.get("output", "slurm-%j.out"), *tasks]
    with (state / "errors").open("a") as errors:
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=errors)
    (state / f"session-{job}").write_text(str(process.pid))
    print(f"Submitted batch job {job}")


def parse(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options before the first word that is none, as --array=0-3 and --requeue are, and the words from there."""
    options = {}
    for number, word in enumerate(words):
        if not word.startswith("--"):
            return options, words[number:]
        key, _, value = word.removeprefix("--").partition("=")
        options[key] = value
    return options, []


def node(words: list[str], state: Path) -> None:
    """Run the tasks of a job, at most so many side by side."""
    job, most, output, *tasks = words
    slots = threading.Semaphore(int(most))

    def run(task: str) -> None:
        with slots:
            run_task(state, job, task, output)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run_task(state: Path, job: str, task: str, output: str) -> None:
    place = state / task
    index = task.partition("_")[2]
    ids = {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": index} if index else {}
    restarts = 0
    while True:
        (place / "state").write_text("RUNNING")
        environment = {
            **os.environ, **ids, "SLURM_JOB_ID": job if not index else f"{job}{index}", "SLURM_NTASKS": "1",
            "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
            "SLURM_JOB_NODELIST": "node1", "SLURM_RESTART_COUNT": str(restarts), "FAKE_TASK": str(place),
        }  # fmt: skip
        with open(fill(output, environment), "a") as out:
            shell = subprocess.Popen(
                ["bash", str(state / f"{job}.sh")], env=environment, start_new_session=True, stdout=out, stderr=out
            )
            (place / "session-shell").write_text(str(shell.pid))
            code = shell.wait()
        for path in place.glob("session-step*"):
            kill_session(path.read_text(), signal.SIGKILL)
            path.unlink()
        requeued = place / "requeued"
        if not requeued.exists():
            break
        requeued.unlink()
        restarts += 1
        (place / "restarts").write_text(str(restarts))
    if (place / "state").read_text() != "CANCELLED":
        (place / "state").write_text("COMPLETED" if code == 0 else "FAILED")


def fill(pattern: str, environment: dict[str, str]) -> str:
    job = environment["SLURM_JOB_ID"]
    values = {"%A": environment.get("SLURM_ARRAY_JOB_ID", job), "%a": environment.get("SLURM_ARRAY_TASK_ID", "0")}
    for key, value in {**values, "%j": job, "%t": "0"}.items():
        pattern = pattern.replace(key, value)
    return pattern


def srun(words: list[str], state: Path) -> None:
    """A step: what Slurm's signals go to."""
    values, files = list(words), {}
    while values[0].startswith("--"):
        option = values.pop(0)
        if option in ("--output", "--error"):
            files[option] = fill(values.pop(0), dict(os.environ))
    with open(files["--output"], "a") as out, open(files["--error"], "a") as err:
        step = subprocess.Popen(values, stdout=out, stderr=err, start_new_session=True)
    (Path(os.environ["FAKE_TASK"]) / f"session-step{step.pid}").write_text(str(step.pid))
    sys.exit(abs(step.wait()))


def scontrol(words: list[str], state: Path) -> None:
    assert words[0] == "requeue"
    for place in places(state, words[1]):
        (place / "requeued").touch()


def scancel(words: list[str], state: Path) -> None:
    job, *rest = words
    for place in places(state, job):
        if not rest:
            (place / "state").write_text("CANCELLED")
        number = signal.Signals[f"SIG{rest[1].removeprefix('SIG')}"] if rest else signal.SIGTERM
        sessions = [path.read_text() for path in place.glob("session-step*")]
        for session in sessions:
            kill_session(session, number)
        if not rest:
            time.sleep(0.5)
            for session in sessions:
                kill_session(session, signal.SIGKILL)


def sacct(words: list[str], state: Path) -> None:
    print("JobID|State|NodeList")
    for job in (word for key, word in itertools.pairwise(words) if key == "-j"):
        for place in places(state, job):
            print(f"{place.name}|{(place / 'state').read_text()}|node1")


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2:], Path(os.environ["FAKE_SLURM"]))
