"""One training: the loop, a step, evaluation, and the state from which it goes on bit for bit."""

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnbench.data import Dataset, train_batches
from gnbench.evaluate import error_by_statistics, evaluate, response_percentiles
from gnbench.precise_bn import layers_with_statistics
from gnbench.recipe import Recipe

RESPONSE = "response"  # a model's module of this name has the percentiles of its output recorded
STEPS_PER_CHECK = 100  # between two looks at the loss: a look makes a GPU wait


class Diverged(Exception):
    """The training loss is not finite."""


@dataclass
class Progress:
    """How far a training is. Sums belong to the epoch under way and are divided once, at its end."""

    step: int = 0  # updates done
    loss_sum: float | Tensor = 0.0  # a tensor on the device while an epoch runs
    num_errors: int | Tensor = 0
    num_images: int = 0
    time_s: float = 0.0
    history: list[dict] = field(default_factory=list)  # a row an epoch


@dataclass
class Training:
    """A model in training on a data set, by a recipe; `train` moves it forward."""

    model: nn.Module
    dataset: Dataset
    recipe: Recipe
    seed: int
    precision: str = "float32"
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.model, self.recipe)
        self.total_steps = self.recipe.total_steps(len(self.dataset.train))
        self.steps_per_epoch = self.recipe.steps_per_epoch(len(self.dataset.train))

    def state(self) -> dict:
        """Tensors and plain values from which `restore` continues bit for bit, between any two steps."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": {
                **asdict(self.progress),
                "loss_sum": float(self.progress.loss_sum),
                "num_errors": int(self.progress.num_errors),
            },
        }

    def restore(self, state: dict) -> None:
        """Continue where `state` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD with momentum. Gamma, beta and biases, the parameters of one dimension, may be spared the weight decay."""
    wide = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    flat = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": wide, "weight_decay": recipe.weight_decay},
        {"params": flat, "weight_decay": recipe.weight_decay if recipe.norm_weight_decay else 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, lr=recipe.base_lr, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)


def train(training: Training, pause: Callable[[], None]) -> None:
    """Train to the end of the recipe, from wherever `training` is.

    `pause` is called between any two steps and after the last, whenever the state is whole: there the caller saves
    it, shows it, or raises to stop. An epoch's row has joined the history by the pause after its last step.

    Raises:
        Diverged: the training loss is not finite.
    """
    progress, dataset, recipe = training.progress, training.dataset, training.recipe
    while progress.step < training.total_steps:
        epoch, first_step = divmod(progress.step, training.steps_per_epoch)
        epoch_end = min((epoch + 1) * training.steps_per_epoch, training.total_steps)
        batches = train_batches(dataset, recipe.batch_size, recipe.drop_last, training.seed, epoch, first_step)
        progress.loss_sum = torch.as_tensor(progress.loss_sum, dtype=torch.float64, device=dataset.mean.device)
        progress.num_errors = torch.as_tensor(progress.num_errors, device=dataset.mean.device)
        _set_train_mode(training, epoch)
        while progress.step < epoch_end:
            started = time.perf_counter()
            images, labels = next(batches)
            loss, errors = train_step(training, images, labels)
            progress.loss_sum += loss.double() * len(labels)
            progress.num_errors += errors
            progress.num_images += len(labels)
            progress.step += 1
            progress.time_s += time.perf_counter() - started
            at_end = progress.step == epoch_end
            if at_end or progress.step % STEPS_PER_CHECK == 0:
                check_loss(progress, epoch + 1)
            if at_end:
                _end_epoch(training, epoch + 1)
            pause()


def _set_train_mode(training: Training, epoch: int) -> None:
    """Training mode, but for running statistics that are frozen in the last epochs: those are used as they are."""
    training.model.train()
    if epoch >= _num_epochs(training) - training.recipe.frozen_epochs:
        for layer in layers_with_statistics(training.model):
            layer.eval()


def _num_epochs(training: Training) -> int:
    """Epochs that the training enters: `max_steps` may end it early."""
    return math.ceil(training.total_steps / training.steps_per_epoch)


def check_loss(progress: Progress, epoch: int) -> None:
    """Raise Diverged where the sum of the epoch's losses is not finite."""
    if not math.isfinite(progress.loss_sum):
        raise Diverged(f"the training loss is not finite by step {progress.step} (epoch {epoch})")


def train_step(training: Training, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One update; returns the batch's mean loss and its number of errors, both still on the device."""
    recipe, optimizer = training.recipe, training.optimizer
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate(training.progress.step, len(training.dataset.train))
    with torch.autocast(images.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
        logits = training.model(images)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
    optimizer.zero_grad()
    loss.backward()
    if recipe.clip_grad_norm is not None:
        nn.utils.clip_grad_norm_(training.model.parameters(), recipe.clip_grad_norm)
    optimizer.step()
    return loss.detach(), (logits.detach().argmax(1) != labels).sum()


def summarize(training: Training) -> dict:
    """A finished training's numbers: `test_error` is the median over the last `report_epochs`, never the best."""
    history, recipe = training.progress.history, training.recipe
    last = history[-1]
    reported = [row["test_error"] for row in history[-recipe.report_epochs :]]
    return {
        "test_error": statistics.median(reported),
        "final_test_error": last["test_error"],
        "test_error_by_statistics": error_by_statistics(
            training.model, training.dataset, training.precision, recipe.batch_size, recipe.precise_images
        ),
        "val_error": last["val_error"],
        "train_error": last["train_error"],
        "train_loss": last["train_loss"],
        "time_s": sum(row["time_s"] for row in history),
    }


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far in MiB: of the device where it is a GPU, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _end_epoch(training: Training, epoch: int) -> None:
    """Turn the epoch's sums into a row of the history."""
    progress, recipe = training.progress, training.recipe
    tested = epoch % recipe.test_every == 0 or epoch > _num_epochs(training) - recipe.report_epochs
    progress.history.append(
        {
            "epoch": epoch,
            "step": progress.step,
            "lr": training.optimizer.param_groups[0]["lr"],
            "train_loss": float(progress.loss_sum) / progress.num_images,
            "train_error": 100 * int(progress.num_errors) / progress.num_images,
            **_measure(training, tested),
            "time_s": progress.time_s,
            "peak_memory_mb": peak_memory_mb(training.dataset.mean.device),
        }
    )
    progress.loss_sum, progress.num_errors, progress.num_images, progress.time_s = 0.0, 0, 0, 0.0


def _measure(training: Training, tested: bool) -> dict:
    """What an epoch's row says of images that are not trained on; None is what was not measured."""
    model, dataset, precision = training.model.eval(), training.dataset, training.precision
    row = {"test_loss": None, "test_error": None, "val_error": None}
    if tested:
        row["test_loss"], row["test_error"] = evaluate(model, dataset, dataset.test, precision)
    if tested and hasattr(model, RESPONSE):
        row["response_percentiles"] = response_percentiles(model, dataset, RESPONSE, precision)
    if len(dataset.val):
        _, row["val_error"] = evaluate(model, dataset, dataset.val, precision)
    if row["test_loss"] is not None and not math.isfinite(row["test_loss"]):
        row["test_loss"] = None  # JSON has no infinity
    return row
