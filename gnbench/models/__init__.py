"""Networks, each a function of `norm` (num_channels -> Module) and `num_classes`; none asks which norm it is given.

What a norm is to a model:
- `norm(num_channels)` is a layer that keeps the shape (N, C, H, W).
- A norm that takes the argument `apply_act` brings the activation after it (the convention of timm): with
  apply_act=True the model adds no ReLU, with apply_act=False, before an addition, the layer is to have none.
- A norm whose attribute `conv_weight` is a function conv -> Module acts on the weights as well: each convolution's
  weight becomes what that module makes of it.
- A layer with a method `with_relu(x, shortcut)` may compute relu(layer(x) + shortcut), shortcut a map or None, faster
  than it is done after it; it returns None where it does not.
- A layer with a method `end_branch()` hears by it that it stands at the end of a residual branch. One with a method
  `zero_scale()` starts that branch at zero by it, where this is wanted, and not by a gamma of 0.
"""

import inspect
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

NormFactory = Callable[..., nn.Module]  # num_channels -> layer
ConvWeight = Callable[[nn.Conv2d], nn.Module]  # conv -> module that maps a weight to one of the same shape


def brings_activation(norm: NormFactory) -> bool:
    """Whether a norm's layers hold the activation that follows them."""
    try:
        return "apply_act" in inspect.signature(norm).parameters
    except ValueError:  # a callable without a signature, as some builtins are
        return False


def norm_and_activation(norm: NormFactory, num_channels: int) -> tuple[nn.Module, nn.Module]:
    """A norm and what follows it: ReLU, or nothing where the norm brings an activation.

    The ReLU is not in place: a norm's backward pass may need its output.
    """
    if brings_activation(norm):
        return norm(num_channels, apply_act=True), nn.Identity()
    return norm(num_channels), nn.ReLU()


def norm_alone(norm: NormFactory, num_channels: int) -> nn.Module:
    """A norm where no activation follows."""
    return norm(num_channels, apply_act=False) if brings_activation(norm) else norm(num_channels)


def norm_then_relu(norm: nn.Module, relu: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """relu(norm(x) + shortcut), `relu` the module that follows a norm: nn.ReLU, or nothing where the norm brings it."""
    if isinstance(relu, nn.ReLU) and hasattr(norm, "with_relu") and not (_has_hooks(norm) or _has_hooks(relu)):
        y = norm.with_relu(x, shortcut)
        if y is not None:
            return y
    y = norm(x)
    return relu(y if shortcut is None else y + shortcut)


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens, who is to hear what the module by itself is given and gives."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def initialize(model: nn.Module, seed: int, norms: Iterable[nn.Module] = ()) -> None:
    """Draw the weights of convolutions and the classifier from `seed` alone, the same whatever the norm.

    Convolutions: He, N(0, 2 / fan_out) (arXiv:1502.01852); classifier: N(0, 0.01^2), bias 0 (arXiv:1706.02677).
    What stands inside one of `norms` is left as its author starts it.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in modules_outside(model, norms):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def parametrize_weights(model: nn.Module, conv_weight: ConvWeight, norms: Iterable[nn.Module] = ()) -> None:
    """Let every convolution outside of `norms` compute its weight from the one that is trained."""
    for module in modules_outside(model, norms):
        if isinstance(module, nn.Conv2d):
            parametrize.register_parametrization(module, "weight", conv_weight(module))


def modules_outside(model: nn.Module, norms: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules of a model that do not stand inside one of `norms`."""
    inside = {id(module) for norm in norms for module in norm.modules()}
    return [module for module in model.modules() if id(module) not in inside]


def end_branch(norm: nn.Module, zero: bool) -> None:
    """Tell a norm that it ends a residual branch, and with `zero` start its gamma at 0: the block is its shortcut."""
    if hasattr(norm, "end_branch"):
        norm.end_branch()
    if zero and hasattr(norm, "zero_scale"):
        norm.zero_scale()
    elif zero and getattr(norm, "weight", None) is not None:
        nn.init.zeros_(norm.weight)
