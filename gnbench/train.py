"""One training: the loop, a step, evaluation, and the state from which it goes on bit for bit."""

import math
import statistics
import time
from collections.abc import Callable, Set
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from gnbench.data import Dataset, images_ahead, train_batches
from gnbench.diagnostics import diagnose, is_due
from gnbench.evaluate import error_by_statistics, evaluate, response_percentiles
from gnbench.machine import peak_memory_mb
from gnbench.recipe import Recipe
from gnbench.record import count_reported
from gnbench.timing import wait_for_device

RESPONSE = "response"  # a model's module of this name has the percentiles of its output recorded
MOMENTUM = "momentum_buffer"  # torch.optim.SGD's name
STEPS_PER_CHECK = 100  # between two looks at the loss on a CPU; on a GPU, which would wait, an epoch's end is the first


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


@dataclass(eq=False)
class Training:
    """A model in training on a data set, by a recipe; `train` moves it forward."""

    model: nn.Module
    dataset: Dataset
    recipe: Recipe
    seed: int
    precision: str = "float32"
    progress: Progress = field(default_factory=Progress)
    diagnostics: int | None = None  # training images on which layers and gradients are measured

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.model, self.recipe, find_spared(self.model))
        self.total_steps = self.recipe.total_steps(len(self.dataset.train))
        self.steps_per_epoch = self.recipe.steps_per_epoch(len(self.dataset.train))
        self.share = slice(None)  # of every batch: the images that this process trains on

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return self.recipe.learning_rate(self.progress.step, len(self.dataset.train))

    @property
    def num_images(self) -> int:
        """Of the next update; an epoch's last may have fewer than the others."""
        first = self.progress.step % self.steps_per_epoch * self.recipe.batch_size
        return min(self.recipe.batch_size, len(self.dataset.train) - first)

    def state(self) -> dict:
        """Tensors and plain values from which `restore` continues bit for bit, between any two steps."""
        optimizer = _own(self.optimizer.state_dict())
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])
        return {
            "model": _own(self.model.state_dict()),
            "optimizer": optimizer,
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


def _own(value: object) -> object:
    """The same with copies of its tensors: a view would be saved with all that it is a view of."""
    if isinstance(value, dict):
        return {key: _own(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_own(inner) for inner in value]
    return value.clone() if isinstance(value, Tensor) else value


def find_spared(model: nn.Module) -> set[nn.Parameter]:
    """What norm_weight_decay=false spares the weight decay: the parameters of norms, of any shape, and biases."""
    norms = [model.get_submodule(name) for name in getattr(model, "norm_places", ())]
    flat = {parameter for parameter in model.parameters() if parameter.ndim <= 1}
    return flat.union(*(norm.parameters() for norm in norms))


def make_optimizer(model: nn.Module, recipe: Recipe, spared: Set[nn.Parameter]) -> torch.optim.SGD:
    """SGD with momentum; `spared` are the parameters that decay only if the norms' do."""
    groups = [
        {
            "params": [parameter for parameter in model.parameters() if parameter not in spared],
            "weight_decay": recipe.weight_decay,
        },
        {
            "params": [parameter for parameter in model.parameters() if parameter in spared],
            "weight_decay": recipe.weight_decay if recipe.norm_weight_decay else 0.0,
        },
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, lr=recipe.base_lr, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)


def lay_out_momenta(optimizer: torch.optim.Optimizer) -> None:
    """Give momenta the memory format of their parameters: a checkpoint may bring another engine's, and fused SGD, which
    goes by addresses, would mix them up."""
    for parameter, state in optimizer.state.items():
        if isinstance(state.get(MOMENTUM), Tensor):
            state[MOMENTUM] = torch.empty_like(parameter).copy_(state[MOMENTUM])


class Engine(Protocol):
    """What moves one or several trainings forward by a step: gnbench.engine."""

    members: list[Training]  # at the same step, alike but for their seeds; one that diverges or fails is taken out

    @property
    def name(self) -> str: ...  # how a step is executed, as a record's `environment.engine` says it

    def set_train_mode(self, frozen: bool) -> None: ...

    def step(self, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]: ...


def train(engine: Engine, pause: Callable[[], None], drop: Callable[[Training, Diverged], None] | None = None) -> None:
    """Train the engine's members to the end of their recipe, from wherever they are.

    Args:
        pause: called between any two steps and after the last, whenever the state is whole: there the caller saves
            it, shows it, or raises to stop. An epoch's row has joined the history by the pause after its last step.
        drop: told of a member whose loss is not finite, which is then trained no further; None raises instead.

    Raises:
        Diverged: a training loss is not finite, and there is no `drop`.
    """
    while engine.members and engine.members[0].progress.step < engine.members[0].total_steps:
        _train_epoch(engine, pause, drop)


def _train_epoch(engine: Engine, pause: Callable[[], None], drop: Callable[[Training, Diverged], None] | None) -> None:
    """Train to the end of the epoch under way."""
    members, lead = engine.members, engine.members[0]
    recipe, dataset, step = lead.recipe, lead.dataset, lead.progress.step
    epoch, first_step = divmod(step, lead.steps_per_epoch)
    epoch_end = min((epoch + 1) * lead.steps_per_epoch, lead.total_steps)
    chunk = images_ahead(dataset, len(members))
    on_cpu = dataset.mean.device.type == "cpu"
    batches = {
        training.seed: train_batches(
            dataset, recipe.batch_size, recipe.drop_last, training.seed, epoch, first_step, chunk, training.share
        )
        for training in members
    }
    loss_sums, num_errors = _gather_sums(members)
    engine.set_train_mode(recipe.is_frozen(epoch + 1, len(dataset.train)))
    while step < epoch_end and members:
        if len(loss_sums) != len(members):  # one has left
            loss_sums, num_errors = _gather_sums(members)
        started = time.perf_counter()
        num_images = members[0].num_images
        losses, errors = engine.step([next(batches[training.seed]) for training in members])
        loss_sums += losses.double() * num_images
        num_errors += errors
        step += 1
        is_looked_at = step == epoch_end or (on_cpu and step % STEPS_PER_CHECK == 0)
        if is_looked_at:
            wait_for_device(dataset.mean.device)  # a GPU's work on the epoch is part of its time
        share_s = (time.perf_counter() - started) / len(members)
        for training in members:
            training.progress.step = step
            training.progress.num_images += num_images
            training.progress.time_s += share_s
        if is_looked_at:
            _drop_diverged(members, epoch + 1, drop)
        if step == epoch_end:
            for training in members:
                _end_epoch(training, epoch + 1)
        if members:
            pause()


def _gather_sums(members: list[Training]) -> tuple[Tensor, Tensor]:
    """The members' sums of losses and errors, (members,) each, of which the progress of each holds its own element."""
    device = members[0].dataset.mean.device
    loss_sums = torch.tensor([float(t.progress.loss_sum) for t in members], dtype=torch.float64, device=device)
    num_errors = torch.tensor([int(t.progress.num_errors) for t in members], dtype=torch.int64, device=device)
    for training, loss_sum, errors in zip(members, loss_sums, num_errors, strict=True):
        training.progress.loss_sum, training.progress.num_errors = loss_sum, errors
    return loss_sums, num_errors


def _drop_diverged(members: list[Training], epoch: int, drop: Callable[[Training, Diverged], None] | None) -> None:
    """Take the members whose sum of losses is not finite out of the training."""
    for training in [each for each in members if not math.isfinite(each.progress.loss_sum)]:
        step = training.progress.step
        error = Diverged(f"the training loss is not finite by step {step} (epoch {epoch})")
        if drop is None:
            raise error
        members.remove(training)
        drop(training, error)


def summarize(training: Training) -> dict:
    """A finished training's numbers: `test_error` is the median over the last `count_reported`, never the best."""
    history, recipe = training.progress.history, training.recipe
    last = history[-1]
    reported = [row["test_error"] for row in history[-count_reported(recipe.report_epochs, recipe.frozen_epochs) :]]
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


def _end_epoch(training: Training, epoch: int) -> None:
    """Turn the epoch's sums into a row of the history."""
    progress, recipe, diagnosis = training.progress, training.recipe, {}
    num_train = len(training.dataset.train)
    if training.diagnostics and is_due(epoch, recipe.num_epochs(num_train)):
        diagnosis = {"diagnostics": _diagnose(training, epoch)}
    progress.history.append(
        {
            "epoch": epoch,
            "step": progress.step,
            "lr": recipe.learning_rate(progress.step - 1, num_train),
            "train_loss": float(progress.loss_sum) / progress.num_images,
            "train_error": 100 * int(progress.num_errors) / progress.num_images,
            **_measure(training, recipe.is_tested(epoch, num_train)),
            **diagnosis,
            "time_s": progress.time_s,
            "peak_memory_mb": peak_memory_mb(training.dataset.mean.device),
        }
    )
    progress.loss_sum, progress.num_errors, progress.num_images, progress.time_s = 0.0, 0, 0, 0.0


def _diagnose(training: Training, epoch: int) -> dict:
    model, dataset, precision = training.model, training.dataset, training.precision
    frozen = training.recipe.is_frozen(epoch, len(training.dataset.train))
    return diagnose(model, dataset, training.recipe, precision, training.diagnostics, frozen)


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
