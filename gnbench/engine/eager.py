"""The reference: a training by itself, one kernel after the other."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnbench.machine import autocast
from gnbench.precise_bn import set_train_mode
from gnbench.train import Training, lay_out_momenta

ONE_PASS = "norms in one pass"
WINOGRAD = "Winograd convolutions"


class StepEngine:
    """An engine whose step is an update by its optimizer, at the rate that its members' recipe has for it."""

    members: list[Training]
    optimizer: torch.optim.Optimizer

    def step(self, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """One update of every member by its own batch: images (B, C, H, W), labels (B,).

        Returns:
            Mean losses and numbers of errors, (members,) each, on the device.
        """
        self.set_learning_rate()
        return self.update(batches)

    def set_learning_rate(self) -> None:
        """Take the rate of the next update."""
        rate = self.members[0].learning_rate
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # which a recorded step reads
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def update(self, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A step at the rate that is set: what runs on the device."""
        raise NotImplementedError


@dataclass(frozen=True)
class Ways:
    """What of a step is executed otherwise than by torch's own kernels on (N, C, H, W).

    Attributes:
        channels_last: weights and activations are kept as (N, H, W, C) in memory, which most CPU kernels prefer; the
            mathematics is the same, the rounding is not.
        one_pass: norms that have it compute themselves, and a ReLU after them, in one pass over a channels_last map.
        winograd: convolutions that have it compute a channels_last map with fewer multiplications.
    """

    channels_last: bool = False
    one_pass: bool = False
    winograd: bool = False

    @property
    def names(self) -> list[str]:
        """In the words of a record."""
        used = {"channels_last": self.channels_last, ONE_PASS: self.one_pass, WINOGRAD: self.winograd}
        return [name for name, is_used in used.items() if is_used]


PLAIN, CHANNELS_LAST = Ways(), Ways(channels_last=True)


class Eager(StepEngine):
    """One training, one kernel after the other."""

    def __init__(self, training: Training, ways: Ways = PLAIN) -> None:
        self.members, self.ways = [training], ways
        self.name = ", ".join(ways.names) or "eager"
        if ways.channels_last:
            training.model.to(memory_format=torch.channels_last)
        take_kernels(training.model, ways)
        self.optimizer = training.optimizer
        lay_out_momenta(self.optimizer)

    def set_train_mode(self, frozen: bool) -> None:
        """Training mode; with `frozen`, running statistics are used as they are."""
        set_train_mode(self.members[0].model, frozen)

    def update(self, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        training = self.members[0]
        recipe, ((images, labels),) = training.recipe, batches
        if self.ways.channels_last:  # for convolutions whose weights are computed, and have no format of their own
            images = images.contiguous(memory_format=torch.channels_last)
        logits = forward(training.model, images, training.precision)
        loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        if recipe.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(training.model.parameters(), recipe.clip_grad_norm)
        self.optimizer.step()
        return loss.detach()[None], (logits.detach().argmax(1) != labels).sum()[None]


def take_kernels(network: nn.Module, ways: Ways) -> None:
    """Let the layers that have them use gnbench's own kernels (gnbench.kernels), or not."""
    for module in network.modules():
        for name in ("one_pass", "winograd"):
            if isinstance(getattr(module, name, None), bool):
                setattr(module, name, getattr(ways, name))


def forward(model: nn.Module, images: Tensor, precision: str) -> Tensor:
    """Logits, in the precision of the loss: under bf16 the model computes in mixed precision, the loss in float32."""
    with autocast(images.device, precision):
        logits = model(images)
    return logits.float() if precision == "bf16" else logits
