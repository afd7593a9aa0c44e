"""The commands as processes: what they print, what they leave, and with which status they end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TESTS, environment

TINY = ("data=tiny", "model=resnet8", "epochs=2", "batch_size=8", "num_threads=1", "results=out")


def records(directory: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*/record.json"))]


def start(directory: Path, *words: str, env: dict | None = None, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "gnbench", "--config-dir", str(TESTS / "configs"), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=directory, env=environment(env), **pipes, **kwargs)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_one_run_says_its_error_and_where_it_is(gnbench, tmp_path):
    done = gnbench(*TINY, "norm=gn")
    assert (done.returncode, done.stderr) == (0, "")
    line, directory = done.stdout.splitlines()
    assert line.startswith("gn batch_size=8 seed=0: test error ")
    (record,) = records(tmp_path / "out")
    assert directory == f"out/{record['run']}"
    assert record["status"] == "done"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("batch_size=0", "batch_size=0 is not legal: batch_size is 1 or more"),
        ("batch_size=abc", "batch_size=abc is not legal: Value 'abc' of type 'str' could not be converted to Integer"),
        ("epochs=-1", "epochs=-1 is not legal: epochs is 1 or more"),
        ("batchsize=2", "batchsize is not a key; did you mean batch_size?"),
        ("+bath_size=3", "bath_size is not a key; did you mean batch_size?"),
        ("device=meta", "device=meta is not legal: it is auto, cpu, cuda"),
        ("model=resnet20 model.depth=9", "model=resnet20 cannot be built: depth=9 is not 6n + 2"),
        ("sweep=null", "a config group takes the name of one of its files, as in norm=gn"),
        ("results=r\u00e9", "results=r\u00e9 cannot be read as key=value: "),
        ("norm=foo", "norm=foo is not known: it is one of batch_group, bcn, "),
        ("model=foo", "model=foo is not known: it is one of resnet110,"),
        ("data=foo", "data=foo is not known: it is one of cifar10, cifar100, image_folder, random, tiny, toy"),
        ("sweep=foo", "sweep=foo is not known: it is one of batch_renorm, batch_size,"),
        (
            "norm=gn norm.num_groups=32 model=resnet20",
            "cannot be built on 16 channels (model=resnet20 has norms on 16, 32",
        ),
        ("norm=gn norm.num_groups=4 norm.channels_per_group=2", "exactly one of num_groups and channels_per_group"),
        ("norm=bn norm.num_groups=4", "norm.num_groups is not a key of this norm: a parameter"),
        ("norm=gn norm.num_group=4", "norm.num_group is not a key of this norm (did you mean norm.num_groups?)"),
        ("norm=custom norm._target_=a.B norm.blocks=2", "is added with a plus, +norm.blocks=2"),
        ("norm=mynorm", "; one of your own is a file DIR/norm/mynorm.yaml, found by --config-dir DIR"),
        ("data=cifar10 data.root=/nowhere", "cifar10 is not in /nowhere/cifar10; run: "),
        ("data=image_folder", "data.root has no value: give it one, as in data.root=..."),
        ("data=image_folder data.root=/nowhere", "/nowhere"),
        ("data.train_size=1000", "data.train_size=1000 is not legal: it is 1 to 96"),
        ("batch_size=128", "batch_size=128 is not legal: batch_size is at most the 96 training images"),
        ("device=cuda:99", "device=cuda:99 is not to be had here"),
        ("batch_size", "batch_size cannot be read as key=value"),
        ("results=", "results is empty: it names the directory that runs go to"),
        ("results=/proc/nowhere", "results=/proc/nowhere cannot be written: "),
        ("norm_batch_size=4,0", "norm_batch_size=0 is not legal"),
        ("~batch_size", "norm_batch_size cannot be worked out: "),
        ("--cfg job --info", "Only one of --run, --multirun, --cfg, --info and --shell_completion can be specified"),
        ("norm=gn norm.num_groups=2,3", "num_groups=3 does not divide 16 channels; legal: 1, 2, 4, 8, 16"),
    ],
)
def test_bad_input_gets_a_sentence_and_a_status(gnbench, tmp_path, words, sentence):
    refused = gnbench(*(["-m"] if "," in words else []), *TINY, *words.split())
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("gnbench: ")
    assert sentence in line
    assert not records(tmp_path / "out"), "nothing is trained before the whole grid is legal"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("sweep=quick norm=bn,gn epoch=10", "gnbench: epoch is not a key; did you mean epochs?\n"),
        ("sweep=foo norm=bn,gn", "gnbench: sweep=foo is not known: it is one of "),
        ("sweep=quick batch_size=2,4 data=tiny epochs=x", "gnbench: epochs=x is not legal: "),
        ("seed=range(3)", "gnbench: seed=range(3) is several values, which -m makes a sweep of\n"),
    ],
)
def test_a_sweep_that_hydra_takes_for_a_single_run_says_what_is_wrong(gnbench, words, sentence):
    refused = gnbench(*words.split())
    assert refused.returncode == 2
    assert refused.stderr.startswith(sentence)


def test_a_grid_runs_each_cell_once_and_then_nothing(gnbench, tmp_path):
    grid = ("-m", *TINY, "norm=bn,gn", "norm_batch_size=2,4", "seed=0,1", "hydra.launcher.num_processes=2")
    first = gnbench(*grid)
    assert (first.returncode, first.stderr) == (0, "")
    lines = first.stdout.splitlines()
    assert lines[0] == "6 runs (8 cells; some are one and the same run): 0 finished, 6 to do"
    assert lines[1].startswith("up to 2 processes side by side; 6 runs of small batches go 2 seeds as one network")
    assert [line.split("]")[0] for line in lines[2:]] == [f"[{n}/6" for n in range(1, 7)]
    assert "5 left, about " in lines[2]
    assert "all in " in lines[-1]
    assert len(records(tmp_path / "out")) == 6
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/record.json")}
    second = gnbench(*grid)
    assert second.stdout.splitlines() == ["6 runs (8 cells; some are one and the same run): 6 finished, 0 to do"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/record.json")} == before


@pytest.mark.slow
def test_a_line_names_a_run_by_what_its_sweep_varies_also_when_it_is_the_last_that_is_left(gnbench, tmp_path):
    grid = ("-m", *TINY, "norm=bn", "norm_batch_size=2,4", "max_steps=2")
    _, _, *lines = gnbench(*grid).stdout.splitlines()
    assert sorted(line[6:].partition(":")[0] for line in lines) == [
        f"bn batch_size=8 norm_batch_size={size} seed=0" for size in (2, 4)
    ]
    next(tmp_path.glob("out/*nbs2*/record.json")).unlink()
    _, how, line = gnbench(*grid, "hydra.launcher.num_processes=1").stdout.splitlines()
    assert how == "one process at a time, a run each"
    assert line.startswith("[1/1] bn batch_size=8 norm_batch_size=2 seed=0: test error ")
    (count, *_) = gnbench(*grid, "norm_batch_size=2").stdout.splitlines()
    assert count == "1 run: 1 finished, 0 to do"


def test_launchers_and_a_single_run_give_the_same_records(gnbench, tmp_path):
    def numbers(directory: str) -> list:
        return [(r["digest"], [row["train_loss"] for row in r["history"]]) for r in records(tmp_path / directory)]

    words = (*TINY[:-1], "norm=bn,gn", "batch_size=4")
    assert gnbench("-m", *words, "results=cores").returncode == 0
    assert gnbench("-m", *words, "results=basic", "hydra/launcher=basic").returncode == 0
    for norm in ("bn", "gn"):
        assert gnbench(*TINY[:-1], f"norm={norm}", "batch_size=4", "results=single").returncode == 0
    assert len(numbers("cores")) == 2
    assert numbers("cores") == numbers("basic") == numbers("single")


@pytest.mark.slow
def test_a_failed_run_fails_the_command_and_not_the_others(gnbench, tmp_path):
    words = ("-m", *TINY, "norm=gn", "seed=0,1", "data._target_=tiny_data.load_tiny")
    bad = tmp_path / "out"
    done = gnbench(*words)
    assert done.returncode == 0
    victim = records(bad)[1]["run"]
    (bad / victim / "record.json").unlink()
    (bad / victim / "record.json").mkdir()  # nothing can be written there
    for run in (records_path for records_path in bad.iterdir() if records_path.name != victim):
        (run / "record.json").unlink()
    failed = gnbench(*words)
    assert failed.returncode == 1
    assert "gnbench: 1 of 2 runs failed; the others are kept" in failed.stderr
    assert f"{victim}: " in failed.stderr
    assert f"log: out/{victim}/run.log" in failed.stderr
    (bad / victim / "record.json").rmdir()
    assert gnbench(*words).stdout.splitlines()[0] == "2 runs: 1 finished, 1 to do"


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_stops_at_a_step_and_the_run_goes_on_from_there(gnbench, tmp_path, number, status):
    words = (*TINY, "norm=bn", "epochs=30")
    process = start(tmp_path, *words)
    wait_for(lambda: any(record["history"] for record in records(tmp_path / "out")))
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    assert stderr.splitlines()[-1] == f"gnbench: stopped by {number.name}; the same command goes on"
    (record,) = records(tmp_path / "out")
    assert record["status"] == "interrupted"
    assert (tmp_path / "out" / record["run"] / "checkpoint.pt").exists()
    assert gnbench(*words).returncode == 0
    assert gnbench(*words, "results=whole").returncode == 0
    (resumed,), (whole,) = records(tmp_path / "out"), records(tmp_path / "whole")
    assert "goes on from step" in (tmp_path / "out" / record["run"] / "run.log").read_text()
    assert [row["train_loss"] for row in resumed["history"]] == [row["train_loss"] for row in whole["history"]]


@pytest.mark.parametrize(
    "number",
    [*(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGKILL, signal.SIGINT)), signal.SIGTERM],
)
def test_a_killed_sweep_takes_its_processes_with_it_and_resumes(gnbench, tmp_path, number):
    words = ("-m", *TINY, "norm=bn", "epochs=12", "seed=0,1,2", "checkpoint_s=0.2")
    process = start(tmp_path, *words)
    wait_for(lambda: sum(bool(record["history"]) for record in records(tmp_path / "out")) >= 2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    told = "" if number == signal.SIGKILL else f"gnbench: stopped by {number.name}; the same command goes on\n"
    assert stderr == told
    locks = list((tmp_path / "out").glob("*/.lock"))
    wait_for(lambda: all(_is_free(lock) for lock in locks))
    assert gnbench(*words).returncode == 0
    assert [record["status"] for record in records(tmp_path / "out")] == ["done"] * 3
    assert gnbench(*words, "results=whole").returncode == 0
    losses = [[[row["train_loss"] for row in r["history"]] for r in records(tmp_path / d)] for d in ("out", "whole")]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_sweep_in_one_process_stops_at_the_signal_and_not_at_its_end(tmp_path, number, status):
    process = start(tmp_path, "-m", *TINY, "hydra/launcher=basic", "norm=bn", "epochs=30", "seed=0,1")
    wait_for(lambda: any(record["history"] for record in records(tmp_path / "out")))
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    assert [record["status"] for record in records(tmp_path / "out")] == ["interrupted"]


def _is_free(lock: Path) -> bool:
    from filelock import FileLock, Timeout

    try:
        with FileLock(lock).acquire(timeout=0):
            return True
    except Timeout:
        return False


def test_a_killed_process_loses_its_own_run_only_and_is_tried_once_more(gnbench, tmp_path):
    words = ("-m", *TINY, "norm=killer", "norm.fuse=fuse", "seed=0,1")
    (tmp_path / "fuse").write_text("")
    done = gnbench(*words)
    assert done.returncode == 0, done.stderr
    assert "a run's process ended with signal SIGKILL; trying it once more" in done.stdout
    assert [record["status"] for record in records(tmp_path / "out")] == ["done"] * 2


def test_two_sweeps_at_once_train_each_run_once(tmp_path):
    words = ("-m", *TINY, "norm=gn", "epochs=4", "seed=0,1,2,3")
    both = [start(tmp_path, *words) for _ in range(2)]
    outputs = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    logs = [path.read_text() for path in tmp_path.glob("out/*/run.log")]
    assert [log.count("epoch 1:") for log in logs] == [1] * 4
    assert [record["status"] for record in records(tmp_path / "out")] == ["done"] * 4


def test_help_and_analysis_do_not_wait_for_torch():
    for code in (
        "import gnbench.cli, sys; assert 'torch' not in sys.modules",
        "import gnbench.analysis.report, sys; assert 'torch' not in sys.modules",
        "import gnbench, sys; gnbench.load; gnbench.figures; assert 'torch' not in sys.modules",
        "import gnbench, sys; assert not {'torch', 'pandas', 'matplotlib', 'hydra'} & set(sys.modules)",
    ):
        subprocess.run([sys.executable, "-c", code], env=environment(), check=True, cwd=ROOT)


def test_help_lists_choices_keys_and_commands(gnbench):
    shown = gnbench("--help")
    assert shown.returncode == 0
    for words in ("norm: batch_group, bcn, ", "gnbench sweep=batch_size", "batch_size: 128", "gnbench-report"):
        assert words in shown.stdout


def test_tab_completion_knows_the_norms():
    env = environment({"COMP_LINE": "gnbench norm=", "COMP_CWORD": "1"})
    command = [sys.executable, "-m", "gnbench", "-sc", "query=bash"]
    completed = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "norm=bn" in completed.stdout.split()


def test_installed_from_a_wheel_the_configs_come_along(tmp_path):
    clone = tmp_path / "clone"  # without what an earlier build has left
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    for name in ("gnbench", "configs", "hydra_plugins"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    wheel = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(clone)],
        capture_output=True, text=True, timeout=240, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )  # fmt: skip
    assert wheel.returncode == 0, wheel.stderr
    (path,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(path), str(site)], check=True)
    code = "import gnbench.configs as c; print(c.CONFIGS); print(c.choices('norm'), c.choices('sweep'))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
    ).stdout  # fmt: skip
    assert shown.splitlines()[0] == str(site / "gnbench" / "config_files")
    assert "'gn'" in shown
    assert "'batch_size'" in shown


def test_in_a_clone_s_parent_the_package_is_not_the_folder_of_that_name(tmp_path):
    """Which Python takes for a package of its own where the install is an import hook that comes after it."""
    (tmp_path / "gnbench").mkdir()
    (tmp_path / "random.py").write_text("raise RuntimeError('not the one that was meant')")
    installed = Path(sys.executable).with_name("gnbench")
    words = ["--config-dir", str(TESTS / "configs"), "-m", "norm=gn", *TINY, "max_steps=1"]
    env = environment({"PYTHONPATH": str(TESTS)})
    done = subprocess.run([installed, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["gnbench", "gnbench.analysis.report", "gnbench.analysis.runs"])
def test_a_reader_that_leaves_is_no_error(tmp_path, module):
    words = {"gnbench": ["--cfg", "job"]}.get(module, [str(ROOT / "results" / "tune-cifar10-jpeg-resnet8")])
    more = ["--out", str(tmp_path)] if module.endswith("report") else []
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", module, *words, *more]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), stdout=writing, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("module", ["gnbench.analysis.report", "gnbench.analysis.runs"])
def test_ctrl_c_ends_the_other_commands_without_a_traceback(tmp_path, module):
    code = (
        f"import signal; from {module} import main; signal.signal(signal.SIGALRM, signal.default_int_handler); "
        "signal.setitimer(signal.ITIMER_REAL, 0.2); raise SystemExit(main())"
    )
    command = [sys.executable, "-c", code, str(ROOT / "results" / "zoo-cifar10-jpeg-resnet8")]
    if module.endswith("report"):
        command += ["--out", str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, "Traceback" in done.stderr) == (130, False)
