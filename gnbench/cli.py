"""The command line: a Hydra app whose config becomes a typed run, and whose errors are sentences.

This module and hydra_plugins/gnbench are the only ones that see Hydra. torch is imported when a run starts, so that
--help and tab completion do not wait for it.
"""

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from gnbench.configs import CONFIGS, choices
from gnbench.console import INTERRUPTED, fall_silent
from gnbench.errors import SweepFailed, UserError
from gnbench.plan import Run, num_cores, plan_run
from gnbench.recipe import Recipe
from gnbench.words import describe
from gnbench.workers import FIRST, WorkerLost, count_workers, leave_refusal_to_first, rank
from hydra_plugins.gnbench.cores import Cores
from hydra_plugins.gnbench.grid import Grid
from hydra_plugins.gnbench.plan import Plan, PlanConf
from hydra_plugins.gnbench.slurm import Slurm, SlurmConf

REFUSED = 2  # exit status of a command that was refused
FAILED = 1  # of one in which a run failed
UNKNOWN_KEY = r"Could not override '([^']+)'\.\s+To append to your config use (.+)"  # as Hydra says it
FOR_SWEEPS = {PlanConf._target_: "hydra/launcher=plan tells of", SlurmConf._target_: "hydra/launcher=slurm submits"}


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


ConfigStore.instance().store(name="schema", node=Config)
for plugin in (Grid, Cores, Plan, Slurm):  # Hydra's own search for plugins does not see into an editable install
    Plugins.instance().register(plugin)


def plan(cfg: DictConfig, in_sweep: bool) -> Run:
    """The run that a composed config means.

    Raises:
        UserError: a value is not legal.
    """
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for key in config.keys() - {field.name for field in fields(Config)}:  # +key=value adds what nothing reads
        raise UserError(_unknown_key(key))
    return plan_run(config, default_threads=1 if in_sweep else num_cores())


def train_one(cfg: DictConfig) -> dict:
    """Train the run that `cfg` means, or measure its cost, and return its record. Hydra calls it, once a run."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        if count_workers() > 1:
            raise UserError("torchrun trains one run, with hydra/sweeper=grid also as a sweep of one")
        return train_run(plan(cfg, in_sweep=True), progress=False)
    with _exit_on_error():  # here, because Hydra adds lines of its own to an error that leaves a single run
        if does := FOR_SWEEPS.get(HydraConfig.get().launcher._target_):
            raise UserError(f"{does} a sweep and this is a single run: -m makes it a sweep of one")
        run = plan(cfg, in_sweep=count_workers() > 1)  # workers, as a sweep's processes, have a core each
        record = train_run(run, progress=True)
        if record is not None:
            print(f"{describe(record)}\n{run.directory}")
        return record


def train_run(run: Run, progress: bool) -> dict | None:
    """Train a run in this process, or with the other workers of torchrun; the record, on the first worker alone."""
    from gnbench.run import check_runs, execute

    check_runs([run])
    if count_workers() == 1:
        return execute(run, progress)
    from gnbench.torchrun import execute_together

    return execute_together(run, progress)


def main() -> None:
    """The `gnbench` command: exits with 2 where it was refused, 1 where a run failed, 130 or 143 on a signal."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that Hydra raises what it would print over several lines
    if not {"", os.getcwd()} & set(sys.path):  # `python -m gnbench` has it: a norm of one's own beside one
        sys.path.append(os.getcwd())
    app = hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")(train_one)
    with _exit_on_error():
        app()
        sys.stdout.flush()


@contextlib.contextmanager
def _exit_on_error() -> Iterator[None]:
    """End the process with a sentence and a status; with GNBENCH_TRACEBACK=1, with the traceback."""
    try:
        yield
    except KeyboardInterrupt:  # a sweep's launcher, or a run before its first step
        if rank() == FIRST:
            print("gnbench: stopped by SIGINT", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # sys.exit's status is lost where the interrupt met an exec(), of a dataclass say
    except BrokenPipeError:
        sys.exit(fall_silent())
    except Exception as error:
        if os.environ.get("GNBENCH_TRACEBACK") == "1":
            raise
        status = _exit_status(error)
        if status == REFUSED:
            leave_refusal_to_first()
        if rank() == FIRST or (not isinstance(error, WorkerLost) and status in (REFUSED, FAILED)):
            print(f"gnbench: {_sentence(error)}", file=sys.stderr, flush=True)
        sys.exit(status)


def _exit_status(error: Exception) -> int:
    if isinstance(error, (UserError, HydraException, OmegaConfBaseException)) or _is_of_group(error):
        return REFUSED
    number = getattr(error, "number", None)  # of the signal that interrupted a run
    return FAILED if number is None else 128 + number


def _sentence(error: Exception) -> str:
    """What is wrong, in one sentence; Hydra's and OmegaConf's own messages spread it over several lines."""
    text = str(error)
    if isinstance(error, (UserError, SweepFailed, WorkerLost)):
        return text
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return (
            f"{group}={name} is not known: it is one of {', '.join(error.options or choices(group))}; "
            f"one of your own is a file DIR/{group}/{name}.yaml, found by --config-dir DIR"
        )
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value: give it one, as in {error.full_key}=..."
    if isinstance(error, ConfigCompositionException) and (match := re.match(UNKNOWN_KEY, text)):
        return _unknown_key(*match.groups())
    if isinstance(error, ConfigCompositionException) and (match := re.match(r"Error merging override (.*)", text)):
        return f"{match[1]} is not legal: {_first_line(error.__cause__)}"
    if isinstance(error, OverrideParseException):
        said = next(line for line in text.splitlines() if line and line != error.override and set(line) - set(" ^"))
        hint = "; a value with spaces or letters beyond ASCII stands in quotes of its own, as in 'results=\"a b\"'"
        return f"{error.override} cannot be read as key=value: {said}{hint}"
    if _is_of_group(error):
        return "a config group takes the name of one of its files, as in norm=gn or sweep=quick"
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return " ".join(line.strip() for line in text.splitlines())
    return f"{type(error).__name__}: {text}"


def _is_of_group(error: Exception) -> bool:
    """Whether Hydra was given a group's name that is no text, such as sweep=null."""
    return isinstance(error, ValueError) and str(error).startswith("Config group override must be")


def _unknown_key(key: str, added: str = "") -> str:
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


def _first_line(error: BaseException | None) -> str:
    return str(error).splitlines()[0] if error else "it cannot be merged into the config"
