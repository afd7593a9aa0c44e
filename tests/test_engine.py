"""Every way to execute a step beside the reference, and several seeds as one network beside one by one."""

import copy
import itertools
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import environment, tiny_config
from crashes import CONTEXT, KILLED, outcome
from scipy import stats
from test_cli import records
from test_train import finish, make_training, without_times
from tiny_data import load_tiny
from torch import nn

import gnbench
import gnbench.run as run_module
from gnbench import kernels
from gnbench.checkpoint import load_checkpoints, save_checkpoint
from gnbench.configs import choices
from gnbench.data import prepare, train_batches
from gnbench.engine import CudaGraph, Eager, Fused, Ways, make_engine, most_lanes
from gnbench.engine.eager import take_kernels
from gnbench.errors import UserError
from gnbench.machine import set_arithmetic
from gnbench.norms.batch import NormBatches
from gnbench.plan import Run, plan_run
from gnbench.record import RECORD, load_record
from gnbench.run import execute, execute_group
from gnbench.train import Diverged, Training, summarize, train
from hydra_plugins.gnbench.cores import Cores

SEEDS = (3, 4, 5)
NORMS = sorted(set(choices("norm")) - {"custom"})
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3}  # of what 20 steps change, relative to its largest part
GENTLE = {"base_lr": 0.02, "batch_size": 4}  # rounding grows over steps, faster at a larger rate


def trainings(dtype: torch.dtype = torch.float32, norm: str = "bn", model: str = "resnet8", **recipe) -> list[Training]:
    """One for each of SEEDS. Blocks start as shortcuts: fewer numbers then lie so near a ReLU's kink that float32's
    rounding decides on which side."""
    made, start = [], {"zero_init_residual": True} if model.startswith("resnet") else {}
    for seed in SEEDS:
        training = make_training(norm, seed=seed, **{"epochs": 30, **recipe})
        training.model = gnbench.model(model, norm=norm, num_classes=3, seed=seed, **start)
        made.append(Training(training.model.to(dtype), training.dataset, training.recipe, seed))
    return made


def step(engine, num_steps: int, dtype: torch.dtype = torch.float32, size: int = 16) -> list[float]:
    """Step the members of `engine` by batches that belong to their seeds; returns their last losses."""
    losses, members = None, engine.members
    batch_size = members[0].recipe.batch_size
    batches = [[] for _ in members]
    for own, training in zip(batches, members, strict=True):
        epoch = 0
        while len(own) < num_steps:
            own += train_batches(training.dataset, batch_size, drop_last=True, seed=training.seed, epoch=epoch)
            epoch += 1
    engine.set_train_mode(frozen=False)
    for number in range(num_steps):
        images = [F.interpolate(own[number][0].to(dtype), size=(size, size)) for own in batches]
        losses, _ = engine.step([(x, own[number][1]) for x, own in zip(images, batches, strict=True)])
        for training in members:
            training.progress.step += 1
    return losses.tolist()


def state(training: Training) -> dict[str, torch.Tensor]:
    momenta = {name: training.optimizer.state[p]["momentum_buffer"] for name, p in training.model.named_parameters()}
    return {**training.model.state_dict(), **{f"momentum of {name}": value for name, value in momenta.items()}}


def assert_close(ours: Training, reference: Training, start: dict, tolerance: float) -> None:
    """Compare two trainings by what they have changed since `start`: weights that hardly move prove nothing."""
    for key, value in state(reference).items():
        before = start.get(key, torch.zeros_like(value))
        scale = (value - before).abs().max().clamp_min(1e-3)
        assert (state(ours)[key] - value).abs().max() <= tolerance * scale, key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_seeds_as_one_network_step_as_they_do_alone(norm, dtype):
    recipe = {"label_smoothing": 0.1, "nesterov": True, "norm_weight_decay": False, "weight_decay": 0.01}
    alone, together = trainings(dtype, norm, **GENTLE, **recipe), trainings(dtype, norm, **GENTLE, **recipe)
    one, two, three = together
    lanes = [one, None, two, three]  # with an empty one
    losses = step(Fused(lanes, Ways(channels_last=True, winograd=True)), 20, dtype)
    for lane in (0, 2) if dtype == torch.float64 else (1,):
        start = {key: value.clone() for key, value in alone[lane].model.state_dict().items()}
        (expected,) = step(Eager(alone[lane]), 20, dtype)
        assert losses[lane] == pytest.approx(expected, rel=TOLERANCE[dtype])
        assert_close(together[lane], alone[lane], start, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("norm", ["bn", "gn", "brn"])
def test_another_memory_format_steps_alike(norm, dtype):
    alone, other = trainings(dtype, norm, **GENTLE)[0], trainings(dtype, norm, **GENTLE)[0]
    start = {key: value.clone() for key, value in alone.model.state_dict().items()}
    assert step(Eager(other, Ways(channels_last=True)), 20, dtype) == pytest.approx(
        step(Eager(alone), 20, dtype), rel=TOLERANCE[dtype]
    )
    assert_close(other, alone, start, TOLERANCE[dtype])


@pytest.mark.parametrize("norm", ["bn", "gn_ws"])
@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(["eager", "channels_last", "together"], 2)))
def test_a_state_saved_by_one_engine_goes_on_by_another(norm, before, after):
    """Momenta come with the memory format of the engine that made them, which the other may not have."""
    make = {
        "eager": lambda members: Eager(members[0]),
        "channels_last": lambda members: Eager(members[0], Ways(channels_last=True)),
        "together": Fused,
    }
    whole, first, rest = (trainings(torch.float64, norm, **GENTLE) for _ in range(3))
    start = {key: value.clone() for key, value in whole[0].model.state_dict().items()}
    step(make["eager"](whole), 8, torch.float64)
    step(make["eager"](whole), 4, torch.float64)
    step(make[before](first), 8, torch.float64)
    rest[0].restore(first[0].state())
    step(make[after](rest), 4, torch.float64)
    assert_close(rest[0], whole[0], start, TOLERANCE[torch.float64])


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
@pytest.mark.parametrize("norm", ["bn", "gn", "mabn"])
def test_a_recorded_step_is_the_step(norm, together):
    """What surrounds a CUDA graph, with a recording that repeats the step on the CPU, where there are no graphs."""
    recorded = []

    def record(update):
        for _ in range(3):
            update()
        recorded.append(update)
        return update

    reference, other = trainings(norm=norm), trainings(norm=norm)
    plain = Fused(reference) if together else Eager(reference[0])
    graph = CudaGraph(Fused(other) if together else Eager(other[0]), record)
    losses = [step(plain, 5), step(graph, 5)]
    assert losses[0] == losses[1]
    for one, two in zip(plain.members, graph.members, strict=True):
        for key, value in state(one).items():
            assert torch.equal(state(two)[key], value), key
    assert len(recorded) == 1
    graph.set_train_mode(frozen=True)
    plain.set_train_mode(frozen=True)
    batches = [next(train_batches(t.dataset, 4, drop_last=True, seed=t.seed, epoch=9)) for t in plain.members]
    for _ in range(2):
        assert torch.equal(plain.step(batches)[0], graph.step(batches)[0])
    assert len(recorded) == 2, "another mode and shape are another recording"
    if together:
        for engine in (plain, graph):
            engine.members.pop(1)
        assert torch.equal(plain.step(batches[::2])[0], graph.step(batches[::2])[0])
        assert len(recorded) == 3


def test_a_layer_whose_buffer_becomes_another_tensor_is_not_recorded(monkeypatch):
    """A graph would go on with the statistics of its first step, and nothing would tell."""

    def follow(self, running, newest):
        self.running_square = running.lerp(newest.detach().mean(0), self.momentum)

    monkeypatch.setattr(NormBatches, "_follow", follow)
    training = trainings(norm="mabn")[0]
    with pytest.raises(UserError, match=r"cuda_graph is not legal with a layer .* as \S+\.running_square does"):
        step(CudaGraph(Eager(training), record=lambda update: update() or update), 1)


def test_a_model_that_cannot_be_recorded_is_refused_by_what_it_does():
    """torch.cuda.graph raises its own error while it handles the layer's, and tells nothing of that."""

    def record(update):
        try:
            raise ValueError("waits for a number")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    engine = CudaGraph(Eager(trainings()[0]), record)
    with pytest.raises(UserError, match=r"whose step cannot be recorded \(ValueError: waits for a number\)"):
        step(engine, 1)


@needs_gpu
@pytest.mark.parametrize("norm", NORMS)
def test_on_a_gpu_a_graph_steps_as_the_reference_does(norm):
    set_arithmetic({"num_threads": 1, "precision": "float32"})
    reference, other = [[_on("cuda", training) for training in trainings(norm=norm, **GENTLE)] for _ in range(2)]
    start = {key: value.clone() for key, value in reference[0].model.state_dict().items()}
    (expected,) = step(Eager(reference[0]), 20)
    losses = step(CudaGraph(Fused(other, Ways())), 20)
    assert losses[0] == pytest.approx(expected, rel=2e-2)
    assert_close(other[0], reference[0], start, 2e-2)


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("engine", ["auto", "cuda_graph"])
def test_on_a_gpu_nothing_waits_inside_an_epoch(engine):
    members = [_on("cuda", training) for training in trainings(norm="bn")]
    steps = members[0].steps_per_epoch

    def forbid_waiting():
        inside = 1 <= members[0].progress.step % steps < steps - 1  # both ends of an epoch wait
        torch.cuda.set_sync_debug_mode("error" if inside else "default")

    try:
        train(make_engine(members, engine), forbid_waiting)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_recorded_training_goes_on_by_itself_as_one_that_never_was(device, together):
    """Two epochs, each with a last batch of another shape, recorded up to the middle of the second."""

    def record(update):
        update()
        return update

    def stop():
        if whole[0].progress.step == whole[0].total_steps * 3 // 4:
            raise InterruptedError

    recipe = {**GENTLE, "batch_size": 20, "epochs": 2}
    reference, whole, rest = ([_on(device, t) for t in trainings(**recipe)] for _ in range(3))
    count = len(reference) if together else 1
    start = [{key: value.clone() for key, value in t.model.state_dict().items()} for t in reference]
    engine = Fused(whole, Ways()) if together else Eager(whole[0])
    with pytest.raises(InterruptedError):
        train(CudaGraph(engine, record if device == "cpu" else None), stop)
    for expected, recorded, own, before in list(zip(reference, whole, rest, start, strict=True))[:count]:
        own.restore(recorded.state())
        assert own.progress.step == own.total_steps * 3 // 4
        finish(own)
        finish(expected)
        assert_close(own, expected, before, 2e-2)
        errors = [[row["train_error"] for row in each.progress.history] for each in (own, expected)]
        assert errors[0] == pytest.approx(errors[1], abs=5)


def _on(device: str, training: Training) -> Training:
    dataset = prepare(load_tiny(), torch.device(device))
    return Training(training.model.to(device), dataset, training.recipe, training.seed)


needs_compiler = pytest.mark.skipif(not kernels.are_available(), reason="kernels need a compiler")
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}  # relative to the largest number


@needs_compiler
@pytest.mark.parametrize("follows", ["nothing", "relu", "shortcut"])
@pytest.mark.parametrize(
    "shape", [(12, 16, 5, 5), (12, 16, 8, 8), (12, 48, 4, 4), (6, 64, 3, 5), (6, 144, 2, 4)], ids=str
)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", ["bn", "bn2", "gn", "ln", "in"])
def test_a_norm_in_one_pass_is_the_norm(name, dtype, shape, follows):
    """Output, gradients and running statistics beside torch's in float64, with numbers that lie far from zero."""
    norm, keys = ("bn", {"norm_batch_size": 2}) if name == "bn2" else (name, {})
    reference = gnbench.norm(norm, **keys)(shape[1]).double()
    nn.init.normal_(reference.weight, generator=torch.manual_seed(1))
    nn.init.normal_(reference.bias, generator=torch.manual_seed(2))
    ours = copy.deepcopy(reference).to(torch.promote_types(dtype, torch.float32))
    ours.one_pass = True
    x, shortcut, upstream = (
        torch.randn(3, *shape, generator=torch.manual_seed(0), dtype=torch.float64).to(dtype).unbind()
    )
    x = 3 * x + (10 if dtype != torch.bfloat16 else 0)
    numbers = []
    for module, kind in ((reference, torch.float64), (ours, dtype)):
        image, other = (
            each.to(kind, memory_format=torch.channels_last).detach().requires_grad_() for each in (x, shortcut)
        )
        if follows == "nothing":
            y = module(image)
        elif module is ours:
            y = module.with_relu(image, other if follows == "shortcut" else None)
        else:
            y = F.relu(module(image) + other if follows == "shortcut" else module(image))
        assert y.dtype == kind
        (y * upstream.to(kind)).sum().backward()
        assert (y.grad_fn.name() == "_NormalizeBackward") == (module is ours)
        grads = {"x": image.grad, "shortcut": other.grad, **{key: p.grad for key, p in module.named_parameters()}}
        numbers.append({"y": y.detach(), **grads, **dict(module.named_buffers())})
    for key, expected in numbers[0].items():
        if expected is None:
            assert numbers[1][key] is None
            continue
        difference = (numbers[1][key].double() - expected).abs()
        # where rounding decides on which side of the ReLU's kink a number lies, its gradient is another one
        allowed = 0.01 if follows != "nothing" and dtype == torch.bfloat16 and key in ("x", "shortcut") else 0
        assert (difference > ROUNDING[dtype] * expected.abs().max().clamp_min(1)).double().mean() <= allowed, key


@needs_compiler
def test_one_pass_is_for_the_maps_it_is_written_for():
    norm, other = (gnbench.norm(name)(16) for name in ("bn", "brn"))
    x = torch.randn(4, 16, 3, 3).to(memory_format=torch.channels_last)
    assert norm.with_relu(x) is None, "no engine has asked for it"
    norm.one_pass = other.one_pass = True
    assert norm.with_relu(x) is not None
    assert norm.with_relu(x, x[:1]) is None
    assert norm.with_relu(x, x.double()) is None
    assert gnbench.norm("bn")(32).double().with_relu(x) is None
    for gamma in (torch.ones(16).double(), torch.ones(32)[::2], torch.ones(32)):
        strange = copy.deepcopy(norm)
        strange.weight = nn.Parameter(gamma)
        assert strange.with_relu(x) is None
    assert norm.with_relu(x.contiguous()) is None
    assert norm.with_relu(x.half()) is None
    assert norm.with_relu(x[:1, :, :1, :1].contiguous(memory_format=torch.channels_last)) is None, (
        "one number has no var"
    )
    assert other.with_relu(x) is None
    assert norm.eval().with_relu(x) is None
    assert gnbench.norm("gn", num_groups=3)(24).with_relu(torch.randn(2, 24, 3, 3)) is None
    torch.set_num_threads(2)
    try:
        assert norm.train().with_relu(x) is None
    finally:
        torch.set_num_threads(1)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_pass_lets_through_what_is_not_a_number(dtype):
    """A training that has diverged is to be seen to have."""
    norm = gnbench.norm("gn", num_groups=8)(16).to(torch.promote_types(dtype, torch.float32))
    norm.one_pass = True
    x = torch.randn(3, 16, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    x[1, 2, 3, 3] = torch.nan
    y = norm.with_relu(x)
    assert y[1, 2:4].isnan().all()
    assert y.isnan().sum() == 2 * 4 * 4
    x[1, 2, 3, 3] = torch.inf
    assert norm.with_relu(x)[1, 2:4].isnan().any()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
@pytest.mark.parametrize("norm", ["bn", "bn2", "gn", "gn_ws", "ln", "in"])
def test_kernels_step_alike(norm, together, dtype, monkeypatch):
    """Norms in one pass, BN with a normalization batch size of its own too, and convolutions with less to multiply."""
    reference, other = (trainings(dtype, norm.removesuffix("2"), **GENTLE) for _ in range(2))
    for module in [m for each in (*reference, *other) for m in each.model.modules() if hasattr(m, "norm_batch_size")]:
        module.norm_batch_size = 2 if norm == "bn2" else None
    start = {key: value.clone() for key, value in reference[0].model.state_dict().items()}
    engine = Fused if together else lambda members, ways: Eager(members[0], ways)
    calls, call = Counter(), kernels.call
    monkeypatch.setattr(kernels, "call", lambda name, *arguments: calls.update([name]) or call(name, *arguments))
    losses = step(engine(other, Ways(channels_last=True, one_pass=True, winograd=True)), 20, dtype)
    apart = 3 if together and norm == "gn_ws" else 1  # by computed weights each seed has a convolution of its own
    norms, convs = 20 * 7, 20 * 4 * apart  # each of the model's norms, and the convolutions that keep size and width
    names = {"forward": norms, "backward": norms, "convolve": convs, "input_gradient": convs, "weight_gradient": convs}
    assert calls == names
    (expected,) = step(Eager(reference[0]), 20, dtype)
    assert losses[0] == pytest.approx(expected, rel=TOLERANCE[dtype])
    assert_close(other[0], reference[0], start, TOLERANCE[dtype])


@needs_compiler
def test_one_pass_leaves_room_for_those_who_listen():
    """A hook on a norm, or on the ReLU after it, is to see what it sees elsewhere."""
    model = gnbench.model("resnet8", norm="gn")
    take_kernels(model, Ways(one_pass=True))
    x, heard = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), []
    model.to(memory_format=torch.channels_last)
    before = model(x)
    assert before.grad_fn is not None
    assert "_NormalizeBackward" in _names(before.grad_fn)
    block = model.blocks[0]
    for module in (block.norm1, block.act2):
        module.register_forward_hook(lambda _, __, output: heard.append(output))
    assert torch.allclose(model(x), before, atol=1e-5)
    assert [bool((output < 0).any()) for output in heard] == [True, False]
    other = gnbench.model("resnet8", norm="gn").to(memory_format=torch.channels_last)
    take_kernels(other, Ways(one_pass=True))
    other.blocks[0].norm1.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    other.blocks[1].norm2.register_full_backward_hook(lambda *_: heard.append(None))
    other(x).sum().backward()
    assert len(heard) == 4


def _names(node) -> set[str]:
    """The operations behind a result."""
    below = [_names(parent) for parent, _ in node.next_functions if parent is not None]
    return {node.name()}.union(*below)


@needs_compiler
@pytest.mark.parametrize(("norm", "keys"), [("bn", {}), ("bn", {"norm_batch_size": 2}), ("gn", {"num_groups": 1})])
def test_one_pass_keeps_the_digits_of_a_channel_whose_first_number_is_an_outlier(norm, keys):
    x = torch.randn(8, 16, 32, 32, generator=torch.manual_seed(0))
    x[:, :, 0, 0] = 1000.0
    x[:, 3] = 7.0  # a constant one
    layer = gnbench.norm(norm, **keys)(16)
    expected = copy.deepcopy(layer).double()(x.double())
    layer.one_pass = True
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.grad_fn.name() == "_NormalizeBackward"
    assert (y - expected).abs().max() < 1e-3 * expected.abs().max()
    assert (y[:, :, 1:] - expected[:, :, 1:]).abs().max() < 1e-4


@needs_compiler
def test_one_pass_takes_a_shortcut_of_any_memory_format():
    norm = gnbench.norm("gn")(16)
    norm.one_pass = True
    x, shortcut = torch.randn(2, 3, 16, 4, 4).unbind()
    y = norm.with_relu(x.to(memory_format=torch.channels_last), shortcut)
    assert torch.allclose(y, F.relu(norm(x) + shortcut), atol=1e-5)


@needs_compiler
def test_one_pass_rounds_to_bf16_as_torch_does():
    """To the nearest, ties to even: at gamma 0 the output is beta, which lies between two numbers of bf16."""
    norm = gnbench.norm("gn")(16)
    norm.one_pass = True
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.copy_(1 + torch.arange(16) / 2**8)
    x = torch.randn(1, 16, 2, 2).bfloat16().to(memory_format=torch.channels_last)
    assert torch.equal(norm(x)[0, :, 0, 0], norm.bias.bfloat16())


def test_without_a_compiler_torchs_own_kernels_are_taken_and_that_is_said_once(tmp_path):
    """In a process of its own, where no compiler can be found and nothing is compiled yet."""
    code = (
        "from test_engine import *; torch.set_num_threads(1); long = make_training('gn', epochs=1050); "
        "print(make_engine([long], 'auto').name, '|', make_engine([long], 'auto').name)"
    )
    nowhere = {"CXX": "no-compiler", "PATH": str(tmp_path)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, check=True, env=environment(nowhere), capture_output=True, text=True)
    assert done.stdout == "channels_last | channels_last\n"
    said = "trained by torch's own kernels, which are slower; gnbench's were not to be had: [Errno 2]"
    assert done.stderr.count(said) == 1


@pytest.mark.parametrize(
    "model",
    ["resnet20", *(pytest.param(each, marks=pytest.mark.slow) for each in ("resnet18", "resnet50", "vgg16"))],
)
def test_every_kind_of_model_is_taken_apart_by_lanes(model):
    alone, together = [trainings(torch.float64, "gn", model, batch_size=2) for _ in range(2)]
    start = [{key: value.clone() for key, value in training.model.state_dict().items()} for training in alone]
    step(Fused(together), 2, torch.float64, size=32)
    for training, other, before in zip(alone, together, start, strict=True):
        step(Eager(training), 2, torch.float64, size=32)
        assert_close(other, training, before, 1e-8)


def test_only_what_has_no_other_way_is_computed_lane_by_lane():
    def per_lane(norm: str) -> set[str]:
        kinds = {type(module).__name__: module for module in Fused(trainings(norm=norm)).network.modules()}
        return {type(m).__name__ for m in kinds["_PerLane"].lanes.values()} if "_PerLane" in kinds else set()

    for norm in ("bn", "brn", "gn", "ln", "in", "none"):
        assert per_lane(norm) == set()
    assert per_lane("switchable") == {"SwitchableNorm"}


def test_a_group_has_the_history_and_the_summary_of_its_members_alone():
    alone = [finish(make_training("gn", seed=seed)) for seed in SEEDS]
    together = [make_training("gn", seed=seed) for seed in SEEDS]
    train(Fused(together), pause=lambda: None)
    for one, other in zip(alone, together, strict=True):
        for row, expected in zip(
            without_times(other.progress.history), without_times(one.progress.history), strict=True
        ):
            measured = [key for key, value in expected.items() if value is not None]
            assert [row[key] for key in measured] == pytest.approx([expected[key] for key in measured], 1e-3, 1e-3)
        assert summarize(other)["test_error"] == pytest.approx(summarize(one)["test_error"], abs=1e-3)


def test_a_lane_does_not_notice_who_is_in_the_others():
    full, lonely = trainings(), trainings()
    losses = step(Fused(full), 5)
    assert step(Fused([None, lonely[1], None]), 5) == losses[1:2]
    for key, value in state(full[1]).items():
        assert torch.equal(value, state(lonely[1])[key]), key


@pytest.mark.parametrize("norm", ["bn", "gn", "switchable"])
def test_a_diverged_member_leaves_the_others_their_bits(norm):
    calm, troubled = trainings(norm=norm, epochs=2), trainings(norm=norm, epochs=2)
    with torch.no_grad():
        next(troubled[1].model.parameters()).fill_(torch.nan)
    dropped = []
    train(Fused(calm), pause=lambda: None)
    train(Fused(troubled), pause=lambda: None, drop=lambda training, error: dropped.append((training, str(error))))
    assert dropped == [(troubled[1], "the training loss is not finite by step 12 (epoch 1)")]
    assert len(troubled[1].progress.history) == 0
    for lane in (0, 2):
        assert without_times(troubled[lane].progress.history) == without_times(calm[lane].progress.history)
    broken = trainings(norm=norm)
    with torch.no_grad():
        next(broken[0].model.parameters()).fill_(torch.nan)
    engine = Fused(broken)
    with pytest.raises(Diverged):
        train(engine, pause=lambda: None)


@pytest.mark.parametrize(
    ("seeds", "most", "sizes"), [(3, 8, [3]), (9, 8, [5, 4]), (10, 3, [3, 3, 2, 2]), (2, 1, [1, 1])]
)
def test_the_seeds_of_a_cell_go_to_the_fewest_processes_as_evenly_as_can_be(seeds, most, sizes):
    launcher = Cores(num_processes=1, seeds_per_process=most)
    other = plan_run(tiny_config("norm=gn"), default_threads=1)
    launcher.runs = [other, *(plan_run(tiny_config(f"seed={seed}"), default_threads=1) for seed in range(seeds))]
    alone, *groups = launcher._group(launcher.runs)
    assert (alone, [len(group) for group in groups]) == ([0], sizes)
    assert [index for group in groups for index in group] == list(range(1, seeds + 1))


def test_which_engine_auto_takes():
    config = tiny_config("norm=bn", "batch_size=4")
    assert most_lanes(config, 32 * 32, on_gpu=False) == 8
    assert most_lanes({**config, "batch_size": 8}, 32 * 32, on_gpu=False) == 4
    assert most_lanes({**config, "batch_size": 8}, 16 * 16, on_gpu=False) == 8
    assert most_lanes({**config, "batch_size": 2}, 224 * 224, on_gpu=False) == 1
    assert most_lanes({**config, "batch_size": 128}, 32 * 32, on_gpu=True) == 8
    assert most_lanes({**config, "batch_size": 128}, 96 * 96, on_gpu=True) == 1
    assert most_lanes({**config, "batch_size": 32}, 32 * 32, on_gpu=False) == 1
    assert most_lanes({**config, "batch_size": 32}, 32 * 32, on_gpu=False, asked=4) == 4
    assert most_lanes({**config, "engine": "eager"}, 32 * 32, on_gpu=False, asked=4) == 1
    assert most_lanes({**config, "clip_grad_norm": 1.0}, 32 * 32, on_gpu=False) == 1
    stranger = {**config["norm"], "_target_": "mine.Norm"}
    assert most_lanes({**config, "norm": stranger}, 32 * 32, on_gpu=False) == 1
    assert most_lanes({**config, "norm": {**config["norm"], "weight": stranger}}, 32 * 32, on_gpu=False) == 1
    (training, *_) = trainings()
    assert make_engine([training], "eager").name == "eager"
    assert make_engine([training], "auto").name == "channels_last"
    assert make_engine(trainings(), "auto").name == "3 seeds as one network, channels_last"
    available = kernels.are_available()
    half = "channels_last, norms in one pass" if available else "channels_last"
    fast = f"{half}, Winograd convolutions" if available else "channels_last"
    long = make_training("bn", epochs=1_050)  # of 96 images each
    assert make_engine([long], "auto").name == fast
    assert make_engine([make_training("in", epochs=1_050)], "auto").name == (fast if available else "eager")
    assert make_engine(trainings(norm="gn", epochs=1_050), "auto").name == f"3 seeds as one network, {fast}"
    assert make_engine([make_training("frn", epochs=1_050)], "auto").name == fast.replace("norms in one pass, ", "")
    assert make_engine([replace(make_training("bn", epochs=1_050), precision="bf16")], "auto").name == half
    assert make_engine([replace(make_training("gn"), precision="bf16")], "auto").name == "eager"
    assert make_engine([make_training("in")], "auto").name == "eager"
    assert make_engine(trainings(norm="in"), "auto").name == "3 seeds as one network"
    with pytest.raises(UserError, match="engine=cuda_graph is not legal on device=cpu"):
        make_engine([training], "cuda_graph")
    long.model = gnbench.model("resnet8", norm=gnbench.norm("bn", norm_batch_size=2), num_classes=3)
    assert make_engine([long], "auto").name == (fast if available else "eager")
    vgg = gnbench.model("vgg16", norm="gn", width=0.25, num_classes=3)
    other = Training(vgg, long.dataset, long.recipe, 0)
    assert make_engine([other], "auto").name == "channels_last", "which would gain nothing"
    short = make_training("bn")
    short.model = long.model
    assert make_engine([short], "auto").name == "eager"
    weight = training.model.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


# As runs


def plan(results: Path, *words: str) -> list[Run]:
    """Three seeds of one cell, 24 steps each."""
    return [plan_run(tiny_config(f"results={results}", f"seed={seed}", *words), 1) for seed in SEEDS]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory) -> list[Run]:
    """A group that nothing disturbed."""
    runs = plan(tmp_path_factory.mktemp("wholes"))
    assert [record["status"] for record in execute_group(runs)] == ["done"] * 3
    return runs


def elsewhere(runs: list[Run], directory: Path, **changes) -> list[Run]:
    return [replace(run, directory=directory / run.name, config={**run.config, **changes}) for run in runs]


def execute_in_process(runs: list[Run], environment: dict) -> int:
    process = CONTEXT.Process(target=_execute, args=(runs, environment))
    process.start()
    process.join()
    return process.exitcode


def _execute(runs: list[Run], environment: dict) -> None:
    os.environ.update(environment)
    execute_group(runs)


def test_each_seed_of_a_group_has_its_own_record(wholes, tmp_path):
    for run in wholes:
        record = load_record(run.directory / RECORD)
        assert record["config"]["seed"] == run.config["seed"]
        assert record["environment"]["engine"] == "3 seeds as one network, channels_last"
        assert len(record["history"]) == 2
        assert sorted(path.name for path in run.directory.iterdir()) == [".lock", "record.json", "run.log"]
        assert (run.directory / "run.log").read_text().count(" epoch ") == 2
    alone = execute(plan(tmp_path, "engine=eager")[0])
    assert alone["digest"] == wholes[0].digest, "the engine is not part of what a run is"
    grouped = load_record(wholes[0].directory / RECORD)
    assert [row["train_loss"] for row in grouped["history"]] == pytest.approx(
        [row["train_loss"] for row in alone["history"]], rel=1e-3
    )


@pytest.mark.parametrize(
    "place",
    [
        "checkpoint.pt.written:1",  # the first member's first checkpoint, before the others have any
        "checkpoint.pt.renamed:13",  # one member ahead of the two others
        "finished:1",  # one member done, the others not
        *(
            pytest.param(place, marks=pytest.mark.slow)
            for place in (
                *("step:7", "record.json.written:5", "checkpoint.pt.renamed:2", "rotated:7", "epoch:2", "finished:2"),
                "record.json.written:11",
            )
        ),
    ],
)
def test_a_killed_group_ends_like_one_never_killed(wholes, tmp_path, place):
    runs = elsewhere(wholes, tmp_path, checkpoint_s=1e-9)
    assert execute_in_process(runs, {"GNBENCH_CRASH_AT": place}) == KILLED
    execute_group(runs)
    for run, whole in zip(runs, wholes, strict=True):
        assert outcome(run) == outcome(whole)


def test_a_member_goes_on_alone_with_the_same_bits(wholes, tmp_path):
    runs = elsewhere(wholes, tmp_path, checkpoint_s=1e-9)
    assert execute_in_process(runs, {"GNBENCH_CRASH_AT": "step:9"}) == KILLED
    for run, whole in zip(reversed(runs), reversed(wholes), strict=True):
        execute(run)
        assert outcome(run) == outcome(whole)


def test_a_checkpoint_holds_its_own_lane_only(tmp_path):
    def size(engine) -> int:
        step(engine, 1)
        save_checkpoint(tmp_path, engine.members[0].state())
        return (tmp_path / "checkpoint.pt").stat().st_size

    assert size(Fused(trainings())) < 1.1 * size(Eager(trainings()[0]))


def test_a_member_that_went_on_alone_comes_back_without_loss(wholes, tmp_path):
    """Killed between two first checkpoints: one has the network's lanes, the other, gone on alone, its own."""
    runs = elsewhere(wholes, tmp_path, checkpoint_s=1e-9)
    assert execute_in_process(runs, {"GNBENCH_CRASH_AT": "checkpoint.pt.renamed:1"}) == KILLED
    assert execute_in_process(runs[1:2], {"GNBENCH_CRASH_AT": "step:9"}) == KILLED
    execute_group(runs)
    log = (runs[1].directory / "run.log").read_text()
    assert "goes on from step 8" in log
    assert [load_record(run.directory / RECORD)["status"] for run in runs] == ["done"] * 3


def test_a_diverged_member_that_cannot_write_leaves_the_others_be(wholes, tmp_path, monkeypatch):
    runs = elsewhere(wholes, tmp_path)
    drop_all = train

    def train_and_block(engine, pause, drop):
        victim = engine.members[1]
        with torch.no_grad():
            next(victim.model.parameters()).fill_(torch.nan)
        (runs[1].directory / RECORD).unlink()
        (runs[1].directory / RECORD).mkdir()
        drop_all(engine, pause, drop)

    monkeypatch.setattr(run_module, "train", train_and_block)
    kept = execute_group(runs)
    assert [record["status"] for record in kept] == ["done", "failed", "done"]
    assert outcome(runs[0]) == outcome(wholes[0])


def test_a_member_that_cannot_be_summarized_fails_alone(wholes, tmp_path, monkeypatch):
    runs = elsewhere(wholes, tmp_path)

    def fail_for_one(training):
        if training.seed == SEEDS[1]:
            raise MemoryError("of its test")
        return summarize(training)

    monkeypatch.setattr(run_module, "summarize", fail_for_one)
    kept = execute_group(runs)
    assert [record["status"] for record in kept] == ["done", "failed", "done"]
    assert kept[1]["cause"] == "out of memory: MemoryError: of its test"
    for place in (0, 2):
        assert outcome(runs[place]) == outcome(wholes[place])


def test_an_engine_that_the_device_lacks_is_refused_before_training(gnbench, tmp_path):
    words = ("-m", "data=tiny", "model=resnet8", "norm=gn", "batch_size=8", "epochs=1", "results=out", "device=cpu")
    refused = gnbench(*words, "engine=cuda_graph")
    assert refused.returncode == 2
    assert refused.stderr == "gnbench: engine=cuda_graph is not legal on device=cpu: it is auto or eager there\n"
    assert not (tmp_path / "out").exists()


def test_a_stop_while_members_are_being_summarized_keeps_the_rest(wholes, tmp_path, monkeypatch):
    runs = elsewhere(wholes, tmp_path)

    def summarize_and_stop(training):
        os.kill(os.getpid(), signal.SIGTERM)
        return summarize(training)

    monkeypatch.setattr(run_module, "summarize", summarize_and_stop)
    with pytest.raises(run_module.Interrupted):
        execute_group(runs)
    statuses = [load_record(run.directory / RECORD)["status"] for run in runs]
    assert statuses == ["done", "interrupted", "interrupted"]
    assert load_checkpoints(runs[1].directory)[0]["progress"]["step"] == 24
    monkeypatch.undo()
    execute_group(runs)
    for run, whole in zip(runs, wholes, strict=True):
        assert outcome(run) == outcome(whole)


def test_a_damaged_checkpoint_costs_that_member_its_lead_only(wholes, tmp_path):
    runs = elsewhere(wholes, tmp_path, checkpoint_s=1e-9)
    assert execute_in_process(runs, {"GNBENCH_CRASH_AT": "step:9"}) == KILLED
    for path in runs[1].directory.glob("checkpoint*"):
        path.write_bytes(path.read_bytes()[:-1])
    assert load_checkpoints(runs[0].directory)[0]["progress"]["step"] == 8
    execute_group(runs)
    for run, whole in zip(runs, wholes, strict=True):
        ours, expected = outcome(run)[0], outcome(whole)[0]
        assert ours == expected
    assert "goes on from step 8" in (runs[0].directory / "run.log").read_text()
    assert "goes on" not in (runs[1].directory / "run.log").read_text()


def test_a_member_that_cannot_write_fails_alone(wholes, tmp_path):
    runs = elsewhere(wholes, tmp_path)
    (runs[1].directory / RECORD).mkdir(parents=True)  # where its record would be
    kept = execute_group(runs)
    assert [record["status"] for record in kept] == ["done", "failed", "done"]
    assert kept[1]["cause"].startswith("UserError: cannot write ")
    for place in (0, 2):
        assert outcome(runs[place]) == outcome(wholes[place])
    with pytest.raises(UserError, match="cannot write"):
        execute(runs[1])


@pytest.mark.slow
def test_a_network_that_dies_twice_is_tried_seed_by_seed(gnbench, tmp_path):
    words = ("-m", "data=tiny", "model=resnet8", "norm=gn", "batch_size=8", "epochs=1", "seed=0,1,2,3", "results=out")
    words += ("hydra.launcher.num_processes=2",)
    died = gnbench(*words, "checkpoint_s=1e-9", env={"GNBENCH_CRASH_AT": "step:5"})
    assert died.returncode == 0, died.stderr
    assert died.stdout.count("process ended with signal SIGKILL; trying it once more") >= 2
    assert died.stdout.count("2 seeds as one network failed") == 2
    assert [record["status"] for record in records(tmp_path / "out")] == ["done"] * 4
    assert gnbench(*words, "results=whole").returncode == 0
    losses = [[row["train_loss"] for r in records(tmp_path / d) for row in r["history"]] for d in ("out", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3), "not bit for bit: what failed together goes on alone"
    assert {r["environment"]["engine"] for r in records(tmp_path / "out")} == {"channels_last"}


def test_both_engines_err_alike(tmp_path, monkeypatch):
    """Ten seeds by each: a bias that shows in so few is none of rounding. After a few steps none is without errors."""
    monkeypatch.setattr("gnbench.engine.WORTH_COMPILING", 0)

    def errors(engine: str) -> list[float]:
        words = ("norm=bn", f"engine={engine}", "epochs=1", "batch_size=4", f"results={tmp_path / engine}")
        runs = [plan_run(tiny_config(*words, "max_steps=8", f"seed={seed}"), 1) for seed in range(10)]
        kept = execute_group(runs) if engine == "auto" else [execute(run) for run in runs]
        return [record["history"][0]["train_loss"] for record in kept]

    eager, auto = errors("eager"), errors("auto")
    names = {record["environment"]["engine"] for record in records(tmp_path / "auto")}
    assert (
        all(name.endswith("norms in one pass, Winograd convolutions") for name in names) or not kernels.are_available()
    )
    assert stats.ks_2samp(eager, auto).pvalue > 0.1
    differences = [one - other for one, other in zip(eager, auto, strict=True)]
    assert len(set(eager)) == 10
    assert not any(differences) or stats.ttest_1samp(differences, 0).pvalue > 0.05


def test_a_fused_network_is_made_of_shared_memory():
    together = trainings()
    engine = Fused(together)
    fused = engine.network.conv1.weight
    assert isinstance(fused, nn.Parameter)
    with torch.no_grad():
        fused[16:32] = 7.0
    assert (together[1].model.conv1.weight == 7).all()
    assert (together[0].model.conv1.weight != 7).all()
