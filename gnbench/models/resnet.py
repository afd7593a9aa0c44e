"""Residual networks for images of 32 x 32: the 6n+2 family for CIFAR, and torchvision's with a CIFAR stem."""

import torch.nn.functional as F
from torch import Tensor, nn

from gnbench.models import NormFactory, zero_scale
from gnbench.torchvision_compat import import_torchvision

WIDTHS = (16, 32, 64)  # channels of the three stages


class PadShortcut(nn.Module):
    """Option A of arXiv:1512.03385: every `stride`-th position, and zeros for the channels that are new."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))


class BasicBlock(nn.Module):
    """y = relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))."""

    def __init__(self, norm: NormFactory, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm(channels)
        same = in_channels == channels and stride == 1
        self.shortcut = nn.Identity() if same else PadShortcut(channels - in_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of arXiv:1512.03385, section 4.2: depth 6n + 2, three stages of n blocks."""

    def __init__(self, norm: NormFactory, num_classes: int, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.norm1 = norm(WIDTHS[0])
        blocks, in_channels = [], WIDTHS[0]
        for stage, channels in enumerate(WIDTHS):
            for block in range((depth - 2) // 6):
                blocks.append(BasicBlock(norm, in_channels, channels, stride=2 if stage and block == 0 else 1))
                in_channels = channels
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(images)))  # (N, 3, H, W) -> (N, 16, H, W)
        x = self.blocks(x)  # -> (N, 64, H/4, W/4)
        return self.classifier(x.mean((2, 3)))  # -> (N, num_classes)


def cifar_resnet(norm: NormFactory, num_classes: int, depth: int, zero_init_residual: bool = True) -> nn.Module:
    """ResNet-8, 20, 32, 44, 56, 110 for CIFAR (arXiv:1512.03385).

    Args:
        depth: 6n + 2.
        zero_init_residual: gamma of the last norm of every block starts at 0, whatever the norm (arXiv:1706.02677).

    Raises:
        ValueError: depth is not 6n + 2 with n of 1 or more.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth={depth} is not 6n + 2")
    model = CifarResNet(norm, num_classes, depth)
    if zero_init_residual:
        for block in model.blocks:
            zero_scale(block.norm2)
    return model


def torchvision_resnet(
    norm: NormFactory, num_classes: int, architecture: str, zero_init_residual: bool = True
) -> nn.Module:
    """torchvision's resnet18, resnet34 or resnet50 with a CIFAR stem: a 3 x 3 convolution of stride 1, no pooling."""
    models = import_torchvision().models
    model = getattr(models, architecture)(num_classes=num_classes, norm_layer=norm)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    if zero_init_residual:
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in stage:
                zero_scale(block.bn3 if hasattr(block, "bn3") else block.bn2)  # torchvision's names, of any norm
    return model
