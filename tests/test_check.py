"""A directory of runs is checked without trust: damage, lies, strangers' files and paths."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, environment
from filelock import FileLock
from synthetic import write_run

from gnbench.analysis.check import check_runs
from gnbench.analysis.report import main
from gnbench.errors import UserError
from gnbench.record import load_record, save_record

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture
def path(tmp_path):
    """The record of a sound run, alone in its sweep's directory; its history is as long as its config says."""
    path = write_run(tmp_path / "sweep", "bn", 8, epochs=6, num_epochs=6)
    record = load_record(path)
    errors = sorted(row["test_error"] for row in record["history"][-5:])
    change(path, result={**record["result"], "test_error": errors[2], "final_test_error": errors[0]})
    return path


def change(path, **keys) -> None:
    save_record(path, {**load_record(path), **keys})


def sentences(path) -> list[str]:
    return [finding.sentence for finding in check_runs(path.parent.parent)]


def test_a_sound_run_has_no_findings(path):
    assert check_runs(path.parent.parent) == []


def test_the_error_of_a_run_with_frozen_epochs_is_of_those(path):
    record = load_record(path)
    errors = [row["test_error"] for row in record["history"][-3:]]
    frozen = {
        "config": {**record["config"], "frozen_epochs": 3},
        "result": {**record["result"], "test_error": errors[1]},
    }
    change(path, **frozen)
    assert not [sentence for sentence in sentences(path) if "by its history" in sentence]


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        check_runs(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"run": "../../etc/passwd"}, "its record says that it is '../../etc/passwd'"),
        ({"digest": "f" * 64}, "which its directory is not named after"),
        ({"status": "winning"}, "status is 'winning'; it is one of running, done, diverged, failed, interrupted"),
        ({"status": "failed", "cause": "a cause", "result": None}, "failed: a cause"),
        ({"status": "running", "result": None}, "says running, but no process trains it"),
        ({"status": "diverged"}, "has a result, being diverged"),
        ({"result": None}, "is done, without a result or without a history"),
        ({"history": []}, "is done, without a result or without a history"),
        ({"history": 7}, "has a value of another kind than a record's"),
        ({"history": [{"epoch": 2}]}, "its history has the epochs [2]"),
        ({"result": {"test_error": 0.5, "final_test_error": 0.5}}, "test_error is 0.5, by its history "),
    ],
)
def test_what_a_record_says_is_held_against_itself(path, keys, sentence):
    change(path, **keys)
    assert any(sentence in told for told in sentences(path)), sentences(path)


def test_a_history_that_is_too_short_and_an_error_above_100_are_named(path):
    record = load_record(path)
    record["history"][2]["train_error"] = 101.0
    change(path, config={**record["config"], "epochs": 30}, history=record["history"])
    assert "is done with 6 of 30 epochs in its history" in sentences(path)
    assert "train_error of epoch 3 is 101.0 %" in sentences(path)


def test_files_that_are_damaged_or_left_over_are_named(path):
    (path.parent / ".checkpoint.pt.abc.part").write_bytes(b"")
    (path.parent / "checkpoint.pt.corrupt").write_bytes(b"")
    (path.parent / "checkpoint.pt").write_bytes(b"no checkpoint, but longer than a checksum is")
    told = sentences(path)
    assert ".checkpoint.pt.abc.part was never finished" in told
    assert "checkpoint.pt.corrupt was set aside as damaged" in told
    assert "checkpoint.pt does not match its checksum" in told
    assert "is finished; what is left of its checkpoints may be removed" in told


def test_a_damaged_record_another_schema_and_a_missing_record_are_named(path):
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"done"', b'"dome"'))
    assert sentences(path) == ["its content does not match its checksum"]
    path.write_bytes(whole.replace(b'"schema": 1', b'"schema": 2'))
    assert sentences(path) == ["schema 2, this version of gnbench reads 1"]
    path.unlink()
    (path.parent / "run.log").write_text("")
    assert sentences(path) == ["has no record.json"]


@pytest.mark.parametrize("text", ['{"schema": 1, "config": {}, "x": NaN}', '{"schema": 1, "config": {}, "x": 1e999}',
                                  "[" * 100_000])  # fmt: skip
def test_json_that_is_none_is_a_sentence(path, text):
    path.write_text(text)
    with pytest.raises(UserError, match=r"not a whole JSON file|not finite"):
        load_record(path)


def test_a_record_with_text_that_is_no_unicode_comes_back(path):
    change(path, cause="caf\udce9")
    assert load_record(path)["cause"] == "caf\udce9"


def test_a_run_in_training_is_no_finding(path):
    change(path, status="running", result=None)
    with FileLock(path.parent / ".lock"):
        assert sentences(path) == []


def test_no_link_is_followed_out_of_the_directory(path, tmp_path):
    elsewhere = write_run(tmp_path / "elsewhere", "gn", 4)
    elsewhere.write_text("unreadable")
    sweep = path.parent.parent
    (sweep / "out").symlink_to(elsewhere.parent)
    assert [str(finding) for finding in check_runs(sweep)] == [
        f"out: is a link to {elsewhere.parent}, outside of {sweep}; not read"
    ]
    (sweep / "out").unlink()
    path.unlink()
    path.symlink_to(elsewhere)
    assert sentences(path) == [f"record.json is a link to {elsewhere}, outside of the run; not read"]


def test_a_report_escapes_html_in_every_field_and_writes_only_where_it_is_told(tmp_path):
    from gnbench.analysis.page import write_report

    def infect(value: object) -> object:
        if isinstance(value, dict):
            return {key: value[key] if key in ("status", "schedule") else infect(value[key]) for key in value}
        return HOSTILE + value if isinstance(value, str) else value

    sweep = tmp_path / "sweep"
    for seed in (0, 1):
        path = write_run(sweep, "bn", 8, seed)
        save_record(path, {**infect(load_record(path)), "run": "../../../escaped", "status": "done"})
    failed = write_run(sweep, "gn", 8, 0, status="failed", cause=HOSTILE)
    save_record(failed, {**infect(load_record(failed)), "status": "failed"})
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(sweep)}
    write_report([sweep], sweep)
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(sweep)} == before
    page = (sweep / "report.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "<img src=x" not in page


def test_checking_does_not_wait_for_torch_or_pandas(path):
    code = (
        "import sys; from gnbench.analysis.check import check_runs; "
        f"assert check_runs({str(path.parent.parent)!r}) == []; assert not {{'torch', 'pandas'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, cwd=ROOT)


def test_a_check_changes_nothing(path):
    change(path, status="running", result=None)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.parent.iterdir()}
    sentences(path)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.parent.iterdir()} == before
    assert json.loads(path.read_text())["status"] == "running"
    assert os.listdir(path.parent) == ["record.json"]


def test_a_directory_without_a_run_is_not_one_in_which_nothing_is_wrong(path, capsys):
    for directory in (path.parent.parent.parent, path.parent):  # one level too high, one too deep
        assert main([str(directory), "--check"]) == 2
        assert f"{directory}: holds no runs; they stand directly in it" in capsys.readouterr().err


def test_the_report_command_prints_what_the_check_finds(path, capsys):
    sweep = path.parent.parent
    assert main([str(sweep), "--check"]) == 0
    assert capsys.readouterr().out == "nothing is wrong\n"
    path.write_bytes(path.read_bytes()[:-20])
    assert main([str(sweep), "--check"]) == 1
    assert path.parent.name in capsys.readouterr().out
