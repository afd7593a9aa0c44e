"""What a norm costs: the time of a training step and of inference, beside BN's, and memory. `sweep=cost` measures it.

Time is measured in pairs: the model with the norm and the same model with plain BN (over the whole batch) stand in one
process and take turns, round after round, each as long as it is told; a ratio is of one round. Both do what a trainer
does with a batch that is there: the reference engine's step, in the memory format that is asked for, without
torch.compile. Augmentation and tests, the same for every norm, are left out.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gnbench.configs import load_group
from gnbench.data import Dataset
from gnbench.engine import Eager, Ways, prefers_channels_last
from gnbench.engine.eager import forward
from gnbench.errors import OUT_OF_MEMORY, first_line, is_out_of_memory
from gnbench.timing import time_calls, wait_for_device
from gnbench.train import Training

RATE = 1e-9  # base_lr: steps that do all their work and leave the weights where finite numbers come from
MOST_IMAGES = 2**20  # of the largest batch that is tried
RESOLUTION = 64  # the largest batch is known to one part in so many
WAYS = ("step", "inference")
MIB = 2**20

MakeTraining = Callable[[dict], Training]  # a norm's config node -> the training of the same run with that norm


@dataclass(frozen=True)
class Subject:
    """A model on a batch, to be timed: what its trainer does in a step, and its forward pass in evaluation."""

    engine: Eager
    images: Tensor  # (B, C, H, W)
    labels: Tensor  # (B,)

    @property
    def training(self) -> Training:
        return self.engine.members[0]

    @property
    def format(self) -> str:
        return "channels_last" if self.engine.ways.channels_last else "contiguous"

    def step(self) -> None:
        """One update."""
        self.engine.step([(self.images, self.labels)])

    def inference(self) -> None:
        """One forward pass without gradients."""
        with torch.no_grad():
            forward(self.training.model, self.images, self.training.precision)

    def prepare(self, way: str) -> None:
        """Get ready for a step, or for inference."""
        if way == "step":
            self.engine.set_train_mode(frozen=False)
        else:
            self.training.model.eval()


def measure_cost(config: dict, make: MakeTraining, pause: Callable[[], None] = lambda: None) -> dict:
    """What a record's `cost` says of a measurement, as docs/record.md has it, and its `engine` and `num_parameters`.

    Args:
        config: of the run.
        make: the run's training with any norm.
        pause: called between two rounds; it raises to stop.
    """
    started = time.perf_counter()
    without = make_subject(make, load_group("norm", "none", {}, {}), config)
    device, saved_without_mb = without.images.device, measure_saved(without)
    warm_up(without, 1)  # what libraries take for themselves is not the norm's
    del without
    allocated = allocated_bytes(device)
    norm = make_subject(make, config["norm"], config)
    warm_up(norm, config["cost_warm_up"])
    peak_memory_mb = measure_peak(norm, allocated)
    saved_mb = measure_saved(norm)
    bn = make_subject(make, load_group("norm", "bn", {}, {"norm_batch_size": None}), config)
    warm_up(bn, config["cost_warm_up"])
    rounds = time_rounds({"": norm, "bn_": bn}, config["cost_rounds"], config["cost_round_s"], pause)
    cost = {
        "engine": norm.engine.name,
        "norm_format": norm.format,
        "bn_format": bn.format,
        "image_shape": list(norm.images.shape[1:]),
        "num_parameters": sum(parameter.numel() for parameter in norm.training.model.parameters()),
        **summarize_rounds(rounds, config["batch_size"]),
        "saved_mb": saved_mb,
        "norm_saved_mb": saved_mb - saved_without_mb,
        "peak_memory_mb": peak_memory_mb,
        "largest_batch": None,
        "largest_batch_limit": None,
        "rounds": rounds,
    }
    del norm, bn
    if device.type == "cuda":
        cost.update(measure_largest_batch(config, make))
    return {**cost, "time_s": time.perf_counter() - started}


def make_subject(make: MakeTraining, node: dict, config: dict, batch_size: int | None = None) -> Subject:
    """The model with a norm, in the memory format of the config, and as many images as its batch, or as are asked."""
    training = make(node)
    training.recipe = dataclasses.replace(training.recipe, base_lr=RATE)
    asked = config["memory_format"]
    channels_last = prefers_channels_last(training) if asked == "auto" else asked == "channels_last"
    engine = Eager(training, Ways(channels_last))
    engine.set_train_mode(frozen=False)
    return Subject(engine, *take_batch(training.dataset, batch_size or config["batch_size"]))


def take_batch(dataset: Dataset, size: int) -> tuple[Tensor, Tensor]:
    """So many training images (B, C, H, W), normalized, and labels (B,); the same again where there are too few."""
    index = torch.arange(size, device=dataset.mean.device) % len(dataset.train)
    return dataset.normalize(dataset.train.images[index]), dataset.train.labels[index]


def warm_up(subject: Subject, steps: int) -> None:
    """Let kernels be chosen and memory be taken."""
    for way in reversed(WAYS):
        subject.prepare(way)
        for _ in range(steps):
            getattr(subject, way)()


def time_rounds(
    subjects: dict[str, Subject], rounds: int, seconds: float, pause: Callable[[], None] = lambda: None
) -> list[dict[str, float]]:
    """A row a round: milliseconds of a step and of inference of each subject, under its prefix.

    In a round all subjects have their turn, in an order that every round reverses: neither is always the first.
    """
    rows = []
    for number in range(rounds):
        pause()
        row = {}
        for way in WAYS:
            for prefix in sorted(subjects, reverse=number % 2 == 1):
                subject = subjects[prefix]
                subject.prepare(way)
                row[f"{prefix}{way}_ms"] = 1000 * time_calls(getattr(subject, way), seconds, subject.images.device)
        rows.append(dict(sorted(row.items())))
    return rows


def summarize_rounds(rounds: Sequence[dict[str, float]], batch_size: int) -> dict[str, float]:
    """Medians over rounds, with quartiles `..._low` and `..._high`; a ratio is the norm's time over BN's of a round."""
    summary = {}
    for way in WAYS:
        norm, bn = (np.array([row[f"{prefix}{way}_ms"] for row in rounds]) for prefix in ("", "bn_"))
        for key, values in ((f"{way}_ms", norm), (f"bn_{way}_ms", bn), (f"{way}_ratio", norm / bn)):
            low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
            summary.update({key: middle, f"{key}_low": low, f"{key}_high": high})
    summary["images_per_s"] = 1000 * batch_size / summary["step_ms"]
    summary["inference_images_per_s"] = 1000 * batch_size / summary["inference_ms"]
    return summary


def measure_saved(subject: Subject) -> float:
    """MiB that a forward pass in training keeps for the backward pass; parameters, buffers and batch do not count."""
    subject.prepare("step")
    model = subject.training.model
    known = [*model.parameters(), *model.buffers(), subject.images]
    return count_saved_bytes(lambda: forward(model, subject.images, subject.training.precision), known) / MIB


def count_saved_bytes(compute: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """Bytes of what autograd saves while `compute` runs: each storage once and whole, those of `known` tensors not.

    What a layer's own backward keeps in other ways than `save_for_backward` is not seen.
    """
    kept: list[Tensor] = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = compute()
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in kept)}
    del output
    apart = {tensor.untyped_storage().data_ptr() for tensor in known}
    return sum(size for address, size in storages.items() if address not in apart)


def allocated_bytes(device: torch.device) -> int:
    """Of a GPU's memory, what torch's tensors take at this moment, without those that nobody needs."""
    if device.type != "cuda":
        return 0
    gc.collect()
    return torch.cuda.memory_allocated(device)


def measure_peak(subject: Subject, allocated: int) -> float | None:
    """MiB of a GPU at the peak of a step above `allocated` bytes, which were taken before the subject was made.

    So weights, gradients, momenta and the batch count, and the images of the data set do not. None on a CPU.
    """
    device = subject.images.device
    if device.type != "cuda":
        return None
    subject.prepare("step")
    torch.cuda.reset_peak_memory_stats(device)
    subject.step()
    wait_for_device(device)
    return (torch.cuda.max_memory_allocated(device) - allocated) / MIB


def measure_largest_batch(config: dict, make: MakeTraining) -> dict:
    """The largest batch of which a GPU makes a step, to one part in RESOLUTION, and why it makes none of a larger one.

    A norm whose statistics are over the whole batch has them over the whole of this one.
    """
    reasons = []

    def fits(batch_size: int) -> bool:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            _try_steps(config, make, batch_size)
            reason = None
        except RuntimeError as error:  # no memory, or a tensor with more elements than a kernel can count
            reason = OUT_OF_MEMORY if is_out_of_memory(error) else first_line(error)
        reasons.extend([reason] if reason else [])
        return reason is None

    largest = find_largest(fits, config["batch_size"], MOST_IMAGES)
    return {"largest_batch": largest, "largest_batch_limit": reasons[-1] if reasons else f"{MOST_IMAGES} were tried"}


def _try_steps(config: dict, make: MakeTraining, batch_size: int) -> None:
    """Two steps: momenta are there from the second on."""
    node = dict(config["norm"])
    if node.get("norm_batch_size") == config["batch_size"]:
        node["norm_batch_size"] = batch_size
    subject = make_subject(make, node, config, batch_size)
    for _ in range(2):
        subject.step()
    wait_for_device(subject.images.device)


def find_largest(fits: Callable[[int], bool], first: int, most: int) -> int | None:
    """About the largest number that fits, to one part in RESOLUTION; None where `first` does not.

    Doubled from `first` until one does not fit, or is above `most`; then the gap is halved.
    """
    low, high = 0, first
    while high <= most and fits(high):
        low, high = high, 2 * high
    if low == 0 or high > most:
        return low or None
    while high - low > max(1, low // RESOLUTION):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
