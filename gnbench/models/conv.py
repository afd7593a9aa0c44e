"""Convolutions as the models here are built of."""

from torch import Tensor, nn

from gnbench.kernels import winograd


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d, with fewer multiplications where an engine wants that."""

    winograd = False  # an engine sets it; `winograd.takes` says on which maps it then counts

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight  # once: it may be computed
        if self.winograd and winograd.takes(self, x, weight):
            return winograd.convolve(x, weight, self.groups)
        return self._conv_forward(x, weight, self.bias)
