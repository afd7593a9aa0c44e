"""From a resolved config to a run that may be trained: checked, named and placed, before the first step of any."""

import functools
import inspect
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

from gnbench.configs import add_source, partial
from gnbench.datasets import Images
from gnbench.datasets.split import AUGMENTATIONS, split_sizes
from gnbench.errors import UserError, require
from gnbench.recipe import Recipe
from gnbench.record import FINISHED, RECORD, digest, load_record, run_name
from gnbench.tuning import check_tuned_images, choose_base_lr

PRECISIONS = ("float32", "tf32", "bf16")
ENGINES = ("auto", "eager", "cuda_graph")
MEASURES = ("error", "cost")
MEMORY_FORMATS = ("auto", "channels_last", "contiguous")
COST_KEYS = {"memory_format": "auto", "cost_rounds": 15, "cost_round_s": 0.05, "cost_warm_up": 3}  # what null becomes
LEAST_DIAGNOSED = 8  # images: two normalization batch sizes, with a variance over mini-batches of each
SPLIT_KEYS = ("train_size", "val_size", "split_seed", "augment")  # of `data`; its other keys belong to the source


@dataclass(frozen=True)
class Run:
    """A training, or a measurement of cost, that is legal as far as can be told without torch."""

    config: dict  # resolved, plain values, as its record keeps it
    digest: str
    data_fingerprint: str  # of the images' content, which the data's name does not tell
    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def cell(self) -> str:
        """What it has in common with the runs that differ from it by their seeds alone."""
        return repr({key: value for key, value in self.config.items() if key != "seed"})

    @property
    def effort(self) -> float:
        """Its work relative to other runs: a step takes about as long as 2 images more than it has."""
        if self.measures_cost:
            return 1.0  # it lasts as long as it is told to
        return self.config["epochs"] * (1 + 2 / self.config["batch_size"])

    @property
    def measures_cost(self) -> bool:
        """Whether it is a measurement, and nothing is trained."""
        return self.config.get("measure") == "cost"

    def is_finished(self) -> bool:
        """Whether its record says done or diverged. A record that cannot be read does not count."""
        try:
            record = load_record(self.directory / RECORD)
        except UserError:
            return False
        return record.get("status") in FINISHED and record.get("digest") == self.digest


def plan_run(config: dict, default_threads: int) -> Run:
    """Check a resolved config and give it its identity and place.

    Args:
        default_threads: what num_threads=auto becomes.

    Raises:
        UserError: a value is not legal; the sentence names the key, the value and what is legal.
    """
    config = {**work_out(config), "num_threads": _num_threads(config["num_threads"], default_threads)}
    _check_values(config)
    _settle_measure(config)
    _settle_diagnostics(config)
    if not config.get("deterministic"):  # a run without the key and one with null are the same, and of one cell
        config.pop("deterministic", None)
    _require_finite(config)
    recipe = make_recipe(config)
    _settle_norm_batch_size(config)
    images = unverified_images(json.dumps(config["data"]))
    if config["tuned_from"] is not None:
        check_tuned_images(config, images.fingerprint)
    num_train, _ = split_sizes(images, config["data"]["train_size"], config["data"]["val_size"])
    recipe.total_steps(num_train)  # there is at least one batch
    identity = digest(config, images.fingerprint)
    return Run(config, identity, images.fingerprint, Path(config["results"]) / run_name(config, identity))


def work_out(config: dict) -> dict:
    """A resolved config with what no user types: the hash of a stranger's norm, and the base_lr that was tuned.

    Raises:
        UserError: the norm has a key `source`, or `tuned_from` has no base_lr for its cell.
    """
    config = {**config, "norm": add_source(config["norm"])}
    if config["tuned_from"] is not None:
        config["base_lr"], config["tuning"] = choose_base_lr(config)
    return config


def make_recipe(config: dict) -> Recipe:
    """The recipe among a config's keys.

    Raises:
        UserError: a value is out of its range.
    """
    return Recipe(**{field.name: config[field.name] for field in fields(Recipe)})


def load_images(node: dict, verify: bool = True) -> Images:
    """The images of a `data` node.

    Args:
        verify: whether every pixel is compared with its checksum; the fingerprint alone does not need it.
    """
    load = partial({key: value for key, value in node.items() if key not in SPLIT_KEYS})
    for key in load.keywords.keys() - inspect.signature(load.func).parameters.keys():
        raise UserError(f"data.{key} is not a key of data={node['name']}")
    return load(name=node["name"], verify=verify)


@functools.cache  # a sweep plans hundreds of runs on one data set
def unverified_images(node_json: str) -> Images:
    """The images of a `data` node, as JSON, whose fingerprint and sizes are wanted rather than their pixels."""
    return load_images(json.loads(node_json), verify=False)


def _num_threads(asked: int | str, default: int) -> int:
    if asked == "auto":
        return default
    legal = isinstance(asked, int) and asked >= 1
    require(legal, "num_threads", asked, "it is auto, or a number of 1 or more")
    return asked


def _check_values(config: dict) -> None:
    for key, known in (("precision", PRECISIONS), ("engine", ENGINES)):
        require(config[key] in known, key, config[key], f"it is one of {', '.join(known)}")
    if not config["results"].strip():
        raise UserError("results is empty: it names the directory that runs go to")
    data = config["data"]
    require(type(data["val_size"]) is int, "data.val_size", data["val_size"], "it is a whole number")
    legal = data["train_size"] is None or type(data["train_size"]) is int
    require(legal, "data.train_size", data["train_size"], "it is a whole number, or null for all images")
    require(type(data["split_seed"]) is int, "data.split_seed", data["split_seed"], "it is a whole number")
    augment = data["augment"]
    require(augment in AUGMENTATIONS, "data.augment", augment, f"it is one of {', '.join(AUGMENTATIONS)}")
    for key, seed in (("seed", config["seed"]), ("data.split_seed", data["split_seed"])):
        require(0 <= seed < 2**63, key, seed, "it is 0 or more, and below 2**63")
    checkpoint_s = config["checkpoint_s"]
    require(checkpoint_s > 0, "checkpoint_s", checkpoint_s, "it is a number of seconds above 0")


def _settle_measure(config: dict) -> None:
    """Give a measurement of cost the values of its keys; a training, and so its record, has none of them."""
    measure = config.pop("measure", None) or "error"
    given = {key: config.pop(key, None) for key in COST_KEYS}
    require(measure in MEASURES, "measure", measure, f"it is one of {', '.join(MEASURES)}")
    if measure == "error":
        for key, value in given.items():
            if value is not None:
                raise UserError(f"{key}={value} is not legal for a training: it belongs to measure=cost")
        return
    config["measure"] = measure
    config.update({key: default if given[key] is None else given[key] for key, default in COST_KEYS.items()})
    for key in ("tensorboard", "diagnostics"):
        if config.get(key):
            raise UserError(f"{key}={config[key]} is not legal with measure=cost, which trains nothing")
    if config["engine"] != "auto":
        raise UserError(f"engine={config['engine']} is not legal with measure=cost: memory_format says how a step goes")
    asked = config["memory_format"]
    require(asked in MEMORY_FORMATS, "memory_format", asked, f"it is one of {', '.join(MEMORY_FORMATS)}")
    for key, least in (("cost_rounds", 1), ("cost_round_s", 0), ("cost_warm_up", 1)):
        require(config[key] >= least, key, config[key], f"it is {least} or more")


def _settle_diagnostics(config: dict) -> None:
    """Check the number of images; a record without the key and one with null are the same run."""
    num_images = config.get("diagnostics")
    legal = f"it is a number of images of {LEAST_DIAGNOSED} or more, or null"
    require(num_images is None or num_images >= LEAST_DIAGNOSED, "diagnostics", num_images, legal)
    if num_images is None:
        config.pop("diagnostics", None)


def _require_finite(config: dict, prefix: str = "") -> None:
    """JSON, and so a record, has no number that is not finite."""
    for key, value in config.items():
        if isinstance(value, dict | list):
            inner = value if isinstance(value, dict) else dict(enumerate(value))
            _require_finite(inner, f"{prefix}{key}.")
        elif isinstance(value, float):
            require(math.isfinite(value), f"{prefix}{key}", value, "it is a finite number")


def _settle_norm_batch_size(config: dict) -> None:
    """Check it, and give runs that differ by it alone one value where the norm does not notice."""
    size, batch_size = config["norm_batch_size"], config["batch_size"]
    if size < 1 or batch_size % size:
        divisors = ", ".join(str(n) for n in range(1, batch_size + 1) if batch_size % n == 0)
        raise UserError(
            f"norm_batch_size={size} is not legal: it divides batch_size={batch_size}, so it is one of {divisors}"
        )
    if "norm_batch_size" not in config["norm"]:  # no batch statistics: one run serves all that only they notice
        config.update(norm_batch_size=None, frozen_epochs=0, precise_images=Recipe.precise_images)
        return
    own = config["norm"]["norm_batch_size"]
    require(own in (None, size), "norm.norm_batch_size", own, f"set norm_batch_size={own}, which the norm then takes")
    if own is None:  # always the whole batch: one run serves every norm_batch_size
        config["norm_batch_size"] = None
