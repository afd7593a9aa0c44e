"""One training by several workers: each takes its share of every batch, and gradients and statistics are shared.

Worker r of W holds the images r, r + W, r + 2W, ... of a batch. That is how `gnbench.norms.batch.NormBatches` deals a
batch out to its normalization batches, so that each of these is inside one worker wherever their number is a multiple
of W; else all workers take part in each.
"""

import copy
from collections.abc import Callable
from inspect import signature

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gnbench.engine.eager import PLAIN, Eager, Ways, forward
from gnbench.errors import UserError
from gnbench.norms.batch import BatchNorm, NormBatches
from gnbench.norms.precision import widen
from gnbench.precise_bn import layers_with_statistics, set_train_mode
from gnbench.train import Training
from gnbench.workers import count_workers, noticing_loss, rank

# DDP's argument that lets it leave buffers alone, by its name from torch 2.13 on or by that of before
BUFFERS_STAY = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in signature(DDP).parameters)


class Distributed(Eager):
    """A training whose steps W workers make together: the numbers are the reference's, to rounding.

    Every worker has the whole training and updates it by the same gradient, that of the mean loss over the whole batch,
    to which each contributes its own images' part; after a step it has the statistics that one process would have kept.
    So each can be evaluated, saved and restored as if it were alone.
    """

    def __init__(self, training: Training, ways: Ways = PLAIN) -> None:
        super().__init__(training, ways)
        self.name = ", ".join([f"{count_workers()} workers", *ways.names])
        training.share = slice(rank(), None, count_workers())
        with noticing_loss():
            self.network = DDP(_synchronize(training), **{BUFFERS_STAY: False})
        self.network.register_comm_hook(None, _sum_gradients)

    def set_train_mode(self, frozen: bool) -> None:
        """Training mode; with `frozen`, running statistics are used as they are."""
        set_train_mode(self.network, frozen)

    def update(self, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A step by this worker's share of a batch; mean loss and number of errors, (1,) each, of the whole batch."""
        (training,) = self.members
        recipe, ((images, labels),) = training.recipe, batches
        with noticing_loss():
            logits = forward(self.network, images, training.precision)
            loss_sum = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing, reduction="sum")
            self.optimizer.zero_grad()
            (loss_sum / training.num_images).backward()
            if recipe.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(training.model.parameters(), recipe.clip_grad_norm)
            self.optimizer.step()
            num_errors = (logits.detach().argmax(1) != labels).sum()
            loss_sum, num_errors = self._pool(loss_sum.detach(), num_errors)
        return (loss_sum / training.num_images)[None], num_errors.long()[None]

    def _pool(self, loss_sum: Tensor, num_errors: Tensor) -> Tensor:
        """The two numbers (2,) summed over the workers; what layers keep becomes the workers' average on the way."""
        buffers = [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]
        everything = torch.cat([torch.stack([loss_sum, num_errors]).double(), *(b.double().flatten() for b in buffers)])
        dist.all_reduce(everything)
        sums, *kept = everything.split([2, *(buffer.numel() for buffer in buffers)])
        for buffer, total in zip(buffers, kept, strict=True):
            buffer.copy_((total / count_workers()).view_as(buffer))
        for own, buffer in zip(self.members[0].model.buffers(), self.network.buffers(), strict=True):
            if own is not buffer:  # a layer has put another tensor into its place
                own.copy_(buffer)
        return sums


def _sum_gradients(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's own way would be their average, but shares may differ by an image, and a loss counts by its images."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


def check_layer(layer: nn.Module, batch_size: int, label: str) -> None:
    """Refuse a norm of the batch that would need statistics from several workers and has no way to them.

    Raises:
        UserError: names how many images share statistics and how many a worker has.
    """
    split = [module for module in layer.modules() if isinstance(module, NormBatches)]
    if not split or any(not isinstance(module, NormBatches) for module in layers_with_statistics(layer)):
        raise UserError(
            f"{label} cannot be trained by {count_workers()} workers: it is of the batch, and does not deal it out by "
            "gnbench.norms.NormBatches; one process can train it"
        )
    for module in split:
        num_batches = module.count_batches(batch_size)
        if num_batches % count_workers() and type(module) is not BatchNorm:
            raise UserError(
                f"{label} cannot be trained by {count_workers()} workers: {batch_size // num_batches} of {batch_size} "
                "images share statistics and are not one worker's, which only BN can do; one process can train it"
            )


def _synchronize(training: Training) -> nn.Module:
    """A network with the model's own parameters and buffers, in which BN can have statistics of several workers."""
    tensors = [*training.model.parameters(), *training.model.buffers()]
    network = copy.deepcopy(training.model, {id(tensor): tensor for tensor in tensors})
    for parent in list(network.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is BatchNorm:
                setattr(parent, name, _SharedBatchNorm(module, lambda: training.num_images))
    return network


class _SharedBatchNorm(BatchNorm):
    """A `BatchNorm` on a worker's share (n, C, H, W) of a batch of N images, with that one's parameters and buffers.

    Each image has moments of its own; those of the images of a normalization batch are added up over the workers.

    Args:
        num_images: gives N.
    """

    def __init__(self, norm: BatchNorm, num_images: Callable[[], int]) -> None:
        super().__init__(len(norm.weight), norm.norm_batch_size, norm.eps, norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_images = num_images

    def forward(self, x: Tensor) -> Tensor:
        num_batches = self.count_batches(self.num_images())
        if not self.training or num_batches % count_workers() == 0:
            return super().forward(x)
        places = torch.arange(rank(), self.num_images(), count_workers(), device=x.device)  # of the share in the batch
        return self._normalize_batches(x, places % num_batches, num_batches)

    def _normalize_batches(self, x: Tensor, batch: Tensor, num_batches: int) -> Tensor:
        """Each image normalized over all images of its normalization `batch` (n,), on whatever worker they are."""
        size = self.num_images() // num_batches  # images in a normalization batch
        var, mean = (moment.double() for moment in torch.var_mean(widen(x), (2, 3), correction=0))  # (n, C) each
        moments = torch.stack([mean, var + mean.square()], 1)  # in float64, where E[x^2] - E[x]^2 loses nothing
        sums = _SumOverWorkers.apply(moments.new_zeros(num_batches, *moments.shape[1:]).index_add(0, batch, moments))
        mean, square = (sums / size).unbind(1)  # (num_batches, C) each
        var = square - mean.square()
        with torch.no_grad():
            count = size * x[0, 0].numel()
            self._follow(self.running_mean, mean.to(self.running_mean.dtype))
            self._follow(self.running_var, (var * count / max(1, count - 1)).to(self.running_var.dtype))
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        scale, shift = (each[batch, :, None, None].to(widen(x).dtype) for each in (scale, shift))
        return (widen(x) * scale + shift).to(x.dtype)


class _SumOverWorkers(torch.autograd.Function):
    """y = the sum of x over the workers; all their losses depend on y, and so dx is the sum of dy over the workers."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _SumOverWorkers.apply(gradient.contiguous())
