"""scripts/speed, at a toy's size: what it writes belongs to what it measured."""

import json
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT, environment

QUICKLY = ["--rounds", "2", "--seconds", "0.1", "--model", "resnet8"]


def speed(out, *words: str) -> tuple[dict, list[list[str]]]:
    """What the JSON file holds, and the rows of the table."""
    name = "side_by_side" if "--side-by-side" in words else "speed"
    command = [sys.executable, "scripts/speed.py", *QUICKLY, "--out", str(out), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (out / f"{name}.png").stat().st_size > 10_000
    lines = (out / f"{name}.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return json.loads((out / f"{name}.json").read_text()), rows[2:]


@pytest.mark.slow
def test_each_way_is_timed_in_each_round_and_the_table_has_their_ratio(tmp_path):
    content, rows = speed(tmp_path, "--cells", "gn 2", "bn 128 NBS 2")
    assert [row[0] for row in rows] == [each["cell"] for each in content["results"]] == ["gn 2", "bn 128 NBS 2"]
    for each, row in zip(content["results"], rows, strict=True):
        common, ours = each["images_per_s"]["common"], each["images_per_s"]["gnbench"]
        assert len(common) == len(ours) == len(each["matrix_flop_per_s"]) == 2
        assert row[4].startswith(f"{statistics.median(b / a for a, b in zip(common, ours, strict=True)):.2f}×")
    assert [each["seeds_as_one_network"] for each in content["results"]] == [8, 1]


@pytest.mark.slow
def test_side_by_side_has_a_row_for_each_number_of_processes_and_seeds(tmp_path):
    content, rows = speed(tmp_path, "--side-by-side", "--cells", "bn 2")
    most = max(each["processes"] for each in content["results"])
    assert [(int(row[1]), int(row[2])) for row in rows] == [(n, s) for n in sorted({1, most}) for s in (1, 2, 4, 8)]
    assert rows[0][5] == "1.0×"
