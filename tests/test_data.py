"""Splits, order and augmentation: each against a naive loop, and independent of all but the seed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_data import load_tiny

from gnbench import data
from gnbench.data import PAD, crop, flip, prepare, train_batches
from gnbench.datasets.split import stratified_order
from gnbench.errors import UserError

CPU = torch.device("cpu")


def collect(dataset: data.Dataset, batch_size: int = 8, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"drop_last": True, "seed": 0, "epoch": 0, **kwargs}
    images, labels = zip(*train_batches(dataset, batch_size, **options), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_crop_is_pad_and_cut_for_each_image():
    images = torch.randint(0, 256, (20, 3, 6, 7), dtype=torch.uint8)
    shifts = torch.randint(0, 2 * PAD + 1, (20, 2))
    cropped = crop(images, shifts)
    for image, (row, column), result in zip(images, shifts.tolist(), cropped, strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (PAD, PAD), (PAD, PAD)))
        np.testing.assert_array_equal(result.numpy(), padded[:, row : row + 6, column : column + 7])


def test_crop_at_the_middle_is_the_image():
    images = torch.randint(0, 256, (5, 3, 6, 7), dtype=torch.uint8)
    assert torch.equal(crop(images, torch.full((5, 2), PAD)), images)


def test_flip_mirrors_the_chosen_images_alone():
    images = torch.arange(24, dtype=torch.uint8).view(2, 1, 3, 4)
    flipped = flip(images, torch.tensor([True, False]))
    np.testing.assert_array_equal(flipped[0].numpy(), images[0].numpy()[:, :, ::-1])
    assert torch.equal(flipped[1], images[1])


def test_normalized_training_pixels_have_mean_zero_and_deviation_one():
    dataset = prepare(load_tiny(), CPU)
    pixels = dataset.normalize(dataset.train.images).double()
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-5, rtol=0)


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    dataset = prepare(load_tiny(), CPU, augment="none")
    reference = dataset.normalize(dataset.train.images)

    def order(**kwargs) -> list[int]:
        images, labels = collect(dataset, **kwargs)
        places = [int((reference == image).flatten(1).all(1).nonzero()) for image in images]
        assert torch.equal(dataset.train.labels[places], labels)
        return places

    first = order()
    assert sorted(first) == list(range(96))
    assert order() == first
    assert order(batch_size=3) == first
    assert order(epoch=1) != first
    assert order(seed=1) != first


def test_augmentation_depends_on_seed_and_epoch_alone(monkeypatch):
    dataset = prepare(load_tiny(), CPU)
    images, _ = collect(dataset)
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(collect(dataset, batch_size=2)[0], images)
    monkeypatch.setattr(data, "CHUNK", 16)
    assert torch.equal(collect(dataset)[0], images)
    assert not torch.equal(collect(dataset, epoch=1)[0], images)


def test_an_epoch_can_be_entered_at_any_step():
    dataset = prepare(load_tiny(), CPU)
    images, labels = collect(dataset)
    for first_step in (1, 5, 11):
        later_images, later_labels = collect(dataset, first_step=first_step)
        assert torch.equal(later_images, images[8 * first_step :])
        assert torch.equal(later_labels, labels[8 * first_step :])


def test_the_last_smaller_batch_is_dropped_or_kept():
    dataset = prepare(load_tiny(), CPU, augment="none")
    sizes = {
        drop: [len(labels) for _, labels in train_batches(dataset, 36, drop, seed=0, epoch=0)] for drop in (True, False)
    }
    assert sizes == {True: [36, 36], False: [36, 36, 24]}


def test_batches_are_contiguous_whatever_the_augmentation():
    for augment in data.AUGMENTATIONS:
        dataset = prepare(load_tiny(), CPU, augment=augment)
        images, _ = next(train_batches(dataset, 8, drop_last=True, seed=0, epoch=0))
        assert images.is_contiguous()


@given(st.lists(st.integers(0, 4), min_size=2, max_size=200), st.integers(0, 3), st.data())
@settings(deadline=None)
def test_every_prefix_of_a_stratified_order_is_stratified(labels, seed, draw):
    labels = np.array(labels)
    order = stratified_order(labels, seed)
    assert sorted(order) == list(range(len(labels)))
    size = draw.draw(st.integers(1, len(labels)))
    for label in np.unique(labels):
        share = (labels == label).mean() * size
        assert abs((labels[order[:size]] == label).sum() - share) <= 2.5


def test_held_out_images_are_stratified_fixed_and_apart_from_training():
    images = load_tiny()
    dataset = prepare(images, CPU, val_size=30, split_seed=1)
    assert len(dataset.val) == 30
    assert len(dataset.train) == 66
    assert np.bincount(dataset.val.labels).tolist() == [10, 10, 10]

    def keys(split: data.Split) -> set[bytes]:
        return {image.numpy().tobytes() for image in split.images}

    assert not keys(dataset.val) & keys(dataset.train)
    assert keys(prepare(images, CPU, val_size=30, split_seed=1).val) == keys(dataset.val)
    assert keys(prepare(images, CPU, val_size=30, split_seed=2).val) != keys(dataset.val)
    small = prepare(images, CPU, val_size=30, split_seed=1, train_size=12).train
    assert keys(small) < keys(dataset.train)
    assert np.bincount(small.labels).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"train_size": 97}, r"data\.train_size=97 is not legal: it is 1 to 96"),
        ({"train_size": 0}, r"data\.train_size=0"),
        ({"val_size": 96}, r"data\.val_size=96 is not legal: it is 0 to 95"),
        ({"val_size": -1}, r"data\.val_size=-1"),
        ({"val_size": 50, "train_size": 50}, r"it is 1 to 46"),
        ({"augment": "mixup"}, r"data\.augment=mixup is not legal: it is one of crop_flip, crop, none"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(params, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare(load_tiny(), CPU, **params)
