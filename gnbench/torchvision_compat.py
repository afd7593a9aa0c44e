"""torchvision, also where its compiled operators do not load beside the installed torch."""

import importlib
from types import ModuleType

from gnbench.errors import UserError

# Operators that torchvision only describes while it is imported, and that no model or data set here calls.
OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> ModuleType:
    """The module `torchvision`.

    A CUDA build of torchvision cannot load its compiled operators beside a CPU build of torch, and its import stops
    at "operator torchvision::nms does not exist". There, and only there, the schemas that it asks for are declared
    and it is imported again: its models and data sets then work, a call of the operators fails.

    Raises:
        UserError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except ImportError as error:
        raise UserError(f"torchvision cannot be imported ({error}): run `pip install torchvision`") from error
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    import torch

    for operator in OPERATORS:
        torch.library.define(f"torchvision::{operator}", SCHEMA)
    return importlib.import_module("torchvision")
