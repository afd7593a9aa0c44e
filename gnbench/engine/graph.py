"""A whole step as one CUDA graph: a GPU then waits for no Python between the hundreds of kernels of a small batch."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gnbench.engine.eager import Eager
from gnbench.engine.fused import Fused
from gnbench.errors import UserError, explain
from gnbench.train import MOMENTUM, Training

WARM_UP_STEPS = 3  # before a capture, so that libraries have chosen their kernels and taken their memory
Replay = Callable[[], None]


class CudaGraph:
    """Another engine's step, recorded once for each shape, mode and set of members, and replayed.

    Images, labels and the learning rate are copied into the tensors that the graph reads. A recording trains for some
    steps, which are then undone, but for the random numbers that layers draw in them. A batch of another shape, as an
    epoch's last, is a recording of its own. What a layer does in Python alone, as counting its steps, is not repeated.

    Args:
        engine: what is recorded.
        record: makes a function that repeats what another one did on the device.

    Raises:
        UserError: by `step`: a layer does what a graph cannot record, as waiting for a number to decide by, or puts
            another tensor in the place of a buffer, which a graph would not follow.
    """

    def __init__(self, engine: Eager | Fused, record: Callable[[Callable[[], None]], Replay] | None = None) -> None:
        self.engine = engine
        self.name = f"{engine.name}, CUDA graph"
        self.frozen = False
        self.replays: dict[tuple, tuple[Replay, list[tuple[Tensor, Tensor]], list[Tensor]]] = {}
        device = self.members[0].dataset.mean.device
        self.record = record or functools.partial(record_cuda_graph, device=device)
        for group in engine.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
            for parameter in group["params"] if group["momentum"] else ():
                engine.optimizer.state[parameter].setdefault(MOMENTUM, torch.zeros_like(parameter))

    @property
    def members(self) -> list[Training]:
        return self.engine.members

    def set_train_mode(self, frozen: bool) -> None:
        """Training mode; with `frozen`, running statistics are used as they are."""
        self.frozen = frozen
        self.engine.set_train_mode(frozen)

    def step(self, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """One update of every member; losses and numbers of errors, (members,) each, on the device."""
        key = (self.frozen, batches[0][0].shape, *(training.seed for training in self.members))
        if key not in self.replays:
            seeds = key[2:]  # a member that has left does not come back, and recordings with it keep their memory
            self.replays = {each: kept for each, kept in self.replays.items() if each[2:] == seeds}
            self.replays[key] = self._record(batches)
        replay, inputs, outputs = self.replays[key]
        for (images, labels), (own_images, own_labels) in zip(batches, inputs, strict=True):
            own_images.copy_(images)
            own_labels.copy_(labels)
        self.engine.set_learning_rate()
        replay()
        losses, num_errors = outputs
        return losses.clone(), num_errors.clone()

    def _record(self, batches: list[tuple[Tensor, Tensor]]) -> tuple[Replay, list[tuple[Tensor, Tensor]], list[Tensor]]:
        inputs = [(images.clone(), labels.clone()) for images, labels in batches]
        outputs: list[Tensor] = []

        def update() -> None:
            outputs[:] = self.engine.update(inputs)

        state = [(tensor, tensor.clone()) for tensor in self._state()]
        buffers = self._buffers()
        try:
            replay = self.record(update)
        except Exception as error:
            first = error
            while first.__context__ is not None:  # what ended a capture: the last says no more than that it ended
                first = first.__context__
            if first is error:  # by a run before the capture, which fails without one too
                raise
            raise UserError(
                f"engine=cuda_graph is not legal with a model whose step cannot be recorded ({explain(first)}): "
                "it is auto or eager"
            ) from error
        for tensor, before in state:
            tensor.copy_(before)
        for name, buffer in self._buffers().items():
            if buffer is not buffers.get(name):
                raise UserError(
                    f"engine=cuda_graph is not legal with a layer that puts another tensor in the place of its buffer, "
                    f"as {name[1]} does, instead of changing it in place: it is auto or eager"
                )
        return replay, inputs, outputs

    def _buffers(self) -> dict[tuple[int, str], Tensor]:
        """The members' buffers, by seed and name."""
        return {(t.seed, name): buffer for t in self.members for name, buffer in t.model.named_buffers()}

    def _state(self) -> Iterator[Tensor]:
        """All that an update changes."""
        for training in self.members:
            yield from (parameter.data for parameter in training.model.parameters())
            yield from training.model.buffers()
        for state in self.engine.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def record_cuda_graph(update: Callable[[], None], device: torch.device) -> Replay:
    """Capture what `update` does on a CUDA device, after some runs of it on a stream of its own."""
    with torch.cuda.device(device):  # streams and graphs belong to the current one
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                update()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            update()
    return graph.replay
