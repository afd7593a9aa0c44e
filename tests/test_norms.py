"""Norms against their formulas in float64, and against each other where they are the same."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gnbench.norms import (
    BatchChannelNorm,
    BatchGroupNorm,
    BatchNorm,
    BatchRenorm,
    EstimatedBatchNorm,
    EvoNormB0,
    EvoNormS0,
    FilterResponseNorm,
    MovingAverageBatchNorm,
    PositionNorm,
    RMSGroupNorm,
    SkipInit,
    SwitchableNorm,
    WeightCentralization,
    WeightStandardization,
    group_norm,
    instance_norm,
    layer_norm,
    no_norm,
    rms_layer_norm,
)


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


def affine(y: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return y * norm.weight[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize("num_groups", [1, 2, 6])
def test_rms_group_norm_is_its_formula(num_groups):
    x = randn(4, 6, 3, 5)
    norm = with_random_affine(RMSGroupNorm(6, num_groups=num_groups, eps=1e-3))
    size, expected = 6 // num_groups, torch.empty_like(x)
    for n in range(4):
        for c in range(6):
            group = x[n, c // size * size : (c // size + 1) * size]
            expected[n, c] = x[n, c] / math.sqrt((group**2).sum() / group.numel() + 1e-3)
    torch.testing.assert_close(norm(x), affine(expected, norm))


def test_rms_layer_norm_is_torchs_rms_norm():
    x = randn(4, 6, 3, 5)
    norm = with_random_affine(rms_layer_norm(6, eps=1e-3))
    torch.testing.assert_close(norm(x), affine(F.rms_norm(x, x.shape[1:], eps=1e-3), norm))


@pytest.mark.parametrize("apply_act", [True, False])
def test_filter_response_norm_is_its_formula(apply_act):
    x = randn(4, 3, 3, 5)
    norm = with_random_affine(FilterResponseNorm(3, eps=1e-3, apply_act=apply_act))
    expected = torch.empty_like(x)
    for n in range(4):
        for c in range(3):
            y = norm.weight[c] * x[n, c] / math.sqrt((x[n, c] ** 2).mean() + 1e-3) + norm.bias[c]
            expected[n, c] = y
    if apply_act:
        with torch.no_grad():
            norm.tau.copy_(torch.tensor([-0.5, 0.0, 0.7]))
        expected = torch.stack([expected[:, c].clamp(min=norm.tau[c].item()) for c in range(3)], 1)
    torch.testing.assert_close(norm(x), expected)


def test_position_norm_is_its_formula():
    x = randn(2, 6, 3, 4)
    norm = with_random_affine(PositionNorm(6))
    sets = [(n, slice(None), h, w) for n in range(2) for h in range(3) for w in range(4)]
    torch.testing.assert_close(norm(x), normalize_sets(x, sets, norm))


def test_skip_init_is_a_bias_and_at_the_end_of_a_branch_a_number_that_starts_at_zero():
    x, norm = randn(2, 3, 4, 4), SkipInit(3).double()
    with torch.no_grad():
        norm.bias.copy_(randn(3, seed=1))
    assert torch.equal(norm(x), x + norm.bias[:, None, None])
    norm.end_branch()
    assert not norm(x).any()
    with torch.no_grad():
        norm.weight.fill_(2.5)
    torch.testing.assert_close(norm.double()(x), 2.5 * (x + norm.bias[:, None, None]))


@pytest.mark.parametrize("num_groups", [1, 3])
def test_evonorm_s0_is_its_formula(num_groups):
    x = randn(4, 6, 3, 5)
    norm = with_random_affine(EvoNormS0(6, num_groups=num_groups))
    with torch.no_grad():
        norm.v.copy_(randn(6, seed=3))
    size, expected = 6 // num_groups, torch.empty_like(x)
    for n in range(4):
        for c in range(6):
            group = x[n, c // size * size : (c // size + 1) * size]
            std = math.sqrt(((group - group.mean()) ** 2).mean() + 1e-5)
            expected[n, c] = x[n, c] / (1 + torch.exp(-norm.v[c] * x[n, c])) / std
    torch.testing.assert_close(norm(x), affine(expected, norm))


@pytest.mark.parametrize("norm_batch_size", [None, 2])
@pytest.mark.parametrize("training", [True, False])
def test_evonorm_b0_is_its_formula(norm_batch_size, training):
    x = randn(4, 3, 3, 5)
    norm = with_random_affine(EvoNormB0(3, norm_batch_size)).train(training)
    with torch.no_grad():
        norm.v.copy_(randn(3, seed=3))
        norm.running_var.copy_(randn(3, seed=4).square())
    running_var = norm.running_var.clone()
    workers = 1 if norm_batch_size is None else 2
    expected, variances = torch.empty_like(x), []
    for n in range(4):
        for c in range(3):
            shared = x[n % workers :: workers, c]
            var = ((shared - shared.mean()) ** 2).mean() if training else running_var[c]
            variances.append(shared.var())
            image_std = math.sqrt(((x[n, c] - x[n, c].mean()) ** 2).mean() + 1e-3)
            expected[n, c] = x[n, c] / (norm.v[c] * x[n, c] + image_std).clamp(min=math.sqrt(var + 1e-3))
    torch.testing.assert_close(norm(x), affine(expected, norm))
    kept = 0.9 * running_var + 0.1 * torch.stack(variances).view(4, 3).mean(0)
    torch.testing.assert_close(norm.running_var, kept if training else running_var)


@pytest.mark.parametrize("layer", [EvoNormB0(3, apply_act=False), EvoNormS0(3, num_groups=1, apply_act=False)])
def test_evonorm_before_an_addition_is_gamma_and_beta_alone(layer):
    x, norm = randn(2, 3, 4, 4), with_random_affine(layer)
    torch.testing.assert_close(norm(x), affine(x, norm))
    assert sorted(norm.state_dict()) == ["bias", "weight"]


@pytest.mark.parametrize("norm_batch_size", [None, 2])
@pytest.mark.parametrize("training", [True, False])
def test_switchable_norm_is_its_formula(norm_batch_size, training):
    x = randn(4, 3, 3, 5)
    norm = with_random_affine(SwitchableNorm(3, norm_batch_size)).train(training)
    with torch.no_grad():
        for parameter, seed in ((norm.mean_weight, 3), (norm.var_weight, 4)):
            parameter.copy_(randn(3, seed=seed))
        norm.running_mean.copy_(randn(3, seed=5))
        norm.running_var.copy_(randn(3, seed=6).square())
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    p, q = (torch.exp(w) / torch.exp(w).sum() for w in (norm.mean_weight, norm.var_weight))
    workers = 1 if norm_batch_size is None else 2
    expected = torch.empty_like(x)
    for n in range(4):
        for c in range(3):
            shared = x[n % workers :: workers, c]
            means = [x[n, c].mean(), x[n].mean(), shared.mean() if training else mean[c]]
            var_b = shared.var(correction=0) if training else var[c]
            variances = [x[n, c].var(correction=0), x[n].var(correction=0), var_b]
            m, v = (sum(a * b for a, b in zip(w, k, strict=True)) for w, k in ((p, means), (q, variances)))
            expected[n, c] = (x[n, c] - m) / (v + 1e-5) ** 0.5
    torch.testing.assert_close(norm(x), affine(expected, norm))


def test_switchable_norm_that_has_settled_on_one_is_that_one():
    x = randn(4, 6, 3, 5)
    for k, other in enumerate((instance_norm(6), layer_norm(6), BatchNorm(6, 2))):
        norm, other = SwitchableNorm(6, 2).double(), other.double()
        with torch.no_grad():
            norm.mean_weight[k] = norm.var_weight[k] = 1e3
        torch.testing.assert_close(norm(x), other(x))
        if k == 2:
            torch.testing.assert_close(norm.eval()(x), other.eval()(x))


@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize("norm_batch_size", [1, 2, 4])
def test_batch_group_norm_is_its_formula(num_groups, norm_batch_size):
    x = randn(4, 6, 3, 5)
    norm = with_random_affine(BatchGroupNorm(6, norm_batch_size, num_groups=num_groups))
    size, workers = 6 // num_groups, 4 // norm_batch_size
    sets = [
        (slice(w, None, workers), slice(g * size, (g + 1) * size)) for w in range(workers) for g in range(num_groups)
    ]
    torch.testing.assert_close(norm(x), normalize_sets(x, sets, norm))
    means = torch.stack([x[index].mean() for index in sets]).view(workers, num_groups).mean(0)
    variances = torch.stack([x[index].var() for index in sets]).view(workers, num_groups).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.1 * means)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variances)
    spread_mean, spread_var = (running.repeat_interleave(size)[:, None, None] for running in
                               (norm.running_mean, norm.running_var))  # fmt: skip
    torch.testing.assert_close(norm.eval()(x), affine((x - spread_mean) / (spread_var + 1e-5) ** 0.5, norm))


def test_batch_group_norms_ends_are_batch_norm_and_group_norm():
    x = randn(4, 6, 3, 5)
    bn, gn = BatchNorm(6, 2).double(), group_norm(6, num_groups=2).double()
    like_bn = BatchGroupNorm(6, 2, channels_per_group=1).double()
    for step in range(2):
        torch.testing.assert_close(like_bn(x + step), bn(x + step))
    torch.testing.assert_close(like_bn.eval()(x), bn.eval()(x))
    torch.testing.assert_close(BatchGroupNorm(6, 1, num_groups=2).double()(x), gn(x))


def test_estimated_batch_norm_is_its_formula():
    norm = with_random_affine(EstimatedBatchNorm(3, 2, momentum=0.3))
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for step in range(3):
        x = randn(4, 3, 3, 5, seed=step)
        expected, means, variances = torch.empty_like(x), [], []
        for w in range(2):
            own = x[w::2]
            var_w = 0.7 * var + 0.3 * torch.stack([((own[:, c] - mean[c]) ** 2).mean() for c in range(3)])
            mean_w = 0.7 * mean + 0.3 * torch.stack([own[:, c].mean() for c in range(3)])
            expected[w::2] = (own - mean_w[:, None, None]) / (var_w + 1e-5).sqrt()[:, None, None]
            means.append(mean_w)
            variances.append(var_w)
        torch.testing.assert_close(norm(x), affine(expected, norm))
        mean, var = sum(means) / 2, sum(variances) / 2
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, var)
    scale = ((var + 1e-5) ** -0.5)[:, None, None]
    torch.testing.assert_close(norm.eval()(x), affine((x - mean[:, None, None]) * scale, norm))


def test_estimates_are_constants_of_the_backward_pass():
    norm, x = with_random_affine(EstimatedBatchNorm(2)), randn(4, 2, 3, 3).requires_grad_()
    norm(x).sum().backward()
    expected = norm.weight / (norm.running_var + 1e-5).sqrt()
    torch.testing.assert_close(x.grad, expected[:, None, None].expand(4, 2, 3, 3))


@pytest.mark.parametrize("estimate", [True, False])
def test_batch_channel_norm_is_a_batch_norm_and_then_a_group_norm(estimate):
    x = randn(4, 6, 3, 5)
    norm = BatchChannelNorm(6, 2, num_groups=3, estimate=estimate).double()
    for half in (norm.batch, norm.channel):
        with_random_affine(half)
    first = copy.deepcopy(norm.batch)
    sets = [(n, slice(g * 2, (g + 1) * 2)) for n in range(4) for g in range(3)]
    torch.testing.assert_close(norm(x), normalize_sets(first(x), sets, norm.channel))
    assert type(norm.batch) is (EstimatedBatchNorm if estimate else BatchNorm)
    norm.zero_scale()
    torch.testing.assert_close(norm(x), norm.channel.bias[:, None, None].expand_as(x))


@pytest.mark.parametrize("workers", [1, 2])
def test_moving_average_batch_norm_is_the_papers_algorithm_step_by_step(workers):
    """Through warm-up, moving averages and the correction towards the running statistic, forth and back."""
    norm = with_random_affine(
        MovingAverageBatchNorm(2, 2, simulated_batch_size=6, warmup_steps=4, renorm_steps=7, momentum=0.1)
    )
    window, running, eps = 3, torch.ones(2, dtype=torch.float64), 1e-5
    past_squares, past_products = [], []  # the workers' averages, newest last
    for step in range(1, 12):
        x = (randn(2 * workers, 2, 3, 3, seed=step) * (1 + step % 3)).requires_grad_()
        gradient = randn(2 * workers, 2, 3, 3, seed=100 + step)
        y = norm(x)
        y.backward(gradient)
        expected, expected_grad = torch.empty_like(x), torch.empty_like(x)
        squares, products, averages = [], [], []
        for w in range(workers):
            own, g = x.detach()[w::workers], gradient[w::workers]
            squares.append((own**2).mean((0, 2, 3)))
            s = squares[w] if step < 4 else (sum(past_squares[-(window - 1) :]) + squares[w]) / window
            averages.append(s)
            r = ((s + eps) / (running + eps)).sqrt().clamp(0.2, 5) if step > 7 else torch.ones(2)
            z = own / (s + eps).sqrt()[:, None, None]
            expected[w::workers] = affine(r[:, None, None] * z, norm)
            g = g * norm.weight[:, None, None] * r[:, None, None]
            products.append((g * z).mean((0, 2, 3)))
            product = products[w] if step < 4 else (sum(past_products[-(window - 1) :]) + products[w]) / window
            expected_grad[w::workers] = (g - z * product[:, None, None]) / (s + eps).sqrt()[:, None, None]
        torch.testing.assert_close(y, expected, msg=f"step {step}")
        torch.testing.assert_close(x.grad, expected_grad.detach(), msg=f"step {step}")
        past_squares.append(sum(squares) / workers)
        past_products.append((sum(products) / workers).detach())
        running = 0.9 * running + 0.1 * sum(averages) / workers
        torch.testing.assert_close(norm.running_square, running)
    torch.testing.assert_close(norm.eval()(x), affine(x / (running + eps).sqrt()[:, None, None], norm))


def test_moving_averages_cover_the_simulated_batch():
    assert [len(MovingAverageBatchNorm(2, size).squares) for size in (2, 8, 32, 64, None)] == [16, 4, 1, 1, 1]


def test_weights_are_standardized_and_centralized_by_output_channel():
    conv = nn.Conv2d(4, 3, 5).double()
    weight = randn(3, 4, 5, 5)
    standard, central = WeightStandardization(conv, eps=1e-3)(weight), WeightCentralization(conv)(weight)
    for c in range(3):
        mean = weight[c].sum() / 100
        std = (((weight[c] - mean) ** 2).sum() / 100 + 1e-3) ** 0.5
        torch.testing.assert_close(standard[c], (weight[c] - mean) / std)
        torch.testing.assert_close(central[c], weight[c] - mean)
