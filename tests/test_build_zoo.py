"""What holds for every norm of configs/norm: gradients, precision, normalization batches, statistics, state, facts."""

import ast
import copy
import math
import re

import pytest
import torch
from conftest import ROOT, tiny_config
from test_train import SHORT, assert_same, finish, make_training, weights, without_times
from torch import nn

import gnbench
import gnbench.norms
from gnbench.analysis.figures import NORM_STYLES, SPARE_COLORS, style_norm
from gnbench.analysis.table import NORM_LABELS
from gnbench.checkpoint import load_checkpoints, save_checkpoint
from gnbench.configs import choices, describe_norm, load_group, partial
from gnbench.engine import Eager
from gnbench.errors import UserError
from gnbench.models import brings_activation
from gnbench.plan import plan_run
from gnbench.precise_bn import batch_statistics, layers_with_statistics, update_precise_statistics
from gnbench.recipe import Recipe
from gnbench.run import check_runs
from gnbench.train import Training, train
from gnbench.trial import depends_on_batch

ZOO = [name for name in choices("norm") if name != "custom"]
NODES = {name: load_group("norm", name, {}, {"norm_batch_size": 2}) for name in ZOO}
for node in NODES.values():
    node.update({"num_groups": 4} if "num_groups" in node else {})  # two of a layer's 8 channels a group
NODES["mabn"].update(simulated_batch_size=4, warmup_steps=1, renorm_steps=4)  # all its phases within six steps
OF_THE_BATCH = [name for name in ZOO if "norm_batch_size" in NODES[name]]
SPLITTING = [name for name in OF_THE_BATCH if NODES[name]["norm_batch_size"]]  # which leaves out what is synchronized
DIGESTS = {  # of runs that exist since before the zoo
    "bn": "c68858d7437d",
    "brn": "3ee6217e433d",
    "gn": "923523e88ac3",
    "in": "327c663266b4",
    "ln": "bb9f72d60f1f",
    "none": "237f554715b4",
}


def make_layer(name: str, num_channels: int = 8, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A layer with parameters that are neither 0 nor 1."""
    layer = partial(NODES[name])(num_channels).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return layer


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 + 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ZOO)
def test_gradients_are_those_of_the_formula(name, training):
    layer = make_layer(name).train(training)
    if name == "bcn_ws":
        layer.batch.momentum = 0.0  # its estimates are constants of the backward pass
    if name == "brn":
        layer.momentum = 0.0  # its corrections are constants of the backward pass ...
        layer.r_max, layer.d_max = 1.0, 0.0  # ... so they are held at what they are
    if name == "mabn":
        layer.warmup_steps = layer.renorm_steps = 10**9  # later its backward pass is not a gradient, by design
    names = list(dict(layer.named_parameters()))

    def apply(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = randn(4, 8, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(apply, (x, *layer.parameters()))


@pytest.mark.parametrize("name", ZOO)
def test_half_precision_under_autocast_is_float32s_to_its_digits(name):
    conv = nn.Conv2d(3, 8, 3)
    layer = make_layer(name, dtype=torch.float32)
    x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        layer.train(training)
        exact = copy.deepcopy(layer)(conv(x))
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(conv(x))
        y.sum().backward()
        assert torch.isfinite(y).all()
        torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
        assert {buffer.dtype for buffer in layer.buffers()} <= {torch.float32, torch.int64}


def test_batch_renorm_takes_its_statistics_in_float32():
    layer = gnbench.norm("brn")(8)
    x = 10 + torch.randn(4, 8, 10, 10, generator=torch.Generator().manual_seed(0))
    half = x.bfloat16()
    weight, bias = layer._affine(half, 1)
    exact = layer._affine(half.float(), 1)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, exact[0])
    assert torch.equal(bias, exact[1])


@pytest.mark.parametrize("name", ZOO)
def test_in_evaluation_an_image_is_alone_and_nothing_is_kept(name):
    layer = make_layer(name)
    for step in range(3):
        layer(randn(4, 8, 3, 3, seed=step))
    before = copy.deepcopy(layer.eval().state_dict())
    x = randn(4, 8, 3, 3, seed=9)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))
    assert_same(layer.state_dict(), before)


@pytest.mark.parametrize("name", ZOO)
def test_exactly_the_norms_of_the_batch_take_a_normalization_batch_size(name):
    assert depends_on_batch(partial(NODES[name])) == (name in OF_THE_BATCH)


def test_a_random_layer_is_not_taken_for_one_of_the_batch_nor_one_in_which_only_the_activation_is_missing():
    assert not depends_on_batch(lambda num_channels: nn.Dropout())
    assert depends_on_batch(lambda num_channels, apply_act: nn.BatchNorm2d(num_channels, track_running_stats=False))


@pytest.mark.parametrize("name", SPLITTING)
def test_a_split_batch_is_that_of_its_workers_and_what_is_kept_their_average(name):
    layer = make_layer(name)
    for step in range(4):
        x = randn(6, 8, 3, 3, seed=step)
        workers = [copy.deepcopy(layer) for _ in range(3)]
        y = layer(x)
        for w, worker in enumerate(workers):
            torch.testing.assert_close(y[w::3], worker(x[w::3]))
        for key, buffer in layer.named_buffers():
            average = torch.stack([worker.get_buffer(key).double() for worker in workers]).mean(0)
            torch.testing.assert_close(buffer.double(), average, msg=key)


@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_precise_statistics_of_one_batch_evaluate_as_that_batch_trains(name):
    layer, x = make_layer(name), randn(6, 8, 3, 3)
    for step in range(6):
        layer(randn(6, 8, 3, 3, seed=1 + step))
    layer.eval()
    assert layers_with_statistics(layer)
    for part in layer.modules():
        if hasattr(part, "norm_batch_size"):
            part.norm_batch_size = None
    with batch_statistics(layer):
        expected = layer(x)
    assert not torch.allclose(layer(x), expected)
    update_precise_statistics(layer, [x[:3], x[3:]] if name not in ("bcn", "bcn_ws") else [x])
    torch.testing.assert_close(layer(x), expected)


def make_zoo_training(name: str, seed: int = 0, **recipe: object) -> Training:
    """The tiny training of tests/test_train.py with a norm of NODES."""
    model = gnbench.model("resnet8", norm=partial(NODES[name]), num_classes=3, seed=seed)
    return Training(model, make_training("none").dataset, Recipe(**{**SHORT, **recipe}), seed)


@pytest.mark.parametrize("name", ZOO)
def test_every_norm_trains_on_a_residual_network_and_resumes_bit_for_bit(tmp_path, name):
    recipe = {"epochs": 1, "max_steps": 6}
    whole = finish(make_zoo_training(name, **recipe))
    assert math.isfinite(whole.progress.history[-1]["train_loss"])
    assert math.isfinite(whole.progress.history[-1]["test_loss"])
    first = make_zoo_training(name, **recipe)

    class Cut(Exception):
        pass

    def pause() -> None:
        if first.progress.step == 4:
            save_checkpoint(tmp_path, first.state())
            raise Cut

    with pytest.raises(Cut):
        train(Eager(first), pause)
    second = make_zoo_training(name, **recipe)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.zero_()
    second.restore(load_checkpoints(tmp_path)[0])
    finish(second)
    assert_same(weights(second), weights(whole))
    assert without_times(second.progress.history) == without_times(whole.progress.history)


@pytest.mark.parametrize("name", [name for name in ZOO if name != "none"])
def test_every_norm_learns_on_a_residual_network(name):
    norm = gnbench.norm(name, **({"norm_batch_size": 4} if name in SPLITTING else {}))
    model = gnbench.model("resnet8", norm=norm, num_classes=3)
    recipe = Recipe(**{**SHORT, "epochs": 4, "base_lr": 0.05})
    training = finish(Training(model, make_training("none").dataset, recipe, seed=0))
    assert training.progress.history[-1]["train_loss"] < 0.75 * math.log(3)


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "resnet50"])
@pytest.mark.parametrize("norm", ["frn", "evonorm_b0", "evonorm_s0", "mabn", "gn_ws", "skipinit"])
def test_every_kind_of_norm_is_built_into_every_model(name, norm):
    params = {"width": 0.125} if name == "vgg16" else {}
    with torch.no_grad():
        assert gnbench.model(name, norm=norm, num_classes=7, **params)(torch.ones(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", ZOO)
def test_a_models_norms_bring_their_activations_or_not(name):
    norm = partial(NODES[name])
    model = gnbench.model("resnet8", norm=norm)
    assert isinstance(model.act1, nn.Identity if brings_activation(norm) else nn.ReLU)
    assert isinstance(model.blocks[0].act1, nn.Identity if brings_activation(norm) else nn.ReLU)
    assert brings_activation(norm) == (name in ("frn", "evonorm_b0", "evonorm_s0"))


@pytest.mark.parametrize(("name", "digest"), DIGESTS.items())
def test_the_identity_of_a_run_from_before_the_zoo_is_what_it_was(name, digest):
    assert plan_run(tiny_config(f"norm={name}", "model.zero_init_residual=true", "results=x"), 1).digest[:12] == digest


def test_synchronized_bn_is_one_run_for_every_normalization_batch_size():
    whole, two, frozen = (
        plan_run(tiny_config("norm=syncbn", "results=x", word), 1)
        for word in ("norm_batch_size=8", "norm_batch_size=2", "frozen_epochs=1")
    )
    assert whole == two != frozen
    assert whole.config["norm_batch_size"] is None, "it stands in figures where the others of its batch size do"
    assert frozen.config["frozen_epochs"] == 1
    sync, plain = gnbench.norm("syncbn")(8), gnbench.norm("bn")(8)
    x = randn(6, 8, 3, 3).float()
    assert torch.equal(sync(x), plain(x))
    with pytest.raises(UserError, match="norm_batch_size=8 is not for it: its statistics are the whole batch's"):
        check_runs([plan_run(tiny_config("norm=syncbn", "norm.norm_batch_size=8"), 1)])


@pytest.mark.parametrize("name", ZOO)
def test_a_norms_file_says_what_it_is_and_says_it_rightly(name):
    facts = describe_norm(name)
    batch, weights = (word in facts["depends_on"].split(", ") for word in ("batch", "weights"))
    assert batch == (name in OF_THE_BATCH)
    assert weights == ("weight" in NODES[name])
    assert facts["source"].startswith("arXiv:") or name == "none"
    for num_channels in (8, 16):
        factor, constant = re.fullmatch(r"(\d*)C(?: \+ (\d+))?|0", facts["parameters"]).groups()
        expected = 0 if factor is None else int(factor or 1) * num_channels + int(constant or 0)
        assert sum(parameter.numel() for parameter in partial(NODES[name])(num_channels).parameters()) == expected


def test_every_norm_has_a_label_and_a_style_of_its_own_and_a_strangers_is_free():
    assert set(NORM_LABELS) == set(ZOO)
    assert len(set(NORM_LABELS.values())) == len(ZOO)
    assert set(NORM_STYLES) == set(ZOO)
    assert len({style.color for style in NORM_STYLES.values()}) == len(ZOO)
    assert len({(style.marker, style.linestyle) for style in NORM_STYLES.values()}) == len(ZOO)
    assert not {style.color for style in NORM_STYLES.values()} & set(SPARE_COLORS)
    assert style_norm("MyNorm") == style_norm("MyNorm") != style_norm("OtherNorm")


def test_the_page_about_norms_has_a_row_for_each_as_its_file_says():
    page = (ROOT / "docs" / "norms.md").read_text()
    rows = ["| norm | what it is | an output depends on | parameters | source |", "|---|---|---|---|---|"]
    for name in NORM_LABELS:
        facts = describe_norm(name)
        source = facts["source"].removeprefix("arXiv:")
        link = f"[{source}](https://arxiv.org/abs/{source})" if source else "–"
        rows.append(f"| `{name}` | {facts['description']} | {facts['depends_on']} | {facts['parameters']} | {link} |")
    table = page.partition("<!-- zoo -->\n")[2].partition("<!-- /zoo -->")[0]
    assert table == "\n".join(rows) + "\n", "docs/norms.md, between its two comments, is to be:\n" + "\n".join(rows)


def test_neither_models_nor_trainer_know_a_norm_by_name():
    known = {*choices("norm"), *gnbench.norms.__all__}
    trainer = [ROOT / "gnbench" / f"{name}.py" for name in ("train", "run", "evaluate", "engine/eager")]
    for path in [*(ROOT / "gnbench/models").glob("*.py"), *trainer]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            said = {getattr(node, field, None) for field in ("id", "attr", "name")}
            said |= {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()
            assert not said & known, f"{path.name}, line {node.lineno}"
