"""The embedded data set: the same bytes everywhere, balanced, and varied in what it says it varies."""

import numpy as np

from gnbench.datasets.toy import NUM_CLASSES, SIZE, SPACING, TEST_SIZE, TRAIN_SIZE, load_toy

GOLDEN = "bf12ed9b3a571f3acac2077765b8f7d421da70ae07f804b8093f213a8433d18e"


def test_the_images_are_the_same_bytes_everywhere():
    assert load_toy().fingerprint == GOLDEN
    assert load_toy(name="other", verify=False).fingerprint == GOLDEN


def test_shapes_and_balance():
    toy = load_toy()
    assert toy.name == "toy-stripes"
    assert toy.train_images.shape == (TRAIN_SIZE, SIZE, SIZE, 3)
    assert toy.test_images.shape == (TEST_SIZE, SIZE, SIZE, 3)
    assert toy.train_images.dtype == np.uint8
    assert len(set(toy.classes)) == NUM_CLASSES
    for labels in (toy.train_labels, toy.test_labels):
        assert set(np.bincount(labels)) == {len(labels) // NUM_CLASSES}


def test_no_test_image_is_trained_on():
    toy = load_toy()
    train = {image.tobytes() for image in toy.train_images}
    assert len(train) == TRAIN_SIZE
    assert not train & {image.tobytes() for image in toy.test_images}


def test_brightness_and_contrast_differ_from_image_to_image():
    pixels = load_toy().train_images.astype(float)
    brightness, contrast = pixels.mean((1, 2, 3)), pixels.std((1, 2)).max(1)
    assert brightness.std() > 30
    assert np.percentile(contrast, 95) > 2 * np.percentile(contrast, 5)


def test_the_class_is_the_orientation_of_the_stripes():
    toy = load_toy()
    grey = toy.train_images.astype(float).mean(3)
    spectrum = np.abs(np.fft.fft2(grey - grey.mean((1, 2), keepdims=True)))
    y, x = np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE), indexing="ij")
    strongest = spectrum.reshape(len(grey), -1).argmax(1)
    found = np.degrees(np.arctan2(y.ravel()[strongest], x.ravel()[strongest])) % 180
    expected = SPACING / 10 * toy.train_labels
    off = np.abs((found - expected + 90) % 180 - 90)
    assert np.median(off) < SPACING / 10
