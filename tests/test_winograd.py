"""Convolutions with fewer multiplications, beside torch's by the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize

import gnbench
from gnbench import kernels
from gnbench.kernels import winograd
from gnbench.models.conv import Conv2d
from gnbench.norms.weights import WeightStandardization

pytestmark = pytest.mark.skipif(not kernels.are_available(), reason="kernels need a compiler")

ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5}  # relative to the largest number


def convolution(inputs: int, outputs: int | None = None, lanes: int = 1, **options) -> Conv2d:
    """One that an engine has asked to multiply less."""
    sizes = lanes * inputs, lanes * (outputs or inputs), 3
    conv = Conv2d(*sizes, **{"padding": 1, "bias": False, "groups": lanes, **options})
    nn.init.normal_(conv.weight, generator=torch.manual_seed(1))
    conv.winograd = True
    return conv


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.manual_seed(0)).to(memory_format=torch.channels_last)


def is_taken(conv: Conv2d, x: torch.Tensor) -> bool:
    return conv(x).grad_fn.name() == "_ConvolveBackward"


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (2, 9), (1, 1), (1, 4), (3, 1)], ids=str)
@pytest.mark.parametrize(
    ("lanes", "inputs", "outputs"), [(1, 16, 16), (1, 16, 32), (1, 64, 16), (1, 48, 80), (3, 16, 48), (2, 32, 16)]
)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_it_is_the_convolution(dtype, lanes, inputs, outputs, size):
    """Output and gradients, for as many images as leave the last tiles few."""
    x, conv = image(3, lanes * inputs, *size, dtype=torch.float64), convolution(inputs, outputs, lanes).double()
    upstream = torch.randn(3, lanes * outputs, *size, dtype=torch.float64)
    numbers = []
    for wanted, kind in ((False, torch.float64), (True, dtype)):
        conv.winograd, conv.weight.grad = wanted, None
        conv, own = conv.to(kind), x.to(kind, memory_format=torch.preserve_format).detach().requires_grad_()
        y = conv(own)
        assert (y.grad_fn.name() == "_ConvolveBackward") == wanted
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.backward(upstream.to(kind))
        numbers.append([y.detach(), own.grad, conv.weight.grad])
    for expected, ours in zip(*numbers, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == expected.shape
        assert (ours.double() - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()


@pytest.mark.parametrize(("channels", "size"), [(16, 32), (32, 16), (64, 8)])
def test_it_rounds_hardly_more_than_torchs_own(channels, size):
    """The root mean square of float32's errors, of the output and of both gradients."""
    x, upstream = image(64, channels, size, size), torch.randn(64, channels, size, size)
    conv = convolution(channels)
    errors = {}
    exact = nn.functional.conv2d
    for way, dtype in (("exact", torch.float64), ("torch", torch.float32), ("ours", torch.float32)):
        own, weight = x.to(dtype).detach().requires_grad_(), conv.weight.detach().to(dtype).requires_grad_()
        y = winograd.convolve(own, weight) if way == "ours" else exact(own, weight, padding=1)
        y.backward(upstream.to(dtype))
        errors[way] = [number.double() for number in (y.detach(), own.grad, weight.grad)]
    for true, theirs, ours in zip(errors["exact"], errors["torch"], errors["ours"], strict=True):
        assert (ours - true).square().mean().sqrt() < 2 * (theirs - true).square().mean().sqrt()


def test_it_is_for_the_convolutions_it_is_written_for():
    x = image(4, 16, 6, 6)
    assert is_taken(convolution(16), x)
    assert is_taken(convolution(16).double(), x.double())
    unasked = convolution(16)
    unasked.winograd = False
    others = [
        unasked,
        convolution(16, bias=True),
        convolution(16, stride=2),
        convolution(16, padding=0),
        convolution(16, padding="same"),
        convolution(16, dilation=2, padding=2),
        convolution(16, padding_mode="circular"),
        convolution(16, 24),
        convolution(8, lanes=2),
        Conv2d(16, 16, 1),
    ]
    assert not any(is_taken(conv, x) for conv in others)
    assert not is_taken(convolution(24), image(4, 24, 6, 6))
    assert not is_taken(convolution(16).bfloat16(), x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_taken(convolution(16), x)
    torch.set_num_threads(2)
    try:
        assert not is_taken(convolution(16), x)
    finally:
        torch.set_num_threads(1)
    assert convolution(16)(x[:0]).shape == (0, 16, 6, 6)
    for wrong in (image(4, 32, 6, 6), x.double()):
        with pytest.raises(RuntimeError):
            convolution(16)(wrong)
    for shape in ((24, 16, 3, 3), (16, 16, 5, 5), (16, 16, 1, 1)):
        other = convolution(16)
        other.weight = nn.Parameter(torch.randn(shape))
        assert not is_taken(other, x)
    conv = convolution(16)
    with torch.device("meta"):
        assert is_taken(conv, x)
    with FakeTensorMode():
        assert convolution(16)(torch.randn(4, 16, 6, 6)).shape == x.shape


@pytest.mark.parametrize("order", ["channels_last", "contiguous", "a part"])
def test_numbers_may_lie_in_any_order_and_weights_be_computed(order):
    conv, x = convolution(16, 32), image(2, 48, 5, 5)
    x = {"channels_last": image(2, 16, 5, 5), "contiguous": x[:, :16].contiguous(), "a part": x[:, 16:32]}[order]
    x.requires_grad_()
    parametrize.register_parametrization(conv, "weight", WeightStandardization(conv))
    numbers = []
    for wanted in (True, False):
        conv.winograd = wanted
        y = conv(x)
        assert is_taken(conv, x) == wanted
        numbers.append([y.detach(), *torch.autograd.grad(y.sum((2, 3)).square().sum(), [x, *conv.parameters()])])
    for ours, expected in zip(*numbers, strict=True):
        assert torch.allclose(ours, expected, atol=1e-5 * float(expected.abs().max()))


def test_a_gradient_that_nobody_asks_for_is_not_computed(monkeypatch):
    called, call = [], kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *arguments: called.append(name) or call(name, *arguments))
    conv, x = convolution(16), image(2, 16, 4, 4)
    conv(x).sum().backward()
    conv.requires_grad_(False)
    conv(x.requires_grad_()).sum().backward()
    with torch.no_grad():
        assert not conv(x).requires_grad
    assert called == ["convolve", "weight_gradient", "convolve", "input_gradient", "convolve"]


@pytest.mark.parametrize("take", ["convolution", "norm"])
def test_what_is_saved_for_backward_may_come_back_in_another_format(take):
    layer = convolution(16) if take == "convolution" else gnbench.norm("gn")(16)
    layer.one_pass = True
    x, gradients = image(2, 16, 5, 5).requires_grad_(), []
    for unpack in (lambda saved: saved, lambda saved: saved.contiguous()):
        with saved_tensors_hooks(lambda saved: saved.detach(), unpack):
            y = layer(x)
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
    for ours, expected in zip(*gradients, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("changed", ["x", "weight"])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_change_between_forward_and_backward_is_noticed(changed, memory_format):
    conv = convolution(16).to(memory_format=memory_format)
    x = image(2, 16, 5, 5).contiguous(memory_format=memory_format)
    y = conv(x.requires_grad_())
    with torch.no_grad():
        {"x": x, "weight": conv.weight}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("compiler", "cause"),
    [
        ("false", "false ended with status 1"),
        ("no-compiler", "[Errno 2] No such file or directory: 'no-compiler'"),
        ("'", "No closing quotation"),
        ("c++ -include missing.h", "missing.h: No such file or directory"),
    ],
)
def test_a_compiler_that_does_not_work_is_said_in_a_line(compiler, cause, monkeypatch, caplog):
    monkeypatch.setenv("CXX", compiler)
    assert kernels._library.__wrapped__() is None
    assert caplog.messages[-1].startswith("trained by torch's own kernels, which are slower; gnbench's were not")
    assert cause in caplog.messages[-1]
    assert "\n" not in caplog.messages[-1]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_it_lets_through_what_is_not_a_number(bad):
    """A training that has diverged is to be seen to have; other images are not touched by it."""
    conv, x = convolution(16), image(3, 16, 6, 6)
    x[1, 2, 3, 3] = bad
    y = conv(x)
    assert not y[1, :, 2:5, 2:5].isfinite().any()
    assert F.conv2d(x, conv.weight, padding=1)[[0, 2]].allclose(y[[0, 2]], atol=1e-4)
    assert y[[0, 2]].isfinite().all()
