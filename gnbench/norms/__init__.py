"""Normalization layers, each a function or class that takes `num_channels` first and keeps the shape (N, C, H, W)."""

from gnbench.norms.batch import BatchNorm, BatchRenorm
from gnbench.norms.group import group_norm, instance_norm, layer_norm
from gnbench.norms.none import no_norm

__all__ = ["BatchNorm", "BatchRenorm", "group_norm", "instance_norm", "layer_norm", "no_norm"]
