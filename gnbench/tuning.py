"""A learning rate for each cell, chosen on held-out training images among the same candidates for every cell."""

import functools
import itertools
from pathlib import Path

from gnbench.errors import UserError, require
from gnbench.recipe import Recipe
from gnbench.record import NOT_IDENTITY, find_runs, load_record

CELL = ("norm", "model", "batch_size")  # what a rate is chosen for; the recipe's other keys may be shorter when tuning
AXES = (*CELL, "norm_batch_size", "base_lr", "seed", "num_threads", "frozen_epochs", "precise_images", *NOT_IDENTITY)


def choose_base_lr(config: dict) -> tuple[float, dict]:
    """The base_lr of least mean `val_error` among the runs of `tuned_from` for the config's norm, model and batch.

    Returns:
        the rate, and what the record of the final run keeps of the choice: the directory, the mean held-out error in
        percent of every candidate (None where it diverged), and whether the choice is the largest or smallest of them.

    Raises:
        UserError: there are no such runs, they held out no images, one of them is unfinished, or this cell was given
            other candidates than the rest; base_lr is given too, or base_batch_size is another.
    """
    directory = Path(config["tuned_from"])
    records = _read_runs(directory)
    if config["base_lr"] != Recipe.base_lr:
        raise UserError(f"base_lr={config['base_lr']} is not legal beside tuned_from, which chooses it")
    size = records[0]["config"]["base_batch_size"]  # another one would make another rate of the same base_lr
    require(config["base_batch_size"] == size, "base_batch_size", config["base_batch_size"], f"{directory} has {size}")
    budget = sorted({record["config"]["base_lr"] for record in records})
    cell = [record for record in records if all(record["config"][key] == config[key] for key in CELL)]
    where = f"norm={config['norm']['name']} model={config['model']['name']} batch_size={config['batch_size']}"
    unfinished = [record["run"] for record in cell if record["status"] not in ("done", "diverged")]
    if unfinished:
        raise UserError(f"tuned_from={directory}: {unfinished[0]} is not finished; run its sweep to the end first")
    errors = {lr: _mean_val_error([r for r in cell if r["config"]["base_lr"] == lr], directory) for lr in budget}
    seeds = sorted({record["config"]["seed"] for record in cell})
    tried = {(record["config"]["base_lr"], record["config"]["seed"]) for record in cell}
    for lr, seed in itertools.product(budget, seeds or [None]):
        if (lr, seed) not in tried:
            which = f"base_lr={lr}" if lr not in {lr for lr, _ in tried} else f"base_lr={lr} seed={seed}"
            raise UserError(f"tuned_from={directory} has no run of {where} {which}: every cell needs the same")
    finite = {lr: error for lr, error in errors.items() if error is not None}
    if not finite:
        raise UserError(f"tuned_from={directory}: every run of {where} diverged")
    best = min(finite, key=lambda lr: (finite[lr], lr))
    at_edge = len(budget) > 1 and best in (budget[0], budget[-1])
    return best, {
        "from": str(directory),
        "val_error": {str(lr): error for lr, error in errors.items()},
        "edge": at_edge,
    }


def check_tuned_images(config: dict, fingerprint: str) -> None:
    """Hold a run to the images, by their fingerprint, on which its base_lr was chosen.

    Raises:
        UserError: they are others.
    """
    record = _read_runs(Path(config["tuned_from"]))[0]
    if record["data_fingerprint"] != fingerprint:
        raise UserError(
            f"tuned_from={config['tuned_from']} was tuned on other images: data={record['config']['data']['name']}"
        )


@functools.cache  # a sweep asks for every cell
def _read_runs(directory: Path) -> list[dict]:
    """The records of a tuning sweep, which differ in nothing but what it sweeps."""
    records = [load_record(path) for path in find_runs(directory)]
    if not records:
        raise UserError(f"tuned_from={directory} holds no runs: gnbench sweep=tune makes them")
    if len({record.get("data_fingerprint") for record in records}) > 1:
        raise UserError(f"tuned_from={directory} mixes runs on different images: tune in a directory of its own")
    recipes = [{key: value for key, value in record["config"].items() if key not in AXES} for record in records]
    for recipe in recipes:
        mixed = [key for key in recipe if recipe[key] != recipes[0].get(key)]
        if mixed:
            raise UserError(
                f"tuned_from={directory} mixes runs that differ in {mixed[0]}: tune in a directory of its own"
            )
    return records


def _mean_val_error(records: list[dict], directory: Path) -> float | None:
    """The mean held-out error of one candidate's seeds in percent; None where one of them diverged."""
    if not records or any(record["status"] == "diverged" for record in records):
        return None
    errors = [record["result"]["val_error"] for record in records]
    if None in errors:
        raise UserError(
            f"tuned_from={directory}: {records[0]['run']} held out no images; set data.val_size in its sweep"
        )
    return sum(errors) / len(errors)
