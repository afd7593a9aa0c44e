"""The precision in which a norm computes."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """x in float32 at least: statistics in half precision would lose digits that torch's own norms keep."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
