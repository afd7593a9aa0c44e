"""Diagnostics: each number beside a naive formula, a training that does not notice them, and their figures."""

import copy
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from synthetic import write_run
from test_train import assert_same, finish, make_training, weights, without_times
from torch import nn

import gnbench
from gnbench import diagnostics
from gnbench.analysis import diagnostics as analysis
from gnbench.analysis import table
from gnbench.analysis.page import write_report
from gnbench.configs import choices
from gnbench.diagnostics import diagnose, is_due, measure_noise
from gnbench.engine import Eager, Fused
from gnbench.errors import UserError
from gnbench.evaluate import response_percentiles, shuffled
from gnbench.plan import plan_run
from gnbench.train import Training, train

NUM_IMAGES = 32
PLACES = ["norm1", *(f"blocks.{block}.norm{norm}" for block in range(3) for norm in (1, 2))]
CLOSE = {"rel": 1e-3, "abs": 1e-7}  # numbers have 4 digits


def trained(norm: object = "bn", **recipe: object) -> Training:
    """A training that has left its start, where the last gammas of its branches are 0."""
    training = make_training(**recipe)
    torch.manual_seed(0)
    model = gnbench.model("resnet8", norm=norm, num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    training.model = model
    return training


def measure(training: Training, num_images: int = NUM_IMAGES, **options: object) -> dict:
    return diagnose(training.model, training.dataset, training.recipe, "float32", num_images, **options)


def watch(training: Training, places: list[str], frozen: bool = False) -> tuple[dict, dict, list[dict]]:
    """Naively: inputs and outputs (N, C, H, W) of places, and the gradients of each mini-batch."""
    inputs, outputs = {name: [] for name in places}, {name: [] for name in places}
    gradients = []

    def keep(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        inputs[name].append(x.detach())
        outputs[name].append(y.detach().clone())

    split = shuffled(training.dataset.train, NUM_IMAGES)
    size = training.recipe.batch_size
    for start in range(0, NUM_IMAGES, size):
        model = copy.deepcopy(training.model).train()
        for name in places:
            if frozen:
                model.get_submodule(name).eval()
            layer = model.get_submodule(name)
            layer.register_forward_hook(lambda _, x, y, name=name: keep(name, x[0], y))
        logits = model(training.dataset.normalize(split.images[start : start + size]))
        F.cross_entropy(logits, split.labels[start : start + size], label_smoothing=0.1).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    return (
        {name: torch.cat(parts).double().numpy() for name, parts in inputs.items()},
        {name: torch.cat(parts).double().numpy() for name, parts in outputs.items()},
        gradients,
    )


def naive_noise(x: np.ndarray, batches: list[list[int]]) -> tuple[float, float]:
    """Of the mini-batches of given images: channel by channel, mini-batch by mini-batch."""
    mean_errors, var_errors = [], []
    for channel in x.transpose(1, 0, 2, 3):
        mean, var = channel.mean(), channel.var()
        mean_errors.append(sum((channel[b].mean() - mean) ** 2 / var for b in batches) / (len(batches) - 1))
        var_errors.append(sum((channel[b].var() / var - 1) ** 2 for b in batches) / (len(batches) - 1))
    return float(np.mean(mean_errors)), float(np.mean(var_errors))


@pytest.mark.parametrize("frozen", [False, True])
def test_every_number_of_a_layer_is_the_naive_one(frozen):
    training = trained("bn", batch_size=8, label_smoothing=0.1)
    inputs, outputs, gradients = watch(training, PLACES, frozen)
    found = measure(training, frozen=frozen)
    assert found["num_images"] == NUM_IMAGES
    assert found["layers"] == PLACES
    assert found["norm_batch_sizes"] == [1, 2, 4, 8]
    for number, name in enumerate(PLACES):
        x, y = inputs[name], outputs[name]
        matrix = y.transpose(0, 2, 3, 1).reshape(-1, y.shape[1])
        singular = np.linalg.svd(matrix, compute_uv=False)
        assert found["percentiles"][number] == pytest.approx(np.percentile(y, (1, 20, 80, 99)), **CLOSE)
        assert found["mean"][number] == pytest.approx(y.mean(), rel=1e-3, abs=1e-5)
        assert found["sd"][number] == pytest.approx(y.std(), **CLOSE)
        assert found["stable_rank"][number] == pytest.approx((singular**2).sum() / singular[0] ** 2, **CLOSE)
        for place, size in enumerate(found["norm_batch_sizes"]):
            batches = [list(range(start, start + size)) for start in range(0, NUM_IMAGES, size)]
            mean_noise, var_noise = naive_noise(x, batches)
            assert found["mean_noise"][number][place] == pytest.approx(mean_noise, **CLOSE)
            assert found["var_noise"][number][place] == pytest.approx(var_noise, **CLOSE)
        assert set(found["norm_gradients"][number]) == {"weight", "bias"}
        for parameter, value in found["norm_gradients"][number].items():
            norms = [batch[f"{name}.{parameter}"].norm() for batch in gradients]
            assert value == pytest.approx(float(np.mean(norms)), rel=1e-3)
    convolutions = ["conv1.weight", *(f"blocks.{block}.conv{conv}.weight" for block in range(3) for conv in (1, 2))]
    assert list(found["weight_gradients"]) == [*convolutions, "classifier.weight"]
    for name, value in found["weight_gradients"].items():
        assert value == pytest.approx(float(np.mean([batch[name].norm() for batch in gradients])), rel=1e-3)


def test_at_its_own_size_the_noise_is_that_of_the_normalization_batches_that_a_norm_takes():
    training = trained(gnbench.norm("bn", norm_batch_size=2), batch_size=8)
    inputs, _, _ = watch(training, PLACES)
    found = measure(training)
    workers = [[start + worker, start + worker + 4] for start in range(0, NUM_IMAGES, 8) for worker in range(4)]
    for number, name in enumerate(PLACES):
        expected = naive_noise(inputs[name], workers)
        assert (found["mean_noise"][number][1], found["var_noise"][number][1]) == pytest.approx(expected, **CLOSE)


def test_noise_of_independent_numbers_is_what_it_is_for_a_normal_distribution():
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).double()  # an image is one number
    mean_noise, var_noise = measure_noise(torch.stack([x, x.square()], 1), [1, 2, 8])
    assert mean_noise.tolist() == pytest.approx([1, 1 / 2, 1 / 8], rel=0.02)
    assert var_noise.tolist() == pytest.approx([1, 3 / 4, 15 / 64], rel=0.02)


def test_channels_that_are_constant_have_no_noise_and_those_that_are_not_finite_are_told():
    x = torch.randn(64, 3).double()
    x[:, 1] = 0.1
    moments = torch.stack([x, x.square()], 1)
    for found, expected in zip(measure_noise(moments, [2]), measure_noise(moments[..., [0, 2]], [2]), strict=True):
        assert torch.equal(found, expected)
    assert all(math.isnan(found) for found in measure_noise(moments[..., [1]], [2]))
    moments[0, 0, 0] = math.nan
    assert all(math.isnan(found) for found in measure_noise(moments, [2]))


def test_the_values_behind_percentiles_are_spread_over_all_positions(monkeypatch):
    monkeypatch.setattr(diagnostics, "MOST_VALUES", 1000)
    place = diagnostics._Place(nn.Identity(), num_images=128)
    position = torch.arange(16 * 8 * 8.0).reshape(1, 16, 8, 8).expand(64, -1, -1, -1)
    place.add_output(position)
    place.add_output(position)
    values = torch.cat(place.values)
    assert 900 < len(values) <= 1002
    assert values.unique().numel() > 0.4 * len(values), "not always the same ones"
    assert {int(value) % 64 for value in values} == set(range(64))
    assert {int(value) // 64 for value in values} == set(range(16))


@pytest.mark.parametrize("norm", sorted(set(choices("norm")) - {"custom"}))
def test_every_norm_is_measured_and_left_as_it_was(norm):
    training = trained(norm, batch_size=4)
    before, momenta = weights(training), torch.get_rng_state()
    found = measure(training, num_images=16)
    assert_same(weights(training), before)
    assert torch.equal(torch.get_rng_state(), momenta)
    assert all(parameter.grad is None for parameter in training.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in training.model.modules())
    assert found["layers"] == PLACES
    for key in ("percentiles", "mean_noise", "var_noise", "mean", "sd", "stable_rank"):
        assert np.isfinite(np.array(found[key], dtype=float)).all(), key
    assert next(iter(found["weight_gradients"])) == "conv1.weight"
    parameters = {name for name, _ in training.model.named_parameters() if name.startswith("norm1.")}
    assert {f"norm1.{name}" for name in found["norm_gradients"][0]} == parameters


@pytest.mark.parametrize(("model", "count"), [("resnet18", 20), ("vgg16", 13)])
@pytest.mark.parametrize("norm", ["none", "evonorm_s0"])
def test_places_are_found_in_every_kind_of_model(model, count, norm):
    built = gnbench.model(model, norm=norm, num_classes=3)
    assert len(built.norm_places) == count
    training = make_training(batch_size=2)
    training.dataset.train.images = training.dataset.train.images.repeat(1, 1, 4, 4)
    found = diagnose(built, training.dataset, training.recipe, "float32", 2)
    assert sorted(found["layers"]) == sorted(built.norm_places)


class Troubled(nn.Module):
    """What a stranger's norm may do: draw random numbers, and put new tensors into the place of buffers."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))

    def forward(self, x):
        if self.training:
            self.running_mean = 0.9 * self.running_mean + 0.1 * x.detach().mean((0, 2, 3))
        noise = torch.rand(len(x), 1, 1, 1) if self.training else 0.5
        return (x - self.running_mean[:, None, None]) * self.weight[:, None, None] * noise


@pytest.mark.parametrize("norm", ["bn", "mabn", "gn_ws", Troubled])
def test_a_training_is_the_same_bit_for_bit(norm):
    def run(num_images: int | None) -> Training:
        training = make_training(epochs=3, report_epochs=1, test_every=2, frozen_epochs=1)
        model = gnbench.model("resnet8", norm=norm, num_classes=3)
        torch.manual_seed(7)
        return finish(Training(model, training.dataset, training.recipe, 0, diagnostics=num_images))

    plain, plain_state = run(None), torch.get_rng_state()
    diagnosed, state = run(NUM_IMAGES), torch.get_rng_state()
    assert torch.equal(plain_state, state)
    assert_same(weights(plain), weights(diagnosed))
    momenta = [[entry["momentum_buffer"] for entry in t.optimizer.state.values()] for t in (plain, diagnosed)]
    assert all(torch.equal(one, other) for one, other in zip(*momenta, strict=True))
    measured = [row.pop("diagnostics") for row in diagnosed.progress.history]
    assert without_times(diagnosed.progress.history) == without_times(plain.progress.history)
    assert measured[0] != measured[1] != measured[2]


def test_without_the_key_there_is_no_pass_more_and_no_field():
    training, passes = make_training("bn", epochs=2), []
    training.model.register_forward_hook(lambda *_: passes.append(1))
    finish(training)
    assert len(passes) == 2 * (96 // 8 + 1)  # steps, and one test of 40 images
    assert all("diagnostics" not in row for row in training.progress.history)


def test_a_long_training_is_measured_about_twenty_times_at_its_ends_too():
    for num_epochs in range(1, 400):
        due = [epoch for epoch in range(1, num_epochs + 1) if is_due(epoch, num_epochs)]
        assert due[0] == 1
        assert due[-1] == num_epochs
        assert min(num_epochs, 10) <= len(due) <= 22


def test_a_resumed_training_measures_the_same():
    class Stop(Exception):
        pass

    def stop_at(training: Training, step: int) -> None:
        if training.progress.step == step:
            raise Stop

    whole, first, second = (make_training("bn", epochs=2) for _ in range(3))
    whole.diagnostics = first.diagnostics = second.diagnostics = NUM_IMAGES
    finish(whole)
    with pytest.raises(Stop):
        train(Eager(first), pause=lambda: stop_at(first, 15))
    second.restore(copy.deepcopy(first.state()))
    finish(second)
    assert without_times(second.progress.history) == without_times(whole.progress.history)


def test_seeds_as_one_network_are_measured_each_by_itself():
    def double(seed: int) -> Training:
        training = make_training("bn", seed=seed, epochs=1, batch_size=2, max_steps=3)
        dataset = training.dataset
        normalize = type(dataset).normalize
        dataset.normalize = lambda images: normalize(dataset, images).double()
        training = Training(training.model.double(), dataset, training.recipe, seed)
        training.diagnostics = NUM_IMAGES
        return training

    alone, together = [double(seed) for seed in (3, 4)], [double(seed) for seed in (3, 4)]
    train(Fused(together), pause=lambda: None)
    for one, other in zip(alone, together, strict=True):
        train(Eager(one), pause=lambda: None)
        (expected,), (found,) = ([row["diagnostics"] for row in t.progress.history] for t in (one, other))
        for key in ("percentiles", "sd", "stable_rank", "mean_noise", "var_noise"):
            assert np.array(found[key]) == pytest.approx(np.array(expected[key]), rel=1e-3, abs=1e-6)
        assert found["weight_gradients"] == pytest.approx(expected["weight_gradients"], rel=1e-3)
    assert together[0].progress.history[0]["diagnostics"] != together[1].progress.history[0]["diagnostics"]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_what_is_not_finite_is_recorded_as_null(value):
    class Exploded(nn.Module):
        def forward(self, x):
            return x * value

    training = trained(lambda num_channels: nn.GroupNorm(2, num_channels), batch_size=8)
    training.model.blocks[1].norm1 = Exploded()
    training.model.norm_places = ["norm1", "blocks.1.norm1"]
    found = json.loads(json.dumps(measure(training), allow_nan=False))
    assert found["sd"][0] is not None
    assert found["mean_noise"][1][0] is not None, "the input is finite"
    assert (found["sd"][1], found["stable_rank"][1]) == (None, None)
    assert None in found["percentiles"][1]
    assert found["weight_gradients"]["conv1.weight"] is None


def test_responses_that_are_not_finite_are_null():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    nn.init.constant_(model[1].bias, math.nan)
    assert response_percentiles(model, make_training().dataset, "1", "float32") == [None] * 4


# The key


def plan(*words: str) -> tuple[dict, str]:
    run = plan_run(tiny_config(*words), default_threads=1)
    return run.config, run.digest


def test_the_key_belongs_to_the_identity_only_where_it_asks_for_something():
    config, digest = plan()
    assert "diagnostics" not in config
    assert plan("diagnostics=null")[1] == digest
    assert plan("diagnostics=8")[1] not in (digest, plan("diagnostics=16")[1])


@pytest.mark.parametrize("value", [0, -1, 7])
def test_too_few_images_are_refused(value):
    with pytest.raises(UserError, match=rf"^diagnostics={value} is not legal: it is a number of images of 8 or more"):
        plan(f"diagnostics={value}")


# The figures


def made_up(scale: float, num_layers: int = 3) -> dict:
    depths = range(1, num_layers + 1)
    return {
        "num_images": 64,
        "layers": [f"norm{depth}" for depth in depths],
        "percentiles": [[-3 * scale, -scale, scale, 2 * scale * depth] for depth in depths],
        "mean": [0.0 for _ in depths],
        "sd": [scale * depth for depth in depths],
        "stable_rank": [2.0 * depth for depth in depths],
        "mean_noise": [[scale / size * depth for size in (1, 2, 4)] for depth in depths],
        "var_noise": [[2 * scale / size for size in (1, 2, 4)] for depth in depths],
        "norm_batch_sizes": [1, 2, 4],
        "weight_gradients": {"conv1.weight": 0.5, "classifier.weight": None},
        "norm_gradients": [{"weight": 3.0, "bias": 4.0} for _ in depths],
    }


def write_runs(directory) -> pd.DataFrame:
    """BN and GN at two batch sizes, two seeds of different scale, diagnosed in both of their epochs."""
    for norm in ("bn", "gn"):
        for batch_size in (4, 2):
            for seed in (0, 1):
                keys = {"diagnostics": made_up(1.0 + seed)}
                write_run(directory, norm, batch_size, seed, history_keys=keys, num_epochs=2)
    return table.curves(directory)


def drawn(ax, number: int) -> tuple[list, list]:
    line = ax.lines[number]
    return list(line.get_xdata()), list(line.get_ydata())


def test_the_table_has_every_number(tmp_path):
    tidy = analysis.tabulate(write_runs(tmp_path))
    assert list(tidy.columns) == [*analysis.RUN, *analysis.LAYER]
    per_epoch = 3 * (4 + 3 + 2 * 3 + 3) + 2
    assert len(tidy) == 8 * 2 * per_epoch
    one = tidy[(tidy["norm"] == "bn") & (tidy["batch_size"] == 2) & (tidy["seed"] == 1) & (tidy["epoch"] == 2)]
    values = one[one["depth"] == 2].set_index(["quantity", "images"])["value"]
    assert values["percentile_99"].item() == 8.0
    assert values["mean_noise", 4] == 1.0
    assert values["norm_gradient"].item() == 5.0
    assert values["norm_gradient.bias"].item() == 4.0
    (classifier,) = one[one["layer"] == "classifier.weight"].to_dict("records")
    assert (classifier["depth"], classifier["quantity"]) == (2, "weight_gradient")
    assert math.isnan(classifier["value"])


def test_columns_of_norm_batches_are_named_as_on_the_axes(tmp_path):
    for size in (4, 2):
        keys = {"diagnostics": made_up(1.0)}
        write_run(tmp_path, "bn", 4, norm_batch_size=size, test_error=20, history_keys=keys, num_epochs=1)
    axes = analysis.by_depth(table.curves(tmp_path), "sd")
    assert [ax.get_title() for ax in axes[0]] == ["normalization batch size 4", "normalization batch size 2"]


def test_activations_have_a_row_a_norm_and_a_column_a_batch_size(tmp_path):
    axes = analysis.activations(write_runs(tmp_path))
    assert [ax.get_title() for ax in axes[0]] == ["batch size 4", "batch size 2"]
    assert [line[0].get_ylabel() for line in axes] == ["BN\nactivation", "GN\nactivation"]
    assert axes[-1, 0].get_xlabel() == "depth (norm)"
    low = [line.get_ydata()[0] for line in axes[1, 1].lines]
    assert low.count(-4.5) == 2, "the mean of -3 and -6, in the first epoch and in the last"


@pytest.mark.parametrize(("quantity", "values"), [("sd", [1.5, 3.0, 4.5]), ("stable_rank", [2.0, 4.0, 6.0])])
def test_by_depth_a_line_is_a_norm_and_a_row_an_epoch(tmp_path, quantity, values):
    axes = analysis.by_depth(write_runs(tmp_path), quantity)
    assert axes.shape == (2, 2)
    assert [line[0].get_ylabel().splitlines()[1] for line in axes] == ["epoch 1", "epoch 2"]
    assert drawn(axes[1, 0], 0) == ([1, 2, 3], values)
    low, high = axes[1, 0].get_ylim()
    assert len([tick for tick in axes[1, 0].get_yticks() if low <= tick <= high]) >= 2, "one number is no scale"
    assert [text.get_text() for text in axes[0, -1].get_legend().get_texts()] == ["BN", "GN"]


def test_gradients_of_weights_and_of_norms_have_rows_of_their_own(tmp_path):
    axes = analysis.gradients(write_runs(tmp_path))
    kinds = ["gradient norm, weights"] * 2 + ["gradient norm, norms"] * 2
    assert [line[0].get_ylabel().splitlines()[0] for line in axes] == kinds
    assert drawn(axes[2, 0], 0) == ([1, 2, 3], [5.0] * 3)
    assert axes[0, 0].get_yscale() == "log"


def test_noise_stands_beside_independent_images_and_rings_a_norms_own_size(tmp_path):
    axes = analysis.noise(write_runs(tmp_path))
    reference, first, median, ring, *_ = (drawn(axes[0, 1], number) for number in range(len(axes[0, 1].lines)))
    assert reference == ([1, 2, 4], [1.0, 0.5, 0.25])
    assert first == ([1, 2, 4], [1.5, 0.75, 0.375])
    assert median == ([1, 2, 4], [3.0, 1.5, 0.75])
    assert ring == ([2], [1.5])
    assert drawn(axes[1, 1], 0) == ([1, 2, 4], [1.0, 3 / 4, 7 / 16])
    assert (axes[0, 0].get_xscale(), axes[0, 0].get_yscale()) == ("log", "log")
    assert axes[-1, 0].get_xlabel() == "normalization batch size"


def test_numbers_that_are_all_null_are_drawn_as_nothing(tmp_path):
    def empty(value: object) -> object:
        if isinstance(value, dict):
            return {key: empty(inner) for key, inner in value.items()}
        return [empty(inner) for inner in value] if isinstance(value, list) else None

    names = ("num_images", "layers", "norm_batch_sizes")
    nothing = {key: value if key in names else empty(value) for key, value in made_up(1.0).items()}
    write_run(tmp_path, "bn", 2, history_keys={"diagnostics": nothing}, num_epochs=2)
    for _, axes in analysis.draw(table.curves(tmp_path)).values():
        axes[0, 0].figure.canvas.draw()


@pytest.mark.slow
def test_as_commands_seeds_as_one_network_are_measured(gnbench, tmp_path):
    """The seeds of a cell go as one network; a norm without parameters has its places beside one that has some."""
    words = "-m norm=bn,none batch_size=2 seed=0,1 max_steps=3 diagnostics=16 frozen_epochs=1 results=out"
    tiny = "data=tiny model=resnet8 num_threads=1 epochs=1 precise_images=32 hydra.launcher.num_processes=1"
    done = gnbench(*words.split(), *tiny.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 seeds as one network" in done.stdout
    tidy = analysis.tabulate(table.curves(tmp_path / "out"))
    assert set(tidy["norm"]) == {"bn", "none"}
    assert tidy.groupby("run")["layer"].nunique().tolist() == [7 + 8] * 4
    assert tidy.loc[tidy["norm"] == "bn", "value"].notna().all()


def test_the_report_has_the_table_and_the_figures(tmp_path):
    write_run(tmp_path, "bn", 2, history_keys={"diagnostics": made_up(1.0)}, num_epochs=2)
    paths, _ = write_report([tmp_path], tmp_path)
    names = {f"{name}.{kind}" for name in analysis.draw(table.curves(tmp_path)) for kind in ("svg", "png")}
    assert names | {"diagnostics.csv"} <= {path.name for path in paths}
    assert list(pd.read_csv(tmp_path / "diagnostics.csv")) == [*analysis.RUN, *analysis.LAYER]
    assert "Stable rank of activations by depth" in (tmp_path / "report.html").read_text()


def test_runs_without_diagnostics_have_neither_table_nor_figures(tmp_path):
    write_run(tmp_path, "bn", 32)
    assert not analysis.has_diagnostics(table.curves(tmp_path))
    paths, _ = write_report([tmp_path], tmp_path)
    assert not {"diagnostics.csv", "noise.svg"} & {path.name for path in paths}
