"""The YAML files of configs/, for the command line and for notebooks alike, and the objects that they name."""

import difflib
import functools
import hashlib
import importlib.util
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gnbench.errors import UserError, explain, first_line, is_status, name_exit, require

_PACKAGE = Path(__file__).parent
# An installed package carries the files inside; a clone has them beside it, where people edit them.
CONFIGS = _PACKAGE / "config_files" if (_PACKAGE / "config_files").is_dir() else _PACKAGE.parent / "configs"

RESERVED = ("name", "_target_", "weight", "source")  # keys of a node that are not arguments of its target
TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
RELEASED = ("gnbench", "torch", "torchvision", "timm")  # packages that a version names, not their source

OmegaConf.register_new_resolver(
    "unless", lambda given, default: default if given is None else None, replace=True
)  # ${unless:${.a},8}: 8, unless `a` is given
OmegaConf.register_new_resolver("last_part", lambda path: path.rpartition(".")[2].rpartition(":")[2], replace=True)
OmegaConf.register_new_resolver("times", lambda a, b: a * b, replace=True)


def choices(group: str) -> list[str]:
    """The legal names of a group (`norm`, `model`, `data`, `sweep`): its files."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def describe_norm(name: str) -> dict[str, str]:
    """What the first two lines of configs/norm/<name>.yaml say of a norm.

    `description`; `source`, an arXiv id or nothing; `depends_on`, what an output depends on besides its own input;
    `parameters`, how many a layer of C channels has.

    Raises:
        UserError: the second line does not say it.
    """
    path = CONFIGS / "norm" / f"{name}.yaml"
    title, facts = [*path.read_text(encoding="utf-8").splitlines(), "", ""][:2]
    source = re.search(r", (arXiv:[\w.]+)", title)
    told = re.fullmatch(r"# depends on: (.*); parameters: (.*)", facts)
    if told is None:
        raise UserError(f"{path} lacks its second line, '# depends on: ...; parameters: ...'")
    depends_on, parameters = told.groups()
    return {
        "description": title.removeprefix("# ").replace(source[0] if source else "", "", 1),
        "source": source[1] if source else "",
        "depends_on": depends_on,
        "parameters": parameters,
    }


def load_group(group: str, name: str, params: dict, context: dict) -> dict:
    """The resolved content of configs/<group>/<name>.yaml with `params` in place of its own values.

    Args:
        context: values for what the file takes from the whole config, such as ${norm_batch_size}.

    Raises:
        UserError: no such file, or a parameter that it does not have.
    """
    if name not in choices(group):
        raise UserError(f"{group}={name} is not known: it is one of {', '.join(choices(group))}")
    node = OmegaConf.load(CONFIGS / group / f"{name}.yaml")
    unknown = sorted(set(params) - set(node))
    if unknown:
        legal = ", ".join(arguments(node))
        raise UserError(f"{group}.{unknown[0]} is not known: {group}={name} takes {legal or 'no parameters'}")
    try:
        config = OmegaConf.create({**context, group: OmegaConf.merge(node, params)})
        return OmegaConf.to_container(config, resolve=True)[group]
    except OmegaConfBaseException as error:
        raise UserError(f"{group}={name}: {first_line(error)}") from error


def partial(node: dict, **more: object) -> Callable:
    """The object that `_target_` names by its import path, with the node's other keys, but RESERVED, as arguments.

    Where the node has a node `weight`, of a norm that acts on the weights too, the result's attribute `conv_weight`
    is the object which that one names.

    Raises:
        UserError: there is nothing at the import path, or nothing that can be called, or an argument of gnbench's own
            objects is of another type.
    """
    target = _resolve(node)
    if node["_target_"].startswith("gnbench."):
        _check_types(node, target)
    function = functools.partial(target, **arguments(node), **more)
    weight = node.get("weight")
    if weight is not None:
        if not isinstance(weight, dict) or "_target_" not in weight:
            raise UserError(f"weight={weight} of {node['name']} is not legal: it holds a _target_ and its arguments")
        function.conv_weight = partial({**weight, "name": f"{node['name']}'s weight"})
    return function


def arguments(node: dict) -> dict:
    """The keys of a node that are arguments of its target."""
    return {key: value for key, value in node.items() if key not in RESERVED}


def _check_types(node: dict, target: Callable) -> None:
    """Hold the arguments of a node to the annotations of its target, where those are of TYPES: `no` is no false."""
    given = arguments(node)
    for key, parameter in inspect.signature(target).parameters.items():
        types = typing.get_args(parameter.annotation) or (parameter.annotation,)
        if key in given and all(each in TYPES for each in types):
            found = type(given[key])
            legal = found in types or (found is int and float in types)
            words = ", or ".join(TYPES[each] for each in types)
            require(legal, f"{key} of {node['name']}: {key}", given[key], f"it is {words}")


def check_source(node: dict) -> None:
    """Hold a planned norm to the source whose hash it has.

    Raises:
        UserError: the source has changed since.
    """
    for part in (node, node.get("weight")):
        if isinstance(part, dict) and "source" in part and hash_source(part["_target_"]) != part["source"]:
            raise UserError(f"the source of {part['_target_']} has changed since the run was planned: start again")


def add_source(node: dict) -> dict:
    """A node, and its node `weight`, with the hash of the source that `_target_` names, where that is a stranger's.

    Raises:
        UserError: it has a key `source` of its own.
    """
    if "source" in node:
        raise UserError(f"source of {node.get('name', 'weight')} is not legal: it is written by gnbench")
    weight = node.get("weight")
    node = {**node, "weight": add_source(weight)} if isinstance(weight, dict) else node
    source = hash_source(node.get("_target_", ""))
    return {**node, "source": source} if source else node


def hash_source(target: str) -> str | None:
    """12 hex digits of the SHA-256 of the file in which an import path ends; nothing is imported.

    A module is its file; a package, which may hand out what stands in any of its modules, all *.py files below it.
    None for RELEASED packages and where there is no file.
    """
    first, *parts = target.replace(":", ".").split(".")
    if first in RELEASED:
        return None
    try:
        spec = importlib.util.find_spec(first)
    except ValueError:  # an empty name, or a module that is its own script
        return None
    for end in range(1, len(parts) + 1):
        if spec is None or spec.submodule_search_locations is None:
            break
        name = ".".join([first, *parts[:end]])
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations)) or spec
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    is_package = spec.submodule_search_locations is not None
    paths = sorted(Path(spec.origin).parent.rglob("*.py")) if is_package else [Path(spec.origin)]
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()[:12]


def _resolve(node: dict) -> Callable:
    name = f"_target_={node['_target_']} of {node['name']}"
    try:
        target = pkgutil.resolve_name(node["_target_"])
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{name} cannot be imported: {first_line(error)}{_hint(error, node['_target_'])}") from error
    except Exception as error:  # a stranger's module may raise anything while it is imported
        raise UserError(f"{name} cannot be imported: {explain(error)}") from error
    except SystemExit as error:
        if is_status(error):
            raise
        raise UserError(f"{name} cannot be imported: it calls {name_exit(error)}") from error
    if not callable(target):
        raise UserError(f"{name} is neither a class nor a function: it is a {type(target).__name__}")
    return target


def _hint(error: Exception, target: str) -> str:
    """Where an import path was looked for, or the name that is most like the one that is not there."""
    if isinstance(error, ModuleNotFoundError) and error.name == target.replace(":", ".").partition(".")[0]:
        return "; the current directory and Python's path were searched"
    name, there = getattr(error, "name", None), getattr(error, "obj", None)
    near = difflib.get_close_matches(name, dir(there), n=1) if isinstance(error, AttributeError) and name else None
    return f"; did you mean {near[0]}?" if near else ""
