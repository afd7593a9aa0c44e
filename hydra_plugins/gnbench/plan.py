"""Hydra's launcher that trains nothing: it tells what a sweep would do and take, or the command line of each run.

The time and the memory are estimated: each kind of run takes some steps and measures some images on this machine, in
processes of their own, as many side by side as the sweep would have.
"""

import heapq
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn

from gnbench.datasets.split import split_sizes
from gnbench.errors import UserError, explain
from gnbench.plan import Run, make_recipe, unverified_images
from gnbench.words import duration, number_of
from hydra_plugins.gnbench.cores import Cores, exit_word, side_by_side

if TYPE_CHECKING:  # --help need not wait for torch and pandas
    import pandas as pd

    from gnbench.recipe import Recipe
    from gnbench.train import Engine, Training

STEPS_S = 0.5  # of steps in a calibration
EVALUATION_S = 0.5  # of a batch in evaluation, as far as can be foretold
FEW_IMAGES = 50  # from which that is foretold
SMALL_BATCHES = 32  # images, at least, of those measured in batches as small as in training
SETUP_S = 2.0  # of a measurement of cost, its warm-up included
LIMIT_S = 120.0  # after which a calibration has failed
NAMES = ("norm.name", "batch_size", "norm_batch_size")  # of a cell, in the table's first columns
SPEED_KEYS = (  # of a config: what decides how long a step and a test take
    *("norm", "model", "data", "batch_size", "precision", "engine", "device", "num_threads", "deterministic"),
    *("drop_last", "nesterov", "clip_grad_norm", "precise_images"),
)


@dataclass
class PlanConf:
    """`commands`: print one command line a run that is left, and nothing else.

    `num_processes`, `seeds_per_process`: as of the sweep that is planned.
    """

    _target_: str = "hydra_plugins.gnbench.plan.Plan"
    commands: bool = False
    num_processes: int | None = None
    seeds_per_process: int | None = None


ConfigStore.instance().store(group="hydra/launcher", name="plan", node=PlanConf, provider="gnbench")


@dataclass(frozen=True)
class Calibration:
    """What a process takes to train its seeds, as measured for a short time."""

    engine: str
    setup_s: float  # from the start of its process to the first step
    step_s: float  # of all its seeds; their batches of images too
    test_s: float  # of one seed: a test of an epoch,
    val_s: float  # the held-out images of an epoch,
    end_s: float  # and the test errors by statistics after the last
    memory_mb: float | None  # the largest so far: of the device where it is a GPU, of the process elsewhere
    whole: bool  # whether an evaluation batch was as large as a run's


@dataclass(frozen=True)
class Work:
    """What one run does."""

    steps: int
    images: int  # trained on, each as often as it is
    epochs: int
    tests: int


class Plan(Cores):
    """What Cores would do, told instead of done."""

    def __init__(self, commands: bool, num_processes: int | None, seeds_per_process: int | None) -> None:
        super().__init__(num_processes, seeds_per_process)
        self.commands = commands

    def launch(self, job_overrides: Any, initial_job_idx: int) -> list[JobReturn]:
        raise UserError("hydra/launcher=plan needs to know the runs of a sweep: use it with hydra/sweeper=grid")

    def tell(self, count: str, runs: list[Run], left: list[Run]) -> None:
        """Print the plan.

        Args:
            count: how many runs there are, in words.
            runs: those of the whole sweep.
            left: those that are not finished.
        """
        self.runs = left
        self._check()
        if self.commands:
            if self._measures_cost():
                print("gnbench: measurements of cost: run these one after the other", file=sys.stderr)
            print("".join(f"{line}\n" for line in find_commands(left)), end="", flush=True)
            return
        print(count, flush=True)
        if self._measures_cost():
            print(f"estimated: {_format_time(sum(map(estimate_measurement, left)))} at least, one after the other")
            return
        groups = [[left[index] for index in group] for group in self._group(left)] if left else []
        calibrations = self._calibrate(groups)
        print(tabulate(runs, groups, calibrations).to_string(index=False))
        print("\n".join(self._sum_up(left, groups, calibrations)), flush=True)

    def _calibrate(self, groups: list[list[Run]]) -> dict[str, Calibration | str]:
        """What each kind of group takes, or why that could not be measured."""
        kinds = {_kind(group): group for group in groups}
        if not kinds:
            return {}
        print(
            f"calibrating: {number_of(len(kinds), 'kind')} of run, about 2 s of steps and tests each, on a copy that "
            "is thrown away",
            flush=True,
        )
        context = self._context()
        warm_up = context.Process(target=int)  # the first process of all waits for imports
        warm_up.start()
        warm_up.join()
        with ThreadPoolExecutor(self._num_processes()) as pool:
            measured = pool.map(lambda group: _calibrate_aside(context, group), kinds.values())
            return dict(zip(kinds, measured, strict=True))

    def _sum_up(
        self, left: list[Run], groups: list[list[Run]], calibrations: dict[str, Calibration | str]
    ) -> list[str]:
        """The totals and what to think of them, a line each."""
        if not left:
            return ["nothing is left to do"]
        work = [count_work(run) for run in left]
        steps, images = sum(each.steps for each in work), sum(each.images for each in work)
        lines = [f"left: {number_of(len(left), 'run')}, {number_of(steps, 'step')}, {number_of(images, 'image')}"]
        known = [calibration for calibration in calibrations.values() if not isinstance(calibration, str)]
        if known:
            in_order = sorted(groups, key=lambda group: -sum(run.effort for run in group))  # as Cores starts them
            times = [estimate_time(group, calibrations[_kind(group)]) for group in in_order]
            total_s = schedule([seconds for seconds in times if seconds is not None], self._num_processes())
            memory = max(calibration.memory_mb or 0 for calibration in known)
            least = "" if all(calibration.whole for calibration in known) else "at least "
            whose = " of the GPU" if self._on_gpu() else ""
            lines += [
                f"estimated: {_format_time(total_s)} on this machine with {side_by_side(self._num_processes(), True)}; "
                f"{least}about {memory:.0f} MB of memory{whose} a process at its peak",
                "it counts the tests of every epoch, the errors by statistics at the end, and each run from its start;",
                "it leaves out checkpoints, and whatever else the machine will have to do",
            ]
        failures = {reason: None for reason in calibrations.values() if isinstance(reason, str)}
        lines += [f"without an estimate, and not in the total: {reason}" for reason in failures]
        return lines


def find_commands(runs: Iterable[Run]) -> list[str]:
    """The command line that trains each run, from the directory in which this one stands.

    Raises:
        UserError: there is none for one of them.
    """
    from gnbench.command_line import command_line

    lines = []
    for run in runs:
        record = {"config": run.config, "digest": run.digest, "data_fingerprint": run.data_fingerprint}
        try:
            lines.append(command_line(run.directory.parent, record))
        except UserError as error:
            raise UserError(f"{run.name} has no command line: {error}") from error
    return lines


def tabulate(runs: list[Run], groups: list[list[Run]], calibrations: dict[str, Calibration | str]) -> "pd.DataFrame":
    """A row a cell: what it is, its seeds left, the steps and images of each of its runs, how and how long."""
    import pandas as pd

    cells: dict[str, list[Run]] = {}
    groups_of: dict[str, list[list[Run]]] = {}
    for run in runs:
        cells.setdefault(run.cell, []).append(run)
    for group in groups:
        groups_of.setdefault(group[0].cell, []).append(group)
    rows = []
    for cell, of_cell in cells.items():
        own = groups_of.get(cell, [])
        times = [estimate_time(group, calibrations[_kind(group)]) for group in own]
        work = count_work(of_cell[0])
        rows.append(
            {
                "left": f"{sum(map(len, own))} of {len(of_cell)}",
                "steps": work.steps,
                "images": work.images,
                "executed as": _describe(own),
                "estimated time": "–" if not own or None in times else _format_time(sum(times)),
            }
        )
    names = find_names([of_cell[0].config for of_cell in cells.values()])
    return pd.concat([names, pd.DataFrame(rows)], axis=1)


def find_names(configs: list[dict]) -> "pd.DataFrame":
    """What tells cells apart, a row a config: norm, batch_size, norm_batch_size, and other keys where these do not."""
    import pandas as pd

    as_typed = json.loads(json.dumps(configs), parse_int=str, parse_float=str)  # pandas would make 2 and null 2.0
    frame = pd.json_normalize(as_typed).drop(columns="seed")
    frame = frame.astype(object).where(frame.notna(), "–").astype(str)
    names = list(NAMES)
    for key in ("model.name", "data.name", *frame):  # a name first: it says more than what differs with it
        if key not in names and frame.groupby(names)[key].nunique(dropna=False).max() > 1:
            names.append(key)
    return frame[names].rename(columns=lambda key: key.removesuffix(".name").removeprefix("norm."))


def count_work(run: Run) -> Work:
    """What a run does from its start to its end."""
    recipe, num_train = make_recipe(run.config), _num_train(json.dumps(run.config["data"]))
    epochs = recipe.num_epochs(num_train)
    tests = sum(recipe.is_tested(epoch, num_train) for epoch in range(1, epochs + 1))
    return Work(recipe.total_steps(num_train), count_images(recipe, num_train), epochs, tests)


def count_images(recipe: "Recipe", num_train: int) -> int:
    """Images in all updates of a training on `num_train`."""
    size = recipe.batch_size
    images_per_epoch = num_train - num_train % size if recipe.drop_last else num_train
    epochs, steps = divmod(recipe.total_steps(num_train), recipe.steps_per_epoch(num_train))
    return epochs * images_per_epoch + steps * size


def estimate_time(group: list[Run], calibration: Calibration | str) -> float | None:
    """Seconds that a process takes for the runs of a group, which differ in their seeds; None where that is not known.

    time = setup + steps * step + seeds * (tests * test + epochs * val + end)
    """
    if isinstance(calibration, str):
        return None
    work, c = count_work(group[0]), calibration
    return c.setup_s + work.steps * c.step_s + len(group) * (work.tests * c.test_s + work.epochs * c.val_s + c.end_s)


def estimate_measurement(run: Run) -> float:
    """Seconds that a measurement of cost takes, where a step is short: BN and the norm, in training and inference."""
    return SETUP_S + 4 * run.config["cost_rounds"] * run.config["cost_round_s"]


def schedule(times: Iterable[float], num_processes: int) -> float:
    """When the last of some jobs ends that are started in this order, each as one of the processes comes free."""
    free = [0.0] * num_processes
    for seconds in times:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def calibrate(runs: list[Run], started_s: float) -> Calibration:
    """Train and test the runs of a group for a short time, in this process, and throw the result away.

    Args:
        started_s: when the process was started, by time.time().
    """
    from gnbench.engine import make_engine
    from gnbench.machine import choose_device, peak_memory_mb, set_arithmetic
    from gnbench.run import make_training
    from gnbench.train import RESPONSE

    config = runs[0].config
    device = choose_device(config["device"], config["precision"])
    set_arithmetic(config)
    trainings = [make_training(run, device) for run in runs]
    engine = make_engine(trainings, config["engine"])
    setup_s = time.time() - started_s
    step_s = _measure_step(engine)
    lead = trainings[0]
    dataset, num_test = lead.dataset, len(lead.dataset.test)
    image_s, num_images = _measure_evaluation(lead)
    end_s = _measure_end(lead, image_s, num_images)
    largest = _largest_batch(num_test)
    responses = largest if hasattr(lead.model, RESPONSE) else 0
    return Calibration(
        engine=engine.name,
        setup_s=setup_s,
        step_s=step_s,
        test_s=image_s * (num_test + responses),
        val_s=image_s * len(dataset.val),
        end_s=end_s,
        memory_mb=peak_memory_mb(device),
        whole=num_images == largest,
    )


def _measure_step(engine: "Engine") -> float:
    """Seconds of a step of all members, and of the batches that it takes, after one that finds everything cold."""
    from gnbench.data import images_ahead, train_batches
    from gnbench.timing import time_calls, wait_for_device

    lead = engine.members[0]
    chunk = images_ahead(lead.dataset, len(engine.members))
    size, num_steps = lead.recipe.batch_size, lead.steps_per_epoch
    num_batches = min(max(1, chunk // size), num_steps)  # those that are augmented at once
    started = time.perf_counter()
    batches = [
        list(
            itertools.islice(
                train_batches(lead.dataset, size, lead.recipe.drop_last, training.seed, epoch=0, chunk=chunk),
                num_batches,
            )
        )
        for training in engine.members
    ]
    wait_for_device(lead.dataset.mean.device)
    batches_s = (time.perf_counter() - started) / num_batches
    engine.set_train_mode(frozen=False)
    steps = itertools.cycle(zip(*batches, strict=True))
    engine.step(list(next(steps)))
    return time_calls(lambda: engine.step(list(next(steps))), STEPS_S, lead.dataset.mean.device) + batches_s


def _measure_evaluation(training: "Training") -> tuple[float, int]:
    """Seconds an image takes in a test, and in a batch of how many that was measured: as many as a run's, or fewer."""
    from gnbench.data import Split
    from gnbench.evaluate import evaluate

    model, dataset, test = training.model.eval(), training.dataset, training.dataset.test

    def test_images(count: int) -> None:
        evaluate(model, dataset, Split(test.images[:count], test.labels[:count]), training.precision)

    few = min(FEW_IMAGES, len(test))
    test_images(few)
    foretold_s = _time(lambda: test_images(few)) / few
    count = min(_largest_batch(len(test)), max(few, int(EVALUATION_S / foretold_s)))
    test_images(count)
    return _time(lambda: test_images(count)) / count, count


def _measure_end(training: "Training", image_s: float, num_images: int) -> float:
    """Seconds that the test errors by statistics take, as gnbench.evaluate.error_by_statistics measures them.

    Args:
        image_s: seconds an image takes in a test.
        num_images: in a batch that is not too slow.
    """
    from gnbench.data import Split
    from gnbench.evaluate import evaluate, precise_images
    from gnbench.precise_bn import batch_statistics, kept_statistics, layers_with_statistics, update_precise_statistics
    from gnbench.timing import wait_for_device

    model, dataset, size = training.model, training.dataset, training.recipe.batch_size
    if not layers_with_statistics(model):
        return 0.0
    test = dataset.test
    started = time.perf_counter()
    images = precise_images(dataset, training.recipe.precise_images)
    wait_for_device(dataset.mean.device)
    images_s = time.perf_counter() - started
    some = images[0][:num_images]

    def follow() -> None:
        update_precise_statistics(model, [some])
        wait_for_device(dataset.mean.device)

    with kept_statistics(model):
        population_s = _time(follow) / len(some) * sum(map(len, images))
    few = Split(*(tensor[: size * math.ceil(SMALL_BATCHES / size)] for tensor in (test.images, test.labels)))
    with batch_statistics(model):
        batch_s = _time(lambda: evaluate(model, dataset, few, training.precision, size)) / len(few) * len(test)
    return 2 * image_s * len(test) + images_s + population_s + batch_s  # running and precise: a test each


def _largest_batch(num_test: int) -> int:
    from gnbench.evaluate import BATCH_SIZE

    return min(num_test, BATCH_SIZE)


def _time(action: Callable[[], None]) -> float:
    """Seconds of what waits for its own end."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _calibrate_aside(context: Any, runs: list[Run]) -> Calibration | str:
    """The calibration of a group in a process of its own, or why there is none."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_calibration, args=(theirs, runs, time.time()), daemon=True)
    process.start()
    theirs.close()
    name = f"{runs[0].config['norm']['name']} batch_size={runs[0].config['batch_size']}"
    try:
        if ours.poll(LIMIT_S):
            said = ours.recv()
            return f"{name}: {said}" if isinstance(said, str) else said
        process.kill()
        return f"{name}: its calibration took more than {LIMIT_S:.0f} s"
    except EOFError:
        process.join()
        return f"{name}: the process of its calibration ended with {exit_word(process.exitcode)}"
    finally:
        process.join()
        ours.close()


def _send_calibration(connection: Connection, runs: list[Run], started_s: float) -> None:
    try:
        connection.send(calibrate(runs, started_s))
    except KeyboardInterrupt:  # which the launcher has heard too
        return
    except Exception as error:  # a stranger's norm may raise anything
        connection.send(explain(error))


def _kind(group: list[Run]) -> str:
    """Groups of one kind take equally long a step, and a test."""
    config = group[0].config
    return repr((len(group), [config.get(key) for key in SPEED_KEYS]))


def _num_train(data_json: str) -> int:
    data = json.loads(data_json)
    return split_sizes(unverified_images(data_json), data["train_size"], data["val_size"])[0]


def _describe(groups: list[list[Run]]) -> str:
    """How the runs of a cell that are left would be executed."""
    sizes = [len(group) for group in groups]
    if not sizes:
        return "–"
    return "one a process" if max(sizes) == 1 else f"{' + '.join(map(str, sizes))} seeds as one network"


def _format_time(seconds: float) -> str:
    return "under 1 s" if seconds < 1 else f"about {duration(seconds)}"
