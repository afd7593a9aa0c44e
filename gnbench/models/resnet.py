"""Residual networks for images of 32 x 32: the 6n+2 family for CIFAR, and torchvision's with a CIFAR stem."""

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from gnbench.models import (
    NormFactory,
    brings_activation,
    end_branch,
    norm_alone,
    norm_and_activation,
    norm_then_relu,
)
from gnbench.models.conv import Conv2d
from gnbench.torchvision_compat import import_torchvision

WIDTHS = (16, 32, 64)  # channels of the three stages
STAGES = ("layer1", "layer2", "layer3", "layer4")  # torchvision's names


class PadShortcut(nn.Module):
    """Option A of arXiv:1512.03385: every `stride`-th position, and zeros for the channels that are new."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 1, self.stride)  # a slice's gradient would lose the memory format
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))


class BasicBlock(nn.Module):
    """y = act2(norm2(conv2(act1(norm1(conv1(x))))) + shortcut(x)), ReLUs unless norm1 brings act1."""

    def __init__(self, norm: NormFactory, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1, self.act1 = norm_and_activation(norm, channels)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2, self.act2 = norm_alone(norm, channels), nn.ReLU()
        same = in_channels == channels and stride == 1
        self.shortcut = nn.Identity() if same else PadShortcut(channels - in_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = norm_then_relu(self.norm1, self.act1, self.conv1(x))
        return norm_then_relu(self.norm2, self.act2, self.conv2(out), self.shortcut(x))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of arXiv:1512.03385, section 4.2: depth 6n + 2, three stages of n blocks."""

    def __init__(self, norm: NormFactory, num_classes: int, depth: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.norm1, self.act1 = norm_and_activation(norm, WIDTHS[0])
        blocks, in_channels = [], WIDTHS[0]
        for stage, channels in enumerate(WIDTHS):
            for block in range((depth - 2) // 6):
                blocks.append(BasicBlock(norm, in_channels, channels, stride=2 if stage and block == 0 else 1))
                in_channels = channels
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = norm_then_relu(self.norm1, self.act1, self.conv1(images))  # (N, 3, H, W) -> (N, 16, H, W)
        x = self.blocks(x)  # -> (N, 64, H/4, W/4)
        return self.classifier(x.mean((2, 3)))  # -> (N, num_classes)


def cifar_resnet(norm: NormFactory, num_classes: int, depth: int, zero_init_residual: bool = False) -> nn.Module:
    """ResNet-8, 20, 32, 44, 56, 110 for CIFAR (arXiv:1512.03385).

    Args:
        depth: 6n + 2.
        zero_init_residual: gamma of the last norm of every block starts at 0, whatever the norm (arXiv:1706.02677), and
            not at 1. These small networks then train more slowly.

    Raises:
        ValueError: depth is not 6n + 2 with n of 1 or more.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth={depth} is not 6n + 2")
    model = CifarResNet(norm, num_classes, depth)
    for block in model.blocks:
        end_branch(block.norm2, zero_init_residual)
    return model


def torchvision_resnet(
    norm: NormFactory, num_classes: int, architecture: str, zero_init_residual: bool = True
) -> nn.Module:
    """torchvision's resnet18, resnet34 or resnet50 with a CIFAR stem: a 3 x 3 convolution of stride 1, no pooling."""
    layer = functools.partial(norm, apply_act=True) if brings_activation(norm) else norm
    model = getattr(import_torchvision().models, architecture)(num_classes=num_classes, norm_layer=layer)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    blocks = [block for stage in STAGES for block in getattr(model, stage)]
    if brings_activation(norm):
        _move_activations(model, blocks, norm)
    for block in blocks:
        end_branch(getattr(block, _last_place(block)[1]), zero_init_residual)
    return model


def _move_activations(model: nn.Module, blocks: list[nn.Module], norm: NormFactory) -> None:
    """Leave the activations to the norms, but for the ReLU after an addition.

    torchvision's blocks use one module `relu` after their norms and after their addition. Here it does nothing, the
    norms before an addition are built without an activation, and a ReLU of its own follows each block.
    """
    model.relu = nn.Identity()
    for block in blocks:
        block.relu = nn.Identity()
        conv, last = _last_place(block)
        setattr(block, last, norm_alone(norm, getattr(block, conv).out_channels))
        if block.downsample is not None:
            block.downsample[1] = norm_alone(norm, block.downsample[0].out_channels)
    for stage in STAGES:
        layers = [layer for block in getattr(model, stage) for layer in (block, nn.ReLU())]
        setattr(model, stage, nn.Sequential(*layers))


def _last_place(block: nn.Module) -> tuple[str, str]:
    """torchvision's names of a block's last convolution and of the norm after it, whichever norm that is."""
    return ("conv3", "bn3") if hasattr(block, "bn3") else ("conv2", "bn2")
