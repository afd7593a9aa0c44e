"""The `gnbench` command line of a run, composed from its record."""

import functools
import json
import re
import shlex
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gnbench.configs import CONFIGS, choices
from gnbench.errors import UserError, first_line
from gnbench.plan import work_out
from gnbench.record import NOT_IDENTITY, digest, leaves
from gnbench.schema import Config

GROUPS = ("norm", "model", "data")  # keys of a config that are files of configs/
PLAIN = re.compile(r"[A-Za-z_./][\w./-]*", re.ASCII)  # text that Hydra reads as text without quotes
NOT_TEXT = ("null", "true", "false", "inf", "nan")
NOT_TYPED = ("tuning", "norm.source", "norm.weight.source", "results")  # what a run worked out; where it stood
NEVER = 1000  # changes of a file that is not to be chosen


def command_line(directory: Path | str, record: dict) -> str:
    """The `gnbench key=value ...` that trains the run of a record again, into `directory`.

    What is typed is what differs from the files of configs/ as they are now. The result is proven here: the config that
    the words compose to has the record's digest. (The images are taken to be those of the record.)

    Raises:
        UserError: no words compose to that digest, as after a change of gnbench or of the tuning behind `tuned_from`.
    """
    try:
        words, config = _compose_words(record["config"])
    except (OmegaConfBaseException, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"this version of gnbench has no such config ({first_line(error)})") from error
    if digest(config, str(record.get("data_fingerprint"))) != record.get("digest"):
        asked, given = (dict(leaves(node)) for node in (record["config"], config))
        keys = [key for key in {**asked, **given} if not _is_free(key) and asked.get(key) != given.get(key)]
        if not keys:
            raise UserError("its digest is not that of its config and images")
        raise UserError(f"this version of gnbench composes another run from its config, with another {', '.join(keys)}")
    return shlex.join(["gnbench", *words, f"results={format_value(str(directory))}"])


def _compose_words(asked: dict) -> tuple[list[str], dict]:
    """The words of the command line for a record's config, and the config that they compose to."""
    files = {group: _choose_file(group, asked[group]) for group in GROUPS}
    cfg = _compose(files)
    raw = dict(leaves(OmegaConf.to_container(cfg, resolve=False)))
    wanted = {key: value for key, value in leaves(asked) if _is_typed(key, value, asked)}
    words = [f"{group}={name}" for group, name in files.items()]
    # what refers to other keys comes after them, and then mostly needs no word of its own
    for key in sorted(wanted, key=lambda key: ("${" in str(raw.get(key)), key.count("."))):
        value = wanted[key]
        is_given = _is_same(_select(cfg, key), value) if key in raw else value is None and "." not in key
        if not is_given:
            words.append(f"{'' if key in raw else '+'}{key}={format_value(value)}")
            OmegaConf.update(cfg, key, value, force_add="." in key)  # no run has more keys than Config
    for key in raw:
        if key not in wanted and raw[key] is not None and key.split(".")[0] in GROUPS:
            words.append(f"~{key}")
            node, _, leaf = key.rpartition(".")
            OmegaConf.select(cfg, node).pop(leaf)
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return words, work_out(config)


def _compose(files: dict[str, str]) -> DictConfig:
    """What Hydra composes of configs/config.yaml with these files of its groups."""
    main = OmegaConf.load(CONFIGS / "config.yaml")
    own = {key: value for key, value in main.items() if key not in ("defaults", "hydra")}
    groups = {group: OmegaConf.load(CONFIGS / group / f"{name}.yaml") for group, name in files.items()}
    return OmegaConf.merge(OmegaConf.structured(Config), groups, own)


def _choose_file(group: str, node: dict) -> str:
    """The file of a group from which the fewest keys have to be changed.

    Any would do, but that Hydra cannot take away a key without a value, which a target might not know.
    """
    asked = dict(leaves(node))

    def count_changes(name: str) -> int:
        raw = _read_leaves(group, name)
        found = {key: asked.get(key) if key in asked and "${" in str(value) else value for key, value in raw.items()}
        changes = sum(found.get(key) != asked.get(key) for key in {**asked, **found})
        stuck = [key for key in found if key not in asked and found[key] is None]
        return changes + NEVER * bool(stuck and found["_target_"] != asked["_target_"])

    return min(choices(group), key=count_changes)


@functools.cache  # every run asks for every file
def _read_leaves(group: str, name: str) -> dict:
    return dict(leaves(OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{name}.yaml"), resolve=False)))


def _is_typed(key: str, value: object, asked: dict) -> bool:
    """Whether a key of a record's config is one that a user sets, and not one that the run worked out."""
    if key == "base_lr" and asked.get("tuned_from") is not None:
        return False
    derived = key in NOT_TYPED or key.split(".")[0] in NOT_TYPED
    return not derived and not (key == "norm_batch_size" and value is None)


def _is_free(key: str) -> bool:
    """Whether a key of a config may differ between two starts of one run."""
    return key.split(".")[0] in (*NOT_IDENTITY, "norm_batch_size")


def _select(cfg: DictConfig, key: str) -> object:
    value = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _is_same(a: object, b: object) -> bool:
    """Whether two values are one in a digest: 1, 1.0 and true are three."""
    return json.dumps(a) == json.dumps(b)


def format_value(value: object) -> str:
    """A value in the grammar of Hydra's command line."""
    if isinstance(value, list):
        return f"[{','.join(map(format_value, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{format_value(inner)}' for key, inner in value.items())}}}"
    if not isinstance(value, str):
        return json.dumps(value)
    if PLAIN.fullmatch(value) and value.lower() not in NOT_TEXT:
        return value
    quoted = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), value)
    return f"'{quoted}'"
