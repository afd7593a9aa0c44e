"""Figures are tested by what they draw: positions, values, labels and notes; and by giving the same bytes twice."""

import colorsys
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.markers import CARETDOWN, CARETUP
from synthetic import PAPER, make_history, write_run, write_sweep

import gnbench
from gnbench.analysis import figures, statistics, table


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("batch_size"), norms=("bn", "gn", "ln", "in"))


@pytest.fixture(scope="module")
def frame(sweep):
    return table.load(sweep)


def lines_with_bars(ax):
    return {container.lines[0].get_color(): container for container in ax.containers}


def find_dots(ax):
    """The lines of seeds."""
    return [line for line in ax.lines if line.get_markersize() == 3]


def find_marks(ax, marker):
    """{(x, rounded in octaves, y)} of the points that have this marker and no line."""
    marks = [line for line in ax.lines if line.get_marker() == marker and line.get_linestyle() == "None"]
    return {(round(float(np.log2(x))), y) for line in marks for x, y in zip(*line.get_data(), strict=True)}


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def note(ax):
    """The small print, its line breaks undone."""
    texts = [text.get_text() for text in ax.texts]
    supxlabel = ax.figure.get_supxlabel() if ax.figure else ""
    return " ".join([*texts, supxlabel]).replace("\n", " ")


def test_what_a_figure_shows_can_be_read_as_one_paragraph(tmp_path):
    for zero in (True, False):
        model = {"name": "resnet20", "a_long_name_of_a_part": {"zero_init_residual": zero}}
        write_run(tmp_path, "bn", 32, norm_batch_size=32, model=model)
        write_run(tmp_path, "gn", 32, model=model)
    ax = figures.error_vs_batch_size(table.load(tmp_path))
    told = figures.describe_figure(ax.figure)
    assert "\n" not in told
    lines = told.partition("Lines: ")[2].partition(". n = 1")[0].split("; ")
    assert lines == [f"{norm} [model.a_long_name_of_a_part.zero_init_residual={zero}]" for norm in ("BN", "GN")
                     for zero in ("false", "true")]  # fmt: skip
    assert "\n" in legend(ax)[0], "which the legend breaks"
    assert told.endswith(note(ax).strip())


def test_the_package_offers_figures():
    assert gnbench.figures is figures


def test_error_vs_batch_size_draws_every_mean_interval_and_seed(frame):
    ax = figures.error_vs_batch_size(frame)
    summary = statistics.summarize(frame)
    bars = lines_with_bars(ax)
    assert len(bars) == 4
    for norm in PAPER:
        line, _, (collection,) = bars[figures.style_norm(norm).color].lines
        cells = summary[summary["norm"] == norm].sort_values("batch_size")
        assert line.get_ydata() == pytest.approx(cells["mean"].to_numpy())
        assert np.round(np.log2(line.get_xdata(orig=False))) == pytest.approx(
            np.log2(cells["batch_size"].astype(float))
        )
        ends = np.array([segment[:, 1] for segment in collection.get_segments()])
        assert ends == pytest.approx(cells[["low", "high"]].to_numpy())
    dots = [value for line in find_dots(ax) for value in line.get_ydata()]
    assert sorted(dots) == pytest.approx(sorted(frame["test_error"]))


def test_the_axis_is_the_papers(frame):
    ax = figures.error_vs_batch_size(frame)
    assert ax.get_xscale() == "log"
    assert ax.xaxis.get_transform().base == 2
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "4", "8", "16", "32"]
    assert ax.get_xlim()[0] > ax.get_xlim()[1]
    assert ax.get_ylabel() == "test error (%)"
    assert legend(ax) == ["BN", "GN", "LN", "IN"]


def test_the_axis_may_rise(frame):
    ax = figures.error_vs_batch_size(frame, decreasing=False)
    assert ax.get_xlim()[0] < ax.get_xlim()[1]


def test_it_draws_on_the_axes_that_it_is_given(frame):
    given = Figure().subplots()
    assert figures.error_vs_batch_size(frame, given) is given
    assert len(given.containers) == 4


def test_it_leaves_the_notebooks_style_and_the_frame_alone(frame):
    before, copy = dict(mpl.rcParams), frame.copy()
    figures.error_vs_batch_size(frame)
    assert dict(mpl.rcParams) == before
    assert frame.equals(copy)


def test_the_note_states_n_and_what_was_run(frame):
    text = note(figures.error_vs_batch_size(frame))
    assert "n = 3 seeds a cell" in text
    assert "95 % t-interval" in text
    assert "resnet20, cifar10, all training images, 30 epochs" in text
    assert "A run's test error: the median over its last 5 epochs" in text


def test_one_seed_has_no_interval_and_the_note_says_so(tmp_path):
    write_sweep(tmp_path, seeds=(0,))
    ax = figures.error_vs_batch_size(table.load(tmp_path))
    assert "n = 1 seed a cell: no interval" in note(ax)
    for container in ax.containers:
        for segment in container.lines[2][0].get_segments():
            assert segment[0, 1] == segment[1, 1]


def test_cells_that_are_missing_failed_or_diverged_are_named_on_the_figure(tmp_path):
    write_sweep(tmp_path, norms=("bn", "gn"), batch_sizes=(32, 2), seeds=(0, 1))
    write_run(tmp_path, "bn", 4, 0, status="diverged")
    write_run(tmp_path, "bn", 4, 1, status="diverged")
    ax = figures.error_vs_batch_size(table.load(tmp_path))
    assert "BN at batch size 4: 2 of 2 runs diverged (seeds 0, 1)." in note(ax)
    assert "GN at batch size 4: no run." in note(ax)
    crosses = [line for line in ax.lines if line.get_marker() == "x" and line.get_linestyle() == "None"]
    assert len(crosses) == 1
    assert np.round(np.log2(crosses[0].get_xdata())) == [2]
    assert crosses[0].get_color() == figures.style_norm("bn").color
    assert len(lines_with_bars(ax)[figures.style_norm("bn").color].lines[0].get_xdata()) == 2


@pytest.mark.parametrize("status", ["failed", "running", "diverged"])
def test_a_frame_without_any_result_still_draws(tmp_path, status):
    write_run(tmp_path, status=status, num_epochs=0)
    ax = figures.error_vs_batch_size(table.load(tmp_path))
    assert "No finished run" in note(ax)
    figures.curves(table.curves(tmp_path))
    figures.curves_by_batch_size(table.curves(tmp_path))


def test_a_frame_of_unreadable_records_still_draws(tmp_path):
    write_run(tmp_path).write_text("broken")
    assert "is unreadable" in note(figures.error_vs_batch_size(table.load(tmp_path)))


def test_norms_without_norm_batches_are_level_over_the_norm_batch_axis(tmp_path):
    for seed in range(3):
        for norm_batch_size in (32, 8, 2):
            write_run(tmp_path, "bn", 32, seed, norm_batch_size=norm_batch_size)
        write_run(tmp_path, "gn", 32, seed, test_error=24 + seed / 10)
    ax = figures.error_vs_batch_size(table.load(tmp_path), x="norm_batch_size")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "8", "32"]
    level = [line for line in ax.lines if len(line.get_xdata()) == 2 and set(np.round(line.get_ydata(), 9)) == {24.1}]
    assert len(level) == 1
    assert min(level[0].get_xdata()) < 2
    assert max(level[0].get_xdata()) > 32
    assert "batch size 32" in note(ax)
    gn = figures.style_norm("gn").color
    dots = [line.get_ydata() for line in find_dots(ax) if line.get_color() == gn]
    assert sorted(dots[0]) == [24.0, 24.1, 24.2]


def test_workers_of_several_images_stand_at_their_images(tmp_path):
    for images in (32, 2):
        for norm in ("bn", "gn"):
            write_run(tmp_path, norm, 8 * images, norm_batch_size=images, test_error=20)
    ax = figures.error_vs_batch_size(table.load(tmp_path), x="norm_batch_size")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "32"]
    for container in ax.containers:
        assert list(np.round(np.log2(container.lines[0].get_xdata(orig=False)))) == [1, 5]
    assert "batch_size = 8 · norm_batch_size" in note(ax)


@pytest.mark.parametrize(("seeds", "words"), [((0, 1), "95 % t-interval as a band and its seeds"), ((0,), "seeds")])
def test_the_note_says_what_a_level_line_and_its_band_are(tmp_path, seeds, words):
    for seed in seeds:
        for norm_batch_size in (32, 2):
            write_run(tmp_path, "bn", 32, seed, norm_batch_size=norm_batch_size, test_error=20 + seed)
        write_run(tmp_path, "gn", 32, seed, test_error=30 + seed)
    frame = table.load(tmp_path)
    for ax in (
        figures.error_vs_batch_size(frame, x="norm_batch_size"),
        *figures.error_by_norm(frame, x="norm_batch_size"),
    ):
        assert f"Level, with its {words} at the end: a norm that looks at one image at a time" in note(ax)
    assert "Level" not in note(figures.error_vs_batch_size(frame[frame["norm"] == "bn"], x="norm_batch_size"))


def test_the_axis_ends_where_errors_do(tmp_path):
    write_run(tmp_path, "bn", 32, 0, test_error=20)
    write_run(tmp_path, "bn", 32, 1, test_error=90)
    assert figures.error_vs_batch_size(table.load(tmp_path)).get_ylim() == (0, 100)


def test_one_wide_interval_leaves_the_other_lines_room(tmp_path):
    for batch_size, errors in ((32, (4, 4.1, 4.2)), (2, (6, 6.2, 6.1))):
        for seed, error in enumerate(errors):
            write_run(tmp_path, "bn", batch_size, seed, test_error=error)
    ax = figures.error_vs_batch_size(table.load(tmp_path))
    assert CARETUP not in [line.get_marker() for line in ax.lines], "an interval of three seeds that agree is shown"
    for seed, error in enumerate((5, 25)):
        write_run(tmp_path, "mine", 32, seed, test_error=error)
    ax = figures.error_vs_batch_size(table.load(tmp_path))
    bottom, top = ax.get_ylim()
    assert bottom == 0
    assert 25 < top < 40
    assert {y for _, y in find_marks(ax, CARETUP)} == {top}
    assert figures.CUT_NOTE in note(ax)


def test_an_interval_that_the_axis_cuts_ends_in_an_arrowhead_that_the_note_explains(tmp_path):
    for batch_size, errors in ((32, (20, 60)), (8, (90, 93)), (2, (50, 50.1))):
        for seed, error in enumerate(errors):
            write_run(tmp_path, "bn", batch_size, seed, test_error=error)
    frame = table.load(tmp_path)
    for ax in (figures.error_vs_batch_size(frame), figures.error_by_norm(frame)[0]):
        assert find_marks(ax, CARETDOWN) == {(5, 0)}
        assert find_marks(ax, CARETUP) == {(5, 100), (3, 100)}
        assert figures.CUT_NOTE in note(ax)
    assert figures.CUT_NOTE not in note(figures.error_vs_batch_size(frame[frame["batch_size"] == 2]))


def test_a_level_bands_cut_end_is_marked_too(tmp_path):
    for seed, error in enumerate((2, 10)):
        for norm_batch_size in (32, 2):
            write_run(tmp_path, "bn", 32, seed, norm_batch_size=norm_batch_size, test_error=50)
        write_run(tmp_path, "gn", 32, seed, test_error=error)
    ax = figures.error_vs_batch_size(table.load(tmp_path), x="norm_batch_size")
    (mark,) = [line for line in ax.lines if line.get_marker() == CARETDOWN]
    assert list(mark.get_ydata()) == [0]


@pytest.mark.parametrize("name", ["gn", "a_long_name_of_a_norm_of_ones_own_with_all_its_parameters"])
def test_legends_lie_beside_the_axes_and_inside_the_figure(tmp_path, name):
    for norm in ("bn", name):
        for batch_size, errors in ((32, (20, 22)), (2, (30, 32))):
            for seed, error in enumerate(errors):
                write_run(tmp_path, norm, batch_size, seed, test_error=error)
    frame, rows = table.load(tmp_path), table.curves(tmp_path)
    drawn = [figures.error_vs_batch_size(frame), figures.curves(rows)[-1], figures.curves_by_batch_size(rows)[-1]]
    for ax in drawn:
        ax.figure.draw_without_rendering()
        box = ax.get_legend().get_window_extent()
        assert box.x0 >= ax.get_window_extent().x1
        assert box.x1 <= ax.figure.bbox.x1
        assert ax.get_window_extent().width > 1.8 * ax.figure.dpi


def test_the_seeds_of_a_cell_stand_beside_one_another_above_all_lines(tmp_path):
    for norm in ("bn", "gn"):
        for seed, error in enumerate((48.21, 49.4, 48.18)):
            write_run(tmp_path, norm, 32, seed, test_error=error)
            write_run(tmp_path, norm, 2, seed, test_error=error)
    ax = figures.error_vs_batch_size(table.load(tmp_path))
    ax.figure.draw_without_rendering()
    for dots in find_dots(ax):
        x = np.sort(ax.transData.transform(dots.get_xydata())[:, 0]) * 72 / ax.figure.dpi  # points
        assert np.diff(x).min() > 2  # a dot without its edge
        assert dots.get_zorder() > max(line.get_zorder() for line in ax.lines if line not in find_dots(ax))
    assert "small dots beside a mean: its seeds" in note(ax)


def test_what_another_axis_holds_is_left_out_and_counted(tmp_path):
    write_sweep(tmp_path, norms=("bn",), seeds=(0,))
    write_run(tmp_path, "bn", 32, 0, norm_batch_size=2)
    ax = figures.error_vs_batch_size(table.load(tmp_path))
    assert len(ax.containers[0].lines[0].get_xdata()) == 5
    assert "runs of other sizes are in the table: 1" in note(ax)


def test_every_norm_of_the_paper_has_its_own_style():
    styles = [figures.style_norm(norm) for norm in ("bn", "gn", "ln", "in", "none")]
    for part in ("color", "marker", "linestyle"):
        assert len({getattr(style, part) for style in styles}) == 5


def test_no_norm_is_drawn_in_the_grey_of_what_lies_behind():
    colors = [*(style.color for style in figures.NORM_STYLES.values()), *figures.SPARE_COLORS]
    for color in set(colors) - {"#000000"}:
        assert max(to_rgb(color)) - min(to_rgb(color)) > 0.1


def test_a_panel_a_norm_says_which_grey_line_is_which(tmp_path):
    for norm in ("bn", "gn", "frn"):
        for batch_size in (32, 2):
            write_run(tmp_path, norm, batch_size, test_error=20)
    axes = figures.error_by_norm(table.load(tmp_path))
    assert "In grey: BN (dashed) and GN (solid)." in note(axes[0])


def test_a_norms_style_does_not_depend_on_its_company(tmp_path):
    write_run(tmp_path / "one", "gn")
    for norm in ("bn", "gn", "frn"):
        write_run(tmp_path / "two", norm, test_error=20)
    styles = [figures.style_lines(table.load(tmp_path / name))["GN"] for name in ("one", "two")]
    assert styles[0] == styles[1]


def test_variants_of_a_norm_are_told_apart_without_colour(tmp_path):
    for num_groups in (1, 2, 4, 8):
        write_run(tmp_path, "gn", 32, norm_keys={"num_groups": num_groups})
    styles = figures.style_lines(table.load(tmp_path)).values()
    assert len({(style["linestyle"], style["fillstyle"]) for style in styles}) == 4
    assert len({style["color"] for style in styles}) == 4


def test_variants_of_any_norm_are_seen_on_white_and_lie_apart(tmp_path):
    for blocks in range(8):
        for norm in ("my_norm", "bcn"):
            write_run(tmp_path, norm, 32, norm_keys={"blocks": blocks}, test_error=20)
    styles = figures.style_lines(table.load(tmp_path))
    for name in ("my_norm", "BCN"):
        own = [style for label, style in styles.items() if label.startswith(name)]
        lightness = [colorsys.rgb_to_hls(*to_rgb(style["color"]))[1] for style in own[1:]]
        assert figures.DARKEST <= min(lightness) <= max(lightness) <= figures.LIGHTEST
        looks = [(round(light, 1), style["fillstyle"]) for light, style in zip(lightness, own[1:], strict=True)]
        assert len(set(looks)) == 7


def test_a_dollar_sign_in_a_name_is_no_formula(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "$\\nonsense{$", seed=seed, test_error=20 + seed)
    ax = figures.error_vs_batch_size(table.load(tmp_path))
    figures.save(ax.figure, tmp_path / "figure.svg")
    assert legend(ax) == ["$\\nonsense{$"]


def test_others_numbers_lie_behind_hollow_and_with_their_source(frame):
    reference = table.choose_reference(frame, "batch_size")
    ax = figures.error_vs_batch_size(frame, reference=reference)
    hollow = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
    assert len(hollow) == 6  # two norms of the paper and of its two replications on CIFAR-10
    assert [23.6, 23.7, 24.8, 27.3, 34.7] in [list(line.get_ydata()[::-1]) for line in hollow]
    assert all(line.get_zorder() < 2 for line in hollow)
    assert legend(ax)[4:] == [
        "Wu & He 2018 (resnet50, imagenet)",
        "BeFranke/GroupNorm (resnet20, cifar10)",
        "HickmannLautaro/GroupNorm (resnet20, cifar10)",
    ]
    assert "published by others" in note(ax)


def test_others_numbers_are_seen_beside_much_lower_ones(tmp_path):
    for seed, error in enumerate((2.0, 9.0)):
        write_run(tmp_path, "bn", 32, seed, test_error=error)
        write_run(tmp_path, "bn", 2, seed, test_error=error)
    frame = table.load(tmp_path)
    ax = figures.error_vs_batch_size(frame, reference=table.choose_reference(frame, "batch_size"))
    low, high = ax.get_ylim()
    assert (low, high > 34.7) == (0, True)


def test_curves_are_training_error_left_and_test_error_right(sweep):
    axes = figures.curves(table.curves(sweep))
    assert [ax.get_ylabel() for ax in axes] == ["training error (%)", "test error (%)"]
    assert legend(axes[1]) == ["BN", "GN", "LN", "IN"]
    rows = table.curves(sweep)
    rows = rows[(rows["norm"] == "gn") & (rows["batch_size"] == 32)]
    color = figures.style_norm("gn").color
    for ax, column in zip(axes, ("train_error", "test_error"), strict=True):
        lines = [line for line in ax.lines if line.get_color() == color]
        assert len(lines) == 4  # three seeds and their mean
        assert lines[-1].get_ydata() == pytest.approx(rows.groupby("epoch")[column].mean().to_numpy())
    assert "batch size 32" in note(axes[0])


def test_a_mean_curve_is_over_finished_runs_only(tmp_path):
    for seed, status in enumerate(("done", "done", "diverged")):
        write_run(tmp_path, "bn", 32, seed, test_error=20 + 10 * seed, status=status)
    ax = figures.curves(table.curves(tmp_path))[1]
    assert len(ax.lines) == 4
    assert ax.lines[-1].get_ydata()[-1] == pytest.approx(25)
    assert "1 of 3 runs diverged" in note(ax)


def test_curves_by_batch_size_have_a_panel_a_norm_and_a_line_a_size(sweep):
    axes = figures.curves_by_batch_size(table.curves(sweep))
    assert [ax.get_title() for ax in axes] == ["BN", "GN", "LN", "IN"]
    assert legend(axes[-1]) == ["32", "16", "8", "4", "2"]
    bold = [line for line in axes[0].lines if line.get_linewidth() > 1]
    assert [line.get_ydata()[-1] for line in bold] == sorted(line.get_ydata()[-1] for line in bold)
    assert len(bold) == 5


def test_epochs_are_whole_and_no_marker_is_cut(tmp_path):
    for batch_size in (32, 2):
        write_run(tmp_path, "bn", batch_size, num_epochs=9)
    rows = table.curves(tmp_path)
    for ax in (*figures.curves(rows), *figures.curves_by_batch_size(rows)):
        ax.figure.draw_without_rendering()
        assert all(tick == round(tick) for tick in ax.get_xticks())
        frame = ax.get_window_extent()
        for line in (line for line in ax.lines if line.get_linewidth() > 1):
            marked = ax.transData.transform(line.get_xydata()[line.get_markevery()])
            radius = line.get_markersize() / 2 * ax.figure.dpi / 72
            assert len(marked) > 3
            assert (marked > (frame.x0 + radius, frame.y0 + radius)).all()
            assert (marked < (frame.x1 - radius, frame.y1 - radius)).all()


def test_one_epoch_has_one_tick(tmp_path):
    write_run(tmp_path, "bn", 32, num_epochs=1)
    ax = figures.curves(table.curves(tmp_path))[0]
    low, high = ax.get_xlim()
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [1]


def test_a_start_that_takes_little_room_is_shown_and_a_high_one_is_not(tmp_path):
    for name, first in (("low", 60.0), ("high", 99.0)):
        history = make_history(20, 15, 32, 20)
        for entry in history:
            entry["test_error"] = first if entry["epoch"] <= 2 else 56.0 - entry["epoch"]
        write_run(tmp_path / name, "bn", 32, record_keys={"history": history})
        shown = figures.curves(table.curves(tmp_path / name))[1].get_ylim()[1]
        assert (shown > first) == (name == "low")


def test_error_vs_groups_has_both_axes_and_the_extremes(tmp_path):
    for num_groups in (8, 4, 2):
        write_run(tmp_path, "gn", 32, norm_keys={"num_groups": num_groups}, test_error=20 + num_groups)
    for channels in (16, 4):
        keys = {"num_groups": None, "channels_per_group": channels}
        write_run(tmp_path, "gn", 32, norm_keys=keys, test_error=20 + channels)
    write_run(tmp_path, "ln", 32)
    write_run(tmp_path, "in", 32)
    frame = table.load(tmp_path)
    left, right = figures.error_vs_groups(frame)
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "2", "4", "8"]
    assert [label.get_text() for label in right.get_xticklabels()] == ["1", "4", "16"]
    assert (left.get_xlabel(), right.get_xlabel()) == ("number of groups", "channels per group")
    assert list(left.containers[0].lines[0].get_ydata()) == [22, 24, 28]
    assert list(right.containers[0].lines[0].get_ydata()) == [24, 36]
    assert (left.get_legend(), legend(right)) == (None, ["GN", "LN", "IN"])
    for ax in (left, right):
        assert ax.get_ylim()[0] < frame["test_error"].min()
        assert ax.get_ylim()[1] > frame["test_error"].max()
    assert table.find_groups(frame) == 32


def test_error_vs_groups_has_a_line_a_setting(tmp_path):
    for epochs in (10, 30):
        for num_groups in (2, 8):
            keys = {"num_groups": num_groups}
            write_run(tmp_path, "gn", 32, norm_keys=keys, epochs=epochs, test_error=epochs + num_groups)
    (ax,) = figures.error_vs_groups(table.load(tmp_path))
    assert {tuple(sorted(container.lines[0].get_ydata())) for container in ax.containers} == {(12, 18), (32, 38)}
    assert sorted(legend(ax)) == ["GN [epochs=10]", "GN [epochs=30]"]


def test_no_groups_are_found_where_they_do_not_vary(frame):
    assert table.find_groups(frame) is None


def test_the_same_records_give_the_same_bytes_in_another_process(sweep, frame, tmp_path):
    code = (
        "import sys; from gnbench.analysis import figures, table; "
        "ax = figures.error_vs_batch_size(table.load(sys.argv[1])); figures.save(ax.figure, *sys.argv[2:])"
    )
    here, there = ([tmp_path / f"{place}.{suffix}" for suffix in ("svg", "png")] for place in ("here", "there"))
    figures.save(figures.error_vs_batch_size(frame).figure, *here)
    subprocess.run([sys.executable, "-c", code, sweep, *there], check=True)
    for one, other in zip(here, there, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert len(one.read_bytes()) > 10_000


def test_figures_need_no_pyplot_and_a_strange_norm_looks_the_same_in_another_process():
    code = "import sys; from gnbench.analysis import figures; "
    code += "print(figures.style_norm('frn'), 'matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{figures.style_norm('frn')} False"
