"""A norm from outside the package: by import path and by a file of the user's own, in real processes; its identity."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TESTS, environment, tiny_config

import gnbench.norms
from gnbench.analysis.figures import error_vs_batch_size
from gnbench.analysis.table import load
from gnbench.configs import add_source, hash_source, partial
from gnbench.errors import UserError
from gnbench.norms import BatchNorm
from gnbench.plan import Run, plan_run
from gnbench.run import execute

TINY = ("data=tiny", "model=resnet8", "epochs=1", "batch_size=8", "num_threads=1", "results=out")
MYNORM = """
import sys

import torch
from torch import nn


class Tanh(nn.Module):
    def __init__(self, num_channels, alpha=0.5):
        super().__init__()
        self.alpha = alpha
        self.weight = nn.Parameter(torch.ones(num_channels))

    def forward(self, x):
        return torch.tanh(self.alpha * x) * self.weight[:, None, None]


def halve(num_channels):
    return nn.Sequential(nn.GroupNorm(2, num_channels), nn.AvgPool2d(2))


def not_a_number(num_channels):
    return nn.Threshold(1e9, float("nan"))


def group_norm(num_channels, num_groups):
    return nn.GroupNorm(num_groups, num_channels)


def of_the_batch(num_channels):
    return nn.BatchNorm2d(num_channels)


class NormAndSwish(nn.GroupNorm):
    def __init__(self, num_channels, apply_act=True):
        super().__init__(4, num_channels)
        self.apply_act = apply_act

    def forward(self, x):
        y = super().forward(x)
        return y * torch.sigmoid(y) if self.apply_act else y


class Last(nn.GroupNorm):
    calls = 0

    def __init__(self, num_channels):
        super().__init__(4, num_channels)
        print("a norm's own words")

    def forward(self, x):
        Last.calls += len(x) == 8
        if Last.calls == 7:
            sys.exit(0)
        return super().forward(x)


class Painter(Last):
    def forward(self, x):
        if Last.calls == 6:
            raise ZeroDivisionError("\\n\\x1b[31mred\\nand more")
        return super().forward(x)


class Unit(nn.Module):
    def __init__(self, conv, scale):
        super().__init__()
        self.scale = scale

    def forward(self, weight):
        return self.scale * weight / weight.flatten(1).norm(dim=1)[:, None, None, None]
"""


@pytest.fixture
def mynorm(tmp_path) -> Path:
    path = tmp_path / "mynorm.py"
    path.write_text(MYNORM)
    return path


def records(directory: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*/record.json"))]


def plan(*words: str) -> Run:
    return plan_run(tiny_config("results=x", *words), default_threads=1)


# In processes


def read_block(language: str, place: int = 0) -> str:
    """The first block of code of docs/norms.md in a language, or a later one."""
    return (ROOT / "docs" / "norms.md").read_text().split(f"```{language}\n")[1 + place].partition("```")[0]


def test_the_page_about_norms_takes_an_outside_norm_into_the_figure_and_the_report(tmp_path):
    def run(module: str, *words: str) -> None:
        command = [sys.executable, "-m", module, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240)
        assert (done.returncode, done.stderr) == (0, "")

    (tmp_path / "mynorm.py").write_text(read_block("python"))
    (tmp_path / "mine" / "norm").mkdir(parents=True)
    (tmp_path / "mine" / "norm" / "mynorm.yaml").write_text(read_block("yaml"))
    grid = "gnbench --config-dir mine sweep=quick norm=bn,gn,mynorm results=results/mine"
    assert f"\n{grid}\ngnbench-report results/mine\n" in (ROOT / "docs" / "norms.md").read_text()
    run(*grid.split(), "epochs=1", "max_steps=4", "seed=0", "batch_size=8")
    run("gnbench.analysis.report", "results/mine")
    page = (tmp_path / "results" / "mine" / "report.html").read_text()
    (mine, *_) = [r["config"]["norm"] for r in records(tmp_path / "results" / "mine") if "mynorm" in r["run"]]
    for words in ("mynorm.MyNorm", f"hash {mine['source']}", "Group Normalization", "arXiv:1803.08494", "batch"):
        assert words in page
    assert "mynorm" in error_vs_batch_size(load(tmp_path / "results" / "mine")).get_legend().get_texts()[2].get_text()


def test_the_pages_norm_of_the_batch_trains_at_each_normalization_batch_size_and_is_bn(gnbench, tmp_path, monkeypatch):
    (tmp_path / "mybatchnorm.py").write_text(read_block("python", 1))
    (line,) = re.findall(
        r"^gnbench (-m .*mybatchnorm.*) norm_batch_size=32,8,2$", (ROOT / "docs/norms.md").read_text(), re.M
    )
    words = [*TINY, "norm_batch_size=8,4,1", "drop_last=false", "data.train_size=93"]  # its last batch has 5 images
    done = gnbench(*shlex.split(line), *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert {record["status"] for record in records(tmp_path / "out")} == {"done"}
    assert all(len(record["result"]["test_error_by_statistics"]) == 3 for record in records(tmp_path / "out"))
    monkeypatch.syspath_prepend(tmp_path)
    from mybatchnorm import MyBatchNorm

    x = torch.randn(8, 4, 3, 3, dtype=torch.float64)
    for size in (None, 2):
        mine, theirs = MyBatchNorm(4, size).double(), BatchNorm(4, size).double()
        workers = torch.arange(8).view(-1, 4).T.flatten() if size else torch.arange(8)  # theirs are dealt out
        torch.testing.assert_close(mine(x[workers]), theirs(x)[workers])
        torch.testing.assert_close(mine.running_mean.flatten(), theirs.running_mean)


def test_the_runs_of_an_old_source_are_found_and_deleted_as_the_page_says(gnbench, mynorm, tmp_path):
    words = (*TINY, "max_steps=1", "norm=custom", "norm._target_=mynorm.Tanh", "results=results/mine")
    assert gnbench(*words).returncode == 0
    mynorm.write_text(MYNORM.replace("tanh", "sin"))
    assert gnbench(*words).returncode == 0
    first, second = (
        record["config"]["norm"]["source"]
        for record in sorted(records(tmp_path / "results/mine"), key=lambda record: record["config"]["norm"]["source"])
    )
    (line,) = re.findall(r"^gnbench-runs (.*) --delete --yes$", (ROOT / "docs/norms.md").read_text(), re.M)
    command = [sys.executable, "-m", "gnbench.analysis.runs", *shlex.split(line.replace("2b48a62ed354", first))]
    done = subprocess.run([*command, "--delete", "--yes"], cwd=tmp_path, env=environment(), capture_output=True)
    assert done.returncode == 0
    assert [record["config"]["norm"]["source"] for record in records(tmp_path / "results/mine")] == [second]


def test_norms_in_files_of_the_users_own_bring_activations_and_act_on_weights(gnbench, mynorm, tmp_path):
    folder = tmp_path / "mine" / "norm"
    folder.mkdir(parents=True)
    (folder / "swish.yaml").write_text("name: swish\n_target_: mynorm.NormAndSwish\n")
    (folder / "unit.yaml").write_text(
        "name: unit\n_target_: mynorm.group_norm\nnum_groups: 4\nweight:\n  _target_: mynorm.Unit\n  scale: 2.0\n"
    )
    done = gnbench("-m", f"hydra.searchpath=[file://{tmp_path}/mine]", *TINY, "norm=swish,unit")
    assert (done.returncode, done.stderr) == (0, "")
    swish, unit = (record["config"]["norm"] for record in records(tmp_path / "out"))
    assert unit["weight"] == {"_target_": "mynorm.Unit", "scale": 2.0, "source": unit["source"]}
    assert swish["source"] == unit["source"]


def test_the_installed_command_finds_a_module_in_the_directory_it_is_started_in(mynorm, tmp_path):
    code = "import sys; sys.path.pop(0); from gnbench.cli import main; main()"  # a console script's path lacks it
    words = [*TINY, "norm=custom", "norm._target_=mynorm.group_norm", "+norm.num_groups=4"]
    command = [sys.executable, "-c", code, "--config-dir", str(TESTS / "configs"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    assert records(tmp_path / "out")[0]["config"]["norm"]["name"] == "group_norm"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("norm=custom", "norm._target_ has no value: give it one"),
        ("norm=custom norm._target_=mynorm.halve", "it turns the shape (4, 16, 32, 32) into (4, 16, 16, 16)"),
        ("norm=custom norm._target_=nomodule.Norm", "cannot be imported: No module named 'nomodule'; the current dir"),
        ("norm=custom norm._target_=mynorm.Tank", "'mynorm' has no attribute 'Tank'; did you mean Tanh?"),
        ("norm=custom norm._target_=mynorm.Tanh +norm.beta=1", "unexpected keyword argument 'beta'"),
        ("norm=custom norm._target_=mynorm.of_the_batch", "keeps running statistics of a batch"),
    ],
)
def test_a_norm_that_cannot_be_gets_one_sentence_before_training(gnbench, mynorm, tmp_path, words, sentence):
    refused = gnbench(*TINY, *words.split())
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("gnbench: ")
    assert sentence in line
    assert not records(tmp_path / "out")


# Its identity


def write_package(directory: Path) -> None:
    (directory / "mypackage" / "norms").mkdir(parents=True)
    for path, text in {
        "__init__.py": "from mypackage.layers import Norm\nraise ImportError('planning imports nothing')\n",
        "layers.py": "class Norm: pass\n",
        "norms/__init__.py": "",
        "norms/mine.py": "class Norm: pass\n",
    }.items():
        (directory / "mypackage" / path).write_text(text)


def test_the_source_of_a_strangers_norm_is_its_module_or_its_whole_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write_package(tmp_path)
    module, package = hash_source("mypackage.norms.mine.Norm"), hash_source("mypackage.Norm")
    assert len(module) == len(package) == 12
    assert module == hash_source("mypackage.norms.mine:Norm")
    (tmp_path / "mypackage" / "layers.py").write_text("class Norm: version = 2\n")
    assert hash_source("mypackage.norms.mine.Norm") == module
    assert hash_source("mypackage.Norm") != package
    (tmp_path / "mypackage" / "norms" / "mine.py").write_text("class Norm: version = 2\n")
    assert hash_source("mypackage.norms.mine.Norm") != module


def test_what_a_version_names_or_what_is_not_there_has_no_source():
    for target in (
        "gnbench.norms.BatchNorm",
        "torch.nn.GroupNorm",
        "timm.layers.GroupNorm",
        "nomodule.Norm",
        "",
        "???",
    ):
        assert hash_source(target) is None
    node = {"name": "gn", "_target_": "gnbench.norms.group_norm", "num_groups": 8}
    assert add_source(node) == node


def test_source_and_parameters_are_in_the_identity_and_a_key_of_that_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "other_norm.py").write_text(MYNORM)
    words = ("norm=custom", "norm._target_=other_norm.Tanh", "+norm.alpha=0.1")
    first = plan(*words)
    assert plan(*words).digest == first.digest
    assert plan(*words[:2], "+norm.alpha=0.2").digest != first.digest
    assert first.name.startswith("Tanh-bs8-s0-")
    (tmp_path / "other_norm.py").write_text(MYNORM.replace("tanh", "sin"))
    assert plan(*words).digest != first.digest
    with pytest.raises(UserError, match="source of Tanh is not legal"):
        plan(*words, "+norm.source=mine")


def test_a_norm_that_was_edited_since_the_run_was_planned_is_not_trained(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited_norm.py").write_text(MYNORM)
    run = plan("norm=custom", "norm._target_=edited_norm.Tanh", f"results={tmp_path}/results")
    (tmp_path / "edited_norm.py").write_text(MYNORM.replace("tanh", "sin"))
    with pytest.raises(UserError, match=r"the source of edited_norm\.Tanh has changed since the run was planned"):
        execute(run)


@pytest.mark.parametrize(
    ("source", "code", "sentence"),
    [
        ("sys.exit('bye')", 2, "_target_=mynorm.Norm of Norm cannot be imported: it calls sys.exit('bye')"),
        ("sys.exit()", 2, "_target_=mynorm.Norm of Norm cannot be imported: it calls sys.exit()"),
        ("def Norm(C): sys.exit('bye')", 1, "a layer of model=resnet8 with norm=Norm called sys.exit('bye')"),
        ("raise ImportError('\\n\\x1b[31mred')", 2, "_target_=mynorm.Norm of Norm cannot be imported: red"),
    ],
)
def test_a_module_that_ends_the_program_or_paints_the_terminal_is_named(gnbench, tmp_path, source, code, sentence):
    (tmp_path / "mynorm.py").write_text(f"import sys\n{source}\n")
    done = gnbench(*TINY, "norm=custom", "norm._target_=mynorm.Norm")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"gnbench: {sentence}\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("norm._target_=gnbench.norms.__name__",), "is neither a class nor a function: it is a str"),
        (("norm._target_=broken_norm.Norm",), "cannot be imported: ZeroDivisionError: division by zero"),
        (("norm._target_=gnbench.norms.SkipInit", "+norm.weight=3"), "weight=3 of SkipInit is not legal"),
        (("norm._target_=gnbench.norms.SkipInit", "+norm.weight._target_=no.Weight"), "of SkipInit's weight cannot be"),
    ],
)
def test_an_import_path_that_leads_nowhere_is_refused_in_a_sentence(tmp_path, monkeypatch, words, sentence):
    from gnbench.run import check_runs

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_norm.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=sentence):
        check_runs([plan("norm=custom", *words)])


def test_planning_a_strangers_norm_does_not_import_torch(mynorm, tmp_path):
    code = (
        "import sys; from conftest import compose_config; from gnbench.plan import plan_run;"
        "config = compose_config('norm=custom', 'norm._target_=mynorm.Tanh', 'batch_size=8', 'results=x');"
        "print(plan_run(config, 1).config['norm']['source'], 'torch' in sys.modules, 'mynorm' in sys.modules)"
    )
    env = environment({"PYTHONPATH": os.pathsep.join([environment()["PYTHONPATH"], str(tmp_path)])})
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    source, *imported = shown.stdout.split()
    assert len(source) == 12, shown.stderr
    assert imported == ["False", "False"]


def test_every_public_norm_of_the_package_is_reached_by_its_import_path():
    for name in gnbench.norms.__all__:
        assert partial({"name": name, "_target_": f"gnbench.norms.{name}"}).func is getattr(gnbench.norms, name)


def test_a_norm_that_ends_the_program_is_a_failed_run(gnbench, tmp_path):
    (tmp_path / "mynorm.py").write_text(MYNORM)
    done = gnbench(*TINY, "norm=custom", "norm._target_=mynorm.Last")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "gnbench: a layer called sys.exit(0)")
    (path,) = tmp_path.glob("out/*/record.json")
    record = json.loads(path.read_text())
    assert (record["status"], record["cause"]) == ("failed", "Exited: a layer called sys.exit(0)")


def test_what_an_error_says_over_several_lines_and_in_colour_is_one_plain_line(gnbench, tmp_path):
    (tmp_path / "mynorm.py").write_text(MYNORM)
    done = gnbench(*TINY, "norm=custom", "norm._target_=mynorm.Painter")
    assert (done.returncode, done.stderr) == (1, "gnbench: ZeroDivisionError: red\n")


def test_a_norms_own_words_are_no_commands(gnbench, tmp_path):
    (tmp_path / "mynorm.py").write_text(MYNORM)
    words = ("norm=custom", "norm._target_=mynorm.Last", "hydra/launcher=plan", "hydra.launcher.commands=true")
    done = gnbench("-m", *TINY, *words)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("gnbench ")
    assert "a norm's own words" in done.stderr
