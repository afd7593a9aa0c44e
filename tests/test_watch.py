"""Watching: the table of a sweep in a terminal, --watch of the other commands, and what TensorBoard gets to read."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from dataclasses import replace

import pytest
from conftest import TESTS, environment, tiny_config
from filelock import FileLock
from synthetic import make_config, write_run
from test_cli import TINY, records, wait_for

from gnbench import progress, watch
from gnbench.plan import plan_run
from gnbench.record import PROGRESS, RECORD, load_record, save_record
from gnbench.watch import Row, Watcher, draw, is_terminal, make_row
from gnbench.words import name_cells, name_seeds, name_varied, number_of

TOKENS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]")
TOLD = {"step": 25, "num_steps": 100, "epoch": 3, "num_epochs": 10, "images_per_s": 80.0, "host": "node7", "pid": 7}


class Terminal:
    """A command in a terminal of its own; `text` is all that was written there, `lines` what it shows."""

    def __init__(self, directory, *words, width=80, height=24):
        self.width = width
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        env = {key: value for key, value in environment({"TERM": "xterm"}).items() if key not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=directory, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self.content = b""
        self.reader = threading.Thread(target=self._read, args=(ours,))
        self.reader.start()

    def _read(self, ours):
        with contextlib.suppress(OSError):  # as Linux says that the other end is closed
            while block := os.read(ours, 1 << 16):
                self.content += block
        os.close(ours)

    @property
    def text(self):
        return self.content.decode(errors="replace")

    @property
    def lines(self):
        """What stands there at the end, as a terminal of endless height shows it."""
        screen, row, column = [[]], 0, 0
        for token in TOKENS.findall(self.text):
            if token == "\r":
                column = 0
            elif token == "\n":
                row += 1
            elif token.endswith("A") and len(token) > 1:
                row -= int(token[2:-1])
            elif token == "\x1b[2K":
                screen[row] = []
            elif len(token) == 1:
                row, column = (row + 1, 0) if column == self.width else (row, column)
                screen += [[] for _ in range(row + 1 - len(screen))]
                screen[row] += [" "] * (column + 1 - len(screen[row]))
                screen[row][column] = token
                column += 1
            screen += [[] for _ in range(row + 1 - len(screen))]
        return [line for cells in screen if (line := "".join(cells).rstrip())]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Nothing stays behind a test that failed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.end()

    def interrupt(self):
        """What Ctrl-C does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self):
        code = self.process.wait(timeout=120)
        self.reader.join(timeout=60)
        return code


def sweep(directory, *words):
    return Terminal(directory, "gnbench", "--config-dir", str(TESTS / "configs"), "-m", *words)


def is_left_clean(terminal):
    """The cursor is to be seen, and nothing of the table is."""
    return terminal.text.rfind("\x1b[?25h") > terminal.text.rfind("\x1b[?25l") and not [
        line for line in terminal.lines if line.startswith(("run ", "all ")) or "so far" in line
    ]


# A sweep in a terminal


@pytest.mark.slow
def test_the_table_goes_and_the_lines_stay_with_what_a_killed_process_said(tmp_path):
    (tmp_path / "fuse").write_text("")
    terminal = sweep(tmp_path, *TINY, "norm=killer", "norm.fuse=fuse", "seed=0,1")
    assert terminal.end() == 0, terminal.text
    assert "0 of 2 runs done, 2 running, 0 failed, 0 left; " in terminal.text
    assert "killer bs8 s1" in terminal.text
    assert is_left_clean(terminal)
    lines = [line for line in terminal.lines if "side" not in line]
    assert lines[0] == "2 runs: 0 finished, 2 to do"
    assert "a last word" in lines
    assert "a run's process ended with signal SIGKILL; trying it once more" in lines
    ends = " ".join(lines[lines.index(next(line for line in lines if line.startswith("[1/2] "))) :])
    assert re.fullmatch(r"\[1/2\] killer .* \[2/2\] killer .* \| all in \d+ s", ends)


def test_a_row_says_how_far_a_run_is_and_ctrl_c_leaves_the_terminal_clean(tmp_path):
    row = re.compile(r"gn bs8 s0 +\d+/5000 .* \d+ % +\d+ +[\d.]+ (?:s|min|h) +[\d.]+(?:-[\d.]+)? +[\d.]+")
    with sweep(tmp_path, *TINY, "norm=gn", "seed=0,1", "epochs=5000") as terminal:
        wait_for(lambda: any(row.match(line) for line in terminal.lines), 240)
        terminal.interrupt()
        assert terminal.end() == 130
    assert is_left_clean(terminal)
    assert terminal.lines[-2:] == [
        "stopping: what is trained at this moment writes its checkpoints",
        "gnbench: stopped by SIGINT; the same command goes on",
    ]
    assert [record["status"] for record in records(tmp_path / "out")] == ["interrupted"] * 2


def test_elsewhere_than_in_a_terminal_nothing_is_drawn(gnbench, monkeypatch):
    done = gnbench("-m", *TINY, "norm=gn", "max_steps=2", env={"TERM": "xterm", "FORCE_COLOR": "1"})
    assert (done.returncode, done.stderr, "\x1b" in done.stdout) == (0, "", False)
    assert len(done.stdout.splitlines()) == 3
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal()
    monkeypatch.setenv("TERM", "xterm")
    assert is_terminal()


def test_rich_is_imported_where_it_draws():
    code = "import gnbench.cli, gnbench.analysis.watch, sys; assert not {'rich', 'torch', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


# The table


@pytest.fixture
def run(tmp_path):
    """The directory of a run under way, after 3 epochs."""
    return write_run(tmp_path, "gn", 8, status="running").parent


def test_progress_is_told_about_once_a_second_with_the_speed_of_the_last_ten(tmp_path, monkeypatch):
    now_s = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    teller = progress.Teller(step=40, num_steps=1000, steps_per_epoch=30, batch_size=4)
    for step in range(41, 400):
        now_s += 0.1 if step < 200 else 0.05
        if teller.is_due():
            teller.tell(step, [tmp_path])
    told = json.loads((tmp_path / PROGRESS).read_text())
    assert (told["num_steps"], told["num_epochs"], told["pid"]) == (1000, 34, os.getpid())
    assert told["epoch"] == told["step"] // 30 + 1
    assert told["images_per_s"] == pytest.approx(4 / 0.05, rel=0.1)


def test_progress_that_cannot_be_written_stops_nobody(tmp_path):
    teller = progress.Teller(step=0, num_steps=10, steps_per_epoch=5, batch_size=4)
    time.sleep(0.01)
    teller.tell(10, [tmp_path / "nowhere", tmp_path])
    assert json.loads((tmp_path / PROGRESS).read_text())["epoch"] == 2


HISTORY = [{"epoch": 40, "train_error": 12.345, "test_error": 20.0}]


@pytest.mark.parametrize(
    ("num_epochs", "epoch_s", "least", "most"),
    [(3, 1.0, 0, 0), (30, 60.0, 29, 31), (1000, 60.0, 49, 51), (1, 3600.0, 10, 11), (1000, 0.02, 1, 2)],
)
def test_a_log_gets_a_line_an_epoch_but_not_a_thousand_lines(monkeypatch, capsys, num_epochs, epoch_s, least, most):
    now_s = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    lines = progress.Lines("gn", step=0, num_steps=100 * num_epochs, steps_per_epoch=100, batch_size=8)
    for step in range(1, 100 * num_epochs + 1):
        now_s += epoch_s / 100
        if lines.is_due(step):
            lines.tell(step, HISTORY)
    out, err = capsys.readouterr()
    assert out == ""
    assert least <= err.count("\n") <= most


def test_a_line_says_the_speed_or_an_epochs_errors_and_the_time_left(monkeypatch, capsys):
    now_s = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    lines = progress.Lines("gn", step=350, num_steps=1000, steps_per_epoch=10, batch_size=8)
    now_s += 25
    lines.tell(355, HISTORY)
    now_s += 25
    lines.tell(400, HISTORY)
    lines.tell(400, [{**HISTORY[0], "test_error": None}])
    assert capsys.readouterr().err.splitlines() == [
        "gn: step 355 of 1000, 2 images/s, about 54 min left",
        "gn: epoch 40 of 100, training error 12.35 %, test error 20.00 %, about 10 min left",
        "gn: epoch 40 of 100, training error 12.35 %, about 10 min left",
    ]


WITHOUT_WAIT = "from gnbench import cli, progress; progress.LINE_EVERY_S = 0.0; cli.main()"


def test_a_single_run_speaks_where_there_is_no_terminal_and_a_reader_who_leaves_does_not_stop_it(tmp_path):
    words = ["--config-dir", str(TESTS / "configs"), *TINY, "norm=gn"]
    command = [sys.executable, "-c", WITHOUT_WAIT, *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.startswith("gn batch_size=8 seed=0: test error ")
    first, *more = done.stderr.splitlines()
    assert re.fullmatch(r"gn batch_size=8 seed=0: step 1 of 24, \d+ images/s, about \d+ s left", first)
    (epoch,) = (line for line in more if "epoch" in line)
    assert epoch.startswith("gn batch_size=8 seed=0: epoch 1 of 2, training error ")
    assert len(more) < 12
    ours, theirs = os.pipe()
    os.close(ours)
    left = subprocess.run([*command, "seed=1"], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    assert left.returncode == 0
    assert left.stdout.startswith(b"gn batch_size=8 seed=1: test error ")
    assert {record["status"] for record in records(tmp_path / "out")} == {"done"}


def test_a_row_is_what_record_and_progress_say(run):
    watcher = Watcher(fresh=True)
    early = make_row("a run", [watcher.look(run)])
    assert (early.epoch, early.share, early.images_per_s) == ("3/30", 0.1, None)
    (run / PROGRESS).write_text(json.dumps(TOLD))
    row = make_row("a run", [watcher.look(run)])
    history = load_record(run / RECORD)["history"]
    assert (row.epoch, row.share, row.images_per_s) == ("3/10", 0.25, 80.0)
    assert row.left_s == pytest.approx((100 - 25) * 8 / 80.0)
    assert (row.test_errors, row.train_errors) == ([history[-1]["test_error"]], [history[-1]["train_error"]])


def test_seeds_as_one_network_are_a_row_of_those_that_still_train(tmp_path):
    places = [write_run(tmp_path, "gn", 8, seed, status="running", test_error=20.0 + seed).parent for seed in range(3)]
    places.append(write_run(tmp_path, "gn", 8, 3, status="diverged", test_error=90.0).parent)
    for number, place in enumerate(places):
        (place / PROGRESS).write_text(json.dumps({**TOLD, "step": 25 + number}))
    row = make_row("three", [Watcher().look(place) for place in places])
    assert (row.share, row.images_per_s) == (0.25, 240.0)
    errors = [load_record(place / RECORD)["history"][-1]["test_error"] for place in places[:3]]
    assert row.test_errors == errors
    assert watch._format(row)["test %"] == f"{min(errors):.1f}-{max(errors):.1f}"


@pytest.mark.parametrize("content", ["", '{"step": 1', "[]", '{"step": "x"}', '{"step": NaN}', "\x00"])
def test_half_a_file_is_not_news(run, content):
    watcher = Watcher()
    (run / PROGRESS).write_text(json.dumps(TOLD))
    before = watcher.look(run)
    (run / PROGRESS).write_text(content)
    (run / RECORD).write_text((run / RECORD).read_text()[:-9])
    after = watcher.look(run)
    assert (after.record, after.progress) == (before.record, before.progress)
    other = Watcher().look(run)
    assert (other.record, other.progress, make_row("nothing", [other]).note) == ({}, {}, "starting")


def test_a_run_that_is_quiet_says_so_until_it_moves(run, monkeypatch):
    old_s = time.time() - 600
    os.utime(run / RECORD, (old_s, old_s))
    watcher = Watcher()
    assert make_row("x", [watcher.look(run)]).note == "quiet 10 min"
    assert make_row("x", [Watcher(fresh=True).look(run)]).note == ""
    (run / PROGRESS).write_text(json.dumps(TOLD))
    assert make_row("x", [watcher.look(run)]).note == ""


def test_names_tell_what_differs_and_nothing_else():
    def config(norm="gn", batch_size=8, groups=8, **keys):
        return make_config(norm, batch_size, **{"seed": 0, **keys}, norm_keys={"num_groups": groups})

    assert name_cells([config(), config("bn", groups=None), config(seed=1)]) == ["gn bs8", "bn bs8", "gn bs8"]
    assert name_cells([config(), config(groups=2)]) == ["gn bs8 num_groups=8", "gn bs8 num_groups=2"]
    assert name_cells([config("bn", norm_batch_size=2)]) == ["bn bs8 nbs2"]
    sizes = [config("bn", norm_batch_size=size) for size in (8, 2)]
    assert name_cells([*sizes, config(norm_batch_size=None)]) == ["bn bs8 nbs8", "bn bs8 nbs2", "gn bs8"]
    two = [config(model={"name": name, "depth": depth}) for name, depth in (("resnet8", 1), ("resnet20", 3))]
    assert name_cells(two) == ["gn bs8 resnet8", "gn bs8 resnet20"]
    assert name_cells([config(device="cpu"), config(device="cuda")]) == ["gn bs8"] * 2
    assert [name_seeds(seeds) for seeds in ([3], [1, 0], [2, 0, 1], [0, 2, 7])] == ["s3", "s0,1", "s0-2", "s0,2,7"]


def test_the_line_of_a_run_names_what_its_sweep_varies_besides_batch_size_and_seed():
    def config(norm="gn", batch_size=8, groups=8, **keys):
        return make_config(norm, batch_size, **{"seed": 0, **keys}, norm_keys={"num_groups": groups})

    assert name_varied([config(), config(batch_size=4), config(seed=1), config("ln", groups=None)]) == [""] * 4
    whole = [config("bn", size, norm_batch_size=size, base_lr=size / 100) for size in (8, 4)]
    assert name_varied(whole) == ["", ""], "what goes with the batch size is told by it"
    split = [config("bn", norm_batch_size=size) for size in (8, 2)]
    assert name_varied([*split, config(norm_batch_size=None)]) == ["norm_batch_size=8", "norm_batch_size=2", ""]
    grid = [config(groups=groups, base_lr=lr) for groups in (2, 4) for lr in (0.1, 0.2)]
    assert sorted(name_varied(grid)[0].split()) == ["base_lr=0.1", "num_groups=2"]
    assert len(set(name_varied(grid))) == 4


def test_one_thing_is_not_several():
    assert [number_of(n, "run") for n in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]
    assert [number_of(n, "process") for n in (1, 2)] == ["1 process", "2 processes"]


@pytest.mark.parametrize("height", [4, 6, 12, 40])
@pytest.mark.parametrize("width", [12, 20, 40, 60, 80, 120, 200])
def test_the_table_fits_into_every_window(width, height):
    from rich.console import Console

    rows = [
        Row(f"gn bs{2**n} num_groups=2 s0-4", f"{n}/164", n / 20, 10.0**n, 60.0 * n, [60.1, 62.2], [50.0], "")
        for n in range(9)
    ]
    console = Console(width=width, height=height, color_system=None)
    table = draw("3 of 75 runs done, 9 running", rows, Row("all", share=0.5), width, height)
    lines = ["".join(part.text for part in line).rstrip() for line in console.render_lines(table, pad=False)]
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert ("all" in text, "done" in text) == (True, True)
    if height == 40 and width >= 80:
        assert all(title in text for title in ("run", "images/s", "left", "test %", "train %"))
        assert all(row.name in text for row in rows)
        assert "60.1-62.2" in text
    if height in (6, 12):
        assert len(lines) <= height
        assert re.search(r"and \d\s+more", text)
        assert width < 80 or f"and {9 - (height - 5)} more" in text
    assert ("━" in text) == (width >= 120)


def test_time_left_is_that_of_all_runs_at_the_speed_of_those_that_run():
    from types import SimpleNamespace

    from gnbench.sweep_table import estimate_s

    jobs = [SimpleNamespace(effort=effort) for effort in (10.0, 30.0, 10.0)]
    rows = [Row("a", share=0.5, left_s=50.0), Row("b", share=0.5, left_s=100.0), Row("c", note="starting")]
    per_s = (10 * 0.5 / 50 + 30 * 0.5 / 100) / 2 * 3  # the one that starts is taken to be like the others
    assert estimate_s(1000.0, jobs, rows) == pytest.approx(1000 / per_s)
    assert estimate_s(1.0, jobs, rows) == 100.0
    assert estimate_s(1000.0, jobs[2:], rows[2:]) is None
    assert estimate_s(1000.0, jobs[:1], [Row("a", share=0.5, left_s=float("inf"))]) is None


# The other commands


def test_runs_of_a_directory_are_watched_in_a_terminal_until_ctrl_c(tmp_path):
    out = tmp_path / "out"
    place = write_run(out, "gn", 8, status="running").parent
    dead = write_run(out, "gn", 4, status="running").parent
    old_s = time.time() - 600
    os.utime(dead / RECORD, (old_s, old_s))
    write_run(out, "bn", 2)
    with contextlib.ExitStack() as stack, FileLock(place / ".lock"):
        (place / PROGRESS).write_text(json.dumps(TOLD))
        terminal = stack.enter_context(Terminal(tmp_path, "gnbench.analysis.runs", "out", "--watch", "0.1"))
        wait_for(lambda: any(line.startswith("gn bs8 s0") for line in terminal.lines))
        assert any("3/10" in line and "25 %" in line and " 80 " in line for line in terminal.lines)
        assert "3 runs have begun: 1 done, 1 running, 1 interrupted" in terminal.lines
        record = load_record(place / RECORD)
        result = {"test_error": 12.5, "final_test_error": 12.5, "train_error": 3.0, "train_loss": 0.1, "time_s": 7.0}
        save_record(place / RECORD, {**record, "status": "done", "result": result})
        wait_for(lambda: "3 runs have begun: 2 done, 1 interrupted" in terminal.lines)
        terminal.interrupt()
        assert terminal.end() == 0
    assert "[3/3] gn batch_size=8 seed=0: test error 12.50 %, training error 3.00 % in 7 s" in terminal.lines
    assert terminal.lines[-1] == "3 runs have begun: 2 done, 1 interrupted"
    assert "Traceback" not in terminal.text


def start_watching(directory, module, *words):
    with open(directory / "stdout", "w") as stdout, open(directory / "stderr", "w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", f"gnbench.analysis.{module}", "out", "--watch", *words],
            cwd=directory, env=environment({"PYTHONUNBUFFERED": "1"}), stdout=stdout, stderr=stderr,
        )  # fmt: skip


def said(directory, stream="stdout"):
    return (directory / stream).read_text()


def test_elsewhere_watched_runs_are_lines(tmp_path):
    process = start_watching(tmp_path, "runs", "0.1")
    wait_for(lambda: "0 runs have begun: 0 done\n" in said(tmp_path))
    write_run(tmp_path / "out", "gn", 8, status="failed", cause="no reason")
    wait_for(lambda: said(tmp_path).endswith("\n[1/1] gn batch_size=8 seed=0: failed, no reason\n"))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert (said(tmp_path, "stderr"), said(tmp_path).count("\n"), "\x1b" in said(tmp_path)) == ("", 2, False)


def test_a_report_is_drawn_again_as_runs_come_in(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    process = start_watching(tmp_path, "report", "0.1")
    wait_for(lambda: "out: holds no records" in said(tmp_path, "stderr"))
    write_run(out, "gn", 8, status="running")
    wait_for(lambda: "1 run has begun" in said(tmp_path))
    damaged = write_run(out, "gn", 4)
    damaged.write_text(damaged.read_text()[:99])  # as a reader may find it on a disk that is shared
    wait_for(lambda: "2 runs have begun: 0 done" in said(tmp_path))
    assert '<meta http-equiv="refresh" content="1">' in (out / "report.html").read_text()
    write_run(out, "bn", 8, test_error=31.4)
    wait_for(lambda: "; new: bn batch_size=8 seed=0: test error 31.40 %" in said(tmp_path))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    page = (out / "report.html").read_text()
    assert "31.40" in page
    assert 'http-equiv="refresh' not in page
    assert said(tmp_path, "stderr").count("\n") == 1


@pytest.mark.parametrize("module", ["runs", "report"])
@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "out"])
def test_seconds_that_are_none_are_refused(module, seconds, capsys):
    import importlib

    main = importlib.import_module(f"gnbench.analysis.{module}").main
    with pytest.raises(SystemExit) as refused:
        main(["--watch", seconds, "out"] if seconds == "out" else ["out", "--watch", seconds])
    assert refused.value.code == 2
    assert "seconds" in capsys.readouterr().err.splitlines()[-1]


# TensorBoard


def plan(directory, *words):
    return plan_run({**tiny_config("norm=bn", *words), "results": str(directory)}, default_threads=1)


def test_tensorboard_is_no_part_of_a_runs_identity(tmp_path):
    assert plan(tmp_path, "tensorboard=true").digest == plan(tmp_path).digest


def test_without_the_package_tensorboard_is_refused_before_training(tmp_path, monkeypatch):
    from gnbench import board
    from gnbench.errors import UserError
    from gnbench.run import check_runs

    monkeypatch.setattr(board.importlib.util, "find_spec", lambda name: None)
    check_runs([plan(tmp_path)])
    with pytest.raises(UserError, match="tensorboard=true needs the package tensorboard: pip install"):
        check_runs([plan(tmp_path, "tensorboard=true")])


def test_tensorboard_shows_each_epoch_of_a_killed_and_resumed_run_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    import crashes

    from gnbench.analysis.check import check_runs
    from gnbench.analysis.runs import delete_run

    run = plan(tmp_path, "tensorboard=true", "epochs=3", "checkpoint_s=1000")
    assert crashes.execute(run, {"GNBENCH_CRASH_AT": "recorded:2"}) == crashes.KILLED
    assert len(list((run.directory / "tensorboard").iterdir())) == 1
    assert crashes.execute(replace(run, config={**run.config, "checkpoint_s": 1e-9})) == 0
    events = accumulator.EventAccumulator(str(run.directory / "tensorboard"))
    events.Reload()
    history = load_record(run.directory / RECORD)["history"]
    for name, key in {"loss/train": "train_loss", "error/test": "test_error", "lr": "lr"}.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(row["epoch"], pytest.approx(row[key], rel=1e-6)) for row in history]
    speeds = [event.value for event in events.Scalars("images_per_s")]
    assert speeds == pytest.approx([12 * 8 / row["time_s"] for row in history])
    assert check_runs(tmp_path) == []
    delete_run(run.directory)
    assert not run.directory.exists()
