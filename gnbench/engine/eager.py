"""The reference: a training by itself, one kernel after the other."""

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnbench.precise_bn import set_train_mode
from gnbench.train import Training, lay_out_momenta

log = logging.getLogger(__name__)


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


class Eager(StepEngine):
    """One training, by torch's own kernels as they come.

    Args:
        channels_last: keep weights and activations as (N, H, W, C) in memory, which most CPU kernels prefer; the
            mathematics is the same, the rounding is not.
        compiled: run the model through torch.compile, which takes half a minute and a C++ compiler; without one, the
            model runs as it is.
    """

    def __init__(self, training: Training, channels_last: bool = False, compiled: bool = False) -> None:
        self.members = [training]
        self.channels_last = channels_last
        if channels_last:
            training.model.to(memory_format=torch.channels_last)
        self.network = _Compiled(training.model) if compiled else training.model
        self.optimizer = training.optimizer
        lay_out_momenta(self.optimizer)

    @property
    def name(self) -> str:
        return ", ".join(["channels_last"] * self.channels_last + ["compiled"] * self.is_compiled) or "eager"

    @property
    def is_compiled(self) -> bool:
        """Whether the model runs through torch.compile."""
        return isinstance(self.network, _Compiled) and self.network.works

    def stop_compiling(self) -> None:
        """Run the model as it is from here on."""
        self.network = self.members[0].model

    def set_train_mode(self, frozen: bool) -> None:
        """Training mode; with `frozen`, running statistics are used as they are."""
        set_train_mode(self.members[0].model, frozen)

    def update(self, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        training = self.members[0]
        recipe, ((images, labels),) = training.recipe, batches
        logits = forward(self.network, images, training.precision)
        loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        if recipe.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(training.model.parameters(), recipe.clip_grad_norm)
        self.optimizer.step()
        return loss.detach()[None], (logits.detach().argmax(1) != labels).sum()[None]


class _Compiled:
    """A model through torch.compile, or as it is from the first failure of that on."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.compiled = torch.compile(model, dynamic=False)  # a shape's code does not depend on the shapes before it
        self.works = True

    def __call__(self, images: Tensor) -> Tensor:
        if self.works:
            try:
                return self.compiled(images)
            except torch._dynamo.exc.TorchDynamoException as error:
                log.warning("trained without torch.compile: %s", str(error).partition("\n")[0])
                self.works = False
        return self.model(images)


def forward(model: Callable[[Tensor], Tensor], images: Tensor, precision: str) -> Tensor:
    """Logits, in the precision of the loss: under bf16 the model computes in mixed precision, the loss in float32."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(images)
    return logits.float() if precision == "bf16" else logits
