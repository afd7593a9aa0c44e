"""Batch-Channel Normalization: a norm of the batch, then one of channel groups."""

from torch import Tensor, nn

from gnbench.norms.batch import BatchNorm, EstimatedBatchNorm
from gnbench.norms.group import group_norm


class BatchChannelNorm(nn.Module):
    """Batch-Channel Normalization (BCN, arXiv:1903.10520v2): y = GN(BN(x)), each with its own gamma and beta (C,).

    Args:
        norm_batch_size: images that share BN's statistics; None takes the whole batch.
        num_groups, channels_per_group: of GN; give one of the two.
        momentum: weight of the newest statistics in the running ones.
        estimate: whether training normalizes by running estimates (`EstimatedBatchNorm`), for micro-batches.

    Raises:
        ValueError: as `BatchNorm` and `group_norm`.
    """

    def __init__(
        self,
        num_channels: int,
        norm_batch_size: int | None = None,
        num_groups: int | None = None,
        channels_per_group: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        estimate: bool = False,
    ) -> None:
        super().__init__()
        batch_norm = EstimatedBatchNorm if estimate else BatchNorm
        self.batch = batch_norm(num_channels, norm_batch_size, eps, momentum)
        self.channel = group_norm(num_channels, num_groups, channels_per_group, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.channel(self.batch(x)).to(x.dtype)

    def zero_scale(self) -> None:
        """Start a residual branch at zero: its last gamma is GN's."""
        nn.init.zeros_(self.channel.weight)
