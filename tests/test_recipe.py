"""The recipe: its learning rates against a naive formula, its limits, and what becomes of the last smaller batch."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnbench.errors import UserError
from gnbench.recipe import Recipe


def test_the_linear_rule_scales_the_rate_with_the_batch():
    for batch_size in (2, 8, 128, 256):
        recipe = Recipe(batch_size=batch_size, schedule="constant")
        assert recipe.learning_rate(0, 50_000) == pytest.approx(0.1 * batch_size / 128)
    assert Recipe(batch_size=2).learning_rate(0, 50_000) == pytest.approx(0.0015625)


def test_step_schedule_falls_tenfold_at_its_milestones():
    recipe = Recipe(batch_size=10, epochs=4, schedule="step", milestones=[0.5, 0.75], base_batch_size=10)
    rates = [recipe.learning_rate(step, 100) for step in range(40)]
    assert rates == pytest.approx([0.1] * 20 + [0.01] * 10 + [0.001] * 10)


def test_cosine_falls_from_its_peak_to_nearly_zero():
    recipe = Recipe(batch_size=10, epochs=2, schedule="cosine", base_batch_size=10)
    for step in range(20):
        assert recipe.learning_rate(step, 100) == pytest.approx(0.05 * (1 + math.cos(math.pi * step / 20)))


def test_warm_up_rises_linearly_and_then_gives_way():
    recipe = Recipe(batch_size=10, epochs=4, schedule="constant", warmup_epochs=1, base_batch_size=10)
    rates = [recipe.learning_rate(step, 100) for step in range(40)]
    assert rates[:10] == pytest.approx([0.01 * n for n in range(1, 11)])
    assert rates[10:] == pytest.approx([0.1] * 30)


def test_the_schedule_spans_what_is_trained():
    recipe = Recipe(batch_size=10, epochs=100, max_steps=20, schedule="cosine", base_batch_size=10)
    assert recipe.total_steps(100) == 20
    assert recipe.learning_rate(10, 100) == pytest.approx(0.05)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 5))
def test_steps_count_the_last_smaller_batch_only_when_it_is_kept(num_images, batch_size, epochs):
    sizes = [min(batch_size, num_images - start) for start in range(0, num_images, batch_size)]
    kept = Recipe(batch_size=batch_size, epochs=epochs, drop_last=False)
    assert kept.total_steps(num_images) == epochs * len(sizes)
    dropped = Recipe(batch_size=batch_size, epochs=epochs)
    full = sum(size == batch_size for size in sizes)
    if full:
        assert dropped.total_steps(num_images) == epochs * full
    else:
        with pytest.raises(UserError, match=f"batch_size={batch_size} .* {num_images} training images"):
            dropped.total_steps(num_images)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 0),
        ("epochs", -1),
        ("max_steps", 0),
        ("base_lr", 0.0),
        ("base_lr", math.inf),
        ("base_lr", math.nan),
        ("momentum", 1.0),
        ("nesterov", True),
        ("weight_decay", -1e-4),
        ("schedule", "exponential"),
        ("milestones", [0.75, 0.5]),
        ("milestones", [0.5, 0.5]),
        ("milestones", [1.5]),
        ("lr_decay", 0.0),
        ("warmup_epochs", -1),
        ("label_smoothing", 1.0),
        ("clip_grad_norm", 0.0),
        ("frozen_epochs", -1),
        ("precise_images", 0),
        ("report_epochs", 0),
        ("test_every", 0),
    ],
)
def test_a_value_out_of_range_is_refused_with_key_and_value(key, value):
    extra = {"momentum": 0.0} if key == "nesterov" else {}
    with pytest.raises(UserError) as refusal:
        Recipe(**{key: value}, **extra)
    assert str(refusal.value).startswith(f"{key}={value} is not legal: {key} is ")
