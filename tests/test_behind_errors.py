"""Figures of what lies behind an error, tested by their data."""

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.markers import CARETDOWN
from synthetic import write_run

from gnbench.analysis import behind_errors, figures, table
from gnbench.analysis.page import write_report

ERRORS = {  # NBS: (training error, mini-batch, population, running averages), percent
    32: (10.0, 24.0, 23.0, 23.5),
    8: (13.0, 25.0, 24.5, 25.5),
    2: (17.0, 26.0, 32.0, 35.5),
}


def write_statistics(directory, seeds=(0, 1)):
    for size, (train, batch, precise, ema) in ERRORS.items():
        for seed in seeds:
            by_statistics = {"ema": ema + seed, "precise": precise + seed, "batch": batch + seed}
            write_run(
                directory, "bn", 128, seed, norm_batch_size=size, test_error=ema, train_error=train + seed,
                result={"test_error_by_statistics": by_statistics}, frozen_epochs=0,
            )  # fmt: skip
    write_run(
        directory, "bn", 128, 0, norm_batch_size=2, test_error=27.0, train_error=20.0, frozen_epochs=5,
        result={"test_error_by_statistics": {"ema": 27.0, "precise": 27.0, "batch": 28.0}},
    )  # fmt: skip
    write_run(directory, "gn", 128, 0, test_error=24.0)
    return table.load(directory)


def lines(ax) -> list[tuple[list, list]]:
    """(x, y) of the means that an axis draws with error bars; x as the place that a line stands beside."""
    places = [2 ** np.round(np.log2(c.lines[0].get_xdata(orig=False))) for c in ax.containers]
    return [(list(x), list(c.lines[0].get_ydata())) for x, c in zip(places, ax.containers, strict=True)]


def test_each_choice_of_statistics_has_its_line_and_the_parts_sum_to_the_error(tmp_path):
    frame = write_statistics(tmp_path)
    assert behind_errors.has_statistics(frame)
    above, below = behind_errors.error_by_statistics(frame)
    sizes = [2.0, 8.0, 32.0]
    half = 0.5  # the mean of seeds 0 and 1
    ema, precise, batch, train, frozen = lines(above)
    for column, (found_x, found_y) in zip((3, 2, 1, 0), (ema, precise, batch, train), strict=True):
        assert found_x == sizes
        assert found_y == pytest.approx([ERRORS[size][column] + half for size in (2, 8, 32)])
    assert frozen == ([2.0], [27.0])
    parts = [y for _, y in lines(below)]
    assert parts[1] == pytest.approx([6.0, -0.5, -1.0])  # population - mini-batch
    assert [sum(values) for values in zip(train[1], *parts, strict=True)] == pytest.approx(ema[1])
    assert "n = 1 to 2 seeds a cell" in above.figure.get_supxlabel()


def test_each_norm_that_keeps_statistics_has_its_panels_and_no_other(tmp_path):
    write_statistics(tmp_path)
    for size, (train, batch, precise, ema) in ERRORS.items():
        by_statistics = {"ema": ema + 10, "precise": precise + 10, "batch": batch + 10}
        write_run(
            tmp_path, "my_norm", 128, 0, norm_batch_size=size, norm_keys={"norm_batch_size": size}, test_error=ema,
            train_error=train, result={"test_error_by_statistics": by_statistics},
        )  # fmt: skip
    axes = behind_errors.error_by_statistics(table.load(tmp_path))
    assert [ax.get_title() for ax in axes] == ["BN", "", "my_norm", ""]
    own, others = lines(axes[2]), lines(axes[0])
    assert own[0] == ([2.0, 8.0, 32.0], [45.5, 35.5, 33.5])
    assert len(others[-1][0]) == 1  # the frozen run is BN's
    assert len(own[-1][0]) == 0
    assert axes[0].get_ylim() == axes[2].get_ylim()
    assert axes[0].get_legend() is None
    assert len(axes[2].get_legend().get_texts()) == 5


def test_many_norms_with_statistics_stand_in_a_grid(tmp_path):
    for number in range(7):
        for size in (32, 2):
            by_statistics = {"ema": 20 + number, "precise": 20, "batch": 20}
            write_run(
                tmp_path, f"norm{number}", 32, norm_batch_size=size, norm_keys={"norm_batch_size": size},
                test_error=20, result={"test_error_by_statistics": by_statistics},
            )  # fmt: skip
    axes = behind_errors.error_by_statistics(table.load(tmp_path))
    axes[0].figure.draw_without_rendering()
    corners = [(round(ax.get_position().x0, 3), round(ax.get_position().y0, 3)) for ax in axes]
    assert len(set(corners)) == len(axes) == len(axes[0].figure.axes) == 14
    assert len({x for x, _ in corners}) == 5
    assert len({y for _, y in corners}) == 4


def test_a_norm_without_norm_batches_has_its_statistics_over_the_batch_size(tmp_path):
    for batch_size in (32, 2):
        by_statistics = {"ema": 20.0, "precise": 21.0, "batch": 22.0}
        write_run(
            tmp_path, "my_norm", batch_size, test_error=20, result={"test_error_by_statistics": by_statistics}
        )  # fmt: skip
    frame = table.load(tmp_path)
    assert behind_errors.has_statistics(frame)
    above, _ = behind_errors.error_by_statistics(frame, x="batch_size")
    assert lines(above)[0] == ([2.0, 32.0], [20.0, 20.0])


def test_statistics_of_one_place_stand_beside_one_another_between_0_and_100(tmp_path):
    for size in (32, 2):
        for seed in (0, 1):
            by_statistics = {"ema": 20.0 + seed, "precise": 20.0 + seed, "batch": 20.0 + seed}
            write_run(
                tmp_path, "bn", 32, seed, norm_batch_size=size, test_error=20, train_error=2.0 + 2 * seed,
                result={"test_error_by_statistics": by_statistics},
            )  # fmt: skip
    above, below = behind_errors.error_by_statistics(table.load(tmp_path))
    above.figure.draw_without_rendering()
    assert above.get_ylim()[0] == 0
    starts = np.sort([above.transData.transform((c.lines[0].get_xdata()[0], 1))[0] for c in above.containers])
    assert np.diff(starts).min() > 3 * above.figure.dpi / 72
    assert any(line.get_marker() == CARETDOWN for line in above.lines)
    assert figures.CUT_NOTE in above.figure.get_supxlabel().replace("\n", " ")
    for ax in (above, below):
        assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1


def test_runs_without_a_choice_have_no_such_figure(tmp_path):
    write_run(tmp_path, "gn", 32)
    write_run(tmp_path, "bn", 32)
    frame = table.load(tmp_path)
    assert not behind_errors.has_statistics(frame)
    assert not behind_errors.has_learning_rates(frame)


def test_responses_are_means_over_seeds_in_a_panel_a_norm(tmp_path):
    for norm, scale in (("bn", 1.0), ("gn", 2.0)):
        for seed in (0, 1):
            percentiles = [-scale, 0.0, scale + seed, 3 * scale + seed]
            write_run(tmp_path, norm, 32, seed, history_keys={"response_percentiles": percentiles}, num_epochs=3)
    axes = behind_errors.responses(table.curves(tmp_path))
    assert [ax.get_title() for ax in axes] == ["BN", "GN"]
    for ax, scale in zip(axes, (1.0, 2.0), strict=True):
        drawn = [list(line.get_ydata()) for line in ax.lines]
        assert all(tick == round(tick) for tick in ax.get_xticks())
        assert drawn == [[value] * 3 for value in (-scale, 0.0, scale + 0.5, 3 * scale + 0.5)]


def test_learning_rates_ring_the_least_held_out_error_and_cross_what_diverged(tmp_path):
    for base_lr, val_error in ((0.05, 30.0), (0.1, 20.0), (0.2, 25.0)):
        write_run(tmp_path, "bn", 32, base_lr=base_lr, result={"val_error": val_error})
    write_run(tmp_path, "bn", 32, base_lr=0.4, status="diverged", cause="not finite")
    frame = table.load(tmp_path)
    assert behind_errors.has_learning_rates(frame)
    (ax,) = behind_errors.error_vs_learning_rate(frame)
    mean, ring, cross = ax.lines
    assert list(mean.get_xdata()) == [0.05, 0.1, 0.2]
    assert list(mean.get_ydata()) == [30.0, 20.0, 25.0]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([0.1], [20.0])
    assert list(cross.get_xdata()) == [0.4]


def test_learning_rates_of_different_experiments_are_different_lines(tmp_path):
    for base_lr in (0.1, 0.2):
        for size in (32, 2):
            result = {"val_error": 100 * base_lr + size}
            write_run(tmp_path, "bn", 32, norm_batch_size=size, base_lr=base_lr, result=result)
        for num_groups in (8, 2):
            result, own = {"val_error": 100 * base_lr + num_groups}, {"num_groups": num_groups}
            write_run(tmp_path, "gn", 32, base_lr=base_lr, norm_keys=own, result=result)
    (ax,) = behind_errors.error_vs_learning_rate(table.load(tmp_path))
    drawn = dict(zip((text.get_text() for text in ax.get_legend().get_texts()), ax.lines[::3], strict=True))
    assert {name: list(line.get_ydata()) for name, line in drawn.items()} == {
        "BN, NBS 32": [42, 52], "BN, NBS 2": [12, 22], "GN (G=8)": [18, 28], "GN (G=2)": [12, 22]
    }  # fmt: skip


def test_responses_at_several_batch_sizes_are_not_averaged_nor_those_that_diverged(tmp_path):
    for size, scale, status in ((32, 1.0, "done"), (2, 20.0, "done"), (2, 500.0, "diverged")):
        keys = {"response_percentiles": [-scale, 0.0, scale, 2 * scale]}
        write_run(tmp_path, "gn", size, seed=int(scale), status=status, history_keys=keys)
    axes = behind_errors.responses(table.curves(tmp_path))
    assert [ax.get_title() for ax in axes] == ["GN at batch size 32", "GN at batch size 2"]
    assert [ax.lines[0].get_ydata()[0] for ax in axes] == [-1.0, -20.0]


def test_axes_that_are_given_are_drawn_on(tmp_path):
    frame = write_statistics(tmp_path)
    given = matplotlib.figure.Figure().subplots(1, 2)
    assert list(behind_errors.error_by_statistics(frame, given)) == list(given)


def test_the_report_draws_what_the_runs_have(tmp_path):
    write_statistics(tmp_path)
    paths, _ = write_report([tmp_path], tmp_path)
    assert "error_by_statistics.svg" in {path.name for path in paths}
    assert "Test error under each choice of statistics" in (tmp_path / "report.html").read_text()
