"""Group Normalization, and Layer and Instance Normalization as its two ends."""

from torch import Tensor, nn

from gnbench.kernels import one_pass


class GroupNorm(nn.GroupNorm):
    """torch.nn.GroupNorm, and a ReLU after it, in one pass over memory where an engine wants that."""

    one_pass = False  # an engine sets it; `one_pass.takes` says on which maps it then counts

    def forward(self, x: Tensor) -> Tensor:
        if self._takes_one_pass(x):
            return self._in_one_pass(x)
        return super().forward(x).to(x.dtype)  # a GPU's autocast makes it float32, alone among the norms

    def with_relu(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor | None:
        """relu(self(x) + shortcut), or None where that is not to be had in one pass."""
        if self._takes_one_pass(x, shortcut):
            return self._in_one_pass(x, relu=True, shortcut=shortcut)
        return None

    def _takes_one_pass(self, x: Tensor, shortcut: Tensor | None = None) -> bool:
        wanted = self.one_pass and type(self) is GroupNorm  # a subclass may have a formula of its own
        return wanted and one_pass.takes(x, self.weight, self.bias, shortcut)

    def _in_one_pass(self, x: Tensor, **options: object) -> Tensor:
        return one_pass.normalize(x, self.weight, self.bias, len(x), self.num_groups, self.eps, **options)[0]


def group_norm(
    num_channels: int, num_groups: int | None = None, channels_per_group: int | None = None, eps: float = 1e-5
) -> GroupNorm:
    """Group Normalization (arXiv:1803.08494): y = gamma * (x - mean) / sqrt(var + eps) + beta.

    mean and var (biased) are taken for each image over a group: C / num_groups neighbouring channels and all
    positions, x (N, C, H, W) seen as (N, G, C/G * H * W). gamma and beta have shape (C,).

    Args:
        num_groups: G; give this or `channels_per_group`, never both.
        channels_per_group: C/G, the same in every layer, so that G grows with the layer's width.

    Raises:
        ValueError: both or neither is given, or the groups do not divide the channels.
    """
    return GroupNorm(count_groups(num_channels, num_groups, channels_per_group), num_channels, eps=eps)


def count_groups(num_channels: int, num_groups: int | None, channels_per_group: int | None) -> int:
    """The number of groups that one of the two means.

    Raises:
        ValueError: both or neither is given, or the groups do not divide the channels.
    """
    if (num_groups is None) == (channels_per_group is None):
        given = f"num_groups={num_groups}, channels_per_group={channels_per_group}"
        raise ValueError(f"exactly one of num_groups and channels_per_group is to be given, got {given}")
    for key, divisor in (("num_groups", num_groups), ("channels_per_group", channels_per_group)):
        if divisor is not None and (divisor < 1 or num_channels % divisor):
            legal = ", ".join(str(n) for n in range(1, num_channels + 1) if num_channels % n == 0)
            raise ValueError(f"{key}={divisor} does not divide {num_channels} channels; legal: {legal}")
    return num_groups or num_channels // channels_per_group


def layer_norm(num_channels: int, eps: float = 1e-5) -> GroupNorm:
    """Layer Normalization (arXiv:1607.06450) of a feature map: GN with one group.

    gamma and beta have shape (C,), not (C, H, W), so that it differs from GN by its groups alone.
    """
    return group_norm(num_channels, num_groups=1, eps=eps)


def instance_norm(num_channels: int, eps: float = 1e-5) -> GroupNorm:
    """Instance Normalization (arXiv:1607.08022): GN with one channel a group, with gamma and beta of shape (C,)."""
    return group_norm(num_channels, channels_per_group=1, eps=eps)
