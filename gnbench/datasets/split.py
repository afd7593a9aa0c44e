"""Which training images a run uses and which it holds out: numpy only, so that a sweep can check it without torch."""

import numpy as np

from gnbench.datasets import Images
from gnbench.errors import UserError

AUGMENTATIONS = ("crop_flip", "crop", "none")


def split_sizes(images: Images, train_size: int | None, val_size: int) -> tuple[int, int]:
    """How many images a run trains on and holds out.

    Raises:
        UserError: they are more than there are.
    """
    available = len(images.train_labels)
    if not 0 <= val_size < available:
        raise UserError(f"data.val_size={val_size} is not legal: it is 0 to {available - 1} of {images.name}")
    most = available - val_size
    if train_size is not None and not 1 <= train_size <= most:
        raise UserError(f"data.train_size={train_size} is not legal: it is 1 to {most}, or null for all of them")
    return train_size or most, val_size


def split_indices(images: Images, train_size: int | None, val_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The training and the held-out images, ascending, stratified over the classes and without one in common.

    A smaller train_size chooses a part of what a larger one does.
    """
    num_train, num_val = split_sizes(images, train_size, val_size)
    order = stratified_order(images.train_labels, seed)
    return np.sort(order[num_val : num_val + num_train]), np.sort(order[:num_val])


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A permutation of 0 ... N-1 of which every prefix holds the classes in nearly their overall proportions."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)  # evenly over (0, 1)
    return np.lexsort((labels, place))
