"""gnbench: how does a normalization layer's error depend on the batch size?

>>> import gnbench
>>> gnbench.norm("gn", num_groups=4)                      # num_channels -> Module, from configs/norm
>>> gnbench.model("resnet20", norm="gn", num_classes=10)  # a torch Module
>>> frame = gnbench.load("results/batch_size")            # a pandas DataFrame with a row a run
>>> gnbench.figures.error_vs_batch_size(frame)            # a matplotlib Axes
"""

import importlib
from typing import TYPE_CHECKING

from gnbench.errors import UserError

if TYPE_CHECKING:
    from gnbench.analysis import figures
    from gnbench.analysis.table import load
    from gnbench.build import model, norm

__version__ = "0.1.0"
__all__ = ["UserError", "figures", "load", "model", "norm"]

# torch and pandas are imported by the half that is asked for, when it is asked for.
_LAZY = {
    "norm": ("gnbench.build", "norm"),
    "model": ("gnbench.build", "model"),
    "load": ("gnbench.analysis.table", "load"),
    "figures": ("gnbench.analysis.figures", None),
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'gnbench' has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    return getattr(module, attribute) if attribute else module


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
