"""What one training does: its hyperparameters, checked when they are set, and its learning rate at every step."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from gnbench.errors import require

SCHEDULES = ("step", "cosine", "constant")


@dataclass
class Recipe:
    """SGD with momentum under the linear learning-rate rule (arXiv:1706.02677), the same for every norm.

    Raises:
        UserError: a value is out of its range; the sentence names the key, the value and what is legal.
    """

    batch_size: int = 128  # images in one update
    epochs: int = 164  # 64k steps at batch 128 on CIFAR, as arXiv:1512.03385
    max_steps: int | None = None  # ends the training after so many updates; the schedule spans what is trained
    base_lr: float = 0.1  # lr = base_lr * batch_size / base_batch_size
    base_batch_size: int = 128  # the batch size at which lr is base_lr
    momentum: float = 0.9  # of SGD
    nesterov: bool = False  # whether momentum looks ahead
    weight_decay: float = 1e-4  # L2, added to the gradient
    norm_weight_decay: bool = True  # whether norms' parameters and biases decay too, as in arXiv:1803.08494
    schedule: str = "step"  # step, cosine, constant
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75])  # of the training, for `step`
    lr_decay: float = 0.1  # factor at each milestone
    warmup_epochs: float = 0.0  # linear from 0
    label_smoothing: float = 0.0  # share of the target spread over all classes
    clip_grad_norm: float | None = None  # largest L2 norm of all gradients together
    drop_last: bool = True  # whether an epoch leaves out the images that do not fill its last batch
    frozen_epochs: int = 0  # the last so many epochs use the running statistics as they are (arXiv:2105.07576)
    precise_images: int = 10000  # training images behind the precise statistics (arXiv:2105.07576)
    report_epochs: int = 5  # test_error is the median over the last so many epochs, or the frozen ones if fewer
    test_every: int = 1  # epochs between two tests; the last report_epochs are always tested

    def __post_init__(self) -> None:
        counts = ("batch_size", "epochs", "base_batch_size", "precise_images", "report_epochs", "test_every")
        self._check(counts, lambda value: value >= 1, "1 or more")
        self._check(("base_lr",), lambda value: 0 < value < math.inf, "a number above 0")
        self._check(("lr_decay",), lambda value: 0 < value <= 1, "above 0 and at most 1")
        self._check(("max_steps", "clip_grad_norm"), lambda value: value is None or value > 0, "above 0, or null")
        self._check(
            ("weight_decay", "warmup_epochs", "frozen_epochs"), lambda value: 0 <= value < math.inf, "0 or more"
        )
        self._check(("momentum", "label_smoothing"), lambda value: 0 <= value < 1, "at least 0 and below 1")
        self._check(("schedule",), lambda value: value in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._check(("milestones",), _are_rising, "rising fractions of the training between 0 and 1")
        self._check(("nesterov",), lambda value: self.momentum > 0 or not value, "false when momentum is 0")

    def _check(self, keys: Iterable[str], is_legal: Callable[[Any], bool], legal: str) -> None:
        for key in keys:
            value = getattr(self, key)
            require(is_legal(value), key, value, f"{key} is {legal}")

    def steps_per_epoch(self, num_images: int) -> int:
        """Updates in one pass over `num_images` training images.

        Raises:
            UserError: they do not fill one batch and the last smaller batch is dropped.
        """
        steps = num_images // self.batch_size if self.drop_last else math.ceil(num_images / self.batch_size)
        legal = f"batch_size is at most the {num_images} training images, or drop_last=false"
        require(steps > 0, "batch_size", self.batch_size, legal)
        return steps

    def total_steps(self, num_images: int) -> int:
        """Updates in the whole training."""
        steps = self.epochs * self.steps_per_epoch(num_images)
        return min(steps, self.max_steps) if self.max_steps else steps

    def num_epochs(self, num_images: int) -> int:
        """Epochs that the training enters: `max_steps` may end it early."""
        return math.ceil(self.total_steps(num_images) / self.steps_per_epoch(num_images))

    def is_tested(self, epoch: int, num_images: int) -> bool:
        """Whether the test images are measured at the end of `epoch`, from 1."""
        return epoch % self.test_every == 0 or epoch > self.num_epochs(num_images) - self.report_epochs

    def is_frozen(self, epoch: int, num_images: int) -> bool:
        """Whether `epoch`, from 1, uses running statistics as they are."""
        return epoch > self.num_epochs(num_images) - self.frozen_epochs

    def learning_rate(self, step: int, num_images: int) -> float:
        """Learning rate of update `step` (from 0): peak * warm-up(step) * schedule(step / total steps).

        peak = base_lr * batch_size / base_batch_size; warm-up rises linearly to 1 over `warmup_epochs`;
        `step` multiplies by lr_decay at each milestone, `cosine` is (1 + cos(pi * progress)) / 2 (arXiv:1608.03983).
        """
        progress = step / self.total_steps(num_images)
        peak = self.base_lr * self.batch_size / self.base_batch_size
        warmup_steps = self.warmup_epochs * self.steps_per_epoch(num_images)
        warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        return peak * warmup * self._schedule(progress)

    def _schedule(self, progress: float) -> float:
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        if self.schedule == "step":
            return self.lr_decay ** sum(progress >= milestone for milestone in self.milestones)
        return 1.0


def _are_rising(milestones: list[float]) -> bool:
    return all(0 < each < 1 for each in milestones) and sorted(set(milestones)) == milestones
