"""Random pixels, for a measurement of cost: how long a step takes does not depend on what its images show."""

import numpy as np

from gnbench.datasets import Images, make_images
from gnbench.errors import require

NUM_CLASSES = 10
TRAIN_SIZE = 4096
TEST_SIZE = 128
SEED = 0


def load_random(name: str = "random", size: int = 32, verify: bool = True) -> Images:
    """4096 training and 128 test images (size, size, 3) of ten classes, made on the spot; there is nothing to learn.

    Args:
        name: what records and figures call the set.
        size: pixels a side.
        verify: has no effect, for there is no file to check.

    Raises:
        UserError: `size` is below 1.
    """
    require(size >= 1, "data.size", size, "it is a number of pixels, 1 or more")
    count = TRAIN_SIZE + TEST_SIZE
    images = np.random.default_rng(SEED).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64) % NUM_CLASSES
    return make_images(
        name,
        tuple(map(str, range(NUM_CLASSES))),
        train_images=images[:TRAIN_SIZE],
        train_labels=labels[:TRAIN_SIZE],
        test_images=images[TRAIN_SIZE:],
        test_labels=labels[TRAIN_SIZE:],
    )
