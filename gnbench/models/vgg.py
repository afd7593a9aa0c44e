"""VGG-16 for images of 32 x 32, with a norm after every convolution."""

from torch import Tensor, nn

from gnbench.errors import require
from gnbench.models import NormFactory, norm_and_activation

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # configuration D


class VGG(nn.Module):
    """Thirteen 3 x 3 convolutions in five stages (arXiv:1409.1556), each halved by max-pooling, and one classifier.

    The convolutions keep their biases whatever the norm. `response` is what the last activation is given; where the
    norm brings the activation, it is what that gives.
    """

    def __init__(self, norm: NormFactory, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        layers, in_channels = [], 3
        for stage in STAGES:
            for channels in (round(width * channels) for channels in stage):
                conv = nn.Conv2d(in_channels, channels, 3, padding=1)
                layers += [conv, *norm_and_activation(norm, channels)]
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
        *before, activation, pool = layers
        self.features = nn.Sequential(*before)
        self.response = nn.Identity()
        self.last = nn.Sequential(activation, pool)
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.last(self.response(self.features(images)))  # (N, 3, 32, 32) -> (N, 512 * width, 1, 1)
        return self.classifier(x.mean((2, 3)))


def vgg16(norm: NormFactory, num_classes: int, width: float | None = None) -> nn.Module:
    """VGG-16 (arXiv:1409.1556) with a norm after every convolution and a single linear classifier.

    Args:
        width: factor on every number of channels, 64 ... 512; None is 1.

    Raises:
        UserError: `width` leaves a convolution without channels.
    """
    width = 1.0 if width is None else width
    has_channels = round(width * STAGES[0][0]) >= 1
    require(has_channels, "model.width", width, "it leaves the first convolution without channels")
    return VGG(norm, num_classes, width)
