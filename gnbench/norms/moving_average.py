"""Moving Average Batch Normalization: statistics of the last batches, in the backward pass too."""

import math

import torch
from torch import Tensor, nn

from gnbench.norms.batch import NormBatches
from gnbench.norms.precision import widen

R_MAX = 5.0  # bound of the correction towards the running statistic, and its inverse


class MovingAverageBatchNorm(NormBatches):
    """Moving Average Batch Normalization (MABN, arXiv:2001.06838), for convolutions with `WeightCentralization`.

    y = gamma * r * x / sqrt(s + eps) + beta, x (N, C, H, W), gamma and beta (C,); no mean is subtracted. s is the
    average over the last M batches of each channel's mean of x^2, M = simulated_batch_size / NBS. The backward pass
    likewise replaces the batch mean of g * z, g the gradient of z = x / sqrt(s + eps), by its average over the last M:
    dx = (g - z * mean(g * z)) / sqrt(s + eps). In evaluation s is a running average and r = 1.

    For the first max(M, warmup_steps - 1) steps s and mean(g * z) are the batch's own, so that dx is the gradient. For
    max(renorm_steps, warmup_steps) steps r = 1, then r = clip(sqrt(s + eps) / sqrt(running s + eps), 1/5, 5), as in
    Batch Renorm.

    A batch is split into normalization batches as in `BatchNorm`; the average of each is over itself and the M - 1
    steps before it, of which the normalization batches' average is kept.

    Args:
        norm_batch_size: images that share statistics; None takes the whole batch, and M = 1.
        momentum: weight of the newest statistic in the running one.
        simulated_batch_size: images that the average is to cover.
        warmup_steps, renorm_steps: 100 and 1000 are the authors'.

    Raises:
        ValueError: norm_batch_size is below 1, or momentum not 0 to 1.
    """

    def __init__(
        self,
        num_channels: int,
        norm_batch_size: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.02,
        simulated_batch_size: int = 32,
        warmup_steps: int = 100,
        renorm_steps: int = 1000,
    ) -> None:
        super().__init__(norm_batch_size, momentum)
        self.eps = eps
        size = math.ceil(simulated_batch_size / (norm_batch_size or simulated_batch_size))
        self.warmup_steps = max(size + 1, warmup_steps)
        self.renorm_steps = max(renorm_steps, warmup_steps)
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_square", torch.ones(num_channels))
        self.register_buffer("squares", torch.zeros(size, num_channels))  # of the last M batches
        self.register_buffer("products", torch.zeros(size, num_channels))  # mean(g * z) of the last M batches
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            y = self._normalize(self._split(widen(x))).flatten(0, 1)
        else:
            y = x * (self.running_square + self.eps).rsqrt()[:, None, None]
        return (y * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _normalize(self, split: Tensor) -> Tensor:
        """In training: (NBS, W, C, H, W') without gamma and beta."""
        with torch.no_grad():
            square = split.square().mean((0, 3, 4))  # (W, C)
            r = torch.ones_like(square)
            moving = torch.zeros((), dtype=torch.bool, device=split.device)
            if not self.batch_only:
                self.steps += 1
                moving = self.steps >= self.warmup_steps
                square = _average(self.squares, square, self.steps, moving)
                ratio = ((square + self.eps) / (self.running_square + self.eps)).sqrt().clamp(1 / R_MAX, R_MAX)
                r = torch.where(self.steps > self.renorm_steps, ratio, r)
                self._follow(self.running_square, square)
        return _Normalize.apply(split, square + self.eps, r, self.products, self.steps.clone(), moving)

    def set_statistics(self, mean: Tensor, square: Tensor) -> None:
        """Take the population's mean of x^2 (C,) for the running one."""
        self.running_square.copy_(square)

    def extra_repr(self) -> str:
        return (
            f"{len(self.weight)}, norm_batch_size={self.norm_batch_size}, eps={self.eps}, momentum={self.momentum}, "
            f"batches={len(self.squares)}"
        )


class _Normalize(torch.autograd.Function):
    """r * x / sqrt(s), x (NBS, W, C, H, W'), s and r (W, C), with MABN's backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, s: Tensor, r: Tensor, products: Tensor, step: Tensor, moving: Tensor) -> Tensor:
        ctx.save_for_backward(x, s, r, step, moving)
        ctx.products = products  # not saved for backward, which changes it
        return x * (r * s.rsqrt())[..., None, None]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, s, r, step, moving = ctx.saved_tensors
        rstd = s.rsqrt()[..., None, None]
        g, z = gradient * r[..., None, None], x * rstd
        product = _average(ctx.products, (g * z).mean((0, 3, 4)), step, moving)
        return (g - z * product[..., None, None]) * rstd, None, None, None, None, None


def _average(last: Tensor, newest: Tensor, step: Tensor, moving: Tensor) -> Tensor:
    """Put `newest` (W, C), averaged, into the ring `last` (M, C), and average each with the ring's others if `moving`.

    Nothing here waits for the device.
    """
    place = (torch.arange(len(last), device=last.device) == step % len(last))[:, None]
    others = last.masked_fill(place, 0).sum(0)
    last.copy_(torch.where(place, newest.mean(0), last))
    return torch.where(moving, (others + newest) / len(last), newest)
