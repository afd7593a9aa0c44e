"""Records -> frames: every run is a row, every difference of config is told, nothing is dropped."""

import json

import pandas as pd
import pytest
from synthetic import write_run, write_sweep

import gnbench
from gnbench import UserError
from gnbench.analysis import table


def test_a_row_a_run_with_what_the_record_says(tmp_path):
    path = write_run(tmp_path, "gn", 8, seed=3, test_error=12.5, train_error=7.25, device="NVIDIA H200")
    frame = table.load(tmp_path)
    assert len(frame) == 1
    row = frame.iloc[0]
    assert (row["norm"], row["batch_size"], row["num_groups"], row["seed"]) == ("gn", 8, 8, 3)
    assert (row["test_error"], row["train_error"], row["time_s"]) == (12.5, 7.25, 60)
    assert (row["model"], row["data"], row["epochs"], row["base_lr"]) == ("resnet20", "cifar10", 30, 0.1)
    assert (row["device"], row["status"], row["run"]) == ("NVIDIA H200", "done", path.parent.name)
    assert pd.isna(row["norm_batch_size"])
    assert pd.isna(row["channels_per_group"])
    assert pd.isna(row["train_size"])
    assert row["images_per_s"] == pytest.approx(750 * 8 / 60)  # 750 steps in 6 epochs of 10 s
    assert set(table.COLUMNS) <= set(frame)


def test_the_package_offers_load():
    assert gnbench.load is table.load


def test_rows_stand_in_the_papers_order_whatever_the_order_of_the_files(tmp_path):
    write_sweep(tmp_path, norms=("in", "gn", "bn"), batch_sizes=(2, 32, 4), seeds=(1, 0))
    frame = table.load(tmp_path)
    assert list(frame["norm"].unique()) == ["bn", "gn", "in"]
    assert list(frame["batch_size"].unique()) == [32, 4, 2]
    assert list(frame["seed"][:2]) == [0, 1]


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_directory_without_records_is_refused_in_a_sentence(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        table.load(tmp_path / name)


def test_seeds_share_a_cell_and_how_a_run_was_executed_does_not_split_it(tmp_path):
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1, num_threads=2, device="NVIDIA H200")
    write_run(tmp_path, seed=2, checkpoint_s=5)
    assert table.load(tmp_path)["cell"].nunique() == 1


@pytest.mark.parametrize(
    "difference",
    [
        {"epochs": 10},
        {"data": {"name": "cifar100"}},
        {"precision": "bf16"},
        {"milestones": [0.3, 0.6]},
        {"norm_keys": {"eps": 1e-3}},
        {"base_lr": 0.2},
        {"a_key_of_tomorrow": True},
    ],
)
def test_any_other_difference_makes_another_cell_and_another_label(tmp_path, difference):
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1, **difference)
    frame = table.load(tmp_path)
    assert frame["cell"].nunique() == 2
    assert frame["label"].nunique() == 2


def test_a_data_set_of_the_same_name_with_other_images_is_another_cell(tmp_path):
    write_run(tmp_path, seed=0, record_keys={"data_fingerprint": "one45678" + 56 * "9"})
    write_run(tmp_path, seed=1, record_keys={"data_fingerprint": "two45678" + 56 * "9"})
    frame = table.load(tmp_path)
    assert frame["cell"].nunique() == 2
    assert [label.partition("[")[2] for label in frame["label"]] == [
        "data_fingerprint=one45678]",
        "data_fingerprint=two45678]",
    ]


def test_a_variant_names_the_parameters_that_vary_within_its_norm_and_no_others(tmp_path):
    write_run(tmp_path, "bn")
    write_run(tmp_path, "gn", norm_keys={"num_groups": 8})
    write_run(tmp_path, "gn", norm_keys={"num_groups": 4})
    write_run(tmp_path, "gn", norm_keys={"num_groups": None, "channels_per_group": 4})
    frame = table.load(tmp_path)
    assert list(frame["variant"]) == ["bn", "gn num_groups=8", "gn num_groups=4", "gn channels_per_group=4"]
    assert list(frame["label"]) == ["BN", "GN (G=8)", "GN (G=4)", "GN (C/G=4)"]


def test_the_norm_batch_size_is_an_axis_and_no_variant(tmp_path):
    for norm_batch_size in (32, 8, 2):
        write_run(tmp_path, "bn", 32, norm_batch_size=norm_batch_size)
    frame = table.load(tmp_path)
    assert list(frame["norm_batch_size"]) == [32, 8, 2]
    assert frame["label"].unique() == ["BN"]
    assert frame["cell"].nunique() == 3


def test_a_norm_of_ones_own_is_not_called_as_one_that_comes_along(tmp_path):
    write_run(tmp_path, "bn", test_error=10)
    write_run(tmp_path, "BN", test_error=60)
    assert list(table.load(tmp_path)["label"]) == ["BN", "BN (custom)"]


def test_a_directory_counts_once_and_two_of_one_name_are_told_apart(tmp_path):
    for place in "ab":
        write_run(tmp_path / place / "sweep", "bn")
    once, other = tmp_path / "a" / "sweep", tmp_path / "b" / "sweep"
    assert list(table.load(once, f"{tmp_path}/a/../a/sweep")["sweep"]) == ["sweep"]
    assert set(table.load(once, other)["sweep"]) == {str(once), str(other)}


def test_a_label_tells_no_more_than_is_needed(tmp_path):
    write_run(tmp_path, epochs=30, schedule="step")
    write_run(tmp_path, epochs=10, schedule="cosine")  # says nothing that epochs does not
    assert list(table.load(tmp_path)["label"]) == ["BN [epochs=10]", "BN [epochs=30]"]


def test_a_label_has_true_and_false_as_they_are_typed(tmp_path):
    for nesterov in (True, False):
        write_run(tmp_path, nesterov=nesterov)
    assert list(table.load(tmp_path)["label"]) == ["BN [nesterov=false]", "BN [nesterov=true]"]


def test_runs_are_chosen_by_a_condition_and_told_apart_among_themselves(tmp_path):
    for epochs, norm in ((30, "bn"), (10, "bn"), (10, "brn")):
        own = {"r_max": 1.5} if norm == "brn" else {}
        write_run(tmp_path, norm, epochs=epochs, test_error=30, norm_keys=own)
    assert list(table.load(tmp_path)["label"]) == ["BN [epochs=10]", "BN [epochs=30]", "Batch Renorm [epochs=10]"]
    chosen = table.load(tmp_path, where="norm == 'bn' and epochs < 20")
    assert list(chosen["label"]) == ["BN"]
    assert "norm.r_max" not in chosen
    assert list(table.load(tmp_path, where="`norm.r_max` > 1")["norm"]) == ["brn"]
    assert table.curves(tmp_path, where="epochs == 30")["label"].unique() == ["BN"]
    assert list(table.load(tmp_path, where="epochs > 30").columns) == list(table.COLUMNS)
    write_run(tmp_path, seed=1).write_text("broken")
    assert list(table.load(tmp_path, where="epochs > 30")["status"]) == ["unreadable"]
    assert len(table.load(tmp_path, where="epochs.max() > 20")) == 4


@pytest.mark.parametrize("where", ["nrm == 'bn'", "epochs", "epochs <", "'bn'"])
def test_a_condition_that_is_none_is_refused(tmp_path, where):
    write_run(tmp_path)
    with pytest.raises(UserError, match="is no condition"):
        table.load(tmp_path, where=where)


def test_a_learning_rate_tuned_for_each_batch_size_does_not_split_a_line(tmp_path):
    write_run(tmp_path, "bn", 32, base_lr=0.1)
    write_run(tmp_path, "bn", 2, base_lr=0.05)
    frame = table.load(tmp_path)
    assert frame["label"].nunique() == 1
    assert frame["cell"].nunique() == 2


def test_two_learning_rates_at_one_point_are_two_lines(tmp_path):
    write_run(tmp_path, "bn", 32, base_lr=0.1)
    write_run(tmp_path, "bn", 32, base_lr=0.05)
    assert list(table.load(tmp_path)["label"]) == ["BN [base_lr=0.05]", "BN [base_lr=0.1]"]


def _truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def _change_a_number(path):
    path.write_text(path.read_text().replace('"train_loss": 0.5', '"train_loss": 0.4'))


def _become_a_list(path):
    path.write_text("[1, 2]")


def _become_empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [_truncate, _change_a_number, _become_a_list, _become_empty])
def test_a_corrupt_record_is_a_row_that_says_why(tmp_path, harm):
    write_run(tmp_path, seed=0)
    path = write_run(tmp_path, seed=1)
    harm(path)
    frame = table.load(tmp_path)
    assert list(frame["status"]) == ["done", "unreadable"]
    assert frame.iloc[1]["run"] == path.parent.name
    assert len(frame.iloc[1]["cause"]) > 10
    assert "\n" not in frame.iloc[1]["cause"]


@pytest.mark.parametrize(
    ("keys", "cause"),
    [
        ({"seed": "abc"}, "seed is 'abc'"),
        ({"batch_size": None}, "batch_size is None"),
        ({"batch_size": True}, "batch_size is True"),
        ({"seed": 2**70}, "seed is"),
        ({"norm": {"_target_": "x"}}, "norm"),
    ],
)
def test_a_whole_record_of_nonsense_is_unreadable_too(tmp_path, keys, cause):
    write_run(tmp_path, seed=0, config_keys=keys)
    frame = table.load(tmp_path)
    assert list(frame["status"]) == ["unreadable"]
    assert cause in frame.iloc[0]["cause"]


def test_done_without_a_result_is_unreadable_not_a_gap_in_a_mean(tmp_path):
    write_run(tmp_path, result={"test_error": None})
    assert list(table.load(tmp_path)["status"]) == ["unreadable"]


def test_a_diverged_run_keeps_its_cause_and_has_no_error(tmp_path):
    write_run(tmp_path, status="diverged", cause="the training loss is not finite by step 7")
    row = table.load(tmp_path).iloc[0]
    assert (row["status"], row["cause"]) == ("diverged", "the training loss is not finite by step 7")
    assert pd.isna(row["test_error"])
    assert row["time_s"] == 30


def test_a_null_key_is_no_key(tmp_path):
    """A key that came later, and is null unless asked for, does not split older runs from newer ones."""
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1, a_key_of_tomorrow=None)
    assert table.load(tmp_path)["cell"].nunique() == 1


def test_errors_by_statistics_become_columns(tmp_path):
    write_run(tmp_path, result={"test_error_by_statistics": {"ema": 35.5, "precise": 32.0, "batch": 26.0}})
    row = table.load(tmp_path).iloc[0]
    assert (row["test_error_ema"], row["test_error_precise"], row["test_error_batch"]) == (35.5, 32.0, 26.0)


def test_several_directories_make_one_frame(tmp_path):
    write_run(tmp_path / "one", "bn")
    write_run(tmp_path / "two", "gn")
    assert list(table.load(tmp_path / "one", tmp_path / "two")["sweep"]) == ["one", "two"]


def test_curves_have_a_row_an_epoch_and_keep_runs_that_have_none(tmp_path):
    write_run(tmp_path, "bn", 32, num_epochs=4)
    write_run(tmp_path, "bn", 16, status="failed", cause="no memory", num_epochs=1)
    write_run(tmp_path, "bn", 8).write_text("{")
    frame = table.curves(tmp_path)
    assert list(frame["batch_size"].fillna(0)) == [32, 32, 32, 32, 16, 0]
    assert list(frame["epoch"].fillna(0)) == [1, 2, 3, 4, 0, 0]
    assert list(frame["status"][3:]) == ["done", "failed", "unreadable"]
    assert frame["test_error"].iloc[3] == pytest.approx(23.6)


def test_curves_carry_what_is_no_number(tmp_path):
    path = write_run(tmp_path, history_keys={"percentiles": [1, 2]})
    assert json.loads(path.read_text())["history"][0]["percentiles"] == [1, 2]
    assert table.curves(tmp_path)["percentiles"].iloc[0] == [1, 2]


def test_the_batch_axis_holds_the_commonest_number_of_norm_batches(tmp_path):
    for batch_size in (32, 8, 2):
        write_run(tmp_path, "bn", batch_size)
        write_run(tmp_path, "gn", batch_size)
    write_run(tmp_path, "bn", 32, norm_batch_size=2)
    kept, sentence = table.slice_axis(table.load(tmp_path), "batch_size")
    assert list(kept[kept["norm"] == "bn"]["norm_batch_size"]) == [32, 8, 2]
    assert len(kept[kept["norm"] == "gn"]) == 3
    assert sentence.endswith("runs of other sizes are in the table: 1.")
    assert "batch_size = norm_batch_size;" in sentence


def test_the_norm_batch_axis_holds_the_batch_size(tmp_path):
    for norm_batch_size in (32, 8, 2):
        write_run(tmp_path, "bn", 32, norm_batch_size=norm_batch_size)
    write_run(tmp_path, "gn", 32)
    write_run(tmp_path, "bn", 2)
    kept, sentence = table.slice_axis(table.load(tmp_path), "norm_batch_size")
    assert set(kept["batch_size"]) == {32}
    assert len(kept) == 4
    assert "batch_size = 32" in sentence
    assert sentence.endswith("runs of other sizes are in the table: 1.")


def test_the_papers_workers_stay_on_one_line(tmp_path):
    """8 workers with N images each: both batches move, one value of either for each of the other."""
    for images in (32, 8, 2):
        write_run(tmp_path, "bn", 8 * images, norm_batch_size=images, test_error=20)
        write_run(tmp_path, "gn", 8 * images, test_error=20)
    frame = table.load(tmp_path)
    assert table.count_norm_batches(frame) == 8
    assert table.find_axes(frame) == ["norm_batch_size"]
    for x in table.AXES:
        kept, sentence = table.slice_axis(frame, x)
        assert len(kept) == 6
        assert sentence == "Shown: batch_size = 8 · norm_batch_size."
    assert list(table.place_cells(frame, "norm_batch_size")) == [32, 8, 2, 32, 8, 2]
    assert list(table.place_cells(frame, "batch_size")) == [256, 64, 16, 256, 64, 16]


def test_find_axes(tmp_path):
    write_sweep(tmp_path / "batch", seeds=(0,))
    for norm_batch_size in (32, 2):
        write_run(tmp_path / "norm_batch", "bn", 32, norm_batch_size=norm_batch_size)
    write_run(tmp_path / "point", "bn", 32)
    assert table.find_axes(table.load(tmp_path / "batch")) == ["batch_size"]
    assert table.find_axes(table.load(tmp_path / "norm_batch")) == ["norm_batch_size"]
    assert table.find_axes(table.load(tmp_path / "point")) == ["batch_size"]
    both = table.load(tmp_path / "batch", tmp_path / "norm_batch")
    assert table.find_axes(both) == ["batch_size", "norm_batch_size"]


def test_the_reference_holds_what_the_papers_print():
    reference = table.load_reference()
    assert reference[["source", "place", "url", "data", "model", "norm", "test_error"]].notna().all().all()
    assert reference["test_error"].between(1, 50).all()
    paper = reference[(reference["source"] == "Wu & He 2018") & (reference["place"] == "Figure 1, Table 2")]
    lines = paper.pivot_table("test_error", "images_per_worker", "norm")
    assert list(lines.loc[[32, 16, 8, 4, 2], "bn"]) == [23.6, 23.7, 24.8, 27.3, 34.7]
    assert list((lines["gn"] - lines["bn"]).round(1).sort_index(ascending=False)) == [0.5, 0.5, -0.8, -3.1, -10.6]


def test_reference_lines_are_those_of_the_same_axis_norms_and_data(tmp_path):
    write_run(tmp_path / "cifar", "bn", data={"name": "cifar10-jpeg"})
    write_run(tmp_path / "cifar", "gn", data={"name": "cifar10-jpeg"})
    write_run(tmp_path / "other", "bn", data={"name": "cifar100"})
    cifar, other = table.load(tmp_path / "cifar"), table.load(tmp_path / "other")
    replications = {"BeFranke/GroupNorm", "HickmannLautaro/GroupNorm"}
    on_batches = table.choose_reference(cifar, "batch_size")
    assert set(on_batches["source"]) == {"Wu & He 2018", *replications}
    assert set(on_batches["norm"]) == {"bn", "gn"}
    assert len(on_batches) == 30
    assert set(table.choose_reference(other, "batch_size")["source"]) == {"Wu & He 2018"}
    on_norm_batches = table.choose_reference(cifar, "norm_batch_size")
    assert set(on_norm_batches["source"]) == {"Wu & Johnson 2021"}
    assert len(on_norm_batches) == 10
