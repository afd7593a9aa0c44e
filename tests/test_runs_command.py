"""gnbench-runs: what it lists, that its command lines train the same runs, that it deletes runs and nothing else."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, compose_config, environment, tiny_config
from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import write_run, write_sweep

from gnbench import command_line
from gnbench.analysis import runs, table
from gnbench.analysis.runs import main
from gnbench.lock import is_held
from gnbench.plan import plan_run
from gnbench.record import digest, load_record, save_record

RESULTS = ROOT / "results" / "batch_size-cifar10-jpeg-resnet8"


@pytest.fixture
def sweep(tmp_path):
    """BN and GN at two batch sizes and two seeds."""
    return write_sweep(tmp_path / "sweep", batch_sizes=(8, 2), seeds=(0, 1))


def write_planned(directory, config, default_threads=1, **keys):
    """The record of a run that was begun with a config as the command line composes it; returns its directory."""
    run = plan_run({**config, "results": str(directory)}, default_threads)
    record = {"run": run.name, "digest": run.digest, "status": "interrupted", "cause": "stopped by SIGINT"}
    more = {"config": run.config, "data_fingerprint": run.data_fingerprint, "history": [], "result": None}
    save_record(run.directory / "record.json", {**record, **more, **keys})
    return run.directory


def names(text):
    """The runs in what the list prints, one a line after its titles."""
    return [line.split()[0] for line in text.splitlines()[1:] if line and "-s" in line]


def kept(directory):
    return {path.name for path in directory.iterdir()}


def run_python(*words, **kwargs):
    return subprocess.run(
        [sys.executable, *words], env=environment(), capture_output=True, text=True, timeout=120, **kwargs
    )


def test_a_query_chooses_runs_and_the_list_says_what_a_person_needs(sweep, tmp_path):
    done = run_python(
        "-m", "gnbench.analysis.runs", "sweep", "--where", "norm == 'bn' and batch_size == 2", cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    titles, first, second, _, count = done.stdout.splitlines()
    assert " ".join(titles.split()) == "run status norm batch_size norm_batch_size seed epochs test_error time cause"
    record = load_record(next(sweep.glob("bn-bs2-nbs2-s0-*")) / "record.json")
    error = f"{record['result']['test_error']:.2f}"
    assert first.split() == [record["run"], "done", "bn", "2", "2", "0", "6/30", error, "60", "s", "–"]
    assert second.startswith("bn-bs2-nbs2-s1-")
    assert count == "2 of 8 runs: 2 done"


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("num_groups == 8", 4),
        ("num_groups.isna()", 4),
        ("norm_batch_size == 8", 2),
        ("test_error > 30", 2),
        ("base_lr == 0.1 and `norm.eps` < 1", 4),
        ("status != 'done'", 0),
        ("run.str.endswith('x')", 0),
        ("True", 8),
        ("False", 0),
    ],
)
def test_a_condition_may_use_every_column(sweep, capsys, where, count):
    assert main([str(sweep), "--where", where]) == 0
    out, err = capsys.readouterr()
    assert len(names(out)) == count
    assert err == ("" if count else "gnbench-runs: none of the 8 runs fits\n")


@pytest.mark.parametrize(
    "where",
    ["batch_size", "batchsize == 2", "norm = 'bn'", "norm ==", "norm == 'bn", "@x == 1", "norm > 3", "", "1", "'bn'"],
)
def test_a_bad_condition_is_one_sentence(sweep, capsys, where):
    before = kept(sweep)
    assert main([str(sweep), "--where", where, "--delete", "--yes"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"gnbench-runs: --where {where!r} is no condition")
    assert kept(sweep) == before


def test_a_directory_without_runs_is_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith(f"gnbench-runs: {tmp_path}/nowhere: no such directory")


def test_every_status_is_listed_with_its_cause(tmp_path, capsys):
    for seed, status in enumerate(("failed", "interrupted", "diverged", "running")):
        write_run(tmp_path, "gn", 8, seed, status=status, cause=None if status == "running" else f"because\n{seed}")
    damaged = write_run(tmp_path, "bn", 8)
    damaged.write_text(damaged.read_text()[:-20])
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for status, cause in {
        "failed": "because 0",
        "interrupted": "because 1",
        "diverged": "because 2",
        "running": "no process trains it: start its sweep again",
        "unreadable": "not a whole JSON file",
    }.items():
        (line,) = (line for line in lines if line.split()[1:2] == [status])
        assert line.endswith(f"  {cause}")
    assert lines[-1] == "5 runs: 1 failed, 1 interrupted, 1 diverged, 1 running, 1 unreadable"


def test_a_run_that_is_being_trained_is_not_called_dead(tmp_path, capsys):
    path = write_run(tmp_path, "gn", 8, status="running")
    with FileLock(path.parent / ".lock"):
        assert main([str(tmp_path)]) == 0
    assert "no process" not in capsys.readouterr().out


def test_directories_of_one_name_are_kept_apart_and_one_given_twice_is_one(tmp_path, capsys):
    places = [tmp_path / parent / "sweep" for parent in ("a", "b")]
    for seed, place in enumerate(places):
        write_run(place, "bn", 8, seed)
        write_run(place, "gn", 8, 5)  # the same run in both
    write_run(places[1], "none", 8, test_error=20.0, frozen=True)  # a key that the other directory lacks
    assert main([*map(str, places), f"{places[0].parent}/../a/sweep"]) == 0
    listed = names(capsys.readouterr().out)
    assert len(listed) == len(set(listed)) == 5
    assert main([*map(str, places), "--where", "seed == 5", "--delete", "--yes"]) == 0
    assert [len(kept(place)) for place in places] == [1, 2]


def test_a_comparison_names_the_keys_that_differ_and_each_runs_numbers(tmp_path, capsys):
    write_run(tmp_path, "gn", 8, 0, test_error=21.5, weight_decay=0.0)
    write_run(tmp_path, "gn", 8, 1, test_error=22.25, norm_keys={"num_groups": 4})
    write_run(tmp_path, "gn", 8, 2, status="diverged", label_smoothing=0.1)
    assert main([str(tmp_path), "--compare"]) == 0
    titles, *lines, _, last = capsys.readouterr().out.splitlines()
    keys = ["num_groups", "seed", "label_smoothing", "weight_decay"]
    assert titles.split()[1 : len(keys) + 4] == [*keys, "status", "test_error", "final_test_error"]
    rows = {line.split()[2]: line.split()[1:7] for line in lines}
    assert rows == {
        "0": ["8", "0", "–", "0", "done", "21.50"],
        "1": ["4", "1", "–", "0.0001", "done", "22.25"],
        "2": ["8", "2", "0.1", "0.0001", "diverged", "–"],
    }
    assert last == "3 runs, which differ in num_groups, seed, label_smoothing, weight_decay"


def test_runs_that_the_list_would_show_alike_say_what_tells_them_apart(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / "sweep", "bn", 8, seed, test_error=20)
        write_run(tmp_path / "sweep", "bn", 8, seed, test_error=20, base_lr=0.2, num_threads=2)
        write_run(tmp_path / "sweep", "bn", 8, seed, test_error=20, norm_keys={"_target_": "mine.batch_norm"})
        write_run(tmp_path / "sweep", "gn", 8, seed, test_error=20)
    done = run_python("-m", "gnbench.analysis.runs", "sweep", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    titles, *lines = done.stdout.splitlines()
    start, end = titles.index("differs in"), titles.index("epochs")
    apart = [line[start:end].strip() for line in lines[:8]]
    of_bn = ["base_lr=0.1, norm._target_=norms.batch_norm", "base_lr=0.2, norm._target_=norms.batch_norm",
             "base_lr=0.1, norm._target_=mine.batch_norm"]  # fmt: skip
    assert sorted(apart) == sorted(2 * [*of_bn, "–"])
    assert main([str(tmp_path / "sweep"), "--where", "norm == 'gn'"]) == 0
    assert "differs in" not in capsys.readouterr().out


def test_a_comparison_says_names_and_not_what_stands_for_them(tmp_path, capsys):
    for norm, target in (("ln", "layer_norm"), ("gn", "group_norm"), ("gn", "other_norm")):
        for digit, data in (("a", "cifar10"), ("b", "cifar10-jpeg")):
            keys = {"name": norm, "_target_": f"gnbench.norms.{target}"}
            images = {"data": {"name": data}, "record_keys": {"data_fingerprint": 64 * digit}}
            write_run(tmp_path / "norms", norm, 8, norm_keys=keys, **images)
    assert main([str(tmp_path / "norms"), "--compare"]) == 0
    titles, *lines = capsys.readouterr().out.splitlines()
    assert titles.split()[:6] == ["run", "norm", "num_groups", "data", "norm._target_", "norm.eps"]
    assert {line.split()[4] for line in lines[:6]} == {"layer_norm", "group_norm", "other_norm"}
    assert main([str(tmp_path / "norms"), "--compare", "--where", "`norm._target_`.str.contains('r_')"]) == 0
    assert "_target_" not in capsys.readouterr().out, "the norm's name says it"


def test_a_comparison_of_other_images_of_one_name_tells_them_by_their_first_digits(tmp_path, capsys):
    for seed, digit in enumerate("ab"):
        write_run(tmp_path, "gn", 8, seed, record_keys={"data_fingerprint": 64 * digit})
    assert main([str(tmp_path), "--compare"]) == 0
    titles, *lines = capsys.readouterr().out.splitlines()
    assert titles.split()[1:3] == ["seed", "data_fingerprint"]
    assert [line.split()[2] for line in lines[:2]] == [12 * "a", 12 * "b"]


def test_equal_configs_differ_in_nothing_and_an_unreadable_record_is_named(tmp_path, capsys):
    write_run(tmp_path, "gn", 8)
    write_run(tmp_path, "bn", 8).write_text("{}")
    assert main([str(tmp_path), "--compare"]) == 1
    out, err = capsys.readouterr()
    assert out.endswith("1 run, which differs in nothing of its config\n")
    assert "not a record of gnbench" in err


COMMANDS = [
    "norm=bn batch_size=2",
    "norm=gn norm.channels_per_group=2 batch_size=4 norm_batch_size=2",  # for GN that is no other run
    "norm=gn norm.num_groups=4 weight_decay=0 seed=3 deterministic=true",
    "norm=brn norm.d_max=0 batch_size=8 norm_batch_size=4 frozen_epochs=1 precise_images=40",
    "norm=ln model=vgg16 model.width=0.25 model.name=vgg16-quarter data.size=32",
    "sweep=paper norm=bn norm_batch_size=2 max_steps=7",
    "sweep=quick data=toy batch_size=2 num_threads=3",
    "milestones=[0.25,0.5] schedule=cosine nesterov=true clip_grad_norm=1e-3 checkpoint_s=5 device=cpu",
    "\"data.name='a, name: of {all} kinds'\" data.train_size=60 data.val_size=12 precision=bf16",
    "norm=troubled norm.fault=overflow",  # a file outside of configs/
    "norm=custom norm._target_=troubled_norm.build +norm.fault=good",
    "norm=gn_ws norm.weight.eps=1e-4 norm.channels_per_group=4",
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_line_composes_to_the_run_it_is_for(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    place = write_planned("my results", compose_config("drop_last=false", *shlex.split(words)))
    record = load_record(place / "record.json")
    assert main(["my results", "--command"]) == 0
    program, *typed = shlex.split(capsys.readouterr().out)
    assert program == "gnbench"
    again = plan_run(compose_config(*typed), default_threads=2)
    assert again.digest == record["digest"]
    assert again.directory == place
    assert again.config == record["config"]


@pytest.mark.parametrize(
    ("typed", "printed"),
    [
        ("norm=bn batch_size=2", "norm=bn model=resnet20 data=toy batch_size=2"),
        ("norm=bn batch_size=8 norm_batch_size=4", "norm=bn model=resnet20 data=toy batch_size=8 norm_batch_size=4"),
        ("norm.channels_per_group=2", "norm=gn model=resnet20 data=toy norm.channels_per_group=2"),
    ],
)
def test_a_command_line_types_only_what_differs(tmp_path, capsys, typed, printed):
    write_planned(tmp_path, compose_config("data=toy", *typed.split()))
    assert main([str(tmp_path), "--command"]) == 0
    words = set(shlex.split(capsys.readouterr().out))
    assert words == {"gnbench", *printed.split(), "num_threads=1", "device=cpu", f"results={tmp_path}"}


def test_the_commands_of_published_runs_compose_to_them(capsys):
    assert main([str(RESULTS), "--where", "seed == 2 and batch_size <= 4", "--command"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = set()
    for line in lines:
        config = {**compose_config(*shlex.split(line)[1:]), "deterministic": None}
        found.add(digest(config, json.loads(next(RESULTS.glob("*/record.json")).read_text())["data_fingerprint"]))
    published = [load_record(path) for size in (2, 4) for path in RESULTS.glob(f"*-bs{size}-*/record.json")]
    expected = {record["digest"] for record in published if record["config"]["seed"] == 2}
    assert len(lines) == len(expected) == 8  # BN, GN, LN and IN
    assert found == expected


def test_a_key_that_the_record_lacks_is_taken_away_for_a_target_of_its_own(tmp_path, capsys):
    node = {"name": "mine", "_target_": "troubled_norm.build", "fault": "good", "depth": {"a": 1}}
    write_planned(tmp_path, {**tiny_config(), "norm": node})
    model = {"name": "mine", "_target_": "gnbench.models.resnet.cifar_resnet", "depth": 14}
    write_planned(tmp_path, {**tiny_config(), "model": model})
    data = {key: value for key, value in compose_config()["data"].items() if key != "size"}
    write_planned(tmp_path, {**tiny_config(), "data": {**data, "_target_": "gnbench.datasets.toy.load_toy"}})
    assert main([str(tmp_path), "--command"]) == 0
    for line in capsys.readouterr().out.splitlines():
        again = plan_run(compose_config(*shlex.split(line)[1:]), default_threads=1)
        assert again.config == load_record(again.directory / "record.json")["config"]


def test_the_source_of_a_norm_of_ones_own_is_looked_at_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_norm.py").write_text(
        "from torch.nn import GroupNorm\n\ndef mine(channels):\n    return GroupNorm(8, channels)\n"
    )
    code = f"""
import sys
sys.path[:0] = ["", *{sys.path!r}]
from test_runs_command import write_planned, tiny_config
write_planned("out", {{**tiny_config(), "norm": {{"name": "mine", "_target_": "my_norm.mine"}}}})
"""
    assert run_python("-c", code, cwd=tmp_path).returncode == 0
    command = ("-c", "import sys; sys.path[:] = filter(None, sys.path); from gnbench.analysis.runs import main; "
               "sys.exit(main(['out', '--command']))")  # fmt: skip
    found = run_python(*command, cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    assert "norm._target_=my_norm.mine" in found.stdout
    assert "source" not in found.stdout
    (tmp_path / "my_norm.py").write_text("# another\n")
    refused = run_python(*command, cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.endswith("composes another run from its config, with another norm.source\n")


def test_a_tuned_run_asks_for_its_tuning_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for base_lr, error in ((0.2, 30.0), (0.1, 40.0)):
        config = plan_run({**tiny_config("data.val_size=12"), "base_lr": base_lr}, 1).config
        result = {"test_error": error, "val_error": error}
        write_planned("tune", config, status="done", cause=None, result=result)
    write_planned("tuned", tiny_config("tuned_from=tune"))
    assert main(["tuned", "--command"]) == 0
    words = shlex.split(capsys.readouterr().out)[1:]
    assert "tuned_from=tune" in words
    assert not any(word.startswith("base_lr") for word in words)
    assert plan_run(compose_config(*words), 1).config["base_lr"] == 0.2

    (best,) = (
        path for path in (tmp_path / "tune").glob("*/record.json") if load_record(path)["config"]["base_lr"] == 0.2
    )
    save_record(best, {**load_record(best), "result": {"test_error": 50.0, "val_error": 50.0}})
    script = "import sys; from gnbench.analysis.runs import main; sys.exit(main(['tuned', '--command']))"
    refused = run_python("-c", script, cwd=tmp_path)  # this process remembers the records of tune
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.endswith("no command for it: this version of gnbench composes another run from its config, "
                                   "with another base_lr\n")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"epochs": 7}, "its digest is not that of its config and images\n"),
        ({"invented": 7}, "has no such config (Key 'invented' "),
        ({"seed": "two"}, "has no such config (Value 'two' of type 'str' could not be converted to Integer"),
        ({"model": "resnet8"}, "has no such config"),
    ],
)
def test_a_record_that_cannot_be_trained_again_is_said_to_be_one(tmp_path, capsys, change, sentence):
    path = write_planned(tmp_path, tiny_config()) / "record.json"
    record = load_record(path)
    save_record(path, {**record, "config": {**record["config"], **change}})
    assert main([str(tmp_path), "--command"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"gnbench-runs: {path.parent}: no command for it: ")
    assert err.count("\n") == 1
    assert sentence in err


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="$"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(st.from_regex("[a-z_]+", fullmatch=True), inner),
    max_leaves=5,
)


@settings(deadline=None)
@given(VALUES)
def test_a_value_reaches_hydra_as_it_is(value):
    override = OverridesParser.create().parse_override(f"key={command_line.format_value(value)}")
    assert not override.is_sweep_override()
    assert plain(override.value()) == value
    assert json.dumps(plain(override.value())) == json.dumps(value)


def plain(value):
    """A parsed value without Hydra's own kind of quoted text."""
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, dict):
        return {plain(key): plain(inner) for key, inner in value.items()}
    return value.text if hasattr(value, "text") else value


def test_nothing_is_deleted_without_yes(sweep, capsys):
    before = kept(sweep)
    assert main([str(sweep), "--where", "norm == 'gn' and seed == 1", "--delete"]) == 0
    out, err = capsys.readouterr()
    assert kept(sweep) == before
    assert [line.split(" (")[0] for line in out.splitlines()] == [
        f"would delete {place}" for size in (8, 2) for place in sweep.glob(f"gn-bs{size}-s1-*")
    ]
    assert "(done, 1 file, 0.0 MiB)" in out
    assert err == "gnbench-runs: nothing is deleted without --yes\n"


def test_the_chosen_runs_are_deleted_with_all_their_files_and_no_others(sweep, capsys):
    (place,) = sweep.glob("gn-bs2-s1-*")
    outside = sweep.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    (place / "checkpoint.pt").write_bytes(bytes(3_000_000))
    (place / "events").mkdir()
    (place / "events" / "a").write_text("a")
    (place / "link").symlink_to(outside)
    (sweep / "report.html").write_text("kept")
    before = kept(sweep)
    assert main([str(sweep), "--where", "norm == 'gn' and seed == 1 and batch_size == 2", "--delete", "--yes"]) == 0
    assert capsys.readouterr().out == f"deleted {place} (done, 3 files, 2.9 MiB)\n"
    assert kept(sweep) == before - {place.name}
    assert (outside / "file").read_text() == "precious"


def test_the_lock_is_held_to_the_last_file(tmp_path, monkeypatch):
    place = write_run(tmp_path, "gn", 8).parent
    held = {}

    def spy(path, unlink=Path.unlink):
        held[path.name] = is_held(place)
        unlink(path)

    monkeypatch.setattr(Path, "unlink", spy)
    (place / ".a").touch()
    runs.delete_run(place)
    assert held[".a"]
    assert held["record.json"]
    assert list(held)[-1] == ".lock"


def test_deleting_needs_a_condition(sweep, capsys):
    before = kept(sweep)
    for action in ("--delete", "--rerun"):
        assert main([str(sweep), action, "--yes"]) == 2
    assert "need --where" in capsys.readouterr().err
    assert kept(sweep) == before


def test_a_run_that_a_process_trains_is_left_alone(tmp_path, capsys):
    trained, idle = (write_run(tmp_path, "gn", 8, seed, status="running").parent for seed in (0, 1))
    code = f"""
import filelock, sys
with filelock.FileLock({str(trained / ".lock")!r}):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        for words in ((), ("--yes",)):
            assert main([str(tmp_path), "--where", "True", "--delete", *words]) == 1
            assert f"{trained}: is left alone: a process trains it\n" in capsys.readouterr().err
        with pytest.raises(runs.UserError, match="a process trains it"):  # even if it began between look and deed
            runs.delete_run(trained)
        holder.stdin.close()
    assert kept(tmp_path) == {trained.name}
    assert not idle.exists()
    assert main([str(tmp_path), "--where", "True", "--delete", "--yes"]) == 0
    assert kept(tmp_path) == set()


def test_only_the_directory_of_a_run_is_deleted(tmp_path, capsys):
    sweep, elsewhere = tmp_path / "sweep", tmp_path / "elsewhere"
    strangers = sweep / "my-project"
    strangers.mkdir(parents=True)
    (strangers / "record.json").write_text('{"something": "else"}')
    renamed = write_run(sweep, "gn", 8).parent.rename(sweep / "keep this one")
    target = write_run(elsewhere, "gn", 2).parent
    link = sweep / target.name
    link.symlink_to(target, target_is_directory=True)
    assert main([str(sweep), "--where", "True", "--delete", "--yes"]) == 1
    err = capsys.readouterr().err
    assert f"{strangers}: is left alone: it is not named as a run's directory is" in err
    assert f"{renamed}: is left alone: it is not named as a run's directory is" in err
    assert f"{link}: is left alone: it is a link" in err
    for place in (strangers, renamed, link):
        with pytest.raises(runs.UserError):
            runs.delete_run(place)
    assert kept(sweep) == {strangers.name, renamed.name, link.name}
    assert (target / "record.json").exists()


@pytest.fixture
def disk(tmp_path):
    """A directory on a disk of its own, or a skip where this process may not mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_on_a_read_only_disk_runs_are_listed_and_not_deleted(disk, capsys):
    place = write_run(disk, "gn", 8, status="running").parent
    (place / ".lock").touch()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert main([str(disk)]) == 0
    assert names(capsys.readouterr().out) == [place.name]
    assert main([str(disk), "--where", "True", "--delete", "--yes"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"gnbench-runs: {place}: is left alone: it cannot be deleted (Read-only file system)\n"


def test_what_cannot_be_trained_again_is_not_deleted_for_it(sweep, capsys):
    before = kept(sweep)  # synthetic records lack most of a config
    assert main([str(sweep), "--where", "norm == 'gn'", "--rerun", "--yes"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("is left alone") == 4
    assert kept(sweep) == before


def test_a_run_trained_again_is_the_same_run(gnbench, tmp_path):
    words = ("data=tiny", "model=resnet8", "batch_size=8", "epochs=1", "max_steps=2", "num_threads=1", "results=out")
    assert gnbench(*words).returncode == 0
    (path,) = (tmp_path / "out").glob("*/record.json")
    first = load_record(path)
    command = run_python("-m", "gnbench.analysis.runs", "out", "--command", cwd=tmp_path).stdout
    asked = run_python("-m", "gnbench.analysis.runs", "out", "--where", "True", "--rerun", "--yes", cwd=tmp_path)
    assert (asked.returncode, asked.stdout) == (0, command)
    assert not path.parent.exists()
    assert gnbench(*shlex.split(command)[1:]).returncode == 0
    again = load_record(path)
    assert again["digest"] == first["digest"]
    assert again["history"][-1]["train_loss"] == first["history"][-1]["train_loss"]


def test_help_waits_for_nothing_and_no_action_for_torch(sweep):
    heavy = "{'torch', 'pandas', 'hydra', 'omegaconf', 'filelock'} & set(sys.modules)"
    code = f"import sys; from gnbench.analysis import runs; runs.make_parser(); assert not {heavy}\n"
    code += f"assert runs.main([{str(RESULTS)!r}, '--where', 'seed == 0', '--command']) == 0\n"
    code += "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    helped = run_python("-m", "gnbench.analysis.runs", "--help")
    assert helped.returncode == 0
    assert helped.stdout.startswith("usage: gnbench-runs")


def test_the_frame_keeps_the_types_of_its_columns(sweep):
    one, both = runs.load_runs([sweep]), table.load(sweep)
    for key in ("batch_size", "norm_batch_size", "num_groups", "seed", "test_error"):
        assert one[key].dtype == both[key].dtype
    assert list(one["run"]) == list(both["run"])
