"""Batch Normalization whose statistics are shared by a part of the SGD batch, and its kin."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnbench.kernels import one_pass
from gnbench.norms.group import count_groups
from gnbench.norms.precision import widen


class NormBatches(nn.Module):
    """What layers share that see a batch of N images as W = N / NBS normalization batches; `BatchNorm` says how.

    Args:
        norm_batch_size: images that share statistics; None takes the whole batch.
        momentum: weight of the newest statistics in the running ones.

    Raises:
        ValueError: norm_batch_size is below 1, or momentum not 0 to 1.
    """

    batch_only = False  # set while a measurement wants the statistics of the batch at hand and nothing else

    def __init__(self, norm_batch_size: int | None, momentum: float) -> None:
        super().__init__()
        if norm_batch_size is not None and norm_batch_size < 1:
            raise ValueError(f"norm_batch_size={norm_batch_size} is below 1")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum} is to be 0 to 1")
        self.norm_batch_size = norm_batch_size
        self.momentum = momentum

    def _split(self, x: Tensor) -> Tensor:
        """(N, C, H, W') -> (NBS, W, C, H, W'): normalization batch w is [:, w]; in evaluation there is one."""
        num_batches = self.count_batches(len(x)) if self.training else 1
        return x.unflatten(0, (len(x) // num_batches, num_batches))

    def count_batches(self, batch_size: int) -> int:
        """W: the normalization batches of so many images in training; `BatchNorm` says how."""
        if self.norm_batch_size is None:
            return 1
        most = max(1, batch_size // self.norm_batch_size)
        return next(num_batches for num_batches in range(most, 0, -1) if batch_size % num_batches == 0)

    def _follow(self, running: Tensor, newest: Tensor) -> None:
        """Move running statistics (C,) towards the average of the normalization batches' newest (W, C)."""
        running.lerp_(newest.detach().mean(0), self.momentum)


class BatchNorm(NormBatches):
    """Batch Normalization (arXiv:1502.03167) with its own normalization batch size (NBS, arXiv:2105.07576).

    y = gamma * (x - mean) / sqrt(var + eps) + beta, x (N, C, H, W), gamma and beta (C,). In training, mean and var
    (biased) are taken for each channel over the positions of `norm_batch_size` images; in evaluation they are the
    running statistics.

    A batch of N images is W = N / NBS normalization batches, as if W workers held NBS images each. The w-th has the
    images w, w + W, w + 2W, ... so that (N, C, H, W') seen as (NBS, W * C, H, W') needs no copy. The running mean and
    (unbiased) variance move by `momentum` towards the average over the W batches: what each of them by itself would
    lead to, averaged; not W successive updates. NBS = N is torch.nn.BatchNorm2d, bit for bit.

    Where NBS does not divide a batch (an epoch's smaller last one, kept by drop_last=false), W is the largest divisor
    of N that leaves at least NBS images to each of them, or 1 where N is below NBS.

    Args:
        num_channels: C.
        norm_batch_size: images that share statistics; None takes the whole batch.
        momentum: weight of the newest statistics in the running ones.

    Raises:
        ValueError: norm_batch_size is below 1, or momentum not 0 to 1.
    """

    one_pass = False  # an engine sets it; `one_pass.takes` says on which maps it then counts

    def __init__(
        self, num_channels: int, norm_batch_size: int | None = None, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(norm_batch_size, momentum)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        if self._takes_one_pass(x):
            return self._in_one_pass(x)
        num_batches = self.count_batches(len(x)) if self.training else 1
        if num_batches == 1:
            weight, bias = self._affine(x, num_batches)
            return self._normalize(x, self.running_mean, self.running_var, weight, bias)
        grouped = x.reshape(len(x) // num_batches, -1, *x.shape[2:])  # (N, C, H, W') -> (NBS, W * C, H, W')
        means, variances = self.running_mean.repeat(num_batches), self.running_var.repeat(num_batches)
        weight, bias = self._affine(grouped, num_batches)
        y = self._normalize(grouped, means, variances, weight, bias)
        self.running_mean.copy_(means.view(num_batches, -1).mean(0))
        self.running_var.copy_(variances.view(num_batches, -1).mean(0))
        return y.view_as(x)

    def with_relu(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor | None:
        """relu(self(x) + shortcut), or None where that is not to be had in one pass."""
        if self._takes_one_pass(x, shortcut):
            return self._in_one_pass(x, relu=True, shortcut=shortcut)
        return None

    def _takes_one_pass(self, x: Tensor, shortcut: Tensor | None = None) -> bool:
        wanted = self.one_pass and self.training and type(self) is BatchNorm  # a subclass may have its own formula
        return wanted and one_pass.takes(x, self.weight, self.bias, shortcut) and self._count(x) > 1

    def _in_one_pass(self, x: Tensor, **options: object) -> Tensor:
        sizes, count = (self.count_batches(len(x)), x.shape[1]), self._count(x)
        y, mean, var = one_pass.normalize(x, self.weight, self.bias, *sizes, self.eps, **options)
        self._follow(self.running_mean, mean)
        self._follow(self.running_var, var * (count / (count - 1)))
        return y

    def _count(self, x: Tensor) -> int:
        """The numbers of which a channel's statistics in training are."""
        return x.numel() // (self.count_batches(len(x)) * x.shape[1])

    def _affine(self, grouped: Tensor, num_batches: int) -> tuple[Tensor, Tensor]:
        """Scale and shift (W * C,), each normalization batch's own; `grouped` is what they will be applied to."""
        if num_batches == 1:
            return self.weight, self.bias
        return self.weight.repeat(num_batches), self.bias.repeat(num_batches)

    def _normalize(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, norm_batch_size={self.norm_batch_size}, eps={self.eps}, momentum={self.momentum}"


def sync_batch_norm(
    num_channels: int, norm_batch_size: None = None, eps: float = 1e-5, momentum: float = 0.1
) -> BatchNorm:
    """Synchronized BN (arXiv:1711.07240): `BatchNorm` whose statistics are always those of the whole SGD batch.

    Raises:
        ValueError: norm_batch_size is given.
    """
    if norm_batch_size is not None:
        raise ValueError(f"norm_batch_size={norm_batch_size} is not for it: its statistics are the whole batch's")
    return BatchNorm(num_channels, None, eps, momentum)


class BatchRenorm(BatchNorm):
    """Batch Renormalization (arXiv:1702.03275): BN whose training output is drawn towards what evaluation will give.

    y = gamma * ((x - mean) / std * r + d) + beta, with r = clip(std / running_std, 1/r_max, r_max) and
    d = clip((mean - running_mean) / running_std, -d_max, d_max), held constant in the backward pass. Statistics,
    normalization batches and evaluation are those of `BatchNorm`; r_max = 1 and d_max = 0 make it BN.

    Args:
        r_max, d_max: bounds of the corrections; 1.5 and 0.5 are those of arXiv:1803.08494, section 4.1.

    Raises:
        ValueError: r_max is below 1, d_max below 0, or as `BatchNorm`.
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

    def _affine(self, grouped: Tensor, num_batches: int) -> tuple[Tensor, Tensor]:
        weight, bias = super()._affine(grouped, num_batches)
        if not self.training or self.batch_only:
            return weight, bias
        with torch.no_grad():
            var, mean = torch.var_mean(widen(grouped), (0, 2, 3), correction=0)
            running_std = (self.running_var + self.eps).sqrt().repeat(num_batches)
            r = ((var + self.eps).sqrt() / running_std).clamp(1 / self.r_max, self.r_max)
            d = ((mean - self.running_mean.repeat(num_batches)) / running_std).clamp(-self.d_max, self.d_max)
        return weight * r, weight * d + bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"


class EstimatedBatchNorm(BatchNorm):
    """Estimate-based Batch Normalization (arXiv:1903.10520v2): in training too, x is normalized by running estimates.

    Each normalization batch moves the estimates by itself, mean' = mean + m * (batch mean - mean) and
    var' = var + m * (batch mean of (x - mean)^2 - var), and normalizes with mean' and var', through which no gradient
    flows; the average over them is kept. The authors tie m to the learning rate; here it is `momentum`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.batch_only:
            return super().forward(x)
        split = self._split(widen(x))
        mean, var = self._estimate(split)
        scale = self.weight * (var + self.eps).rsqrt()  # (W, C)
        shift = self.bias - mean * scale
        return (split * scale[..., None, None] + shift[..., None, None]).flatten(0, 1).to(x.dtype)

    @torch.no_grad()
    def _estimate(self, split: Tensor) -> tuple[Tensor, Tensor]:
        """The estimates (W, C) of each normalization batch, whose average becomes the running one."""
        square = (split - self.running_mean[:, None, None]).square().mean((0, 3, 4))
        mean = torch.lerp(self.running_mean, split.mean((0, 3, 4)), self.momentum)
        var = torch.lerp(self.running_var, square, self.momentum)
        self.running_mean.copy_(mean.mean(0))
        self.running_var.copy_(var.mean(0))
        return mean, var


class BatchGroupNorm(BatchNorm):
    """Batch Group Normalization (arXiv:1906.03548): samples-per-group x channels-per-group, between BN and GN.

    y = gamma * (x - mean) / sqrt(var + eps) + beta; in training mean and var (biased) are taken over the positions of
    C/G neighbouring channels of `norm_batch_size` images, in evaluation they are running statistics (G,). One channel
    a group is BN; one image a normalization batch is GN in training, though not in evaluation. gamma and beta (C,).

    Args:
        num_groups: G; give this or `channels_per_group`, never both.
        channels_per_group: C/G.

    Raises:
        ValueError: as `group_norm` and `BatchNorm`.
    """

    def __init__(
        self,
        num_channels: int,
        norm_batch_size: int | None = None,
        num_groups: int | None = None,
        channels_per_group: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(num_channels, norm_batch_size, eps, momentum)
        self.num_groups = count_groups(num_channels, num_groups, channels_per_group)
        self.register_buffer("running_mean", torch.zeros(self.num_groups))
        self.register_buffer("running_var", torch.ones(self.num_groups))

    def forward(self, x: Tensor) -> Tensor:
        grouped = widen(x).reshape(len(x), self.num_groups, -1, x.shape[-1])  # (N, C, H, W) -> (N, G, C/G * H, W)
        y = super().forward(grouped).reshape(x.shape)
        return (y * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _affine(self, grouped: Tensor, num_batches: int) -> tuple[None, None]:
        """None: gamma and beta belong to channels, not to groups."""
        return None, None

    def set_statistics(self, mean: Tensor, square: Tensor) -> None:
        """Take the population's mean of x and of x^2 (C,) for the running statistics."""
        mean, square = (moment.view(self.num_groups, -1).mean(1) for moment in (mean, square))
        self.running_mean.copy_(mean)
        self.running_var.copy_(square - mean.square())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}"
