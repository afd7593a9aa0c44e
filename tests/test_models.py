"""Models: golden parameter counts, shapes, and that nothing about them depends on which norm they are given."""

import ast
import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import nn

import gnbench
from gnbench.configs import choices, load_group
from gnbench.errors import UserError
from gnbench.models import brings_activation, initialize
from gnbench.norms import WeightStandardization
from gnbench.trial import channel_counts

NORMS = ["bn", "gn", "ln", "in"]


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters", "published_m"),
    [
        ("resnet8", 75_290, None),
        ("resnet20", 269_722, 0.27),
        ("resnet32", 464_154, 0.46),
        ("resnet44", 658_586, 0.66),
        ("resnet56", 853_018, 0.85),
        ("resnet110", 1_727_962, 1.7),
        ("resnet18", 11_173_962, None),
        ("resnet34", 21_282_122, None),
        ("resnet50", 23_520_842, None),
        ("vgg16", 14_728_266, None),
    ],
)
def test_parameter_counts(name, parameters, published_m):
    count = count_parameters(gnbench.model(name, norm="bn"))
    assert count == parameters
    if published_m:
        assert float(f"{count / 1e6:.2g}") == published_m


def test_vgg_of_another_width():
    model = gnbench.model("vgg16", norm="gn", width=0.25)
    widths = [module.out_channels for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert widths == [16, 16, 32, 32, *[64] * 3, *[128] * 6]
    with pytest.raises(gnbench.UserError, match=r"model\.width=0\.001 is not legal"):
        gnbench.model("vgg16", norm="gn", width=0.001)


@pytest.mark.parametrize("name", choices("model"))
@pytest.mark.parametrize("norm", ["bn", "in"])
def test_every_model_maps_images_to_logits(name, norm):
    images = torch.zeros(2, 3, 32, 32)
    with torch.no_grad():
        assert gnbench.model(name, norm=norm, num_classes=7)(images).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
def test_every_norm_gets_the_same_weights_from_the_same_seed(name):
    def weights(norm: str, seed: int) -> torch.Tensor:
        model = gnbench.model(name, norm=norm, seed=seed)
        return torch.cat([p.flatten() for p in model.parameters() if p.ndim > 1])

    reference = weights("bn", seed=3)
    for norm in (*NORMS, "none"):
        assert torch.equal(weights(norm, seed=3), reference)
    assert not torch.equal(weights("bn", seed=4), reference)


@pytest.mark.parametrize(
    ("name", "norm"), [(name, norm) for name in ("resnet8", "resnet18") for norm in NORMS] + [("resnet50", "bn")]
)
def test_gamma_of_each_blocks_last_norm_starts_alike_whatever_the_norm(name, norm):
    def zero_scales(**params: object) -> int:
        model = gnbench.model(name, norm=norm, **params)
        return sum(bool((p == 0).all()) for key, p in model.named_parameters() if p.ndim == 1 and "weight" in key)

    num_blocks = {"resnet8": 3, "resnet18": 8, "resnet50": 16}[name]
    assert zero_scales(zero_init_residual=True) == num_blocks
    assert zero_scales(zero_init_residual=False) == 0
    assert zero_scales() == (0 if name == "resnet8" else num_blocks), "as arXiv:1512.03385 and arXiv:1803.08494 have it"


def test_he_initialization_has_its_variance():
    weight = gnbench.model("resnet18", norm="bn").layer4[1].conv2.weight
    assert weight.var().item() == pytest.approx(2 / (512 * 9), rel=0.01)


def test_option_a_shortcut_takes_every_second_position_and_pads_with_zeros():
    block = gnbench.model("resnet8", norm="gn", zero_init_residual=True).eval().blocks[1]  # 16 -> 32 channels
    x = torch.rand(2, 16, 8, 8)
    y = block(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert torch.equal(y[:, 16:], torch.zeros(2, 16, 4, 4))


def test_channel_counts_are_those_of_the_norms():
    assert channel_counts(load_group("model", "resnet20", {}, {})) == [16, 32, 64]
    assert channel_counts(load_group("model", "resnet50", {}, {})) == [64, 128, 256, 512, 1024, 2048]


def test_what_cannot_be_built_is_refused_in_a_sentence():
    with pytest.raises(UserError, match=r"norm=foo is not known: it is one of batch_group, bcn, "):
        gnbench.norm("foo")
    with pytest.raises(UserError, match=r"model=foo is not known: it is one of resnet110"):
        gnbench.model("foo")
    with pytest.raises(UserError, match=r"norm\.groups is not known: norm=gn takes num_groups, channels_per_group"):
        gnbench.norm("gn", groups=2)
    with pytest.raises(UserError, match=r"on 16 channels \(model=resnet20 has norms on 16, 32, 64\): num_groups=32"):
        gnbench.model("resnet20", norm=gnbench.norm("gn", num_groups=32))
    with pytest.raises(UserError, match="model=resnet20 cannot be built: depth=21 is not 6n"):
        gnbench.model("resnet20", depth=21)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: gnbench.model("resnet8", zero_init_residual="no"),
            "zero_init_residual=no is not legal: it is true or",
        ),
        (lambda: gnbench.model("resnet8", depth=8.0), r"depth=8\.0 is not legal: it is a whole number"),
        (lambda: gnbench.model("vgg16", width="wide"), "width=wide is not legal: it is a number, or null"),
        (lambda: gnbench.norm("bcn", estimate="no"), "estimate=no is not legal: it is true or false"),
        (lambda: gnbench.norm("gn", num_groups=True), "num_groups=True is not legal: it is a whole number, or null"),
    ],
)
def test_a_parameter_of_another_type_is_refused(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()
    assert gnbench.norm("bn", eps=1)(8).eps == 1  # a whole number is a number


class Tanh(nn.Module):
    """A norm whose backward pass needs its output."""

    def __init__(self, num_channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(num_channels, 1, 1))

    def forward(self, x):
        return torch.tanh(self.alpha * x)


@pytest.mark.parametrize("name", ["resnet8", "vgg16"])
def test_no_activation_overwrites_what_a_norm_needs_in_its_backward_pass(name):
    gnbench.model(name, norm=Tanh)(torch.randn(2, 3, 32, 32)).sum().backward()


def test_a_classifier_may_lack_a_bias():
    model = nn.Linear(4, 2, bias=False)
    initialize(model, seed=0)
    assert 0 < model.weight.std() < 0.03


def test_a_norm_that_changes_the_shape_or_returns_nan_is_refused():
    with pytest.raises(UserError, match=r"turns the shape \(4, 16, 32, 32\) into \(4, 16, 1024\)"):
        gnbench.model("resnet8", norm=lambda num_channels: nn.Flatten(2))
    with pytest.raises(UserError, match="not finite"):
        gnbench.model("resnet8", norm=lambda num_channels: nn.Threshold(1e9, float("nan")))


class NormAndReLU(nn.GroupNorm):
    """GN that brings the activation after it, which is ReLU, so that a model with it is one with GN."""

    def __init__(self, num_channels: int, apply_act: bool = True) -> None:
        super().__init__(2, num_channels)
        self.apply_act = apply_act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y.relu() if self.apply_act else y


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50", "vgg16"])
def test_a_norm_that_brings_its_relu_gives_the_model_of_the_norm_without(name):
    plain, bringing = (
        gnbench.model(name, norm=norm, seed=1).double() for norm in (gnbench.norm("gn", num_groups=2), NormAndReLU)
    )
    generator = torch.Generator().manual_seed(0)
    for one, other in zip(plain.parameters(), bringing.parameters(), strict=True):
        value = one.detach() + 0.3 * torch.randn(one.shape, generator=generator, dtype=one.dtype) * (one.ndim == 1)
        one.data, other.data = value, value.clone()
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    y, z = plain(images), bringing(images)
    torch.testing.assert_close(y, z)
    for logits in (y, z):
        logits.square().sum().backward()
    for one, other in zip(plain.parameters(), bringing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_norm_without_a_signature_brings_no_activation():
    assert not brings_activation(max)  # a builtin that has none
    assert not brings_activation(nn.BatchNorm2d)
    assert brings_activation(NormAndReLU)
    assert brings_activation(functools.partial(NormAndReLU, apply_act=True))


@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
def test_a_norm_of_the_weights_acts_on_every_convolution_and_what_is_trained_is_underneath(name):
    plain, model = (gnbench.model(name, norm=norm, seed=3) for norm in ("gn", "gn_ws"))
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    trained = [module.weight for module in plain.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == len(trained) > 6
    for conv, weight in zip(convs, trained, strict=True):
        assert torch.equal(conv.parametrizations.weight.original, weight)
        rows = weight.flatten(1)
        expected = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(conv.weight, expected.view_as(weight))
    assert count_parameters(model) == count_parameters(plain)
    same = gnbench.model(name, norm=gnbench.norm("gn", weight=WeightStandardization), seed=3)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(same(images), model(images))
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied(images), model(images))


def test_what_stands_inside_a_norm_is_started_by_its_author_and_changes_no_weight_outside():
    class Inside(nn.Module):
        def __init__(self, num_channels: int) -> None:
            super().__init__()
            self.mix = nn.Conv2d(num_channels, num_channels, 1)
            nn.init.constant_(self.mix.weight, 0.25)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(x)

    Inside.conv_weight = WeightStandardization
    plain, model = gnbench.model("resnet8", norm="none", seed=3), gnbench.model("resnet8", norm=Inside, seed=3)
    assert torch.equal(model.classifier.weight, plain.classifier.weight)
    assert torch.equal(model.blocks[2].conv2.parametrizations.weight.original, plain.blocks[2].conv2.weight)
    assert (model.blocks[2].norm2.mix.weight == 0.25).all()


def test_a_norm_may_start_the_end_of_a_branch_in_its_own_way():
    model = gnbench.model("resnet8", norm="skipinit")
    assert [block.norm2.weight.tolist() for block in model.blocks] == [[0.0]] * 3
    assert model.blocks[0].norm1.weight is None
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.blocks[0](x := model.act1(model.norm1(model.conv1(images)))), x)
    bcn = gnbench.model("resnet8", norm="bcn", zero_init_residual=True)
    assert not any(block.norm2.channel.weight.any() for block in bcn.blocks)


class Faulty(nn.Module):
    """A layer that is wrong in one way."""

    def __init__(self, num_channels: int, fault: str) -> None:
        super().__init__()
        self.fault = fault
        if fault == "statistics":
            self.register_buffer("running_mean", torch.zeros(num_channels + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fault == "list":
            return [x]
        if self.fault == "gradient":
            return (x - x.detach()).square().sum((1, 2, 3), keepdim=True).sqrt() + x
        if self.fault == "detached":
            return x.detach()
        if self.fault == "float64":
            return x.double()
        if self.fault == "evaluation" and not self.training:
            return x.sum(0)
        return x


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("list", "its output is of type list, not a tensor"),
        ("gradient", "its gradient is not finite on a first batch"),
        ("detached", "its output is cut off from its input"),
        ("float64", "its output is of float64 where its input is of float32"),
        ("evaluation", r"turns the shape \(4, 16, 32, 32\) into \(16, 32, 32\)"),
        ("statistics", "shape"),
    ],
)
def test_a_layer_that_would_fail_later_is_refused_at_once(fault, sentence):
    with pytest.raises(UserError, match=f"on 16, 32, 64 channels .*{sentence}"):
        gnbench.model("resnet8", norm=functools.partial(Faulty, fault=fault))


def test_what_is_no_module_or_is_wrong_without_its_activation_alone_is_refused():
    with pytest.raises(UserError, match=r"it returns int, no torch\.nn\.Module"):
        gnbench.model("resnet8", norm=lambda num_channels: num_channels)
    with pytest.raises(UserError, match=r"into \(4, 16384\)"):
        gnbench.model("resnet8", norm=lambda num_channels, apply_act: nn.ReLU() if apply_act else nn.Flatten())


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        (lambda conv: nn.Flatten(), r"of shape \(16, 3, 3, 3\): it turns the shape"),
        (lambda conv: nn.Threshold(1e9, float("nan")), "its weight is not finite"),
        (lambda conv: 1 / 0, "division by zero"),
    ],
)
def test_a_norm_of_the_weights_that_cannot_be_is_refused(weight, sentence):
    with pytest.raises(UserError, match=f"norm cannot act on the weights of model=resnet8.*{sentence}"):
        gnbench.model("resnet8", norm=gnbench.norm("gn", weight=weight))


def test_python_surface_takes_a_norm_from_its_file():
    assert gnbench.norm("gn", num_groups=4)(16).num_groups == 4
    assert gnbench.norm("gn")(16).num_groups == 8
    assert gnbench.norm("gn", channels_per_group=2)(16).num_groups == 8
    assert gnbench.norm("bn", norm_batch_size=2)(16).norm_batch_size == 2
    assert gnbench.norm("bn")(16).norm_batch_size is None


@pytest.mark.parametrize(
    "path",
    ["train.py", "evaluate.py", "precise_bn.py", "models/resnet.py", "models/vgg.py", "models/__init__.py"],
)
def test_models_and_trainer_ask_no_norm_what_it_is(path):
    source = (Path(gnbench.__file__).parent / path).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "isinstance":
            assert "Norm" not in ast.unparse(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in ("bn", "gn", "ln", "in")
