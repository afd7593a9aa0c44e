"""Images as one uint8 tensor on the device: splits, the order of an epoch, batched augmentation, normalization.

The order and the augmentation of an epoch come from (seed, epoch) alone, drawn on the CPU: they depend on neither
the device, nor the batch size, nor what else the process trains, and an epoch can be entered at any of its steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gnbench.datasets import Images
from gnbench.datasets.split import AUGMENTATIONS, split_indices
from gnbench.errors import require

PAD = 4  # pixels on each side before a random crop, arXiv:1512.03385
CHUNK = 2048  # images augmented at once: many small batches share one call


@dataclass
class Split:
    """Images (N, C, H, W), uint8, and labels (N,), int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Dataset:
    """The splits of one run. `val` is held-out training data, for choices; `test` is for the final number."""

    train: Split
    val: Split
    test: Split
    num_classes: int
    mean: Tensor  # (C, 1, 1), of the training images' pixels, in 0 ... 255
    std: Tensor
    augment: str

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images -> contiguous float32 of mean 0 and standard deviation 1 over the training pixels."""
        return ((images.float() - self.mean) / self.std).contiguous()


def prepare(
    images: Images,
    device: torch.device,
    train_size: int | None = None,
    val_size: int = 0,
    split_seed: int = 0,
    augment: str = "crop_flip",
) -> Dataset:
    """Split and move `images` to `device`.

    Args:
        train_size: training images to use, stratified over the classes; a smaller choice is part of a larger one.
            None takes all that are not held out.
        val_size: training images to hold out, stratified; the same for every seed of a run.
        split_seed: decides which.
        augment: crop_flip (pad by 4, crop, mirror), crop, or none.

    Raises:
        UserError: the sizes do not fit the training images, or `augment` is not known.
    """
    require(augment in AUGMENTATIONS, "data.augment", augment, f"it is one of {', '.join(AUGMENTATIONS)}")
    train, val = split_indices(images, train_size, val_size, split_seed)
    pixels = images.train_images[train]
    mean, std = _pixel_statistics(pixels)
    return Dataset(
        train=_split(pixels, images.train_labels[train], device),
        val=_split(images.train_images[val], images.train_labels[val], device),
        test=_split(images.test_images, images.test_labels, device),
        num_classes=len(images.classes),
        mean=torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1),
        std=torch.tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1),
        augment=augment,
    )


def train_batches(
    dataset: Dataset,
    batch_size: int,
    drop_last: bool,
    seed: int,
    epoch: int,
    first_step: int = 0,
    chunk: int = CHUNK,
    share: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """The epoch's augmented, normalized batches (B, C, H, W) and labels (B,), from its `first_step` on.

    Args:
        chunk: about how many images to augment ahead, which changes nothing but the memory and the time it takes.
        share: the part of every batch that is wanted; the rest is not augmented.
    """
    num_images = len(dataset.train)
    rng = np.random.default_rng([seed, epoch])
    order = torch.from_numpy(rng.permutation(num_images))
    shifts = torch.from_numpy(rng.integers(0, 2 * PAD + 1, (num_images, 2)))  # of the crop in the padded image
    flips = torch.from_numpy(rng.integers(0, 2, num_images).astype(bool))
    order, shifts, flips = (tensor.to(dataset.mean.device) for tensor in (order, shifts, flips))
    end = num_images - num_images % batch_size if drop_last else num_images
    chunk_size = max(1, chunk // batch_size) * batch_size
    for start in range(first_step * batch_size, end, chunk_size):
        places = torch.arange(start, min(start + chunk_size, end), device=order.device)  # no copy, which would wait
        shares = [part[share] for part in places.split(batch_size)]
        part = torch.cat(shares)
        images = dataset.train.images[order[part]]
        labels = dataset.train.labels[order[part]]
        if dataset.augment != "none":
            images = crop(images, shifts[part])
        if dataset.augment == "crop_flip":
            images = flip(images, flips[part])
        sizes = [len(each) for each in shares]
        yield from zip(dataset.normalize(images).split(sizes), labels.split(sizes), strict=True)


def images_ahead(dataset: Dataset, num_trainings: int) -> int:
    """How many images each of several trainings augments at once: a CPU's caches hold few, a GPU is to be kept busy."""
    return CHUNK if dataset.mean.device.type == "cuda" else CHUNK // num_trainings


def crop(images: Tensor, shifts: Tensor) -> Tensor:
    """Pad by PAD black pixels and cut each image (N, C, H, W) out again at its own (row, column) of `shifts` (N, 2)."""
    height, width = images.shape[2:]
    padded = F.pad(images, (PAD, PAD, PAD, PAD))
    rows = shifts[:, 0, None] + torch.arange(height, device=images.device)  # (N, H)
    columns = shifts[:, 1, None] + torch.arange(width, device=images.device)  # (N, W)
    index = torch.arange(len(images), device=images.device)[:, None, None]
    cut = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return cut.permute(0, 3, 1, 2)


def flip(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror left and right the images (N, C, H, W) for which `flips` (N,) is true."""
    return torch.where(flips[:, None, None, None], images.flip(3), images)


def _split(pixels: np.ndarray, labels: np.ndarray, device: torch.device) -> Split:
    images = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
    return Split(images.contiguous().to(device), torch.from_numpy(np.array(labels, dtype=np.int64)).to(device))


def _pixel_statistics(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, from exact counts of the 256 values."""
    counts = np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(pixels.shape[-1])])
    values = np.arange(256)
    mean = counts @ values / counts.sum(1)
    variance = counts @ values**2 / counts.sum(1) - mean**2
    return mean, np.sqrt(np.maximum(variance, 1e-12))
