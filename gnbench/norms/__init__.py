"""Normalization layers, each a function or class that takes `num_channels` first and keeps the shape (N, C, H, W)."""

from gnbench.norms.batch import BatchGroupNorm, BatchNorm, BatchRenorm, EstimatedBatchNorm, sync_batch_norm
from gnbench.norms.batch_channel import BatchChannelNorm
from gnbench.norms.evonorm import EvoNormB0, EvoNormS0
from gnbench.norms.group import group_norm, instance_norm, layer_norm
from gnbench.norms.moving_average import MovingAverageBatchNorm
from gnbench.norms.none import SkipInit, no_norm
from gnbench.norms.position import PositionNorm
from gnbench.norms.rms import FilterResponseNorm, RMSGroupNorm, rms_layer_norm
from gnbench.norms.switchable import SwitchableNorm
from gnbench.norms.weights import WeightCentralization, WeightStandardization

__all__ = [
    "BatchChannelNorm",
    "BatchGroupNorm",
    "BatchNorm",
    "BatchRenorm",
    "EstimatedBatchNorm",
    "EvoNormB0",
    "EvoNormS0",
    "FilterResponseNorm",
    "MovingAverageBatchNorm",
    "PositionNorm",
    "RMSGroupNorm",
    "SkipInit",
    "SwitchableNorm",
    "WeightCentralization",
    "WeightStandardization",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "no_norm",
    "rms_layer_norm",
    "sync_batch_norm",
]
