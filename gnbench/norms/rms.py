"""Norms that divide by a root mean square and subtract no mean, and Filter Response Normalization among them."""

import torch
from torch import Tensor, nn

from gnbench.norms.group import count_groups
from gnbench.norms.precision import widen


class RMSGroupNorm(nn.Module):
    """GN without the mean: y = gamma * x / sqrt(mean(x^2) + eps) + beta, in the manner of RMSNorm (arXiv:1910.07467).

    mean(x^2) is taken for each image over a group: C/G neighbouring channels and all positions, x (N, C, H, W) seen as
    (N, G, C/G * H * W). gamma and beta have shape (C,).

    Args:
        num_groups: G; give this or `channels_per_group`, never both.
        channels_per_group: C/G.

    Raises:
        ValueError: both or neither is given, or the groups do not divide the channels.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int | None = None,
        channels_per_group: int | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_groups = count_groups(num_channels, num_groups, channels_per_group)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self._normalize(widen(x)).to(x.dtype)

    def _normalize(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(1, (self.num_groups, -1))  # (N, C, H, W) -> (N, G, C/G, H, W)
        square = grouped.square().mean((2, 3, 4), keepdim=True)
        y = (grouped * (square + self.eps).rsqrt()).flatten(1, 2)
        return y * self.weight[:, None, None] + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, num_groups={self.num_groups}, eps={self.eps}"


def rms_layer_norm(num_channels: int, eps: float = 1e-5) -> RMSGroupNorm:
    """RMSNorm (arXiv:1910.07467) of a feature map: `RMSGroupNorm` with one group, as `layer_norm` is GN with one."""
    return RMSGroupNorm(num_channels, num_groups=1, eps=eps)


class FilterResponseNorm(RMSGroupNorm):
    """Filter Response Normalization with its Thresholded Linear Unit (arXiv:1911.09737), norm and activation in one.

    z = max(gamma * x / sqrt(nu2 + eps) + beta, tau), nu2 the mean of x^2 over the positions of one channel of one
    image; gamma, beta and tau (C,) are learned, tau starts at 0. eps is constant, as the paper has it for maps of more
    than one position.

    Args:
        apply_act: whether the maximum with tau is taken.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6, apply_act: bool = True) -> None:
        super().__init__(num_channels, channels_per_group=1, eps=eps)
        self.tau = nn.Parameter(torch.zeros(num_channels)) if apply_act else None

    def _normalize(self, x: Tensor) -> Tensor:
        y = super()._normalize(x)
        return y if self.tau is None else torch.maximum(y, self.tau[:, None, None])
