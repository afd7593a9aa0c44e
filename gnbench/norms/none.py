"""No normalization, and a start from which residual networks train without any."""

import torch
from torch import Tensor, nn


def no_norm(num_channels: int) -> nn.Module:
    """The identity, in a norm's place: y = x, without parameters."""
    return nn.Identity()


class SkipInit(nn.Module):
    """SkipInit (arXiv:2002.10444): y = alpha * (x + beta) at the end of a residual branch, y = x + beta elsewhere.

    alpha is one learned number that starts at 0, so that each block starts as the identity. beta (C,) is the bias of
    the convolution before, which a network without norms has.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_parameter("weight", None)

    def end_branch(self) -> None:
        """Stand at the end of a residual branch: have alpha."""
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.bias[:, None, None]
        return (y if self.weight is None else y * self.weight).to(x.dtype)
