"""Population statistics against a naive float64 formula, and that measuring them changes nothing."""

import copy

import pytest
import torch
from test_train import finish, make_training
from torch import nn

import gnbench
from gnbench.evaluate import error_by_statistics, precise_images
from gnbench.norms import BatchNorm, BatchRenorm
from gnbench.precise_bn import batch_statistics, kept_statistics, layers_with_statistics, update_precise_statistics


def make_batches(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 + 1 for _ in range(count)]


def make_model(norm_batch_size: int | None) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), BatchNorm(4, norm_batch_size), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)]
    return nn.Sequential(*layers).double()


def test_precise_statistics_are_the_pooled_moments_of_each_layers_input():
    for norm_batch_size in (None, 2):
        model, batches = make_model(norm_batch_size), make_batches()
        first, second, relu, third, _ = (copy.deepcopy(layer) for layer in model)
        update_precise_statistics(model, batches)
        inputs_1 = [first(images) for images in batches]
        plain = [nn.functional.batch_norm(x, None, None, second.weight, second.bias, training=True) for x in inputs_1]
        inputs_2 = [third(relu(x)) for x in plain]
        for layer, inputs in ((model[1], inputs_1), (model[4], inputs_2)):
            values = torch.cat(inputs).transpose(0, 1).flatten(1)
            torch.testing.assert_close(layer.running_mean, values.mean(1))
            torch.testing.assert_close(layer.running_var, values.var(1, correction=0))
        assert model[1].norm_batch_size == norm_batch_size


def test_layers_are_found_by_what_they_keep():
    model = nn.Sequential(
        nn.BatchNorm2d(2), nn.GroupNorm(1, 2), BatchNorm(2), nn.BatchNorm2d(2, track_running_stats=False)
    )
    assert layers_with_statistics(model) == [model[0], model[2]]


class Odd(nn.Module):
    """Keeps statistics of its own: a root mean square, in a shape of its own."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("running_rms", torch.ones(1, num_channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.running_rms

    def set_statistics(self, mean: torch.Tensor, square: torch.Tensor) -> None:
        self.running_rms.copy_(square.sqrt()[None, :, None, None])


def test_a_layer_takes_the_population_in_its_own_way_and_a_part_that_is_not_used_keeps_what_it_has():
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_var", torch.ones(1, 3, 1, 1))
            self.unused = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model, batches = nn.Sequential(Odd(3), Shaped()).double(), make_batches()
    update_precise_statistics(model, batches)
    values = torch.cat(batches).transpose(0, 1).flatten(1)
    rms = values.square().mean(1).sqrt()
    torch.testing.assert_close(model[0].running_rms.flatten(), rms)
    torch.testing.assert_close(model[1].running_var.flatten(), values.var(1, correction=0))  # the rms was still 1
    assert torch.equal(model[1].unused.running_var, torch.ones(3))


def test_batch_statistics_normalize_with_the_batch_and_leave_no_trace():
    model = make_model(None)
    images = make_batches(1)[0]
    before = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model).train()(images)
    model.eval()
    with batch_statistics(model):
        assert torch.equal(model(images), expected)
    assert not any(layer.training for layer in model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_kept_statistics_come_back_after_an_update():
    model = make_model(None)
    before = copy.deepcopy(model.state_dict())
    with kept_statistics(model):
        update_precise_statistics(model, make_batches())
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_each_choice_of_statistics_has_its_error_and_the_model_stays():
    training = finish(make_training("bn", epochs=1))
    before = copy.deepcopy(training.model.state_dict())
    errors = error_by_statistics(training.model, training.dataset, "float32", batch_size=8, num_precise_images=64)
    assert list(errors) == ["ema", "precise", "batch"]
    assert errors["ema"] == training.progress.history[-1]["test_error"]
    again = error_by_statistics(training.model, training.dataset, "float32", batch_size=8, num_precise_images=64)
    assert again == errors
    for key, value in training.model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_precise_statistics_repair_running_averages_that_are_wrong():
    training = finish(make_training("bn", epochs=3))
    for layer in layers_with_statistics(training.model):
        layer.running_mean.fill_(50.0)
    errors = error_by_statistics(training.model, training.dataset, "float32", batch_size=8, num_precise_images=96)
    assert errors["ema"] > 50
    assert errors["precise"] < 45
    assert errors["batch"] < 45


def test_the_populations_statistics_are_of_the_activations_that_the_test_has():
    training = finish(make_training("bn", epochs=1))
    model, seen = training.model, []
    model.conv1.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    for precision, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        seen.clear()
        error_by_statistics(model, training.dataset, precision, batch_size=8, num_precise_images=64)
        assert set(seen) == {dtype}


def test_precise_images_are_as_many_as_asked_or_as_there_are():
    dataset = make_training().dataset
    assert sum(len(images) for images in precise_images(dataset, 40)) == 40
    assert sum(len(images) for images in precise_images(dataset, 10_000)) == 96
    dataset.train.images, dataset.train.labels = (
        dataset.train.images.repeat(16, 1, 1, 1),
        dataset.train.labels.repeat(16),
    )
    assert [len(images) for images in precise_images(dataset, 1200)] == [1000, 200]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit.script, which fvcore's import calls
def test_precise_statistics_agree_with_fvcores():
    from fvcore.nn.precise_bn import update_bn_stats

    dataset = make_training().dataset
    batches = precise_images(dataset, 96)
    batches = list(torch.cat(batches).split(16))
    ours = gnbench.model("resnet8", norm=nn.BatchNorm2d, num_classes=3)
    theirs = copy.deepcopy(ours)
    update_precise_statistics(ours.eval(), batches)
    update_bn_stats(theirs.train(), batches, num_iters=len(batches))
    for one, other in zip(layers_with_statistics(ours), layers_with_statistics(theirs), strict=True):
        torch.testing.assert_close(one.running_mean, other.running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.running_var, other.running_var, rtol=1e-5, atol=1e-5)


def test_batch_renorm_is_batch_norm_where_the_statistics_of_the_batch_are_asked_for():
    images = make_batches(1)[0]
    plain, renorm = BatchNorm(3).double(), BatchRenorm(3).double()
    renorm.running_mean.fill_(1.3)
    expected = plain.train()(images)
    with batch_statistics(renorm.eval()):
        assert torch.equal(renorm(images), expected)
    assert not torch.equal(renorm.train()(images), expected)
