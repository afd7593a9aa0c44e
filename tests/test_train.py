"""The training loop: a step against torch's own arithmetic, resuming bit for bit, and how a training ends."""

import copy
import dataclasses
import math
import runpy
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from tiny_data import load_tiny
from torch import nn

import gnbench
from gnbench.checkpoint import load_checkpoints, save_checkpoint
from gnbench.data import prepare, train_batches
from gnbench.engine import Eager, make_engine
from gnbench.evaluate import evaluate, response_percentiles
from gnbench.recipe import Recipe
from gnbench.train import Diverged, Training, summarize, train

SHORT = {"batch_size": 8, "epochs": 2, "base_batch_size": 8, "precise_images": 32}


def make_training(norm: str = "bn", val_size: int = 0, seed: int = 0, **recipe: object) -> Training:
    dataset = prepare(load_tiny(), torch.device("cpu"), val_size=val_size)
    model = gnbench.model("resnet8", norm=norm, num_classes=3, seed=seed)
    return Training(model, dataset, Recipe(**{**SHORT, **recipe}), seed)


def finish(training: Training) -> Training:
    train(Eager(training), pause=lambda: None)
    return training


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in training.model.state_dict().items()}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


def without_times(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in ("time_s", "peak_memory_mb")} for row in history]


@pytest.mark.parametrize("norm", ["bn", "gn", "ln", "in"])
def test_training_learns(norm):
    training = finish(make_training(norm, epochs=4, base_lr=0.02))
    assert training.progress.history[-1]["train_loss"] < 0.7 * math.log(3)
    assert training.progress.history[-1]["test_error"] < 40


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"nesterov": True},
        {"norm_weight_decay": False, "weight_decay": 0.1},
        {"label_smoothing": 0.1},
        {"clip_grad_norm": 0.01},
    ],
)
def test_three_steps_are_those_of_a_naive_loop(recipe):
    training = make_training("gn", **recipe)
    model = copy.deepcopy(training.model).double()
    training.model.double()
    recipe, engine = training.recipe, Eager(training)
    velocity = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
    batches = list(train_batches(training.dataset, 8, drop_last=True, seed=0, epoch=0))[:3]
    for step, (images, labels) in enumerate(batches):
        images = images.double()
        engine.step([(images, labels)])
        training.progress.step += 1
        log_p = model(images).log_softmax(1)
        target = F.one_hot(labels, 3).double() * (1 - recipe.label_smoothing) + recipe.label_smoothing / 3
        model.zero_grad()
        (-(target * log_p).sum(1).mean()).backward()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        scale = min(1.0, float(recipe.clip_grad_norm / (norm + 1e-6))) if recipe.clip_grad_norm else 1.0
        with torch.no_grad():
            for key, p in model.named_parameters():
                decay = recipe.weight_decay if p.ndim > 1 or recipe.norm_weight_decay else 0.0
                gradient = p.grad * scale + decay * p
                velocity[key] = recipe.momentum * velocity[key] + gradient if step else gradient
                move = gradient + recipe.momentum * velocity[key] if recipe.nesterov else velocity[key]
                p -= recipe.learning_rate(step, 96) * move
    ours, naive = training.model.state_dict(), model.state_dict()
    for key in naive:
        torch.testing.assert_close(ours[key], naive[key], msg=key)


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_a_training_is_that_of_a_plain_network_in_a_plain_loop(norm):
    """From the same weights, over the same batches, with tests between the epochs: scripts/plain_loop.py's network."""
    # a rate at which the toy images are not learnt to a loss of rounding errors
    recipe = {"epochs": 3, "schedule": "cosine", "base_lr": 0.002, "weight_decay": 5e-4}
    made = make_training(**recipe)
    torch.manual_seed(0)
    model = gnbench.model("resnet20", norm=norm, num_classes=10)
    training = Training(model, made.dataset, made.recipe, made.seed)
    net = runpy.run_path(str(ROOT / "scripts" / "plain_loop.py"))["resnet20"](norm)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), net.parameters(), strict=True):
            ours.copy_(theirs)
    history, test = finish(training).progress.history, made.dataset.test
    optimizer = torch.optim.SGD(net.parameters(), lr=0.002, momentum=0.9, weight_decay=5e-4)
    num_steps = len(made.dataset.train) // 8
    for epoch, row in enumerate(history):
        net.train()
        losses = []
        for step, (images, labels) in enumerate(train_batches(made.dataset, 8, drop_last=True, seed=0, epoch=epoch)):
            progress = (epoch * num_steps + step) / (3 * num_steps)
            optimizer.param_groups[0]["lr"] = 0.001 * (1 + math.cos(math.pi * progress))
            loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert row["train_loss"] == pytest.approx(statistics.mean(losses), rel=1e-3)
        net.eval()
        with torch.no_grad():
            logits = net(made.dataset.normalize(test.images))
        assert row["test_loss"] == pytest.approx(F.cross_entropy(logits, test.labels).item(), rel=1e-2)


class ColumnNorm(nn.Module):
    """A norm whose parameters have three dimensions."""

    def __init__(self, num_channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(num_channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(num_channels, 1, 1))

    def forward(self, x):
        return self.gamma * x + self.beta


@pytest.mark.parametrize("norm", ["bn", ColumnNorm])
@pytest.mark.parametrize("lanes", [1, 2])
def test_weight_decay_spares_what_belongs_to_norms_and_biases_when_told(norm, lanes):
    members = [make_training(norm, norm_weight_decay=False, seed=seed) for seed in range(lanes)]
    engine = make_engine(members, "auto")
    network = members[0].model if lanes == 1 else engine.network
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decays, spared = ({names[id(p)] for p in group["params"]} for group in engine.optimizer.param_groups)
    assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [1e-4, 0.0]
    assert all("conv" in name or (name.startswith("classifier") and name.endswith("weight")) for name in decays)
    assert all("norm" in name or name.endswith("bias") for name in spared)
    assert decays | spared == set(names.values())


def test_history_counts_are_those_of_the_epoch():
    training = make_training("gn", drop_last=False, batch_size=36, base_lr=1e-9, epochs=1)
    before = copy.deepcopy(training.model)
    finish(training)
    images, labels = zip(*train_batches(training.dataset, 36, drop_last=False, seed=0, epoch=0), strict=True)
    logits, labels = before.train()(torch.cat(images)), torch.cat(labels)
    row = training.progress.history[0]
    assert row["train_error"] == pytest.approx(100 * (logits.argmax(1) != labels).double().mean().item())
    assert row["train_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert row["step"] == 3


def test_evaluation_is_that_of_single_images():
    training = finish(make_training("bn", base_lr=0.01))
    model, dataset = training.model.eval(), training.dataset
    with torch.no_grad():
        logits = torch.cat([model(dataset.normalize(image[None])) for image in dataset.test.images])
    wrong = [int(row.argmax()) != int(label) for row, label in zip(logits, dataset.test.labels, strict=True)]
    loss, error = evaluate(model, dataset, dataset.test, "float32", batch_size=7)
    assert error == pytest.approx(100 * sum(wrong) / 40)
    assert loss == pytest.approx(F.cross_entropy(logits, dataset.test.labels).item(), rel=1e-4)
    assert training.progress.history[-1]["test_error"] == pytest.approx(100 * sum(wrong) / 40)


@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize("cut", [1, 5, 12, 13, 23])
def test_a_training_cut_at_any_step_goes_on_bit_for_bit(tmp_path, norm, cut):
    whole = finish(make_training(norm, drop_last=True))

    class Cut(Exception):
        pass

    first = make_training(norm)

    def pause() -> None:
        if first.progress.step == cut:
            save_checkpoint(tmp_path, first.state())
            raise Cut

    with pytest.raises(Cut):
        train(Eager(first), pause)
    second = make_training(norm, seed=0)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.zero_()
    second.restore(load_checkpoints(tmp_path)[0])
    finish(second)
    assert_same(weights(second), weights(whole))
    assert without_times(second.progress.history) == without_times(whole.progress.history)


def test_max_steps_ends_within_an_epoch():
    training = finish(make_training("gn", epochs=5, max_steps=15))
    assert [row["step"] for row in training.progress.history] == [12, 15]


def test_reported_error_is_the_median_of_the_last_epochs_which_are_all_tested():
    training = finish(make_training("gn", epochs=6, test_every=4, report_epochs=2))
    errors = [row["test_error"] for row in training.progress.history]
    assert [error is None for error in errors] == [True, True, True, False, False, False]
    for row, error in zip(training.progress.history, (1.0, 90.0, 50.0, 10.0, 40.0, 20.0), strict=True):
        row["test_error"] = error
    result = summarize(training)
    assert result["test_error"] == 30.0
    assert result["final_test_error"] == 20.0
    training.recipe = dataclasses.replace(training.recipe, report_epochs=5)
    assert summarize(training)["test_error"] == 40.0  # of 90 50 10 40 20: neither the best nor the mean nor the last


def test_held_out_images_are_measured_when_there_are_any():
    assert finish(make_training("gn", epochs=1)).progress.history[0]["val_error"] is None
    assert 0 <= finish(make_training("gn", epochs=1, val_size=12)).progress.history[0]["val_error"] <= 100


@pytest.mark.parametrize("steps", [3, 150])
def test_a_loss_that_is_not_finite_ends_the_training(steps):
    training = make_training("none", epochs=20, max_steps=steps, schedule="constant", base_lr=1e30)
    with pytest.raises(Diverged, match="not finite by step"):
        finish(training)


def test_responses_of_a_model_that_names_them_have_their_percentiles():
    assert "response_percentiles" not in finish(make_training("gn", epochs=1)).progress.history[0]
    training = make_training("gn", epochs=1, max_steps=1)
    training.model.response = nn.Identity()
    blocks, response = training.model.blocks, training.model.response
    training.model.blocks = nn.Sequential(*blocks, response)
    finish(training)
    order = np.random.default_rng(0).permutation(40)
    with torch.no_grad():
        images = training.dataset.normalize(training.dataset.test.images[order])
        values = blocks(F.relu(training.model.norm1(training.model.conv1(images)))).flatten().sort().values
    found = training.progress.history[0]["response_percentiles"]
    assert found == pytest.approx(np.percentile(values.numpy(), (1, 20, 80, 99)).tolist(), abs=1e-6)
    assert found[3] > 0


def test_vgg_records_its_responses_before_the_last_activation():
    training = make_training("gn", epochs=1, max_steps=1)
    training.model = gnbench.model("vgg16", norm="gn", num_classes=3)
    images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 8:24, 8:24] = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    training.dataset.test.images = images
    low, _, _, high = response_percentiles(training.model.eval(), training.dataset, "response", "float32")
    assert low < -0.5 < 0.5 < high


def test_frozen_epochs_keep_running_statistics_and_normalize_with_them():
    training = make_training("bn", epochs=2, frozen_epochs=1)
    seen = {}

    def pause() -> None:
        seen[training.progress.step] = training.model.norm1.running_mean.clone()

    train(Eager(training), pause)
    assert not torch.equal(seen[1], seen[11])
    for step in range(12, 25):
        assert torch.equal(seen[step], seen[12])


def test_the_error_of_a_run_with_frozen_epochs_is_of_those_alone():
    training = finish(make_training("bn", epochs=4, frozen_epochs=2, report_epochs=3))
    for row, error in zip(training.progress.history, (60.0, 50.0, 10.0, 20.0), strict=True):
        row["test_error"] = error
    assert summarize(training)["test_error"] == 15.0
    training.recipe = dataclasses.replace(training.recipe, report_epochs=1)
    assert summarize(training)["test_error"] == 20.0


def test_bf16_trains_and_keeps_float32_weights():
    training = make_training("gn", epochs=1, max_steps=3)
    training.precision = "bf16"
    finish(training)
    assert {p.dtype for p in training.model.parameters()} == {torch.float32}
    assert math.isfinite(training.progress.history[0]["train_loss"])


def test_order_of_images_does_not_depend_on_torchs_own_generator():
    one, other = make_training(), make_training()
    torch.manual_seed(1)
    finish(one)
    torch.manual_seed(2)
    finish(other)
    assert_same(weights(one), weights(other))


def test_a_model_without_running_statistics_reports_no_choice_of_them():
    assert summarize(finish(make_training("gn", epochs=1)))["test_error_by_statistics"] == {}
    assert isinstance(make_training("gn").model, nn.Module)
