"""Every config file composes, is read in full, and means what it says."""

import ast
import inspect
import re
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, compose_config, tiny_config
from omegaconf import OmegaConf

from gnbench import configs
from gnbench.configs import CONFIGS, choices, load_group, partial
from gnbench.errors import UserError
from gnbench.plan import SPLIT_KEYS, plan_run
from gnbench.recipe import Recipe
from gnbench.schema import Config

CONTEXT = {"norm_batch_size": 4}


def test_configs_are_those_of_the_repository():
    assert CONFIGS == ROOT / "configs"


@pytest.mark.parametrize("name", [name for name in choices("norm") if name != "custom"])  # which the user completes
def test_every_norm_is_built_by_its_file_and_keeps_the_shape(name):
    node = load_group("norm", name, {}, CONTEXT)
    assert node["name"] == name
    norm = partial(node)(16)
    assert norm(torch.randn(4, 16, 3, 3)).shape == (4, 16, 3, 3)


@pytest.mark.parametrize("group", ["norm", "model", "data"])
def test_every_key_of_a_file_is_a_parameter_of_its_target(group):
    for name in choices(group):
        if name == "custom":  # which the user completes
            continue
        node = OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{name}.yaml"), resolve=False)
        for own in (node, node.pop("weight", None)):
            if own:
                target = partial({"name": name, "_target_": own["_target_"]}).func
                more = SPLIT_KEYS if group == "data" else ()
                known = {"_target_", "name", *inspect.signature(target).parameters, *more}
                assert set(own) <= known, f"{group}/{name}.yaml"


@pytest.mark.parametrize("name", choices("model"))
def test_every_model_composes_under_its_own_name(name):
    assert tiny_config(f"model={name}")["model"]["name"] == name


@pytest.mark.parametrize("name", choices("sweep"))
def test_every_sweep_is_legal_along_every_axis(name):
    sweep = OmegaConf.load(CONFIGS / "sweep" / f"{name}.yaml")
    assert sweep.hydra.mode == "MULTIRUN"
    axes = {key: str(values).split(",") for key, values in sweep.hydra.sweeper.params.items()}
    assert any(len(values) > 1 for values in axes.values())
    for key, values in axes.items():
        for value in values:
            cell = {**{other: first for other, (first, *_) in axes.items()}, key: value}
            words = (f"{k}={v}" for k, v in cell.items())
            tiny = ("drop_last=false", "data.val_size=0", "tuned_from=null")  # it has fewer images than a batch
            config = compose_config(f"sweep={name}", *tiny, *words)
            assert config["results"] == f"results/{name}"
            plan_run(config, default_threads=1)


def test_the_main_file_has_the_keys_of_the_schema():
    assert set(tiny_config()) == {field.name for field in fields(Config)}


def test_every_key_of_the_recipe_is_read_and_not_only_checked():
    trees = parse_sources()
    recipe = next(node for tree in trees for node in tree.body if getattr(node, "name", "") == "Recipe")
    methods = [part for part in recipe.body if getattr(part, "name", "__post_init__") != "__post_init__"]
    read = {name for part in methods for name in find_attributes(part, "self")}
    read |= {name for tree in trees for name in find_attributes(tree, "recipe")}
    keys = {field.name for field in fields(Recipe)}
    assert {*keys, "made_up"} - read == {"made_up"}


def test_every_other_key_of_a_config_is_read():
    read = {name for tree in parse_sources() for name in find_items(tree)}
    keys = {field.name for field in fields(Config)} - {field.name for field in fields(Recipe)}
    assert {*keys, "made_up"} - read == {"made_up"}


def parse_sources() -> list[ast.Module]:
    """The modules that train; those of gnbench/analysis read records, which have whatever was asked for."""
    paths = [path for path in (ROOT / "gnbench").rglob("*.py") if path.parent.name != "analysis"]
    return [ast.parse(path.read_text(encoding="utf-8")) for path in paths]


def find_attributes(tree: ast.AST, owner: str) -> set[str]:
    """`name` of every owner.name and whatever.owner.name."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if owner in (getattr(node.value, key, "") for key in ("id", "attr"))}


def find_items(tree: ast.AST) -> set[str]:
    """`name` of every whatever["name"] and whatever.get("name")."""
    nodes = list(ast.walk(tree))
    calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get"]
    items = [node.slice for node in nodes if isinstance(node, ast.Subscript)] + [
        arg for node in calls for arg in node.args
    ]
    return {item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)}


def test_a_norm_without_its_line_of_facts_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "CONFIGS", tmp_path)
    path = tmp_path / "norm" / "mine.yaml"
    path.parent.mkdir()
    for text in ("", "# Mine\n", "# Mine\n_target_: mine.Norm\n"):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"{re.escape(str(path))} lacks its second line, '# depends on: "):
            configs.describe_norm("mine")


def test_group_norms_groups_give_way_to_channels_per_group():
    assert tiny_config("norm=gn")["norm"]["num_groups"] == 8
    assert tiny_config("norm=gn", "norm.channels_per_group=2")["norm"]["num_groups"] is None
