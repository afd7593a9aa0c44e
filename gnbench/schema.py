"""The keys of a run, with their types and defaults, and how a config of them becomes a planned run."""

import difflib
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from gnbench.configs import CONFIGS, choices
from gnbench.errors import UserError
from gnbench.machine import num_cores
from gnbench.plan import Run, plan_run
from gnbench.recipe import Recipe


@dataclass
class Config(Recipe):
    """The keys of a run: what is compared, the recipe's own, and how it is executed."""

    norm: Any = MISSING
    model: Any = MISSING
    data: Any = MISSING
    norm_batch_size: int = "${batch_size}"  # type: ignore[assignment]  # images that share statistics (NBS)
    tuned_from: str | None = None  # results of sweep=tune, whose best base_lr for the cell is taken
    seed: int = 0  # of the initialization, the order of images and the augmentation
    diagnostics: int | None = None  # training images on which layers and gradients are measured, in about 20 epochs
    precision: str = "float32"  # float32, tf32 (on a GPU), bf16 (mixed)
    engine: str = "auto"  # auto: what is faster, several seeds as one network too; eager: the reference; cuda_graph
    deterministic: bool | None = None  # whether a GPU uses algorithms that give the same bits every time; a CPU does
    num_threads: Any = "auto"  # auto: 1 in a sweep or by torchrun, with a process a core; all cores for a single run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    measure: str | None = None  # null or error: train; cost: measure time and memory of a step, and train nothing
    memory_format: str | None = None  # with measure=cost: auto (as engine=auto; null: this), channels_last, contiguous
    cost_rounds: int | None = None  # with measure=cost: rounds in which the norm and BN take turns; null: 15
    cost_round_s: float | None = None  # with measure=cost: seconds of steps, and of inference, of each; null: 0.05
    cost_warm_up: int | None = None  # with measure=cost: steps of each before the first round; null: 3
    results: str = "results/runs"  # where the run's directory goes; a sweep has its own
    checkpoint_s: float = 60.0  # seconds between two checkpoints: what a kill can cost
    tensorboard: bool = False  # whether each epoch's numbers are also written for TensorBoard, into the run's directory


def plan(cfg: DictConfig, in_sweep: bool) -> Run:
    """The run that a composed config means.

    Raises:
        UserError: a value is not legal.
    """
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for key in config.keys() - {field.name for field in fields(Config)}:  # +key=value adds what nothing reads
        raise UserError(explain_unknown_key(key))
    return plan_run(config, default_threads=1 if in_sweep else num_cores())


def explain_unknown_key(key: str, added: str = "") -> str:
    """What is wrong with a key that the config lacks; `added` is the word that would add it."""
    group, _, parameter = key.partition(".")
    if not parameter:
        near = difflib.get_close_matches(key, [field.name for field in fields(Config)], n=1)
        return f"{key} is not a key" + (f"; did you mean {near[0]}?" if near else ": gnbench --help lists the keys")
    known = {each for name in choices(group) for each in OmegaConf.load(CONFIGS / group / f"{name}.yaml")}
    near = [] if parameter in known else difflib.get_close_matches(parameter, known, n=1)
    said = f"{key} is not a key of this {group}" + (f" (did you mean {group}.{near[0]}?)" if near else "")
    if group != "norm":
        return said
    return f"{said}: a parameter of a layer of your own, by norm=custom, is added with a plus, {added}"
