"""Properties that hold for any input: identity, learning rate, order of images, splits, damaged bytes."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import compose_config, tiny_config
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_data import load_tiny

from gnbench.data import prepare, train_batches
from gnbench.datasets.split import split_indices
from gnbench.errors import UserError
from gnbench.plan import plan_run
from gnbench.recipe import Recipe
from gnbench.record import NOT_IDENTITY, digest, load_record, run_name

IMAGES = load_tiny()
DATASET = prepare(IMAGES, torch.device("cpu"))
sizes = st.integers(1, 96)


@pytest.fixture(scope="module")
def config():
    return tiny_config()


def shuffle(value: object, rng) -> object:
    """The same mapping with its keys in another order, at every level."""
    if not isinstance(value, dict):
        return value
    keys = list(value)
    rng.shuffle(keys)
    return {key: shuffle(value[key], rng) for key in keys}


# Identity


@given(st.randoms(use_true_random=False))
def test_the_order_of_keys_is_not_in_the_identity(config, rng):
    assert digest(shuffle(config, rng), "data") == digest(config, "data")


@settings(max_examples=8, deadline=None)
@given(st.permutations(["norm=bn", "batch_size=4", "norm_batch_size=2", "seed=3", "norm.eps=0.1", "model=resnet8"]))
def test_the_order_of_overrides_is_not_in_the_identity(words):
    assert compose_config(*words) == compose_config(*sorted(words))


@given(st.data())
def test_each_key_that_counts_changes_the_identity_and_each_other_does_not(config, data):
    key = data.draw(st.sampled_from(sorted(config)))
    value = data.draw(st.integers(2000, 10**6) | st.text(min_size=1).filter(lambda text: text != config[key]))
    assume(key not in ("norm", "model", "data"))
    counts = key not in (*NOT_IDENTITY, "norm_batch_size")
    assert (digest({**config, key: value}, "data") != digest(config, "data")) == counts


@given(st.dictionaries(st.text(min_size=1).filter(lambda key: key != "norm_batch_size"), st.none(), max_size=4))
def test_keys_without_a_value_are_not_in_the_identity(config, more):
    assume(not set(more) & set(config))
    assert digest({**more, **config}, "data") == digest(config, "data")


@given(st.text(min_size=1), st.integers(0, 10**6))
def test_a_run_of_any_name_is_one_directory_below_its_sweep(config, name, seed):
    found = run_name({**config, "norm": {**config["norm"], "name": name}, "seed": seed}, "0123456789ab")
    assert "/" not in found
    assert "\\" not in found
    assert "\0" not in found
    assert found not in (".", "..")


@given(st.sampled_from(["eps", "momentum"]), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_number_that_is_not_finite_is_refused_by_name(config, key, value):
    with pytest.raises(UserError, match=rf"norm\.{key}={value} is not legal: it is a finite number"):
        plan_run({**config, "norm": {**config["norm"], key: value}}, default_threads=1)


# Learning rate


@given(st.sampled_from(["step", "cosine", "constant"]), sizes, st.integers(1, 20), st.floats(0, 3), st.floats(1e-3, 9))
def test_the_learning_rate_follows_batch_size_and_stays_below_its_peak(schedule, batch_size, epochs, warmup, base_lr):
    recipe = Recipe(batch_size, epochs, base_lr=base_lr, schedule=schedule, warmup_epochs=warmup)
    peak = base_lr * batch_size / 128
    rates = [recipe.learning_rate(step, 96) for step in range(recipe.total_steps(96))]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    first_after_warmup = math.ceil(warmup * recipe.steps_per_epoch(96))
    settled = rates[first_after_warmup:]
    assert all(after <= before for before, after in itertools.pairwise(settled))
    if warmup == 0:
        assert rates[0] == pytest.approx(peak)


@given(sizes, st.integers(1, 20), st.integers(1, 30) | st.none(), st.booleans())
def test_steps_are_those_of_a_naive_count(batch_size, epochs, max_steps, drop_last):
    recipe = Recipe(batch_size, epochs, max_steps, drop_last=drop_last)
    counted = [size for _ in range(epochs) for size in _batch_sizes(96, batch_size, drop_last)][:max_steps]
    assert recipe.total_steps(96) == len(counted)


def _batch_sizes(num_images: int, batch_size: int, drop_last: bool) -> list[int]:
    found = [len(range(start, min(start + batch_size, num_images))) for start in range(0, num_images, batch_size)]
    return [size for size in found if size == batch_size or not drop_last]


# Order of images


@settings(deadline=None, max_examples=30)
@given(sizes, st.booleans(), st.integers(0, 2**31), st.integers(0, 1000), st.data())
def test_an_epoch_entered_at_any_step_goes_on_as_if_never_left(batch_size, drop_last, seed, epoch, data):
    whole = list(train_batches(DATASET, batch_size, drop_last, seed, epoch))
    first = data.draw(st.integers(0, len(whole)))
    rest = list(train_batches(DATASET, batch_size, drop_last, seed, epoch, first))
    assert len(rest) == len(whole) - first
    for ours, theirs in zip(rest, whole[first:], strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@settings(deadline=None, max_examples=30)
@given(sizes, sizes, st.integers(0, 2**31), st.integers(0, 1000))
def test_order_and_augmentation_do_not_depend_on_the_batch_size(one, other, seed, epoch):
    epochs = [list(train_batches(DATASET, size, False, seed, epoch)) for size in (one, other)]
    images, labels = ([torch.cat([batch[i] for batch in batches]) for batches in epochs] for i in (0, 1))
    assert torch.equal(images[0], images[1])
    assert torch.equal(labels[0], labels[1])
    assert torch.equal(labels[0].sort().values, torch.from_numpy(IMAGES.train_labels).sort().values)


# Splits


@given(st.integers(3, 60), st.integers(0, 30), st.integers(0, 9))
def test_a_split_is_disjoint_and_of_the_sizes_that_were_asked_for(train_size, val_size, seed):
    try:
        train, val = split_indices(IMAGES, train_size, val_size, seed)
    except UserError:
        assume(False)
    assert (len(train), len(val)) == (train_size, val_size)
    assert not set(train) & set(val)
    assert len(set(train)) == train_size
    counts = np.bincount(IMAGES.train_labels[train], minlength=3)
    assert counts.max() - counts.min() <= 1  # stratified: the classes are of one size


@given(st.integers(3, 40), st.integers(0, 20), st.integers(0, 9))
def test_a_smaller_choice_is_part_of_a_larger_one_and_held_out_images_stay(train_size, val_size, seed):
    small, val = split_indices(IMAGES, train_size, val_size, seed)
    large, same = split_indices(IMAGES, train_size + 20, val_size, seed)
    assert set(small) <= set(large)
    assert np.array_equal(np.sort(val), np.sort(same))


# Records


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_bytes_of_any_kind_are_no_record_and_no_traceback(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("record") / "record.json"
    path.write_bytes(content)
    with pytest.raises(UserError):
        load_record(path)
