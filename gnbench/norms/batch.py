"""Batch Normalization whose statistics are shared by a part of the SGD batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.Module):
    """Batch Normalization (arXiv:1502.03167) with its own normalization batch size (NBS, arXiv:2105.07576).

    y = gamma * (x - mean) / sqrt(var + eps) + beta, x (N, C, H, W), gamma and beta (C,). In training, mean and var
    (biased) are taken for each channel over the positions of `norm_batch_size` images; in evaluation they are the
    running statistics.

    A batch of N images is W = N / NBS normalization batches, as if W workers held NBS images each. Worker w holds
    the images w, w + W, w + 2W, ... so that (N, C, H, W') seen as (NBS, W * C, H, W') needs no copy. The running
    mean and (unbiased) variance move by `momentum` towards the average over the W workers: what each of W workers
    would keep, averaged; not W successive updates. NBS = N is torch.nn.BatchNorm2d, bit for bit.

    Where NBS does not divide a batch (an epoch's smaller last one, kept by drop_last=false), W is the largest divisor
    of N that leaves at least NBS images to each worker, or 1 where N is below NBS.

    Args:
        num_channels: C.
        norm_batch_size: images that share statistics; None takes the whole batch.
        momentum: weight of the newest statistics in the running ones.

    Raises:
        ValueError: norm_batch_size is below 1.
    """

    batch_only = False  # set while a measurement wants the statistics of the batch at hand and nothing else

    def __init__(
        self, num_channels: int, norm_batch_size: int | None = None, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        if norm_batch_size is not None and norm_batch_size < 1:
            raise ValueError(f"norm_batch_size={norm_batch_size} is below 1")
        self.norm_batch_size = norm_batch_size
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        workers = self._num_workers(len(x)) if self.training else 1
        if workers == 1:
            weight, bias = self._affine(x, workers)
            return self._normalize(x, self.running_mean, self.running_var, weight, bias)
        grouped = x.reshape(len(x) // workers, -1, *x.shape[2:])  # (N, C, H, W') -> (NBS, W * C, H, W')
        means, variances = self.running_mean.repeat(workers), self.running_var.repeat(workers)
        weight, bias = self._affine(grouped, workers)
        y = self._normalize(grouped, means, variances, weight, bias)
        self.running_mean.copy_(means.view(workers, -1).mean(0))
        self.running_var.copy_(variances.view(workers, -1).mean(0))
        return y.view_as(x)

    def _affine(self, grouped: Tensor, workers: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of each worker's channels (W * C,); `grouped` is what they will be applied to."""
        if workers == 1:
            return self.weight, self.bias
        return self.weight.repeat(workers), self.bias.repeat(workers)

    def _num_workers(self, batch_size: int) -> int:
        if self.norm_batch_size is None:
            return 1
        most = max(1, batch_size // self.norm_batch_size)
        return next(workers for workers in range(most, 0, -1) if batch_size % workers == 0)

    def _normalize(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, norm_batch_size={self.norm_batch_size}, eps={self.eps}, momentum={self.momentum}"


class BatchRenorm(BatchNorm):
    """Batch Renormalization (arXiv:1702.03275): BN whose training output is drawn towards what evaluation will give.

    y = gamma * ((x - mean) / std * r + d) + beta, with r = clip(std / running_std, 1/r_max, r_max) and
    d = clip((mean - running_mean) / running_std, -d_max, d_max), held constant in the backward pass. Statistics,
    normalization batches and evaluation are those of `BatchNorm`; r_max = 1 and d_max = 0 make it BN.

    Args:
        r_max, d_max: bounds of the corrections; 1.5 and 0.5 are those of arXiv:1803.08494, section 4.1.

    Raises:
        ValueError: r_max is below 1, d_max below 0, or norm_batch_size below 1.
    """

    def __init__(
        self,
        num_channels: int,
        norm_batch_size: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        r_max: float = 1.5,
        d_max: float = 0.5,
    ) -> None:
        super().__init__(num_channels, norm_batch_size, eps, momentum)
        if r_max < 1 or d_max < 0:
            raise ValueError(f"r_max={r_max} is to be 1 or more and d_max={d_max} 0 or more")
        self.r_max = r_max
        self.d_max = d_max

    def _affine(self, grouped: Tensor, workers: int) -> tuple[Tensor, Tensor]:
        weight, bias = super()._affine(grouped, workers)
        if not self.training or self.batch_only:
            return weight, bias
        with torch.no_grad():
            var, mean = torch.var_mean(grouped, (0, 2, 3), correction=0)
            running_std = (self.running_var + self.eps).sqrt().repeat(workers)
            r = ((var + self.eps).sqrt() / running_std).clamp(1 / self.r_max, self.r_max)
            d = ((mean - self.running_mean.repeat(workers)) / running_std).clamp(-self.d_max, self.d_max)
        return weight * r, weight * d + bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"
