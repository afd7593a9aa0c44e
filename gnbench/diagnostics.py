"""What happens inside a network in training, for a norm's author: activations, gradients, noise of batch statistics.

All is measured on the same training images for every norm and seed, not augmented, in passes of their own that leave
the training as it was. They are in the mode of the training and in mini-batches of its size, so that a norm is seen
with the statistics by which the weights are learned; evaluation has others.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnbench.data import Dataset
from gnbench.evaluate import percentiles, shuffled
from gnbench.machine import autocast
from gnbench.precise_bn import kept_statistics, set_train_mode
from gnbench.recipe import Recipe

TIMES = 20  # about so often in a training, however long, so that a record stays small
MOST_VALUES = 2**18  # of a layer's output that are kept for its percentiles
GRADIENT_BATCHES = 8  # mini-batches whose gradients are taken, or fewer
LEAST_BATCHES = 4  # mini-batches that a variance over mini-batches needs
DIGITS = 4  # that are recorded
CONSTANT = 1e-12  # variance over mean square up to which a channel is taken for constant


def is_due(epoch: int, num_epochs: int) -> bool:
    """Whether an epoch, from 1, is diagnosed at its end: the first, the last and about TIMES at equal distances."""
    return epoch in (1, num_epochs) or epoch % math.ceil(num_epochs / TIMES) == 0


def diagnose(
    model: nn.Module, dataset: Dataset, recipe: Recipe, precision: str, num_images: int, frozen: bool = False
) -> dict:
    """Measurements at every place of a norm, by depth: the order in which a pass comes to them.

    Of the output of a place, over images, positions and channels: `percentiles` 1, 20, 80, 99, `mean`, `sd`, and the
    `stable_rank` ||A||_F^2 / ||A||_2^2 of A (N * H * W, C), as it is, not centred: over how many directions the
    positions are spread, from 1 to C (arXiv:math/0503442; as a measure of norms, arXiv:2106.05956). Of its input:
    `mean_noise` and `var_noise`, by `measure_noise`. `weight_gradients` and `norm_gradients` are the L2 norms of the
    gradient of a mini-batch's loss, not clipped and without weight decay, as means over GRADIENT_BATCHES mini-batches.

    Args:
        model: of gnbench.build.build_model. Its parameters, gradients and buffers, and the random numbers to come, are
            what they were afterwards; it is left in training mode.
        num_images: of training images, at least a mini-batch of them; mini-batches that are not full are left out.
        frozen: whether running statistics are used as they are.

    Returns:
        Numbers of DIGITS digits, None for one that is not finite, in lists by layer: docs/record.md has them all.
    """
    split = shuffled(dataset.train, max(num_images, recipe.batch_size))
    batch_size = min(recipe.batch_size, len(split))
    count = len(split) // batch_size * batch_size
    parameters = dict(model.named_parameters())
    gradients: list[Tensor] = []  # L2 norms (parameters,) of each mini-batch
    set_train_mode(model, frozen)
    with kept_statistics(model), _kept_random_state(dataset.mean.device), _watch(model, count) as places:
        for start in range(0, count, batch_size):
            images, labels = (tensor[start : start + batch_size] for tensor in (split.images, split.labels))
            with torch.set_grad_enabled(len(gradients) < GRADIENT_BATCHES):
                with autocast(images.device, precision):
                    logits = model(dataset.normalize(images))
                loss = F.cross_entropy(logits.double(), labels, label_smoothing=recipe.label_smoothing)
            if loss.requires_grad:
                gradients.append(_measure_gradients(loss, list(parameters.values())))
    sizes = [2**power for power in range(count.bit_length()) if LEAST_BATCHES * 2**power <= count]
    layers = [place.summarize(sizes) for place in places.values()]
    keys = layers[0] if layers else ()
    norms = dict(zip(parameters, _plain(torch.stack(gradients).mean(0)), strict=True))
    return {
        "num_images": count,
        "layers": list(places),
        **{key: [layer[key] for layer in layers] for key in keys},
        "norm_batch_sizes": sizes,
        "weight_gradients": {
            name.replace("parametrizations.", "").removesuffix(".original"): norms[name]
            for name, parameter in parameters.items()
            if parameter.ndim > 1 and not any(name.startswith(f"{place}.") for place in places)
        },
        "norm_gradients": [
            {name.removeprefix(f"{place}."): norm for name, norm in norms.items() if name.startswith(f"{place}.")}
            for place in places
        ],
    }


def measure_noise(moments: Tensor, norm_batch_sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """How far the statistics of a mini-batch are from the population's: (sizes,) of the mean, (sizes,) of the variance.

    mean_noise = E[(mean_B - mean)^2 / var], var_noise = E[(var_B / var - 1)^2]: mean and var (biased) are those of a
    channel over all images and positions, mean_B and var_B those over a mini-batch B of `norm_batch_size` images. E is
    over disjoint mini-batches of neighbouring images, as a sum divided by their number - 1, since the population is
    made of the same images; and over the channels that are not constant. mean_noise falls as 1 / norm_batch_size where
    images are independent; it is 1 / norm_batch_size where the positions of an image are all alike.

    Args:
        moments: of each image and channel over its positions, the mean of x and of x^2 (N, 2, C).
    """
    mean, square = moments.mean(0)
    var = square - mean.square()
    live = ~(var <= CONSTANT * square)  # so that what is not a number is not left out
    found = [moments.new_zeros(0, 2)]
    for size in norm_batch_sizes:
        count = len(moments) // size
        batch_mean, batch_square = moments[: count * size].unflatten(0, (count, size)).mean(1).unbind(1)
        errors = (batch_mean - mean).square() / var, ((batch_square - batch_mean.square()) / var - 1).square()
        found.append(torch.stack([error.sum(0)[live].mean() / (count - 1) for error in errors])[None])
    mean_noise, var_noise = torch.cat(found).unbind(1)
    return mean_noise, var_noise


class _Place:
    """A place of a norm, and sums of what comes to it, x, and leaves it, y, in mini-batches (B, C, H, W)."""

    def __init__(self, layer: nn.Module, num_images: int) -> None:
        self.num_images = num_images
        sizes = (getattr(module, "norm_batch_size", None) for module in layer.modules())
        self.norm_batch_size = next((size for size in sizes if size), None)
        self.moments: list[Tensor] = []  # of x
        self.values: list[Tensor] = []  # some of y
        self.count, self.sum, self.gram = 0, 0.0, 0.0  # of y: elements, their sum, A^T A (C, C)

    @torch.no_grad()
    def add_input(self, x: Tensor) -> None:
        x = x.double()
        moments = torch.stack([x.mean((2, 3)), x.square().mean((2, 3))], 1)  # (B, 2, C)
        if self.norm_batch_size and len(x) % self.norm_batch_size == 0:  # as NormBatches deals them out
            moments = moments.unflatten(0, (self.norm_batch_size, -1)).transpose(0, 1).flatten(0, 1)
        self.moments.append(moments)

    @torch.no_grad()
    def add_output(self, y: Tensor) -> None:
        step = math.ceil(self.num_images * y[0].numel() / MOST_VALUES)
        while math.gcd(step, y[0].numel()) > 1:  # else it would always meet the same positions
            step += 1
        self.values.append(y.flatten()[::step].clone())
        rows = y.double().transpose(0, 1).flatten(1)  # A^T: (B, C, H, W) -> (C, B * H * W)
        self.count += rows.numel()
        self.sum = self.sum + rows.sum()
        self.gram = self.gram + rows @ rows.T

    def summarize(self, norm_batch_sizes: Sequence[int]) -> dict:
        mean, square = self.sum / self.count, self.gram.trace() / self.count
        finite = self.gram.isfinite().all()
        rank = self.gram.trace() / torch.linalg.eigvalsh(self.gram)[-1] if finite else self.gram.trace() * math.nan
        mean_noise, var_noise = measure_noise(torch.cat(self.moments), norm_batch_sizes)
        return {
            "percentiles": [_round(value) for value in percentiles(torch.cat(self.values))],
            "mean": _plain(mean),
            "sd": _plain((square - mean.square()).clamp(min=0).sqrt()),
            "stable_rank": _plain(rank),
            "mean_noise": _plain(mean_noise),
            "var_noise": _plain(var_noise),
        }


@contextlib.contextmanager
def _watch(model: nn.Module, num_images: int) -> Iterator[dict[str, _Place]]:
    """The places of norms by name, filled in the order in which passes through the model come to them."""
    places: dict[str, _Place] = {}

    def enter(name: str, layer: nn.Module, x: Tensor) -> None:
        if name not in places:
            places[name] = _Place(layer, num_images)
        places[name].add_input(x)

    hooks = []
    for name in getattr(model, "norm_places", ()):
        layer = model.get_submodule(name)
        hooks += [
            layer.register_forward_pre_hook(lambda layer, inputs, name=name: enter(name, layer, inputs[0])),
            layer.register_forward_hook(lambda _, __, output, name=name: places[name].add_output(output)),
        ]
    try:
        yield places
    finally:
        for hook in hooks:
            hook.remove()


def _kept_random_state(device: torch.device) -> contextlib.AbstractContextManager:
    """Random numbers that a norm draws inside are drawn again afterwards."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _measure_gradients(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    """The L2 norm of the loss's gradient by each parameter, (parameters,); 0 for one that it does not depend on."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.stack([loss.new_zeros(()) if g is None else torch.linalg.vector_norm(g.double()) for g in gradients])


def _plain(values: Tensor) -> float | list | None:
    """A tensor as numbers for a record."""
    found = values.tolist()
    return [_round(value) for value in found] if isinstance(found, list) else _round(found)


def _round(value: float | None) -> float | None:
    return float(f"{value:.{DIGITS}g}") if value is not None and math.isfinite(value) else None
