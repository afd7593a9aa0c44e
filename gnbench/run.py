"""Planned runs from their start, or from their checkpoints, to their records: every way to end has a status."""

import contextlib
import dataclasses
import functools
import json
import logging
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from gnbench.board import Board, check_tensorboard
from gnbench.build import build_model
from gnbench.checkpoint import delete_checkpoints, load_checkpoints, save_checkpoint
from gnbench.configs import arguments, check_source, partial
from gnbench.cost import measure_cost
from gnbench.crash import crash_at
from gnbench.data import Dataset, prepare
from gnbench.engine import check_engine, make_engine
from gnbench.errors import UserError, exits_are_errors, explain
from gnbench.files import CORRUPT, cannot_write, check_place, set_aside
from gnbench.lock import held
from gnbench.machine import choose_device, describe_environment, set_arithmetic
from gnbench.plan import SPLIT_KEYS, Run, load_images, make_recipe, unverified_images
from gnbench.progress import Lines, Teller, describe_errors
from gnbench.record import CHECKPOINTS, LOCK, RECORD, NotToBeRead, delete_parts, load_record, save_record
from gnbench.run_log import logging_to
from gnbench.train import Diverged, Engine, Training, summarize, train
from gnbench.trial import check_batches, check_images, check_norm
from gnbench.words import name_run
from gnbench.workers import broadcast, count_workers, share_signals

log = logging.getLogger(__name__)
LOCK_WAIT_S = 3.0  # for a run's lock: a process whose launcher was killed needs a step and a checkpoint to let go of it


class Interrupted(Exception):
    """A signal asked the run to stop; its checkpoint is written."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def check_runs(runs: list[Run], here: bool = True) -> None:
    """Try every norm on every channel count of its model, before any training.

    Args:
        here: whether they are trained on this machine: only then are the device, the engine and the place asked for.

    Raises:
        UserError: a norm cannot be used there, the images are too small for the model, the device, the engine or
            TensorBoard is not to be had, or the directory that runs go to cannot be written.
        Exited: a norm ended the program.
    """
    if here:
        for place in {run.directory.parent for run in runs if not run.is_finished()}:
            check_place(place)
    if any(run.config["tensorboard"] for run in runs):
        check_tensorboard()
    checked, passed = set(), set()
    for run in runs:
        key = repr([run.config[name] for name in ("norm", "model", "data", "device", "precision", "engine")])
        if key not in checked:
            checked.add(key)
            if here:
                check_engine(run.config["engine"], choose_device(run.config["device"], run.config["precision"]))
            params = ", ".join(f"{k}={v}" for k, v in arguments(run.config["norm"]).items())
            name = f"norm={run.config['norm']['name']}"
            label = f"{name} ({params})" if params else name
            with exits_are_errors(f"a layer of model={run.config['model']['name']} with {name}"):
                shape = check_norm(run.config["model"], partial(run.config["norm"]), label)
                check_batches(run.config["norm"], shape, name)
            size = unverified_images(json.dumps(run.config["data"])).train_images.shape[1:3]
            if (key := repr([run.config["model"], size])) not in passed:
                passed.add(key)
                check_images(run.config["model"], *size)


def execute(run: Run, progress: bool = False) -> dict:
    """Train `run`, unless it is finished, and return its record: `execute_group` of one."""
    return execute_group([run], progress)[0]


def execute_group(runs: list[Run], progress: bool = False, alone: bool = False) -> list[dict]:
    """Train runs that are alike but for their seeds, side by side as one network, and return their records.

    A finished run is left as it is; an unfinished one goes on from its checkpoint; one that another process is
    training is left to it. A measurement of cost is a run too, without checkpoints. A record's status is done or
    diverged (results), running (another process has it), interrupted, or failed: `cause` says why and run.log has the
    traceback. What stops all of the runs, or the only one, is raised again.

    Args:
        progress: show a bar on standard error, or a line now and then where that is no terminal.
        alone: leave the network of which a run's checkpoint was a part, and with it the last bits: it failed there.
    """
    records, members = {}, []
    with contextlib.ExitStack() as stack:
        for run in runs:
            if run.is_finished() and not any((run.directory / name).exists() for name in CHECKPOINTS):
                records[run.digest] = load_record(run.directory / RECORD)  # though its place may be for reading alone
                continue
            try:
                if not _lock(run, stack):
                    log.warning("%s is being trained by another process", run.name)
                    records[run.digest] = {**_new_record(run), "cause": "another process trains it"}
                    continue
                _require_readable(run.directory / RECORD)
                if run.is_finished():
                    delete_checkpoints(run.directory)  # a process that was killed as it ended may have left them
                    records[run.digest] = load_record(run.directory / RECORD)
                else:
                    members.append(_Member(run, _new_record(run)))
            except UserError as error:  # its place cannot be written
                if len(runs) == 1:
                    raise
                records[run.digest] = {**_new_record(run), "status": "failed", "cause": explain(error)}
        stack.enter_context(logging_to([member.run for member in members]))
        for member in members:
            _clear(member.run.directory)
        if members:
            _execute_locked(members, progress, alone)
    if len(runs) == 1 and members and members[0].error is not None:
        raise members[0].error
    records.update({member.run.digest: member.record for member in members})
    return [records[run.digest] for run in runs]


def _lock(run: Run, stack: contextlib.ExitStack) -> bool:
    """Hold the lock of a run's directory until `stack` is left; False where another process does."""
    try:
        run.directory.mkdir(parents=True, exist_ok=True)
        return stack.enter_context(held(run.directory, LOCK_WAIT_S))
    except (OSError, NotImplementedError) as error:  # the second: a file system without locks
        raise cannot_write(run.directory / LOCK, error) from error


def record_death(run: Run, cause: str) -> None:
    """Let the record of a run say that it failed, where its process died without a word.

    Raises:
        UserError: the record cannot be written.
    """
    with held(run.directory, LOCK_WAIT_S) as is_free:
        if not is_free:
            return
        try:
            record = load_record(run.directory / RECORD)
        except NotToBeRead:
            raise
        except UserError:
            _clear(run.directory)
            record = _new_record(run)
        if record.get("status") == "running":
            save_record(run.directory / RECORD, {**record, "status": "failed", "cause": cause})


def _new_record(run: Run) -> dict:
    return {
        "run": run.name,
        "digest": run.digest,
        "status": "running",
        "cause": None,
        "config": run.config,
        "data_fingerprint": run.data_fingerprint,
        "environment": {},
        "num_parameters": None,
        "history": [],
        "result": None,
    }


def _clear(directory: Path) -> None:
    """Set aside a record that cannot be read, and remove files that were never finished."""
    delete_parts(directory)
    path = directory / RECORD
    if path.is_file():
        try:
            load_record(path)
        except UserError as error:
            kept = set_aside(path).name
            log.warning(
                "%s; it is kept as %s, and the run goes on from what is left",
                error,
                kept,
                extra={"run": directory.name},
            )


def _require_readable(path: Path) -> None:
    """Let a record that is there, but cannot be read for the moment, be no damaged one.

    Raises:
        NotToBeRead: it cannot be read.
    """
    if path.is_file():
        try:
            load_record(path)
        except NotToBeRead:
            raise
        except UserError:
            pass  # it is damaged, for `_clear` to set aside


def _reopen(run: Run) -> None:
    """Let the record of an earlier start say that its run is trained again: how that one ended is not how this does."""
    path = run.directory / RECORD
    if path.is_file():
        save_record(path, {**load_record(path), "status": "running", "cause": None})


@dataclass(eq=False)
class _Member:
    """A run under way: what is trained for it and what is written of it."""

    run: Run
    record: dict
    training: Training | None = None
    board: Board | None = None
    error: Exception | None = None

    def save(self, **changes: object) -> None:
        self.record.update(changes)
        save_record(self.run.directory / RECORD, self.record)

    def fail(self, error: Exception) -> None:
        """Let the record say what went wrong; this is called while `error` is handled."""
        self.error = error
        log.error("%s", traceback.format_exc(), extra={"run": self.run.name})
        with contextlib.suppress(UserError):  # a full disk may be the cause; then the record cannot say so
            self.save(status="failed", cause=explain(error))

    def finish(self, **changes: object) -> None:
        self.save(**changes)
        crash_at("finished")
        delete_checkpoints(self.run.directory)
        if self.board is not None:
            self.board.close()

    def save_checkpoint(self, lanes: list[str]) -> None:
        save_checkpoint(self.run.directory, {**self.training.state(), "digest": self.run.digest, "lanes": lanes})


def _execute_locked(members: list[_Member], progress: bool, alone: bool) -> None:
    try:
        for member in members:
            _reopen(member.run)
        _train_recorded(members, progress, alone)
    except Interrupted as error:
        for member in _unfinished(members):
            with contextlib.suppress(UserError):
                member.save(status="interrupted", cause=f"stopped by {error}")
        raise
    except Exception as error:
        for member in _unfinished(members):
            member.fail(error)
        raise


def _unfinished(members: list[_Member]) -> list[_Member]:
    return [member for member in members if member.record["status"] == "running"]


@exits_are_errors()
def _train_recorded(members: list[_Member], progress: bool, alone: bool) -> None:
    config = members[0].run.config
    device = choose_device(config["device"], config["precision"])
    set_arithmetic(config)
    if members[0].run.measures_cost:
        for member in members:
            _measure_recorded(member, device)
        return
    for member in members:
        member.training = make_training(member.run, device)
    keep_lanes = not alone and config["engine"] != "eager" and count_workers() == 1
    with stop_signals() as stop:
        for digests, lanes in _line_up(members, keep_lanes):
            if stop:
                raise Interrupted(stop[0])
            _train_lanes(digests, lanes, device, progress, stop)


def _measure_recorded(member: _Member, device: torch.device) -> None:
    """Measure what a norm costs. It takes seconds: one that is stopped begins anew."""
    config, environment = member.run.config, describe_environment(member.run.config, device)

    def make(norm: dict) -> Training:
        return make_training(dataclasses.replace(member.run, config={**config, "norm": norm}), device)

    with stop_signals() as stop:

        def pause() -> None:
            if stop:
                raise Interrupted(stop[0])

        member.save(environment=environment)
        cost = measure_cost(config, make, pause)
        pause()
        environment["engine"] = cost.pop("engine")
        member.finish(status="done", num_parameters=cost.pop("num_parameters"), cost=cost)
    log.info("%.2f ms a step, %.2f of BN's", cost["step_ms"], cost["step_ratio"], extra={"run": member.run.name})


def _train_lanes(
    digests: list[str], lanes: list[_Member | None], device: torch.device, progress: bool, stop: list[int]
) -> None:
    """Train members that stand at the same step to their end, each in its lane of one network.

    Args:
        stop: the signals that were heard, on which to save and stop.
    """
    members = {lane.training: lane for lane in lanes if lane is not None}
    config = next(iter(members.values())).run.config
    if count_workers() > 1:
        broadcast(next(iter(members)).state())  # from there the other workers go on too
    engine = make_engine([lane and lane.training for lane in lanes], config["engine"])

    def attempt(training: Training, action: Callable[[], None]) -> None:
        """What may fail for one member alone: that one is trained no further, and the others go on."""
        try:
            action()
        except Exception as error:
            if training in engine.members:
                engine.members.remove(training)
            members[training].fail(error)

    def start(training: Training) -> None:
        members[training].save(
            environment={**describe_environment(config, device), "engine": engine.name},
            num_parameters=sum(parameter.numel() for parameter in training.model.parameters()),
            history=training.progress.history,
        )
        if config["tensorboard"]:
            board = Board(members[training].run.directory, training.progress.history, config["batch_size"])
            members[training].board = board

    for training in list(engine.members):
        attempt(training, lambda training=training: start(training))
    crash_at("started")

    def drop(training: Training, error: Diverged) -> None:
        attempt(training, lambda: members[training].finish(status="diverged", cause=str(error)))

    with _progress_bar(members, progress) as bar:
        pause = _Pause(digests, members, engine, attempt, stop, bar, has_lines=progress and bar.disable)
        train(engine, pause, drop)
        crash_at("trained")
        while engine.members:
            training = engine.members.pop(0)
            attempt(
                training,
                lambda training=training: members[training].finish(status="done", result=summarize(training)),
            )
            if stop and engine.members:
                pause.stop_here()


def _line_up(members: list[_Member], keep_lanes: bool) -> list[tuple[list[str], list[_Member | None]]]:
    """Bring fresh members to where they go on, and say which of them do so together, in which lanes of which network.

    A checkpoint names the lanes of its network by their digests, so that a member finds its own again, and with it
    every bit of its arithmetic, whoever else is there. A kill between the checkpoints of two members leaves one of
    them ahead; its previous checkpoint, or its beginning, is where they stood together. Without `keep_lanes` each goes
    on by itself.
    """
    states = {}
    for member in members:
        try:
            states[member] = _load_states(member.run)
        except UserError as error:
            member.fail(error)
    members = list(states)
    if not keep_lanes:
        for member, own in states.items():
            _restore(member, own, max(_steps(member, own)))
        return [([member.run.digest], [member]) for member in members]
    lanes = [state["lanes"] for own in states.values() for state in own]
    fresh = [member.run.digest for member in members if not any(member.run.digest in each for each in lanes)]
    together: dict[tuple, list[_Member]] = {}
    for member, own in states.items():
        named = [state["lanes"] for state in own] + [each for each in lanes if member.run.digest in each] + [fresh]
        together.setdefault(tuple(named[0]), []).append(member)
    line_ups = []
    for digests, own in together.items():
        steps = {member: _steps(member, states[member]) for member in own}
        common = set.intersection(*steps.values())
        for member in own:
            _restore(member, states[member], max(common or steps[member]))
        for step in sorted({member.training.progress.step for member in own}):
            at_step = {member.run.digest: member for member in own if member.training.progress.step == step}
            line_ups.append((list(digests), [at_step.get(digest) for digest in digests]))
    return line_ups


def _load_states(run: Run) -> list[dict]:
    """The states of a run's whole checkpoints, newest first."""
    states = load_checkpoints(run.directory)
    for state in states:
        state.setdefault("lanes", [run.digest])
        if state["digest"] != run.digest:
            raise UserError(
                f"the checkpoint in {run.directory} belongs to another run, {state['digest'][:12]}; remove it"
            )
    return states


def _steps(member: _Member, states: list[dict]) -> set[int]:
    """Where a run can go on: with fewer than two checkpoints, none of which was lost, also at its beginning."""
    steps = {state["progress"]["step"] for state in states}
    lost = any(any(member.run.directory.glob(f"{name}{CORRUPT}*")) for name in CHECKPOINTS)
    return steps | ({0} if not steps or (len(steps) < 2 and not lost) else set())


def _restore(member: _Member, states: list[dict], step: int) -> None:
    for state in states:
        if state["progress"]["step"] == step:
            member.training.restore(state)
            member.record["history"] = member.training.progress.history
            log.info("goes on from step %d of %d", step, member.training.total_steps, extra={"run": member.run.name})
            return


def make_training(run: Run, device: torch.device) -> Training:
    """The model of a run, fresh from its seed, and its data, on `device`.

    Raises:
        UserError: the images, or the source of the norm, are not what they were when the run was planned.
    """
    config = run.config
    dataset = _dataset(json.dumps(config["data"]), device, run.data_fingerprint)
    check_source(config["norm"])
    torch.manual_seed(config["seed"])  # for a stranger's norm that draws its own parameters
    model = build_model(config["model"], partial(config["norm"]), dataset.num_classes, config["seed"])
    return Training(
        model.to(device),
        dataset,
        make_recipe(config),
        config["seed"],
        config["precision"],
        diagnostics=config.get("diagnostics"),
    )


class _Pause:
    """What happens between two steps: records follow the epochs, checkpoints the clock, and signals are heard."""

    def __init__(
        self,
        digests: list[str],
        members: dict[Training, _Member],
        engine: Engine,
        attempt: Callable[[Training, Callable[[], None]], None],
        stop: list[int],
        bar: tqdm,
        has_lines: bool,
    ) -> None:
        self.digests, self.members, self.engine, self.attempt = digests, members, engine, attempt
        self.stop, self.bar = stop, bar
        self.saved_s = time.monotonic()
        training, member = next(iter(members.items()))
        self.num_epochs = len(training.progress.history)
        config = member.run.config
        self.checkpoint_s = config["checkpoint_s"]
        extent = (training.progress.step, training.total_steps, training.steps_per_epoch, config["batch_size"])
        self.teller = Teller(*extent)
        self.lines = Lines(name_run(config), *extent) if has_lines else None

    def __call__(self) -> None:
        progress = self.engine.members[0].progress
        self.bar.update(progress.step - self.bar.n)
        if self.teller.is_due():
            self.teller.tell(progress.step, [self.members[each].run.directory for each in self.engine.members])
        crash_at("step")
        if len(progress.history) > self.num_epochs:
            self.num_epochs = len(progress.history)
            self._for_each(self._end_epoch)
        if self.lines and self.lines.is_due(progress.step):
            self.lines.tell(progress.step, progress.history)
        share_signals(self.stop)
        if self.stop:
            self.stop_here()
        if time.monotonic() - self.saved_s >= self.checkpoint_s:
            self._for_each(lambda training: self.members[training].save_checkpoint(self.digests))
            self.saved_s = time.monotonic()

    def stop_here(self) -> None:
        """Save those that are not finished, and stop."""
        self._for_each(lambda training: self.members[training].save_checkpoint(self.digests))
        raise Interrupted(self.stop[0])

    def _for_each(self, action: Callable[[Training], None]) -> None:
        for training in list(self.engine.members):
            self.attempt(training, lambda training=training: action(training))

    def _end_epoch(self, training: Training) -> None:
        self._show(training)
        crash_at("epoch")
        self.members[training].save()
        if board := self.members[training].board:
            board.add(training.progress.history[-1])
        crash_at("recorded")

    def _show(self, training: Training) -> None:
        row = training.progress.history[-1]
        log.info(
            "epoch %d: training loss %.4f, %s, %.1f s",
            row["epoch"], row["train_loss"], describe_errors(row), row["time_s"],
            extra={"run": self.members[training].run.name},
        )  # fmt: skip
        tested = "" if row["test_error"] is None else f"{row['test_error']:.2f} %"
        self.bar.set_postfix_str(f"train {row['train_error']:.1f} %" + (tested and f", test {tested}"))


@functools.lru_cache(maxsize=1)  # the runs of one process mostly share their images
def _dataset(node_json: str, device: torch.device, fingerprint: str) -> Dataset:
    node = json.loads(node_json)
    images = load_images(node)
    if images.fingerprint != fingerprint:
        raise UserError(f"the images of data={node['name']} have changed since the run was planned: start again")
    return prepare(images, device, **{name: node[name] for name in SPLIT_KEYS})


def _progress_bar(members: dict[Training, _Member], progress: bool) -> tqdm:
    tqdm.set_lock(threading.RLock())  # the default is a semaphore that a killed process leaves behind
    training, config = next((training, member.run.config) for training, member in members.items())
    seeds = ",".join(str(member.run.config["seed"]) for member in members.values())
    return tqdm(
        total=training.total_steps,
        initial=training.progress.step,
        desc=f"{config['norm']['name']} bs{config['batch_size']} s{seeds}",
        unit="step",
        disable=None if progress else True,  # None: shown on a terminal only
        leave=False,
    )


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, to be acted on between two steps, in the process's main thread."""
    stop: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(number, lambda number, _: stop.append(number)) for number in numbers]
    except ValueError:  # in another thread signals keep their meaning
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
