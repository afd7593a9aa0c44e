"""Networks, each a function of `norm` (num_channels -> Module) and `num_classes`; none asks which norm it is given."""

from collections.abc import Callable

import torch
from torch import nn

NormFactory = Callable[[int], nn.Module]


def initialize(model: nn.Module, seed: int) -> None:
    """Draw the weights of convolutions and the classifier from `seed` alone, the same whatever the norm.

    Convolutions: He, N(0, 2 / fan_out) (arXiv:1502.01852); classifier: N(0, 0.01^2), bias 0 (arXiv:1706.02677).
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01, generator=generator)
            nn.init.zeros_(module.bias)


def zero_scale(norm: nn.Module) -> None:
    """Start a norm's gamma at 0, where it has one, so that its residual branch starts as the identity."""
    if getattr(norm, "weight", None) is not None:
        nn.init.zeros_(norm.weight)
