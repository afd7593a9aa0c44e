"""Norms of the weights: each a function conv -> Module through which a convolution sees its weight."""

import torch.nn.functional as F
from torch import Tensor, nn


class WeightStandardization(nn.Module):
    """Weight Standardization (arXiv:1903.10520): w' = (w - mean) / sqrt(var + eps).

    mean and var (biased) are those of each output channel's weights, w (C_out, C_in, kh, kw) over the last three.
    What is trained is w.
    """

    def __init__(self, conv: nn.Conv2d, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        return F.layer_norm(weight, weight.shape[1:], eps=self.eps)


class WeightCentralization(nn.Module):
    """The weights of MABN (arXiv:2001.06838): w' = w - mean, each output channel's weights without their mean."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()

    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean((1, 2, 3), keepdim=True)
