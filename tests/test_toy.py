"""The toy set: the same bytes everywhere, balanced, and as varied as its description says."""

import numpy as np
import pytest

from gnbench.datasets.toy import COSINE, NUM_CLASSES, SIZE, SPACING, TEST_SIZE, TRAIN_SIZE, TURN, draw_stripes, load_toy


@pytest.fixture(scope="module")
def toy():
    return load_toy()


def test_content_is_golden(toy):
    assert toy.fingerprint == "bf12ed9b3a571f3acac2077765b8f7d421da70ae07f804b8093f213a8433d18e"


def test_name_and_verify_do_not_change_the_content(toy):
    other = load_toy(name="mine", verify=False)
    assert other.name == "mine"
    assert other.fingerprint == toy.fingerprint
    assert np.array_equal(other.train_images, toy.train_images)


def test_cosines_are_rounded_far_from_ties():
    exact = 1000 * np.cos(np.deg2rad(np.arange(TURN) / 10))
    to_a_tie = np.abs(exact - np.floor(exact) - 0.5)
    assert to_a_tie.min() > 1e-3  # where mathematics libraries differ by 1e-13
    assert np.abs(COSINE - exact).max() < 0.5


def test_shapes_and_types(toy):
    assert len(toy.classes) == len(set(toy.classes)) == NUM_CLASSES
    for images, labels, size in (
        (toy.train_images, toy.train_labels, TRAIN_SIZE),
        (toy.test_images, toy.test_labels, TEST_SIZE),
    ):
        assert images.shape == (size, SIZE, SIZE, 3)
        assert images.dtype == np.uint8
        assert labels.shape == (size,)
        assert labels.dtype == np.int64


def test_classes_are_balanced(toy):
    assert np.bincount(toy.train_labels).tolist() == [TRAIN_SIZE // NUM_CLASSES] * NUM_CLASSES
    assert np.bincount(toy.test_labels).tolist() == [TEST_SIZE // NUM_CLASSES] * NUM_CLASSES


def test_no_image_comes_twice(toy):
    images = np.concatenate([toy.train_images, toy.test_images])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == TRAIN_SIZE + TEST_SIZE


def test_images_vary_in_contrast_and_colour(toy):
    contrast = toy.train_images.std(axis=(1, 2)).max(axis=-1)  # of an image's most varied channel
    low, high = np.percentile(contrast, [5, 95])
    assert high > 2 * low
    colour = toy.train_images.mean(axis=(1, 2))  # (N, 3)
    assert colour.std(axis=0).min() > 50
    assert np.abs(np.corrcoef(colour.T) - np.eye(3)).max() < 0.1  # the channels vary on their own


def test_contrast_and_colour_do_not_give_the_class_away(toy):
    contrast = toy.train_images.std(axis=(1, 2)).max(axis=-1)
    for feature in (contrast, *toy.train_images.mean(axis=(1, 2)).T):
        of_class = np.array([feature[toy.train_labels == label].mean() for label in range(NUM_CLASSES)])
        assert of_class.std() < 2 * feature.std() / np.sqrt(TRAIN_SIZE / NUM_CLASSES)


def test_label_is_the_direction_of_the_stripes():
    """The strongest wave of each image, found by Fourier transform, runs within a class's spacing of its label."""
    labels = np.arange(200) % NUM_CLASSES
    grey = draw_stripes(labels, np.random.default_rng(1)).astype(float)
    power = (np.abs(np.fft.fft2(grey - grey.mean(axis=(1, 2), keepdims=True), s=(64, 64), axes=(1, 2))) ** 2).sum(-1)
    row, column = np.unravel_index(power.reshape(len(labels), -1).argmax(axis=1), (64, 64))
    frequency = np.fft.fftfreq(64)
    degrees = np.rad2deg(np.arctan2(frequency[row], frequency[column]))
    off = (degrees - SPACING / 10 * labels + 90) % 180 - 90
    assert np.mean(np.abs(off) < SPACING / 10 / 2) > 0.9
