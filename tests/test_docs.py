"""What docs/ says is what the code does: pages are generated or compared, examples and the notebook are run."""

import ast
import hashlib
import json
import pkgutil
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, environment, tiny_config
from omegaconf import OmegaConf
from synthetic import write_run

from gnbench.analysis.claims import FAILS, HOLDS, NOT_TESTED, OPEN
from gnbench.plan import plan_run
from gnbench.record import STATUSES, load_record, save_record

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))])
PUBLISHED = ROOT / "results" / "batch_size-cifar10-jpeg-resnet8"
VERDICTS = (HOLDS, FAILS, OPEN, NOT_TESTED)
COMMANDS = f"""
python() {{ {sys.executable} "$@"; }}
gnbench() {{ python -m gnbench "$@"; }}
gnbench-report() {{ python -m gnbench.analysis.report "$@"; }}
gnbench-runs() {{ python -m gnbench.analysis.runs "$@"; }}
set -e
"""


def run(*command, **kwargs):
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, **kwargs)


def test_the_page_of_keys_is_what_the_code_and_the_files_say():
    done = run(sys.executable, "scripts/docs", "--check", cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Records of real runs that have every field between them: of BN with diagnostics, a response, and a cost."""
    from gnbench.run import execute

    directory = tmp_path_factory.mktemp("runs")
    found = []
    for words in (
        ["norm=bn", "max_steps=2", "diagnostics=8"],
        ["norm=gn", "model=vgg16", "model.width=0.0625", "data.size=32", "max_steps=1", "norm.num_groups=2"],
        ["measure=cost", "cost_rounds=1", "cost_round_s=0"],
    ):
        config = {**tiny_config("data.val_size=12", "epochs=1", "report_epochs=1", *words), "results": str(directory)}
        run = plan_run(config, default_threads=1)
        execute(run)
        found.append(load_record(run.directory / "record.json"))
    return found


def documented_keys():
    """The keys in the first column of the page's tables, but for the tables of files and of statuses."""
    page = (DOCS / "record.md").read_text(encoding="utf-8")
    assert "## Its fields" in page
    cells = [line.split("|")[1] for line in page.partition("## Its fields")[2].splitlines() if line.startswith("| `")]
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)} - set(STATUSES)


def test_every_field_of_a_record_is_told_and_every_field_told_is_there(records):
    present = set()
    for record in records:
        present |= set(record)
        for place in ("environment", "result", "cost"):
            present |= {f"{place}.{key}" for key in record.get(place) or ()}
        present |= {f"history.{key}" for row in record["history"] for key in row}
        present |= {f"diagnostics.{key}" for row in record["history"] for key in row.get("diagnostics", ())}
        present |= {
            f"result.test_error_by_statistics.{key}"
            for key in (record["result"] or {}).get("test_error_by_statistics", ())
        }
        present |= {f"cost.rounds.{key}" for row in record.get("cost", {}).get("rounds", ()) for key in row}
    assert documented_keys() == present


@pytest.fixture(scope="module")
def tables(records, tmp_path_factory):
    """{file: its columns} of a report on those runs, and on made-up ones of GN with two groupings."""
    from gnbench.analysis import cost, page, table

    directory = tmp_path_factory.mktemp("columns")
    for record in records:
        save_record(directory / record["run"] / "record.json", record)
    for num_groups in (2, 4):
        write_run(directory, "gn", 8, norm_keys={"num_groups": num_groups}, test_error=20)
    frames = table.load(directory), cost.load(directory), table.curves(directory)
    found = {name: content for name, content in page.make_tables(*frames).items() if len(content)}
    assert set(found) == {"runs", "summary", "groups", "claims", "cost", "diagnostics"}
    return found


def test_every_column_of_a_table_is_told_and_every_column_told_is_there(tables):
    from gnbench.analysis import table

    page = sections((DOCS / "report.md").read_text(encoding="utf-8"))
    keys = set(re.findall(r"`([^`]+)`", (DOCS / "config.md").read_text(encoding="utf-8")))
    told = {name: set(re.findall(r"`([^`]+)`", page[f"{name}.csv"])) for name in tables}
    told["runs"] |= {*table.IDENTITY, "cell"}  # told with summary.csv, as it says
    told["cost"] |= told["runs"]
    for name, content in tables.items():
        others = {key for key in set(content) - told[name] if not re.search(r"^norm\.|\._target_$", key)}
        assert others <= (keys if name == "runs" else set()), name
        cells = [line.split("|")[1] for line in page[f"{name}.csv"].splitlines() if line.startswith("| `")]
        named = {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)} - set(VERDICTS)
        assert named <= set(content), name
    assert set(tables["diagnostics"]["quantity"]) - {"norm_gradient.bias"} <= told["diagnostics"]


def test_every_verdict_is_told():
    page = (DOCS / "report.md").read_text(encoding="utf-8")
    rows = page.partition("| verdict | when |")[2].partition("\n\n")[0]
    assert tuple(re.findall(r"^\| `([a-z ]+)` \|", rows, re.MULTILINE)) == VERDICTS


def test_every_status_is_told():
    page = (DOCS / "record.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| .* \|$", page.partition("### status")[2].partition("###")[0], re.MULTILINE)
    assert tuple(rows) == STATUSES


def test_every_key_of_a_records_config_is_on_the_page_of_keys(records):
    page = (DOCS / "config.md").read_text(encoding="utf-8")
    for record in records:
        for key, value in record["config"].items():
            keys = [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
            for name in keys:
                assert f"`{name}`" in page or name.endswith((".name", "._target_")), name


def test_the_checksum_and_the_digest_are_as_the_page_says(records):
    def hash_canonical(content):
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def without(node, *keys):
        return {key: value for key, value in node.items() if key not in keys and value is not None}

    for record in records:
        assert record["sha256"] == hash_canonical({key: value for key, value in record.items() if key != "sha256"})
        hows = ("results", "device", "engine", "checkpoint_s", "tensorboard", "tuned_from", "tuning", "norm_batch_size")
        config = without(record["config"], *hows)
        config |= {"data": without(config["data"], "root", "cache"), "norm": without(config["norm"])}
        config["model"] = without(config["model"])
        assert record["digest"] == hash_canonical([record["schema"], record["data_fingerprint"], config])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        if not target.startswith(("http://", "https://")):
            place = page.parent / target if target else page
            assert place.exists(), target
            assert not anchor or anchor in name_anchors(place), f"{target}#{anchor}"


def name_anchors(page):
    """Those of its headings, as GitHub makes them: without punctuation, in lower case, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def sections(page):
    return dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory with the files of docs/extending.md, each under the name that stands above it."""
    directory = tmp_path_factory.mktemp("extending")
    page = (DOCS / "extending.md").read_text(encoding="utf-8")
    files = re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(files) == page.count("```python") + page.count("```yaml")
    for name, text in files:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    shutil.copytree(PUBLISHED, directory / "published")
    return directory


@pytest.mark.parametrize(
    ("section", "shown"),
    [
        ("A model", "bn batch_size=32 seed=0: test error "),
        ("A data set", "gn batch_size=16 seed=0: test error "),
        ("A sweep", "2 runs, which differ in norm.momentum"),
        ("A claim", "BN's test error is more than {margin} above GN's at batch size 2."),
    ],
)
def test_an_example_runs_as_it_stands(written, section, shown):
    page = (DOCS / "extending.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", sections(page)[section], re.MULTILINE | re.DOTALL)
    words = re.sub("^gnbench .*", r"\g<0> num_threads=1", commands, flags=re.MULTILINE)  # as all tests
    done = run("bash", "-c", COMMANDS + words, cwd=written)
    assert (done.returncode, done.stderr) == (0, "")
    assert shown.format(margin="1 point") in done.stdout


def read_notebook():
    return json.loads((DOCS / "analysis.ipynb").read_text(encoding="utf-8"))


def test_the_notebook_runs_in_order_and_shows_what_it_promises(monkeypatch):
    import matplotlib

    monkeypatch.chdir(DOCS)
    with matplotlib.rc_context():
        matplotlib.use("agg")
        names, shown = {}, []
        for cell in read_notebook()["cells"]:
            if cell["cell_type"] == "code":
                shown.append(execute_cell("".join(cell["source"]), names))
    assert list(shown[0]["norm"].unique()) == ["bn"]
    assert sorted(shown[1]["seed"]) == [0, 1, 2, 3, 4]
    assert len(shown[2]) == names["frame"].groupby(["norm", "batch_size"]).ngroups == 28
    assert names["ax"].get_xlabel()
    assert len(names["verdicts"]) >= 11
    assert shown[-1] == 75290


def execute_cell(source, names):
    """Run a cell; returns what a notebook would show below it: the value of its last line, if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None


def test_the_notebook_is_committed_without_its_outputs():
    notebook = read_notebook()
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


def test_the_citation_and_the_changelog_know_the_version():
    import gnbench

    citation = OmegaConf.load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == gnbench.__version__
    assert f'version = "{gnbench.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert gnbench.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_command_has_its_function():
    scripts = re.search(r"\[project.scripts\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    targets = dict(re.findall(r'^([\w-]+) = "(.*)"$', scripts, re.MULTILINE))
    assert set(targets) == {"gnbench", "gnbench-report", "gnbench-runs"}
    for name, target in targets.items():
        assert callable(pkgutil.resolve_name(target)), name
