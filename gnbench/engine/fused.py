"""Several seeds of one cell as one network, because small pieces of work cost more than their arithmetic.

Seed r is lane r of L: its images are the channels from r * 3 on of a batch (B, L * 3, H, W), its convolutions are group
r of grouped ones, its normalization groups, its logits and its loss are its own. Nothing crosses from lane to lane, so
each seed trains as it would alone, to rounding (horizontal fusion, arXiv:2102.02344).

The members' parameters, buffers and momenta become views of the network's. So a member can be evaluated, saved and
restored at any time as if it were alone.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnbench.engine.eager import CHANNELS_LAST, PLAIN, StepEngine, Ways, forward, take_kernels
from gnbench.models.conv import Conv2d
from gnbench.models.resnet import PadShortcut
from gnbench.norms.batch import BatchNorm, BatchRenorm
from gnbench.norms.group import GroupNorm
from gnbench.precise_bn import set_train_mode
from gnbench.record import TOGETHER
from gnbench.train import MOMENTUM, Training, find_spared, lay_out_momenta, make_optimizer

Lanes = Sequence[nn.Module | None]  # one module a lane, of the same kind; None where a lane is empty
Links = list[tuple[nn.Parameter, list[nn.Parameter | None]]]  # a fused parameter and the lanes' parts of it

# Modules that treat every channel, or every group of channels, by itself, so that concatenated parameters are all it
# takes; and those of their attributes that count channels or groups.
COUNTS: dict[type, tuple[str, ...]] = {
    nn.Conv2d: ("in_channels", "out_channels", "groups"),
    Conv2d: ("in_channels", "out_channels", "groups"),
    GroupNorm: ("num_channels", "num_groups"),
    BatchNorm: (),
    BatchRenorm: (),
}
STATELESS = (nn.Identity, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


class Fused(StepEngine):
    """Trainings that differ by their seeds alone, at the same step, moved forward as one network.

    A lane may be empty: its parameters are zeros that nothing reads. So a group whose members have ended, diverged or
    are trained elsewhere keeps its shape, and with it every bit of the others' arithmetic.

    Args:
        lanes: a training for each lane, or None; all of one recipe, data set and model.
    """

    def __init__(self, lanes: Sequence[Training | None], ways: Ways = CHANNELS_LAST) -> None:
        self.name = ", ".join([f"{len(lanes)} seeds {TOGETHER}", *ways.names])
        self.memory_format = torch.channels_last if ways.channels_last else torch.contiguous_format
        self.lanes = list(lanes)
        self.members = [training for training in lanes if training is not None]
        links: Links = []
        self.network = _fuse([training and training.model for training in lanes], links, self.memory_format)
        for training in self.members:
            take_kernels(training.model, PLAIN)
        take_kernels(self.network, ways)  # after that: it may hold layers of theirs
        self.optimizer = make_optimizer(self.network, self.members[0].recipe, self._find_spared(links))
        self._share_momenta(links)

    def set_train_mode(self, frozen: bool) -> None:
        """Training mode; with `frozen`, running statistics are used as they are."""
        set_train_mode(self.network, frozen)

    def update(self, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        lead = self.members[0]
        present = [lane for lane, training in enumerate(self.lanes) if training in self.members]
        images, labels = self._spread(batches, present)
        logits = forward(self.network, images, lead.precision)
        lanes = logits.unflatten(1, (len(self.lanes), -1)).unbind(1)  # (B, L * K) -> L of (B, K)
        logits = torch.stack([lanes[lane] for lane in present])  # (members, B, K)
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=lead.recipe.label_smoothing
        )
        losses = losses.view_as(labels).mean(1)
        self.optimizer.zero_grad()
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach(), (logits.detach().argmax(2) != labels).sum(1)

    def _spread(self, batches: list[tuple[Tensor, Tensor]], present: list[int]) -> tuple[Tensor, Tensor]:
        """Images (B, L * C, H, W), zeros in lanes without a member, and labels (members, B)."""
        empty = torch.zeros_like(batches[0][0])
        images = [empty] * len(self.lanes)
        for lane, (own, _) in zip(present, batches, strict=True):
            images[lane] = own
        spread = torch.cat(images, 1).contiguous(memory_format=self.memory_format)
        return spread, torch.stack([labels for _, labels in batches])

    def _find_spared(self, links: Links) -> set[nn.Parameter]:
        """What the members spare, and the network's parameters that consist of it."""
        own = set().union(*(find_spared(training.model) for training in self.members))
        return own | {parameter for parameter, parts in links if not own.isdisjoint(parts)}

    def _share_momenta(self, links: Links) -> None:
        """Give the network's optimizer the members' momenta; theirs become views of its own."""
        if not self.members[0].recipe.momentum:
            return
        for training in self.members:
            lay_out_momenta(training.optimizer)
        states = {p: t.optimizer.state[p] for t in self.members for p in t.model.parameters()}
        for parameter, state in states.items():
            state.setdefault(MOMENTUM, torch.zeros_like(parameter))
        for parameter in self.network.parameters():
            if parameter in states:  # a lane's own
                self.optimizer.state[parameter] = states[parameter]
        for parameter, parts in links:
            momenta = [None if part is None else states[part][MOMENTUM] for part in parts]
            self.optimizer.state[parameter][MOMENTUM] = _join(momenta, self.memory_format)


def _fuse(lanes: Lanes, links: Links, memory_format: torch.memory_format) -> nn.Module:
    """A module that does to each lane's channels what that lane's module does, and shares its tensors."""
    template = _first(lanes)
    kind = type(template)
    if kind in COUNTS:
        return _concatenate(lanes, links, memory_format, COUNTS[kind])
    if kind is nn.Linear:
        return _LaneLinear(_concatenate(lanes, links, memory_format), len(lanes))
    if kind is PadShortcut:
        return _LanePad(template, len(lanes))
    if kind in STATELESS:
        return copy.deepcopy(template)
    if kind is nn.Sequential or kind.__module__.startswith(("gnbench.models.", "torchvision.models.")):
        network = copy.deepcopy(template)
        for name, _ in template.named_children():
            setattr(network, name, _fuse([module and getattr(module, name) for module in lanes], links, memory_format))
        return network
    return _PerLane(lanes)


def _concatenate(
    lanes: Lanes, links: Links, memory_format: torch.memory_format, counts: Sequence[str] = ()
) -> nn.Module:
    """One module with the lanes' parameters and buffers one after the other; the lanes' own become views of them."""
    template = _first(lanes)
    fused = copy.deepcopy(template)
    for name in counts:
        setattr(fused, name, getattr(template, name) * len(lanes))
    for name, _ in template.named_parameters(recurse=False):
        parts = [module and getattr(module, name) for module in lanes]
        parameter = nn.Parameter(_join(parts, memory_format))
        links.append((parameter, parts))
        setattr(fused, name, parameter)
    for name, _ in template.named_buffers(recurse=False):
        setattr(fused, name, _join([module and getattr(module, name) for module in lanes], memory_format))
    return fused


def _join(parts: Sequence[Tensor | None], memory_format: torch.memory_format) -> Tensor:
    """The lanes' tensors along the first dimension, zeros where there is none; they become views of the whole."""
    empty = torch.zeros_like(_first(parts))
    whole = torch.cat([empty if part is None else part.detach() for part in parts])
    if whole.ndim == 4:
        whole = whole.contiguous(memory_format=memory_format)
    for part, view in zip(parts, whole.chunk(len(parts)), strict=True):
        if part is not None:
            part.data = view
    return whole


class _LaneLinear(nn.Module):
    """(N, L * in) -> (N, L * out), from a linear layer whose weight is (L * out, in)."""

    def __init__(self, linear: nn.Linear, num_lanes: int) -> None:
        super().__init__()
        self.linear, self.num_lanes = linear, num_lanes

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight.unflatten(0, (self.num_lanes, -1))
        y = torch.einsum("nli,loi->nlo", x.unflatten(1, (self.num_lanes, -1)), weight).flatten(1)
        return y if self.linear.bias is None else y + self.linear.bias


class _LanePad(nn.Module):
    """A PadShortcut in each lane."""

    def __init__(self, pad: PadShortcut, num_lanes: int) -> None:
        super().__init__()
        self.pad, self.num_lanes = pad, num_lanes

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 1, self.pad.stride).permute(0, 2, 3, 1)  # channels last, as they mostly are in memory
        lanes = F.pad(x.unflatten(3, (self.num_lanes, -1)), (0, self.pad.new_channels))
        return lanes.flatten(3).permute(0, 3, 1, 2)


class _PerLane(nn.Module):
    """Each lane's own module on its own channels: for layers that cannot be concatenated."""

    def __init__(self, lanes: Lanes) -> None:
        super().__init__()
        self.lanes = nn.ModuleDict({str(lane): module for lane, module in enumerate(lanes) if module is not None})
        self.num_lanes = len(lanes)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(self.num_lanes, 1)
        outputs = {lane: module(parts[int(lane)]) for lane, module in self.lanes.items()}
        empty = torch.zeros_like(_first(list(outputs.values())))
        return torch.cat([outputs.get(str(lane), empty) for lane in range(self.num_lanes)], 1)


def _first(lanes: Sequence) -> object:
    return next(lane for lane in lanes if lane is not None)
