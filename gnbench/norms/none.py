"""No normalization."""

from torch import nn


def no_norm(num_channels: int) -> nn.Module:
    """The identity, in a norm's place: y = x, without parameters."""
    return nn.Identity()
