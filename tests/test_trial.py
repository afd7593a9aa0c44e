"""A stranger's layer is tried before training: what it may do wrong has a sentence, and what it may do is let be."""

import pytest
import torch
from conftest import tiny_config
from torch import nn

from gnbench.configs import choices, load_group, partial
from gnbench.errors import UserError
from gnbench.norms import BatchNorm
from gnbench.plan import plan_run
from gnbench.run import check_runs
from gnbench.trial import check_batches, check_norm, count_others

OWN_SIZE = "+norm.norm_batch_size=${norm_batch_size}"
SIZES = [(name, size) for name in choices("norm") if name != "custom" for size in (1, 2, 8)]


def check(layer: str, *words: str) -> None:
    """What a sweep with a layer of this file does before it trains."""
    node = ("norm=custom", f"norm._target_={__name__}.{layer}")
    check_runs([plan_run(tiny_config(*node, *words, "results=x"), default_threads=1)])


def normalize(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True) + 1e-5).sqrt()


class Layer(nn.Module):
    """What the layers below have in common: nothing but where they are built."""

    def __init__(self, num_channels: int, norm_batch_size: int | None = None) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.norm_batch_size = norm_batch_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.split(x) if self.training else x

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([normalize(part) for part in x.split(self.norm_batch_size or len(x))])


# Normalization batches


class Ignorant(Layer):
    def split(self, x):
        return normalize(x)


class CountsWorkers(Layer):
    def split(self, x):
        return torch.cat([normalize(part) for part in x.chunk(self.norm_batch_size or 1)])


class Noisy(Layer):
    def split(self, x):
        return normalize(x) + torch.randn_like(x)


class Alone(Layer):
    def split(self, x):
        return 2 * x


class FromFour(Layer):
    def split(self, x):
        if self.norm_batch_size in (1, 2, 3):
            raise ValueError("4 or more")
        return normalize(x)


class Exact(Layer):
    def split(self, x):
        size = self.norm_batch_size or len(x)
        assert len(x) % size == 0
        return torch.cat([normalize(part) for part in x.chunk(len(x) // size)])


class Running(Exact):
    def __init__(self, num_channels: int, norm_batch_size: int | None = None) -> None:
        super().__init__(num_channels, norm_batch_size)
        self.register_buffer("running_mean", torch.zeros(num_channels))


class NeverWhole(Running):
    def split(self, x):
        return torch.cat([normalize(part) for part in x.chunk(len(x) // self.norm_batch_size)])


class Renamed(Running):
    def __init__(self, num_channels: int, norm_batch_size: int | None = None) -> None:
        super().__init__(num_channels)
        self.size = norm_batch_size
        del self.norm_batch_size

    def split(self, x):
        return torch.cat([normalize(part) for part in x.split(self.size)])


class OtherBuffers(Layer):
    def __init__(self, num_channels: int, norm_batch_size: int | None = None) -> None:
        super().__init__(num_channels, norm_batch_size)
        self.register_buffer("mean", torch.zeros(num_channels))

    def split(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        return super().split(x)


@pytest.mark.parametrize("layer", ["Ignorant", "CountsWorkers"])
@pytest.mark.parametrize(("size", "sentence"), [(8, "=2 .* on [35] other images of a batch of 6"), (1, "=1 .* on 2")])
def test_a_layer_that_does_not_follow_its_normalization_batch_size_is_refused(layer, size, sentence):
    sentence = f"norm={layer} is given norm_batch_size{sentence}.*norm_batch_size=null"
    if (layer, size) == ("CountsWorkers", 8):
        sentence = sentence.replace("[35]", "2")
    with pytest.raises(UserError, match=sentence):
        check(layer, OWN_SIZE, f"norm_batch_size={size}")


@pytest.mark.parametrize("layer", ["Layer", "Noisy", "Alone", "FromFour", "Exact", "Running"])
def test_layers_that_follow_it_or_that_cannot_be_asked_are_let_be(layer):
    check(layer, OWN_SIZE, "norm_batch_size=8")


def test_a_layer_of_the_whole_batch_says_so_by_null():
    check("Ignorant", "+norm.norm_batch_size=null")


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_every_norm_of_the_zoo_shares_its_statistics_among_so_many_images(name, size):
    node = load_group("norm", name, {}, {"norm_batch_size": size})
    shape = check_norm(load_group("model", "resnet8", {}, {}), partial(node), name)
    check_batches(node, shape, name)
    if node.get("norm_batch_size"):
        assert count_others(partial(node), (3 * size, 16, 4, 4)) == size - 1


def test_the_images_that_an_output_depends_on_are_counted_without_what_a_layer_has_kept():
    assert count_others(lambda num_channels: BatchNorm(num_channels, 3), (9, 16, 4, 4)) == 2
    assert count_others(lambda num_channels: nn.GroupNorm(4, num_channels), (9, 16, 4, 4)) == 0


def test_what_keeps_running_statistics_knows_its_normalization_batch_size_by_name():
    with pytest.raises(UserError, match=r"running statistics in Renamed, which has no attribute norm_batch_size: "):
        check("Renamed", OWN_SIZE)


def test_that_population_statistics_are_those_of_whole_batches_is_said_to_a_layer_that_fails_there():
    words = r"its pass for population statistics, in which its attribute norm_batch_size is None .* raised TypeError: "
    with pytest.raises(UserError, match=rf"{words}.*\(test_trial\.py:\d+, in split\)"):
        check("NeverWhole", OWN_SIZE, "norm_batch_size=8")


def test_statistics_in_buffers_of_another_name_are_refused():
    with pytest.raises(UserError, match=r"norm=OtherBuffers changes mean in training: buffers .* begin with running_"):
        check("OtherBuffers", OWN_SIZE)


# Steps


class Fails(nn.Module):
    """Raises in one step."""

    def __init__(self, num_channels: int, step: str) -> None:
        super().__init__()
        self.step = step
        if step == "building":
            raise KeyError("my own bug")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.step == "training" and self.training:
            raise RuntimeError("my own bug")
        if self.step == "silently":
            raise AssertionError
        if self.step == "torch":
            return x @ torch.ones(3)
        if self.step == "evaluation" and not self.training:
            assert len(x) % 4 == 0, "my own bug"
        if self.step == "gradient":
            x.register_hook(lambda gradient: 1 / 0)
        if self.step == "constant":
            return x.detach() * nn.Parameter(torch.ones(()))
        return x.detach() if self.step == "detached" else x


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ("building", r"cannot be built on 16, 32, 64 channels .*: KeyError: 'my own bug' \(test_trial.py:\d+, in __in"),
        (
            "training",
            r"cannot be used on 16, .* training raised RuntimeError: my own bug \(test_trial.py:\d+, in forwa",
        ),
        ("silently", r"its forward pass in training raised AssertionError \(test_trial.py:\d+, in forward\); tried"),
        (
            "torch",
            r"training raised RuntimeError: .* \(test_trial.py:\d+, in forward\); tried on 4 images of 4 x 4 pos",
        ),
        ("evaluation", "in evaluation, of 3 images, raised AssertionError: my own bug"),
        (
            "gradient",
            r"its backward pass raised ZeroDivisionError: division by zero \(test_trial.py:\d+, in <lambda>\)",
        ),
        ("constant", "no gradient of its output reaches its input: is the input detached on the way"),
        ("detached", "its output is cut off from its input, .*: is it detached"),
    ],
)
def test_the_step_in_which_a_layer_fails_is_named_and_the_line(step, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        check("Fails", f"+norm.step={step}")
    if "raised" in sentence:
        assert caught.value.__cause__.__cause__ is not None


def test_the_traceback_that_is_asked_for_shows_the_line_of_the_layer(gnbench):
    words = ("data=tiny", "norm=custom", f"norm._target_={__name__}.Fails", "+norm.step=training", "batch_size=8")
    done = gnbench(*words, env={"GNBENCH_TRACEBACK": "1"})
    assert 'raise RuntimeError("my own bug")' in done.stderr


class InPlace(nn.Module):
    def __init__(self, num_channels: int) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x -= x.mean((1, 2, 3), keepdim=True)
        return x


class Halves(nn.Module):
    """Legal on images of 8 x 8 positions and more."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(3, (8, -1)).flatten(3)


def test_what_works_behind_a_convolution_and_on_a_models_images_is_let_be():
    check("InPlace")
    check("Halves")
    with pytest.raises(UserError, match=r"used on 2048 channels .*; tried on 4 images of 4 x 4 positions$"):
        check("Halves", "model=resnet50")


def test_a_norm_without_parameters_has_no_empty_brackets_and_one_of_many_groups_needs_no_16_channels():
    with pytest.raises(UserError, match=r"^norm=Fails cannot be built on .* missing 1 required .* 'step'"):
        check("Fails")
    config = tiny_config("norm=gn", "norm.num_groups=32", "model=vgg16", "data.size=32", "results=x")
    check_runs([plan_run(config, default_threads=1)])
