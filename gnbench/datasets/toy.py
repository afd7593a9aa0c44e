"""Toy stripes: a small data set made on the spot, on which Batch Norm's error visibly grows at tiny batches.

It stands in where nothing may be downloaded. It is no natural image, and an error on it says nothing about one.
"""

import numpy as np

from gnbench.datasets import Images, make_images

NUM_CLASSES = 10
TRAIN_SIZE = 1000
TEST_SIZE = 1000
SIZE = 16  # pixels a side
SEED = 1803_08494

TURN = 3600  # angles are in tenths of a degree
SPACING = TURN // 2 // NUM_CLASSES  # between two classes: stripes look the same after half a turn
COSINE = np.rint(1000 * np.cos(2 * np.pi * np.arange(TURN) / TURN)).astype(np.int64)  # of an angle, in thousandths


def load_toy(name: str = "toy-stripes", verify: bool = True) -> Images:
    """Coloured, noisy stripes of 10 orientations, 18 degrees apart; 1000 training and 1000 test images, 16 x 16.

    What differs from image to image beside the class: background colour, contrast (fourfold) and its colour,
    wavelength, phase, and up to 7 of the 9 degrees to the next class. Natural images differ in brightness, colour and
    contrast too. It is this that a batch of two images cannot average out, so it is why the set shows the effect.

    Every number is an integer but for a table of cosines, rounded far from any tie: the same bytes on every platform.
    Mirroring or cropping would turn one class into another or cut the image short: train with `augment: none`.

    Args:
        name: what records and figures call the set.
        verify: has no effect, for there is no file to check.
    """
    labels = np.arange(TRAIN_SIZE + TEST_SIZE, dtype=np.int64) % NUM_CLASSES
    images = draw_stripes(labels, np.random.default_rng(SEED))
    return make_images(
        name,
        tuple(f"{SPACING * label // 10} degrees" for label in range(NUM_CLASSES)),
        train_images=images[:TRAIN_SIZE],
        train_labels=labels[:TRAIN_SIZE],
        test_images=images[TRAIN_SIZE:],
        test_labels=labels[TRAIN_SIZE:],
    )


def draw_stripes(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image (SIZE, SIZE, 3), uint8, for each label: background + contrast * cos(phase + position) + noise."""

    def draw(low: int, high: int, *shape: int) -> np.ndarray:
        return rng.integers(low, high, (len(labels), *shape), dtype=np.int64, endpoint=True)

    angle = SPACING * labels[:, None, None] + draw(-70, 70, 1, 1)
    wavelength = draw(40, 80, 1, 1)  # tenths of a pixel
    phase = draw(0, TURN - 1, 1, 1)
    background = draw(0, 255, 1, 1, 3)
    contrast = draw(24, 96, 1, 1, 1)  # of the channel that has the most
    tint = draw(-100, 100, 1, 1, 3)  # each channel's share of it, and its sign
    noise = draw(-24, 24, SIZE, SIZE, 3)

    y, x = np.indices((SIZE, SIZE))
    position = x * COSINE[angle % TURN] + y * COSINE[(angle - TURN // 4) % TURN]  # (N, H, W), thousandths of a pixel
    stripes = COSINE[(phase + TURN * position // (100 * wavelength)) % TURN][..., None]  # (N, H, W, 1), thousandths
    amplitude = contrast * tint // np.abs(tint).max(axis=-1, keepdims=True).clip(1)
    return (background + amplitude * stripes // 1000 + noise).clip(0, 255).astype(np.uint8)
