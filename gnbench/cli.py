"""The command line: a Hydra app whose config becomes a typed run, and whose errors are sentences.

This module and hydra_plugins/gnbench are the only ones that see Hydra. torch is imported when a run starts, so that
--help and tab completion do not wait for it.
"""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from gnbench.command_line import format_value
from gnbench.configs import CONFIGS, choices
from gnbench.console import fall_silent
from gnbench.errors import Exited, SweepFailed, UserError, explain, first_line
from gnbench.plan import Run
from gnbench.schema import Config, explain_unknown_key, plan
from gnbench.words import describe
from gnbench.workers import FIRST, WorkerLost, count_workers, leave_refusal_to_first, rank
from hydra_plugins.gnbench.cores import Cores
from hydra_plugins.gnbench.grid import Grid
from hydra_plugins.gnbench.plan import Plan, PlanConf
from hydra_plugins.gnbench.slurm import Slurm, SlurmConf

REFUSED = 2  # exit status of a command that was refused
FAILED = 1  # of one in which a run failed
OF_GROUP = "Config group override must be"  # so Hydra's ValueError begins of a group's name that is no text: sweep=null
OF_OPTIONS = "Only one of --run"  # and that of options that exclude each other, as --cfg and -m
SEVERAL = r"(?:Ambiguous value for argument|Sweep parameters) '(.+)'"  # where -m is missing, or seems to be
UNKNOWN_KEY = r"Could not override '([^']+)'\.\s+To append to your config use (.+)"  # as Hydra says it
FOR_SWEEPS = {PlanConf._target_: "hydra/launcher=plan tells of", SlurmConf._target_: "hydra/launcher=slurm submits"}


ConfigStore.instance().store(name="schema", node=Config)
for plugin in (Grid, Cores, Plan, Slurm):  # Hydra's own search for plugins does not see into an editable install
    Plugins.instance().register(plugin)


class Stopped(KeyboardInterrupt):
    """A signal ends a sweep; Hydra would take an Exception for the end of one run, and go on."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def train_one(cfg: DictConfig) -> dict:
    """Train the run that `cfg` means, or measure its cost, and return its record. Hydra calls it, once a run."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        if count_workers() > 1:
            raise UserError("torchrun trains one run, with hydra/sweeper=grid also as a sweep of one")
        try:
            return _train(plan(cfg, in_sweep=True), progress=False)
        except Exception as error:
            number = getattr(error, "number", None)  # of a signal
            if number is None or not HydraConfig.get().launcher._target_.endswith(".BasicLauncher"):
                raise
            raise Stopped(number) from error
    with _exit_on_error():  # here, because Hydra adds lines of its own to an error that leaves a single run
        if does := FOR_SWEEPS.get(HydraConfig.get().launcher._target_):
            raise UserError(f"{does} a sweep and this is a single run: -m makes it a sweep of one")
        run = plan(cfg, in_sweep=count_workers() > 1)  # workers, as a sweep's processes, have a core each
        record = _train(run, progress=True)
        if record is not None:
            print(f"{describe(record)}\n{run.directory}")
        return record


def _train(run: Run, progress: bool) -> dict | None:
    from gnbench.torchrun import train_run  # imports torch: a config that is refused does not wait for it

    return train_run(run, progress)


def main() -> None:
    """The `gnbench` command: exits with 2 where it was refused, 1 where a run failed, 130 or 143 on a signal."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that Hydra raises what it would print over several lines
    if not {"", os.getcwd()} & set(sys.path):  # `python -m gnbench` has it: a norm of one's own beside one
        sys.path.append(os.getcwd())
    signal.signal(signal.SIGTERM, _stop)  # as Ctrl-C: what is trained at the moment writes its checkpoints
    app = hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")(train_one)
    with _exit_on_error():
        app()
        sys.stdout.flush()


def _stop(number: int, _: object) -> None:
    raise Stopped(number)


@contextlib.contextmanager
def _exit_on_error() -> Iterator[None]:
    """End the process with a sentence and a status; with GNBENCH_TRACEBACK=1, with the traceback."""
    try:
        yield
    except KeyboardInterrupt as error:  # a sweep's launcher, or a run before its first step
        number = getattr(error, "number", signal.SIGINT)
        if rank() == FIRST:
            print(f"gnbench: {_tell_stopped(number)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(128 + number)  # sys.exit's status is lost where the interrupt met an exec(), of a dataclass say
    except BrokenPipeError:
        sys.exit(fall_silent())
    except Exception as error:
        if os.environ.get("GNBENCH_TRACEBACK") == "1":
            raise
        status = _exit_status(error)
        if status == REFUSED:
            leave_refusal_to_first(error)
        if rank() == FIRST or (not isinstance(error, WorkerLost) and status in (REFUSED, FAILED)):
            print(f"gnbench: {_sentence(error)}", file=sys.stderr, flush=True)
        sys.exit(status)


def _tell_stopped(number: int) -> str:
    return f"stopped by {signal.Signals(number).name}; the same command goes on"


def _exit_status(error: Exception) -> int:
    if isinstance(error, (UserError, HydraException, OmegaConfBaseException)) or _is_hydras(error):
        return REFUSED
    number = getattr(error, "number", None)  # of the signal that interrupted a run
    return FAILED if number is None else 128 + number


def _sentence(error: Exception) -> str:
    """What is wrong, in one sentence; Hydra's and OmegaConf's own messages spread it over several lines."""
    text = str(error)
    if isinstance(error, (UserError, SweepFailed, WorkerLost, Exited)):
        return text
    if (number := getattr(error, "number", None)) is not None:
        return _tell_stopped(number)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return (
            f"{group}={name} is not known: it is one of {', '.join(error.options or choices(group))}; "
            f"one of your own is a file DIR/{group}/{name}.yaml, found by --config-dir DIR"
        )
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value: give it one, as in {error.full_key}=..."
    if isinstance(error, ConfigCompositionException) and (match := re.match(UNKNOWN_KEY, text)):
        return explain_unknown_key(*match.groups())
    if isinstance(error, ConfigCompositionException) and (match := re.match(r"Error merging override (.*)", text)):
        said = first_line(error.__cause__) if error.__cause__ else "it cannot be merged into the config"
        return f"{match[1]} is not legal: {said}"
    if isinstance(error, ConfigCompositionException) and (match := re.match(SEVERAL, text)):
        return _explain_several(match[1])
    if isinstance(error, OverrideParseException):
        said = next(line for line in text.splitlines() if line and line != error.override and set(line) - set(" ^"))
        hint = "; a value with spaces or letters beyond ASCII stands in quotes of its own, as in 'results=\"a b\"'"
        return f"{error.override} cannot be read as key=value: {said}{hint}"
    if _is_hydras(error) and text.startswith(OF_GROUP):
        return "a config group takes the name of one of its files, as in norm=gn or sweep=quick"
    if isinstance(error, InterpolationKeyError):
        return f"{error.full_key} cannot be worked out: {first_line(error)}"
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return " ".join(line.strip() for line in text.splitlines())
    if _is_hydras(error):
        return text
    return explain(error)


def _explain_several(word: str) -> str:
    """What is wrong with a command that Hydra took for a single run though `word` has several values.

    A sweep file makes a command a sweep, which Hydra does not see where another word is wrong, and then blames `word`.
    """
    args = get_args_parser().parse_args()
    parser = OverridesParser.create()
    others = [other for other in args.overrides if not parser.parse_override(other).is_sweep_override()]
    own = [f"hydra.searchpath={format_value([os.path.abspath(args.config_dir)])}"] if args.config_dir else []
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            hydra.compose("config", [*own, *others], return_hydra_config=True)
    except Exception as error:
        return _sentence(error)
    return f"{word} is several values, which -m makes a sweep of"


def _is_hydras(error: Exception) -> bool:
    """Whether it is one of the ValueErrors by which Hydra refuses words."""
    return isinstance(error, ValueError) and str(error).startswith((OF_GROUP, OF_OPTIONS))
