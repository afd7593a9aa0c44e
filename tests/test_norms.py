"""Norms against their formulas in float64, and against each other where they are the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gnbench.norms import BatchNorm, BatchRenorm, group_norm, instance_norm, layer_norm, no_norm


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def with_random_affine(norm: nn.Module) -> nn.Module:
    norm = norm.double()
    with torch.no_grad():
        norm.weight.copy_(randn(len(norm.weight), seed=1))
        norm.bias.copy_(randn(len(norm.bias), seed=2))
    return norm


def normalize_sets(x: torch.Tensor, sets: list[tuple], norm: nn.Module, eps: float = 1e-5) -> torch.Tensor:
    """The formula itself: over each set of indices, subtract the mean and divide by the standard deviation."""
    y = torch.empty_like(x)
    for index in sets:
        values = x[index]
        mean = values.mean()
        var = ((values - mean) ** 2).mean()
        y[index] = (values - mean) / (var + eps) ** 0.5
    return y * norm.weight[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize("num_groups", [1, 2, 3, 6])
def test_group_norm_is_its_formula(num_groups):
    x = randn(4, 6, 3, 5)
    norm = with_random_affine(group_norm(6, num_groups=num_groups))
    size = 6 // num_groups
    sets = [(n, slice(g * size, (g + 1) * size)) for n in range(4) for g in range(num_groups)]
    torch.testing.assert_close(norm(x), normalize_sets(x, sets, norm))


@pytest.mark.parametrize("norm_batch_size", [1, 2, 4, 8])
def test_batch_norm_is_its_formula_over_each_normalization_batch(norm_batch_size):
    x = randn(8, 3, 4, 5)
    norm = with_random_affine(BatchNorm(3, norm_batch_size))
    workers = 8 // norm_batch_size
    sets = [(slice(w, None, workers), c) for w in range(workers) for c in range(3)]
    torch.testing.assert_close(norm(x), normalize_sets(x, sets, norm))


def test_batch_norm_over_the_whole_batch_is_torchs_bit_for_bit():
    ours, theirs = BatchNorm(5, norm_batch_size=8), nn.BatchNorm2d(5)
    ours_x, theirs_x = (randn(8, 5, 4, 4).float().requires_grad_() for _ in range(2))
    for _ in range(3):
        a, b = ours(ours_x), theirs(theirs_x)
        assert torch.equal(a, b)
        a.square().sum().backward()
        b.square().sum().backward()
    assert torch.equal(ours_x.grad, theirs_x.grad)
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    assert torch.equal(ours.running_mean, theirs.running_mean)
    assert torch.equal(ours.running_var, theirs.running_var)
    assert torch.equal(ours.eval()(ours_x), theirs.eval()(theirs_x))


def test_running_statistics_are_the_average_of_the_workers():
    norm = BatchNorm(3, norm_batch_size=2, momentum=0.3).double()
    workers = [nn.BatchNorm2d(3, momentum=0.3).double() for _ in range(4)]
    for step in range(3):
        x = randn(8, 3, 4, 5, seed=step)
        norm(x)
        for w, worker in enumerate(workers):
            worker(x[w::4])
    for name in ("running_mean", "running_var"):
        average = torch.stack([getattr(worker, name) for worker in workers]).mean(0)
        torch.testing.assert_close(getattr(norm, name), average)


def test_gradients_of_split_batch_norm_are_those_of_its_workers():
    x = randn(6, 2, 3, 3)
    norm = with_random_affine(BatchNorm(2, norm_batch_size=3))
    assert torch.autograd.gradcheck(norm, (x.requires_grad_(),))


@pytest.mark.parametrize(("batch_size", "workers"), [(8, 2), (6, 1), (9, 1), (12, 3), (3, 1), (10, 2)])
def test_a_batch_that_does_not_divide_has_workers_of_one_size(batch_size, workers):
    x = randn(batch_size, 2, 3, 3)
    norm = with_random_affine(BatchNorm(2, norm_batch_size=4))
    sets = [(slice(w, None, workers), c) for w in range(workers) for c in range(2)]
    torch.testing.assert_close(norm(x), normalize_sets(x, sets, norm))


@pytest.mark.parametrize("norm_batch_size", [None, 3])
def test_batch_renorm_is_its_formula(norm_batch_size):
    norm = with_random_affine(BatchRenorm(2, norm_batch_size, r_max=1.5, d_max=0.5))
    for step in range(3):
        x = randn(6, 2, 3, 3, seed=step) * (1 + step)
        running_mean, running_std = norm.running_mean.clone(), (norm.running_var + 1e-5).sqrt()
        workers = 6 // (norm_batch_size or 6)
        expected = torch.empty_like(x)
        for w in range(workers):
            for c in range(2):
                values = x[w::workers, c]
                mean, std = values.mean(), (values.var(correction=0) + 1e-5).sqrt()
                r = min(max(float(std / running_std[c]), 1 / 1.5), 1.5)
                d = min(max(float((mean - running_mean[c]) / running_std[c]), -0.5), 0.5)
                expected[w::workers, c] = norm.weight[c] * ((values - mean) / std * r + d) + norm.bias[c]
        torch.testing.assert_close(norm(x), expected)


def test_batch_renorm_without_room_is_batch_norm_and_holds_its_corrections_constant():
    x = randn(4, 2, 3, 3)
    bn, renorm = BatchNorm(2).double(), BatchRenorm(2, r_max=1, d_max=0).double()
    assert torch.equal(renorm(x), bn(x))
    assert torch.equal(renorm.eval()(x), bn.eval()(x))
    plain, corrected = BatchNorm(2).double(), BatchRenorm(2).double()
    one, other = (x.clone().requires_grad_() for _ in range(2))
    weights = randn(4, 2, 3, 3, seed=5)
    (plain(one) * weights).sum().backward()
    (corrected(other) * weights).sum().backward()
    var = x.var((0, 2, 3), correction=0)
    r = ((var + 1e-5) / (1 + 1e-5)).sqrt().clamp(1 / 1.5, 1.5)
    torch.testing.assert_close(other.grad, one.grad * r[:, None, None])


@pytest.mark.parametrize("params", [{"r_max": 0.5}, {"d_max": -1}])
def test_batch_renorm_refuses_bounds_that_exclude_batch_norm(params):
    with pytest.raises(ValueError, match="r_max"):
        BatchRenorm(2, **params)


def test_layer_norm_is_group_norm_with_one_group_and_torchs_over_all_of_an_image():
    x = randn(4, 6, 3, 5)
    norm = with_random_affine(layer_norm(6))
    plain = F.layer_norm(x, x.shape[1:]) * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), plain)


def test_instance_norm_is_torchs_and_batch_norm_of_one_image():
    x = randn(4, 6, 3, 5)
    norm = instance_norm(6).double()
    torch.testing.assert_close(norm(x), F.instance_norm(x))
    torch.testing.assert_close(norm(x), BatchNorm(6, norm_batch_size=1).double()(x))


def test_channels_per_group_is_num_groups_the_other_way_round():
    assert group_norm(12, channels_per_group=3).num_groups == 4
    assert group_norm(12, num_groups=3).num_groups == 3


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({}, "exactly one"),
        ({"num_groups": 2, "channels_per_group": 4}, "exactly one"),
        ({"num_groups": 3}, "num_groups=3 does not divide 8 channels; legal: 1, 2, 4, 8"),
        ({"num_groups": 0}, "num_groups=0 does not divide 8"),
        ({"channels_per_group": 16}, "channels_per_group=16 does not divide 8"),
    ],
)
def test_groups_that_cannot_be_are_refused(params, sentence):
    with pytest.raises(ValueError, match=sentence):
        group_norm(8, **params)


def test_a_normalization_batch_below_one_is_refused():
    with pytest.raises(ValueError, match="norm_batch_size=0"):
        BatchNorm(4, norm_batch_size=0)


def test_no_norm_is_the_identity_without_parameters():
    x = randn(2, 3, 4, 4)
    assert torch.equal(no_norm(3)(x), x)
    assert not list(no_norm(3).parameters())


@pytest.mark.parametrize("factory", [BatchNorm, lambda c: group_norm(c, num_groups=4), layer_norm, instance_norm])
def test_all_norms_have_the_same_affine_parameters(factory):
    norm = factory(8)
    assert torch.equal(norm.weight, torch.ones(8))
    assert torch.equal(norm.bias, torch.zeros(8))
