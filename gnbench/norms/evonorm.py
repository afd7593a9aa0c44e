"""EvoNorm B0 and S0: norm and activation in one, found by search."""

import torch
from torch import Tensor, nn

from gnbench.norms.batch import NormBatches
from gnbench.norms.group import count_groups
from gnbench.norms.precision import widen


class EvoNormB0(NormBatches):
    """EvoNorm-B0 (arXiv:2004.02967): y = gamma * x / max(sqrt(var + eps), v * x + sqrt(var_i + eps)) + beta.

    var (biased) is that of each channel over the positions of `norm_batch_size` images, split as in `BatchNorm`, and in
    evaluation the running (unbiased) variance; var_i (biased) is that of each channel of each image. gamma, v and beta
    have shape (C,); v starts at 1.

    Args:
        norm_batch_size: images that share var; None takes the whole batch.
        momentum: weight of the newest variance in the running one.
        apply_act: without it, where an addition follows, the authors keep y = gamma * x + beta alone.

    Raises:
        ValueError: norm_batch_size is below 1, or momentum not 0 to 1.
    """

    def __init__(
        self,
        num_channels: int,
        norm_batch_size: int | None = None,
        eps: float = 1e-3,
        momentum: float = 0.1,
        apply_act: bool = True,
    ) -> None:
        super().__init__(norm_batch_size, momentum)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.v = nn.Parameter(torch.ones(num_channels)) if apply_act else None
        if apply_act:
            self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = widen(x)
        if self.v is not None:
            y = self._normalize(self._split(y)).flatten(0, 1)
        return (y * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _normalize(self, split: Tensor) -> Tensor:
        image_std = (split.var((3, 4), correction=0, keepdim=True) + self.eps).sqrt()
        return split / torch.maximum(self._batch_std(split), self.v[:, None, None] * split + image_std)

    def _batch_std(self, split: Tensor) -> Tensor:
        """(W, C, 1, 1) of each normalization batch in training, (C, 1, 1) in evaluation."""
        var = self.running_var
        if self.training:
            var = split.var((0, 3, 4), correction=0)
            count = split[:, 0, 0].numel()
            self._follow(self.running_var, var * count / max(1, count - 1))
        return (var + self.eps).sqrt()[..., None, None]

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, norm_batch_size={self.norm_batch_size}, eps={self.eps}, momentum={self.momentum}"


class EvoNormS0(nn.Module):
    """EvoNorm-S0 (arXiv:2004.02967): y = gamma * x * sigmoid(v * x) / sqrt(var + eps) + beta.

    var (biased) is taken for each image over a group: C/G neighbouring channels and all positions. gamma, v and beta
    have shape (C,); v starts at 1.

    Args:
        num_groups: G; give this or `channels_per_group`, never both.
        channels_per_group: C/G.
        apply_act: without it, where an addition follows, the authors keep y = gamma * x + beta alone.

    Raises:
        ValueError: both or neither is given, or the groups do not divide the channels.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int | None = None,
        channels_per_group: int | None = None,
        eps: float = 1e-5,
        apply_act: bool = True,
    ) -> None:
        super().__init__()
        self.num_groups = count_groups(num_channels, num_groups, channels_per_group)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.v = nn.Parameter(torch.ones(num_channels)) if apply_act else None

    def forward(self, x: Tensor) -> Tensor:
        y = widen(x)
        if self.v is not None:
            var = y.unflatten(1, (self.num_groups, -1)).var((2, 3, 4), correction=0)  # (N, G)
            rstd = (var + self.eps).rsqrt().repeat_interleave(x.shape[1] // self.num_groups, 1)  # (N, C)
            y = y * torch.sigmoid(self.v[:, None, None] * y) * rstd[..., None, None]
        return (y * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, num_groups={self.num_groups}, eps={self.eps}"
