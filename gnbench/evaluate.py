"""What a trained model gets wrong, and how that depends on the statistics its norms are given."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnbench.data import Dataset, Split, train_batches
from gnbench.machine import autocast
from gnbench.precise_bn import batch_statistics, kept_statistics, layers_with_statistics, update_precise_statistics
from gnbench.record import PERCENTILES

BATCH_SIZE = 1000  # images; fixed, so that the rounding of an error does not depend on the recipe


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Dataset, split: Split, precision: str, batch_size: int = BATCH_SIZE
) -> tuple[float, float]:
    """Mean cross-entropy and error in percent over a split."""
    loss_sum, num_errors = 0.0, 0
    for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True):
        with autocast(images.device, precision):
            logits = model(dataset.normalize(images))
        loss_sum += F.cross_entropy(logits.double(), labels, reduction="sum")
        num_errors += (logits.argmax(1) != labels).sum()
    return float(loss_sum) / len(split), 100 * int(num_errors) / len(split)


def error_by_statistics(
    model: nn.Module, dataset: Dataset, precision: str, batch_size: int, num_precise_images: int
) -> dict[str, float]:
    """Test error in percent of one set of weights under each choice of statistics; {} where no norm keeps any.

    `ema`: running averages, as training left them. `precise`: the population's, from `num_precise_images` augmented
    training images. `batch`: those of mini-batches of test images as large as in training, drawn in a fixed order.
    """
    model.eval()
    if not layers_with_statistics(model):
        return {}
    errors = {"ema": evaluate(model, dataset, dataset.test, precision)[1]}
    with kept_statistics(model):
        with autocast(dataset.mean.device, precision):  # the activations that the test will have
            update_precise_statistics(model, precise_images(dataset, num_precise_images))
        errors["precise"] = evaluate(model, dataset, dataset.test, precision)[1]
    with batch_statistics(model):
        full = max(batch_size, len(dataset.test) // batch_size * batch_size)  # a smaller last batch is of another kind
        test = shuffled(dataset.test, full)
        errors["batch"] = evaluate(model, dataset, test, precision, batch_size)[1]
    return errors


def precise_images(dataset: Dataset, num_images: int) -> list[Tensor]:
    """Batches of augmented training images, `num_images` in all or as many as an epoch has; the same at every call."""
    num_images = min(num_images, len(dataset.train))
    batches = train_batches(dataset, min(BATCH_SIZE, num_images), drop_last=False, seed=0, epoch=0)
    taken = [images for _, (images, _) in zip(range(math.ceil(num_images / BATCH_SIZE)), batches, strict=False)]
    return list(torch.cat(taken)[:num_images].split(BATCH_SIZE))


@torch.no_grad()
def response_percentiles(model: nn.Module, dataset: Dataset, name: str, precision: str) -> list[float | None]:
    """PERCENTILES of the output of the module `name` over the first batch of shuffled test images, in evaluation."""
    responses = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, __, output: responses.append(output.clone()))
    try:
        evaluate(model, dataset, shuffled(dataset.test, BATCH_SIZE), precision)
    finally:
        hook.remove()
    return percentiles(torch.cat(responses))


def percentiles(values: Tensor) -> list[float | None]:
    """PERCENTILES of all elements; None for one that is not finite."""
    with np.errstate(invalid="ignore"):
        found = np.percentile(values.float().cpu().numpy(), PERCENTILES)
    return [float(value) if math.isfinite(value) else None for value in found]


def shuffled(split: Split, count: int) -> Split:
    """`count` images in a fixed random order, or all: a batch of one class would have statistics of its own."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(split))[:count]).to(split.labels.device)
    return Split(split.images[order], split.labels[order])
