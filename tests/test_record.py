"""Identity, names, and records that are whole or refused."""

import errno
import json
import os
import random

import pytest
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from gnbench import files
from gnbench.errors import UserError
from gnbench.files import write_atomic
from gnbench.record import NOT_IDENTITY, digest, find_runs, load_record, run_name, save_record

RECORD = {"run": "x", "status": "done", "config": {"seed": 1}, "history": [{"epoch": 1, "test_error": 12.5}]}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_a_record_of_any_content_comes_back(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("record") / "record.json"
    record = {**RECORD, "extra": content}
    save_record(path, record)
    loaded = load_record(path)
    assert {key: loaded[key] for key in record} == record


def test_no_flipped_bit_and_no_truncation_is_accepted(tmp_path):
    path = tmp_path / "record.json"
    save_record(path, RECORD)
    whole = path.read_bytes()
    content = load_record(path)
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        place = rng.randrange(len(whole))
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert load_record(path) == content, damaged  # white space between the values may differ
        except UserError:
            continue
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            load_record(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "not a whole JSON file"),
        ("[1]", "not a record"),
        ('{"config": 3}', "not a record"),
        ('{"schema": 99, "config": {}}', "schema 99, this version of gnbench reads 1"),
        ('{"schema": 1, "config": {}, "sha256": "0"}', "does not match its checksum"),
    ],
)
def test_what_is_no_record_is_named(tmp_path, text, sentence):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_record(path)


def test_a_record_is_readable_by_others_and_leaves_no_temporary_file(tmp_path):
    save_record(tmp_path / "run" / "record.json", RECORD)
    assert os.listdir(tmp_path / "run") == ["record.json"]
    assert (tmp_path / "run" / "record.json").stat().st_mode & 0o444 == 0o444
    assert find_runs(tmp_path) == [tmp_path / "run" / "record.json"]


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    save_record(path, RECORD)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*record.json: No space left on device \(\d+ MiB free\)"):
        save_record(path, {**RECORD, "status": "failed"})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_place_that_is_a_file_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "run" / "record.json", b"")


def test_a_record_refuses_a_number_that_json_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save_record(tmp_path / "record.json", {**RECORD, "loss": float("nan")})


def test_every_key_that_can_change_a_number_is_in_the_digest():
    config = tiny_config()
    original = digest(config, "data")
    other = {"norm": {"name": "x"}, "model": {"name": "x"}, "data": {**config["data"], "val_size": 9}}
    for key, value in config.items():
        if key in (*NOT_IDENTITY, "norm_batch_size"):
            continue
        changed = {**config, key: other.get(key, "changed" if isinstance(value, str) or value is None else 977)}
        assert digest(changed, "data") != original, key
    assert digest(config, "other data") != original


def test_what_cannot_change_a_number_is_not_in_the_digest():
    config = tiny_config()
    original = digest(config, "data")
    for key in ("results", "device", "checkpoint_s", "norm_batch_size", "tuned_from"):
        assert digest({**config, key: "changed"}, "data") == original
    assert digest({**config, "data": {**config["data"], "root": "/a"}}, "data") == original
    assert digest(dict(reversed(config.items())), "data") == original
    assert digest({**config, "a_new_key": None, "norm": {**config["norm"], "another": None}}, "data") == original


def test_a_run_is_named_after_what_a_reader_looks_for():
    config = tiny_config("norm_batch_size=2", "seed=3")
    assert run_name(config, "0123456789abcdef") == "bn-bs8-nbs2-s3-0123456789ab"
    level = {**config, "norm": {"name": "gn"}, "norm_batch_size": None}
    assert run_name(level, "0123456789abcdef") == "gn-bs8-s3-0123456789ab"
    hostile = {**config, "norm": {"name": "../../x y"}}
    assert "/" not in run_name(hostile, "0123456789abcdef")


def test_json_is_written_without_bare_infinities(tmp_path):
    save_record(tmp_path / "record.json", RECORD)
    json.loads((tmp_path / "record.json").read_text(), parse_constant=pytest.fail)
