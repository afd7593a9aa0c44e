"""Switchable Normalization: a learned mixture of the statistics of IN, LN and BN."""

import torch
from torch import Tensor, nn

from gnbench.norms.batch import NormBatches
from gnbench.norms.precision import widen


class SwitchableNorm(NormBatches):
    """Switchable Normalization (arXiv:1806.10779): y = gamma * (x - mean) / sqrt(var + eps) + beta.

    mean = sum_k p_k mean_k and var = sum_k q_k var_k over k = IN, LN, BN; p and q are softmaxes of the parameters
    `mean_weight` and `var_weight` (3,), which start equal. gamma and beta have shape (C,). var_k are biased. BN's part
    is taken over each normalization batch, as in `BatchNorm`; in evaluation it is the running mean and (unbiased)
    variance.

    Args:
        norm_batch_size: images that share BN's statistics; None takes the whole batch.
        momentum: weight of the newest statistics in the running ones.

    Raises:
        ValueError: norm_batch_size is below 1.
    """

    def __init__(
        self, num_channels: int, norm_batch_size: int | None = None, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(norm_batch_size, momentum)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.mean_weight = nn.Parameter(torch.ones(3))
        self.var_weight = nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        split = self._split(widen(x))  # (NBS, W, C, H, W')
        in_var, in_mean = torch.var_mean(split, (3, 4), correction=0)  # (NBS, W, C)
        ln_mean, ln_var = _pool(in_mean, in_var, 2)  # (NBS, W, 1)
        bn_mean, bn_var = self._batch_moments(in_mean, in_var, split[:, 0, 0].numel())
        mean = _mix(self.mean_weight, in_mean, ln_mean, bn_mean)
        var = _mix(self.var_weight, in_var, ln_var, bn_var)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (split * scale[..., None, None] + shift[..., None, None]).flatten(0, 1).to(x.dtype)

    def _batch_moments(self, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """BN's mean and variance from those of each image (NBS, W, C): over `count` values, or the running ones."""
        if not self.training:
            return self.running_mean, self.running_var
        mean, var = _pool(mean, var, 0)  # (1, W, C)
        self._follow(self.running_mean, mean[0])
        self._follow(self.running_var, var[0] * count / max(1, count - 1))
        return mean, var

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, norm_batch_size={self.norm_batch_size}, eps={self.eps}, momentum={self.momentum}"


def _pool(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (biased) of equal sets together from those of each, along `dim`, which stays with length 1."""
    return mean.mean(dim, keepdim=True), var.mean(dim, keepdim=True) + mean.var(dim, correction=0, keepdim=True)


def _mix(weights: Tensor, *parts: Tensor) -> Tensor:
    return sum(weight * part for weight, part in zip(weights.softmax(0), parts, strict=True))
