"""The command as a user runs it, the page it writes, and the sentence on top of it."""

import html.parser
import math
import os
import subprocess
import sys

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import write_run, write_sweep

from gnbench.analysis import figures, page, report, statistics, table


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("batch_size"), sd=0.3)


@pytest.fixture(scope="module")
def written(sweep, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert report.main([str(sweep), "--out", str(out)]) == 0
    return out


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def text(self):
        return " ".join(" ".join(self.texts).split())


def read_page(out):
    return Page((out / "report.html").read_text(encoding="utf-8"))


def test_it_writes_everything_where_it_is_told(sweep, written):
    names = {"runs.csv", "summary.csv", "claims.csv", "report.html"}
    for name in ("error_vs_batch_size", "curves", "curves_by_batch_size"):
        names |= {f"{name}.svg", f"{name}.png"}
    assert names <= {path.name for path in written.iterdir()}
    assert not list(sweep.glob("*.csv"))


def test_it_writes_into_the_directory_itself_and_says_what(tmp_path, capsys):
    write_run(tmp_path)
    assert report.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(lines[:-1]) == {str(path) for path in tmp_path.iterdir() if path.is_file()}
    assert str(tmp_path / "report.html") in lines
    assert lines[-1] == page.headline(table.load(tmp_path))
    assert report.main([str(tmp_path)]) == 0  # its own files do not disturb it


def test_tables_hold_the_numbers(sweep, written):
    runs, summary = pd.read_csv(written / "runs.csv"), pd.read_csv(written / "summary.csv")
    assert len(runs) == 30
    assert runs["test_error"].to_list() == pytest.approx(table.load(sweep)["test_error"].to_list())
    assert len(summary) == 10
    assert set(summary["n"]) == {3}


def test_another_process_writes_the_same_bytes_and_needs_no_torch(sweep, written, tmp_path):
    code = (
        "import sys, gnbench.analysis.report as report; assert report.main(sys.argv[1:]) == 0; "
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, sweep, "--out", tmp_path]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "False"
    files = sorted(path.name for path in written.iterdir())
    assert files == sorted(path.name for path in tmp_path.iterdir())
    for name in files:
        assert (written / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_page_needs_nothing_from_outside(written):
    page = read_page(written)
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert links
    assert all(link.startswith("data:") for link in links)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}


def test_the_page_can_be_read_without_eyes(written):
    page = read_page(written)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len({image["alt"] for image in images}) == len(images) == 3
    shown = images[0]["alt"]
    assert shown.startswith(
        "Test error against batch size. Vertical axis: test error (%). "
        "Horizontal axis: batch size (images in one update). Lines: BN; GN. Mean of n = 3 seeds a cell; bars: "
    )
    assert shown.endswith("resnet20, cifar10, all training images, 30 epochs. A run's test error: the median over its "
                          "last 5 epochs.")  # fmt: skip
    assert "Panels: BN; GN. Lines by batch size: 32; 16; 8; 4; 2." in images[2]["alt"]
    assert ("html", {"lang": "en"}) in page.tags
    assert {"title", "main", "h1", "caption"} <= {tag for tag, _ in page.tags}
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")


def test_the_page_says_what_was_run(written):
    text = read_page(written).text()
    for fact in ("30 done", "Seeds a cell 3", "resnet20", "cifar10", "Epochs 30", "cpu · Made-up 9000 · torch 2.13.0"):
        assert fact in text
    assert "Not everything is here" not in text
    assert "the same for all" in text


def test_the_page_names_what_is_missing_failed_and_diverged(tmp_path):
    write_sweep(tmp_path, batch_sizes=(32, 2), seeds=(0, 1))
    write_run(tmp_path, "bn", 4, 0, status="diverged", cause="the training loss is not finite by step 7")
    write_run(tmp_path, "bn", 4, 1, status="failed", cause="RuntimeError: no memory")
    write_run(tmp_path, "gn", 4, 0).write_text("broken")
    report.main([str(tmp_path)])
    text = read_page(tmp_path).text()
    assert "1 of 2 runs diverged (seed 0); 1 of 2 runs failed (seed 1)" in text
    assert "GN at batch size 4: no run" in text
    assert "not finite by step 7" in text
    assert "RuntimeError: no memory" in text
    assert "is unreadable: not a whole JSON file" in text


def test_the_page_says_when_configurations_are_mixed(tmp_path):
    write_run(tmp_path, epochs=10)
    write_run(tmp_path, epochs=30)
    report.main([str(tmp_path)])
    assert "2 configurations, drawn apart: epochs=10; epochs=30" in read_page(tmp_path).text()


def test_records_of_strangers_are_escaped(tmp_path):
    evil = '<script>alert("1")</script>'
    write_run(tmp_path, "frn", 32, test_error=20, data={"name": evil}, model={"name": f"m{evil}"})
    write_run(tmp_path, evil, 32, 1, test_error=20, status="failed", cause=f"</td>{evil}", device=evil)
    assert report.main([str(tmp_path)]) == 0
    page = read_page(tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert evil in page.text()


def test_groups_make_a_figure_and_a_table(tmp_path):
    for num_groups in (8, 4):
        write_run(tmp_path, "gn", 32, norm_keys={"num_groups": num_groups}, test_error=20 + num_groups)
    report.main([str(tmp_path)])
    groups = pd.read_csv(tmp_path / "groups.csv")
    assert dict(zip(groups["num_groups"], groups["mean"], strict=True)) == {8: 28, 4: 24}
    assert (tmp_path / "groups.svg").exists()


def test_the_norm_batch_axis_has_its_own_figure(tmp_path):
    for norm_batch_size in (32, 2):
        write_run(tmp_path, "bn", 32, norm_batch_size=norm_batch_size)
    report.main([str(tmp_path)])
    assert (tmp_path / "error_vs_norm_batch_size.svg").exists()
    assert not (tmp_path / "error_vs_batch_size.svg").exists()


def test_claims_are_judged_with_the_margin_that_is_given(sweep, written, tmp_path):
    found = pd.read_csv(written / "claims.csv").set_index("claim")["verdict"]
    assert found["BN's test error rises by more than 1 point from batch size 32 to 2."] == "holds"
    assert "holds BN's test error rises by more than 1 point" in read_page(written).text()
    assert report.main([str(sweep), "--out", str(tmp_path), "--margin", "30", "--reference", "--increasing"]) == 0
    found = pd.read_csv(tmp_path / "claims.csv").set_index("claim")["verdict"]
    assert found["BN's test error rises by more than 30 points from batch size 32 to 2."] == "does not hold"
    assert (tmp_path / "error_vs_batch_size.svg").read_bytes() != (written / "error_vs_batch_size.svg").read_bytes()


def test_what_was_not_tested_is_folded_away(written):
    page = read_page(written)
    text = page.text()
    before, _, after = text.partition("4 statements not tested: cells that they need were not trained")
    assert "not tested GN lies between BN and LN" in after
    assert "not tested GN lies between" not in before
    assert "corrected after Holm over all of them" in before
    tags = [tag for tag, attributes in page.tags if tag == "details" or attributes.get("class") == "claims"]
    assert tags[:3] == ["ul", "details", "ul"]


def test_one_run_of_one_epoch_is_told_in_the_singular(tmp_path):
    write_run(tmp_path, "gn", report_epochs=1, num_epochs=1, epochs=1)
    report.main([str(tmp_path)])
    text = read_page(tmp_path).text()
    assert "percent, top-1; of the last epoch" in text
    assert "1 run " in text
    for wrong in ("1 runs", "1 epochs", "1 seeds", "1 statements"):
        assert wrong not in text.replace("11 ", "")
    assert "1 epoch," in figures.describe_runs(table.load(tmp_path))


@pytest.mark.parametrize(("num_epochs", "words"), [(1, "of the last epoch"), (6, "over its last 5 epochs")])
def test_the_median_is_over_the_epochs_that_there_are(tmp_path, num_epochs, words):
    write_run(tmp_path, "gn", num_epochs=num_epochs)
    assert words in dict(page.list_facts(table.load(tmp_path)))["Test error"]


def test_whole_parameters_of_a_norm_are_whole_beside_norms_without_them(tmp_path):
    write_run(tmp_path, "mine", test_error=20, norm_keys={"blocks": 4, "alpha": 0.25})
    write_run(tmp_path, "bn")
    assert "mine: alpha = 0.25, blocks = 4;" in dict(page.list_facts(table.load(tmp_path)))["Norms"] + ";"


def test_the_page_says_whose_time_it_is_where_seeds_share_a_network(tmp_path):
    environment = {"torch": "2.13.0", "processor": "Made-up 9000", "device": "cpu"}
    for place, engine in (("alone", "channels_last"), ("together", "3 seeds as one network, channels_last")):
        for seed in range(3):
            keys = {"environment": {**environment, "engine": engine}}
            write_run(tmp_path / place, "bn", 2, seed, record_keys=keys)
        report.main([str(tmp_path / place)])
        text = read_page(tmp_path / place).text()
        assert engine in text
        assert (page.TIME_NOTE in text) == (place == "together")
        assert set(pd.read_csv(tmp_path / place / "runs.csv")["engine_used"]) == {engine}


def test_configurations_are_counted_with_the_unmarked_one(tmp_path):
    write_run(tmp_path, "bn", 32)
    write_run(tmp_path, "bn", 32, frozen_epochs=3)
    fact = dict(page.list_facts(table.load(tmp_path)))["Configuration besides norm, batch size and seed"]
    assert fact == "2 configurations, drawn apart: unmarked; frozen_epochs=3"


@pytest.mark.parametrize("margin", ["0", "-1", "nan", "inf", "wide"])
def test_a_margin_that_makes_no_sense_is_a_sentence(sweep, margin, capsys):
    assert report.main([str(sweep), "--margin", margin]) == 2
    assert f"--margin {margin} is not legal: it is a number of points above 0" in capsys.readouterr().err


def test_a_report_of_some_of_the_runs_says_which(sweep, tmp_path, capsys):
    assert report.main([str(sweep), "--where", "norm == 'gn'", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("From batch size 32 to 2, GN's test error")
    assert set(pd.read_csv(tmp_path / "runs.csv")["norm"]) == {"gn"}
    assert "the runs with norm == &#39;gn&#39;" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--where", "norm == 'xn'"], "--where \"norm == 'xn'\" fits none of the runs"),
        (["--where", "norm ="], "--where 'norm =' is no condition on these runs"),
        (["--where", "norm == 'gn'", "--check"], "--check looks at all runs of its directories: it takes no --where"),
    ],
)
def test_a_choice_that_makes_no_sense_is_a_sentence(sweep, tmp_path, options, words, capsys):
    assert report.main([str(sweep), *options, "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_report_of_some_of_the_runs_does_not_take_the_place_of_the_whole_one(tmp_path, capsys):
    write_run(tmp_path, "gn")
    assert report.main([str(tmp_path), "--where", "norm == 'gn'"]) == 2
    assert "--out is needed with --where" in capsys.readouterr().err


def test_what_cannot_be_read_is_named_whatever_is_chosen(tmp_path):
    write_run(tmp_path, "gn")
    write_run(tmp_path, "bn").write_text("broken")
    assert report.main([str(tmp_path), "--where", "norm == 'gn'", "--out", str(tmp_path)]) == 0
    assert "is unreadable" in (tmp_path / "report.html").read_text()


def test_two_directories_need_a_place_to_write(tmp_path, capsys):
    write_run(tmp_path / "one", "bn")
    write_run(tmp_path / "two", "gn")
    both = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert report.main(both) == 2
    assert "--out" in capsys.readouterr().err
    assert report.main([*both, "--out", str(tmp_path / "out")]) == 0
    assert len(pd.read_csv(tmp_path / "out" / "runs.csv")) == 2


@pytest.mark.parametrize("place", ["absent", "empty", "file"])
def test_a_bad_directory_is_a_sentence_and_exit_code_2(tmp_path, place, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert report.main([str(tmp_path / place)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gnbench-report: ")
    assert place in err
    assert err.count("\n") == 1


def test_a_place_that_cannot_be_written_is_a_sentence(sweep, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert report.main([str(sweep), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_help_and_import_need_neither_torch_nor_pandas():
    code = (
        "import sys, gnbench.analysis.report as report\n"
        "try: report.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print(sorted({'torch', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def write_cells(directory, norm, errors, **options):
    """{batch size: errors of its seeds}"""
    for batch_size, values in errors.items():
        for seed, error in enumerate(values):
            write_run(directory, norm, batch_size, seed, test_error=error, **options)


def test_headline_of_a_rise_and_a_fall(tmp_path):
    write_cells(tmp_path, "bn", {32: (57.1, 57.2, 57.3), 8: (60.0,) * 3, 2: (71.3, 71.4, 71.5)})
    write_cells(tmp_path, "gn", {32: (58.3, 58.4, 58.5), 8: (58.0,) * 3, 2: (57.4, 57.5, 57.6)})
    assert page.headline(table.load(tmp_path)) == (
        "From batch size 32 to 2, BN's test error rises by 14.2 points [14.0, 14.4] (57.2 to 71.4 %); "
        "GN's falls by 0.9 points [0.7, 1.1] (58.4 to 57.5 %); n = 3 seeds a cell, 95 % intervals in brackets."
    )


def test_headline_gives_the_interval_of_the_change_in_its_direction(tmp_path):
    """4.303 · 0.283 / sqrt(2) · sqrt(2) / sqrt(2) = 0.86 to both sides, with 2 degrees of freedom."""
    write_cells(tmp_path, "gn", {32: (24.0, 24.4), 2: (24.1, 24.5)})
    write_cells(tmp_path, "ln", {32: (24.1, 24.5), 2: (24.0, 24.4)})
    write_cells(tmp_path, "in", {32: (24.0, 24.4), 2: (24.0, 24.4)})
    assert page.headline(table.load(tmp_path)) == (
        "From batch size 32 to 2, GN's test error rises by 0.1 points [-1.1, 1.3] (24.2 to 24.3 %); "
        "LN's falls by 0.1 points [-1.1, 1.3] (24.3 to 24.2 %); "
        "IN's changes by less than 0.1 points [-1.2, 1.2] (24.2 to 24.2 %); "
        "n = 2 seeds a cell, 95 % intervals in brackets."
    )


def test_headline_has_as_many_decimals_everywhere_as_one_of_its_differences_needs(tmp_path):
    """At one decimal IN's 28.26 would be 28.3 and its 28.34 too, though the difference is 0.08, shown as 0.1."""
    write_cells(tmp_path, "bn", {32: (23.6,), 2: (34.7,)})
    write_cells(tmp_path, "in", {32: (28.26,), 2: (28.34,)})
    assert page.headline(table.load(tmp_path)) == (
        "From batch size 32 to 2, BN's test error rises by 11.10 points (23.60 to 34.70 %); "
        "IN's rises by 0.08 points (28.26 to 28.34 %); n = 1 seed a cell, too few for an interval."
    )


def test_headline_of_one_seed(tmp_path):
    write_cells(tmp_path, "bn", {32: (23.6,), 2: (34.7,)})
    write_cells(tmp_path, "gn", {32: (24.1,), 2: (24.12,)})
    assert page.headline(table.load(tmp_path)) == (
        "From batch size 32 to 2, BN's test error rises by 11.1 points (23.6 to 34.7 %); "
        "GN's changes by less than 0.1 points (24.1 to 24.1 %); n = 1 seed a cell, too few for an interval."
    )


def test_headline_with_cells_that_have_no_result(tmp_path):
    write_cells(tmp_path, "bn", {32: (23.6,), 2: (34.7,)})
    write_run(tmp_path, "gn", 32, test_error=24)
    write_run(tmp_path, "ln", 32, test_error=25)
    write_run(tmp_path, "ln", 2, status="running")
    write_run(tmp_path, "in", 32, test_error=28)
    write_run(tmp_path, "in", 2, 0, status="diverged")
    write_run(tmp_path, "in", 2, 1, test_error=28)
    assert page.headline(table.load(tmp_path)) == (
        "From batch size 32 to 2, BN's test error rises by 11.1 points (23.6 to 34.7 %); "
        "GN has no run at batch size 2; LN has no finished run at batch size 2; "
        "IN cannot be told, having 1 diverged run at batch size 2; n = 1 seed a cell, too few for an interval."
    )


def test_headline_of_one_batch_size(tmp_path):
    write_cells(tmp_path, "bn", {32: (23.6, 23.8)})
    write_cells(tmp_path, "gn", {32: (24.1,)})
    assert page.headline(table.load(tmp_path)) == (
        "Mean test error at batch size 32, lowest first: BN 23.7 %; GN 24.1 %; n = 1 to 2 seeds a cell."
    )


def test_headline_of_a_norm_batch_sweep(tmp_path):
    for norm_batch_size, error in ((32, 10.0), (2, 14.0)):
        for seed in (0, 1):
            write_run(tmp_path, "bn", 32, seed, norm_batch_size=norm_batch_size, test_error=error + seed / 10)
    write_run(tmp_path, "gn", 32, 0, test_error=11.0)
    write_run(tmp_path, "gn", 32, 1, test_error=11.2)
    assert page.headline(table.load(tmp_path)) == (
        "From normalization batch size 32 to 2, BN's test error rises by 4.0 points [3.7, 4.3] (10.1 to 14.1 %); "
        "GN's does not depend on it (11.1 %); n = 2 seeds a cell, 95 % intervals in brackets."
    )


def test_headline_of_the_papers_workers(tmp_path):
    for images, error in ((32, 10.0), (2, 14.0)):
        write_run(tmp_path, "bn", 8 * images, norm_batch_size=images, test_error=error)
        write_run(tmp_path, "gn", 8 * images, test_error=11.0)
    assert page.headline(table.load(tmp_path)) == (
        "From normalization batch size 32 to 2, BN's test error rises by 4.0 points (10.0 to 14.0 %); "
        "GN's changes by less than 0.1 points (11.0 to 11.0 %); n = 1 seed a cell, too few for an interval."
    )


def test_headline_without_any_result(tmp_path):
    write_run(tmp_path, seed=0, status="failed")
    write_run(tmp_path, seed=1, status="running")
    write_run(tmp_path, seed=2).write_text("broken")
    sentence = page.headline(table.load(tmp_path))
    assert sentence == "No run has finished (1 failed, 1 running, 1 unreadable)."


def test_headline_keeps_configurations_apart(tmp_path):
    write_cells(tmp_path, "bn", {32: (20.0,), 2: (30.0,)}, epochs=30)
    write_cells(tmp_path, "bn", {32: (50.0,), 2: (55.0,)}, epochs=3)
    sentence = page.headline(table.load(tmp_path))
    assert "BN [epochs=30]'s rises by 10.0 points" in sentence
    assert "BN [epochs=3]'s test error rises by 5.0 points" in sentence


def test_headline_of_no_norm_is_no_denial(tmp_path):
    for norm, errors in (("bn", (20.0, 25.0)), ("none", (30.0, 29.0))):
        for size, error in zip((32, 2), errors, strict=True):
            write_run(tmp_path, norm, size, test_error=error)
    assert "; the test error without a norm falls by 1.0 points" in page.headline(table.load(tmp_path))


def test_headline_stays_short(tmp_path):
    for num_groups in (1, 2, 4, 8, 16):
        keys = {"norm_keys": {"num_groups": num_groups}}
        write_cells(tmp_path, "gn", {32: (24.0,), 2: (24.5,)}, **keys)
    assert "; 1 more in the table; n = 1" in page.headline(table.load(tmp_path))


ERRORS = st.none() | st.floats(0, 100)  # None: the run has not finished
CELLS = st.tuples(st.sampled_from(["bn", "gn", "in"]), st.sampled_from([32, 8, 2]), st.sampled_from([1, 2]))
UNFINISHED = ("failed", "diverged", "interrupted", "running")


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.tuples(CELLS, st.integers(0, 3)), ERRORS, min_size=1, max_size=12), st.data())
def test_a_report_of_any_part_of_a_grid_counts_and_averages_what_is_there(tmp_path_factory, runs, data):
    directory = tmp_path_factory.mktemp("part")
    written: dict[tuple, dict[int, float | None]] = {}
    for ((norm, batch_size, num_norm_batches), seed), error in runs.items():
        options = {"norm_batch_size": batch_size // num_norm_batches} if norm == "bn" else {}
        status = "done" if error is not None else data.draw(st.sampled_from(UNFINISHED))
        shown = 50.0 if error is None else error
        write_run(directory, norm, batch_size, seed, test_error=shown, train_error=40.0, status=status, **options)
        written.setdefault((norm, batch_size, options.get("norm_batch_size", 0)), {})[seed] = error
    frame = table.load(directory)
    summary = statistics.summarize(frame)
    assert len(frame) == sum(map(len, written.values()))
    assert len(summary) == len(written)
    cells = summary.set_index(["norm", "batch_size", summary["norm_batch_size"].fillna(0)])
    for cell, seeds in written.items():
        errors = [error for error in seeds.values() if error is not None]
        assert cells.loc[cell, "n"] == len(errors)
        assert cells.loc[cell, "mean"] == pytest.approx(sum(errors) / len(errors) if errors else math.nan, nan_ok=True)
    drawn = page.draw_figures(frame, table.curves(directory))
    assert {"error_vs_batch_size", "error_vs_norm_batch_size"} & set(drawn)
    assert page.headline(frame)
