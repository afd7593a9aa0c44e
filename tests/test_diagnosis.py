"""Figures of what lies behind an error, tested by their data."""

import matplotlib.figure
import pytest
from synthetic import write_run

from gnbench.analysis import diagnosis, table
from gnbench.analysis.report import write_report

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


def lines(ax) -> dict[tuple, list]:
    """{x values: y values} of the means that an axis draws with error bars."""
    return [(list(c.lines[0].get_xdata()), list(c.lines[0].get_ydata())) for c in ax.containers]


def test_each_choice_of_statistics_has_its_line_and_the_parts_sum_to_the_error(tmp_path):
    frame = write_statistics(tmp_path)
    assert diagnosis.has_statistics(frame)
    left, right = diagnosis.error_by_statistics(frame)
    sizes = [2.0, 8.0, 32.0]
    half = 0.5  # the mean of seeds 0 and 1
    ema, precise, batch, train, frozen = lines(left)
    for column, (found_x, found_y) in zip((3, 2, 1, 0), (ema, precise, batch, train), strict=True):
        assert found_x == sizes
        assert found_y == pytest.approx([ERRORS[size][column] + half for size in (2, 8, 32)])
    assert frozen == ([2.0], [27.0])
    parts = [y for _, y in lines(right)]
    assert parts[2] == pytest.approx([6.0, -0.5, -1.0])  # population - mini-batch
    assert [sum(values) for values in zip(*parts, strict=True)] == pytest.approx(ema[1])


def test_runs_without_a_choice_have_no_such_figure(tmp_path):
    write_run(tmp_path, "gn", 32)
    write_run(tmp_path, "bn", 32)
    frame = table.load(tmp_path)
    assert not diagnosis.has_statistics(frame)
    assert not diagnosis.has_learning_rates(frame)


def test_responses_are_means_over_seeds_in_a_panel_a_norm(tmp_path):
    for norm, scale in (("bn", 1.0), ("gn", 2.0)):
        for seed in (0, 1):
            percentiles = [-scale, 0.0, scale + seed, 3 * scale + seed]
            write_run(tmp_path, norm, 32, seed, history_keys={"response_percentiles": percentiles}, num_epochs=3)
    axes = diagnosis.responses(table.curves(tmp_path))
    assert [ax.get_title() for ax in axes] == ["BN", "GN"]
    for ax, scale in zip(axes, (1.0, 2.0), strict=True):
        drawn = [list(line.get_ydata()) for line in ax.lines]
        assert drawn == [[value] * 3 for value in (-scale, 0.0, scale + 0.5, 3 * scale + 0.5)]


def test_learning_rates_ring_the_least_held_out_error_and_cross_what_diverged(tmp_path):
    for base_lr, val_error in ((0.05, 30.0), (0.1, 20.0), (0.2, 25.0)):
        write_run(tmp_path, "bn", 32, base_lr=base_lr, result={"val_error": val_error})
    write_run(tmp_path, "bn", 32, base_lr=0.4, status="diverged", cause="not finite")
    frame = table.load(tmp_path)
    assert diagnosis.has_learning_rates(frame)
    (ax,) = diagnosis.error_vs_learning_rate(frame)
    mean, ring, cross = ax.lines
    assert list(mean.get_xdata()) == [0.05, 0.1, 0.2]
    assert list(mean.get_ydata()) == [30.0, 20.0, 25.0]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([0.1], [20.0])
    assert list(cross.get_xdata()) == [0.4]


def test_axes_that_are_given_are_drawn_on(tmp_path):
    frame = write_statistics(tmp_path)
    given = matplotlib.figure.Figure().subplots(1, 2)
    assert list(diagnosis.error_by_statistics(frame, given)) == list(given)


def test_the_report_draws_what_the_runs_have(tmp_path):
    write_statistics(tmp_path)
    paths, _ = write_report([tmp_path], tmp_path)
    assert "error_by_statistics.svg" in {path.name for path in paths}
    assert "Test error under each choice of statistics" in (tmp_path / "report.html").read_text()
