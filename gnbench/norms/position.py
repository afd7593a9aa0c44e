"""Positional Normalization: statistics over the channels, at each position."""

import torch
from torch import Tensor, nn

from gnbench.norms.precision import widen


class PositionNorm(nn.Module):
    """Positional Normalization (PONO, arXiv:1907.04312): y = gamma * (x - mean) / sqrt(var + eps) + beta.

    mean and var (biased) are taken over the C channels at each position of each image, x (N, C, H, W) -> (N, 1, H, W).
    gamma and beta have shape (C,). The paper's Moment Shortcut, for generators, is not part of it.
    """

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(widen(x), 1, correction=0, keepdim=True)
        y = (x - mean) * (var + self.eps).rsqrt()
        return (y * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"
