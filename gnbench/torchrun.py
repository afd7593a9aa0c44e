"""One run by as many workers as torchrun started; a process that it did not start trains by itself.

The first worker executes a run as if it were alone, the others make its steps with it. It alone locks, reads and writes
the run's directory, and says from which state the training goes on; every worker then goes through the same steps and
tests, so that all have the same history and meet the same end.
"""

import contextlib
import json

import torch

from gnbench.configs import partial
from gnbench.datasets.split import split_sizes
from gnbench.engine import make_engine
from gnbench.errors import UserError
from gnbench.machine import choose_device, set_arithmetic
from gnbench.models import norm_and_activation
from gnbench.plan import Run, make_recipe, unverified_images
from gnbench.run import Interrupted, check_runs, execute, make_training, stop_signals
from gnbench.train import Diverged, train
from gnbench.trial import channel_counts
from gnbench.words import number_of
from gnbench.workers import FIRST, WorkerLost, broadcast, connected, count_workers, rank, share_signals


def train_run(run: Run, progress: bool) -> dict | None:
    """Check and train a run in this process, or with torchrun's other workers; its record, None on all but the first.

    Raises:
        UserError: it cannot be trained here, or not by so many workers.
        WorkerLost: one of them ended.
    """
    check_runs([run])
    return execute(run, progress) if count_workers() == 1 else execute_together(run, progress)


def execute_together(run: Run, progress: bool = False) -> dict | None:
    """Train `run` with the other workers, unless it is finished; its record on the first worker, None on the others.

    Raises:
        UserError: it cannot be trained by so many workers.
        WorkerLost: one of them ended.
    """
    check_workers(run)
    device = choose_device(run.config["device"], run.config["precision"])
    with connected(device):
        if rank() != FIRST:
            _follow(run, device)
            return None
        record = execute(run, progress)
        with contextlib.suppress(WorkerLost):  # the record is written: who has left need not be told
            broadcast(None)
        return record


def check_workers(run: Run) -> None:
    """Refuse a run whose batches, the last of an epoch too, cannot be dealt out to the workers.

    Raises:
        UserError: names the batch, or the norm, and what is legal.
    """
    from gnbench.engine.distributed import check_layer  # torch.distributed is for those who need it

    config, count = run.config, count_workers()
    if run.measures_cost:
        raise UserError(f"measure=cost is not legal for {count} workers: one process measures")
    if config["batch_size"] % count:
        raise UserError(
            f"batch_size={config['batch_size']} is not legal for {count} workers: it is a multiple of {count}"
        )
    for size in _batch_sizes(config):
        if size < count:
            raise UserError(
                f"drop_last=false is not legal for {count} workers here: "
                f"an epoch's last batch has {number_of(size, 'image')}, and each worker needs one"
            )
        if "norm_batch_size" in config["norm"]:
            layer, _ = norm_and_activation(partial(config["norm"]), channel_counts(config["model"])[0])
            check_layer(layer, size, f"norm={config['norm']['name']}")


def _batch_sizes(config: dict) -> set[int]:
    """Of an epoch: the batch size, and what its last batch has, if that is kept."""
    images = unverified_images(json.dumps(config["data"]))
    num_images, _ = split_sizes(images, config["data"]["train_size"], config["data"]["val_size"])
    recipe = make_recipe(config)
    last = 0 if recipe.drop_last else num_images % recipe.batch_size
    return {min(recipe.batch_size, num_images), last or recipe.batch_size}


def _follow(run: Run, device: torch.device) -> None:
    """Make the first worker's steps with it, until it says that there are no more."""
    set_arithmetic(run.config)
    training = make_training(run, device)
    while (state := broadcast()) is not None:
        training.restore(state)
        with stop_signals() as stop, contextlib.suppress(Diverged):

            def pause(stop: list[int] = stop) -> None:
                share_signals(stop)
                if stop:
                    raise Interrupted(stop[0])

            train(make_engine([training], run.config["engine"]), pause)
