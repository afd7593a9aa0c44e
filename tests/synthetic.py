"""Sweep directories of made-up but valid records, for the tests of the analysis half."""

import random
from pathlib import Path

from gnbench.record import digest, run_name, save_record

PAPER = {  # top-1 error in percent at batch sizes 32 to 2, shaped like Figure 1 of arXiv:1803.08494
    "bn": {32: 23.6, 16: 23.7, 8: 24.8, 4: 27.3, 2: 34.7},
    "gn": {32: 24.1, 16: 24.2, 8: 24.0, 4: 24.2, 2: 24.1},
    "ln": {32: 25.3, 16: 25.2, 8: 25.4, 4: 25.3, 2: 25.3},
    "in": {32: 28.4, 16: 28.3, 8: 28.4, 4: 28.5, 2: 28.4},
}
NORMS = {
    "bn": {"name": "bn", "_target_": "gnbench.norms.batch_norm", "eps": 1e-5, "momentum": 0.1},
    "gn": {"name": "gn", "_target_": "gnbench.norms.group_norm", "num_groups": 8, "channels_per_group": None},
    "ln": {"name": "ln", "_target_": "gnbench.norms.layer_norm", "eps": 1e-5},
    "in": {"name": "in", "_target_": "gnbench.norms.instance_norm", "eps": 1e-5},
}


def write_run(directory: Path, norm: str = "bn", batch_size: int = 32, seed: int = 0, **options) -> Path:
    """Write one valid record and return its path.

    Options: `test_error` (percent, default from PAPER), `train_error`, `status`, `cause`, `norm_batch_size`, `device`,
    `norm_keys`, `result`, `record_keys`, `history_keys`, `config_keys` (more keys there, the last not in the run's
    name), `num_epochs` of history; any other is a key of the config.
    """
    error = options.pop("test_error", None)
    error = PAPER[norm][batch_size] if error is None else error
    train_error = options.pop("train_error", error - 5)
    status, cause = options.pop("status", "done"), options.pop("cause", None)
    result, device = options.pop("result", {}), options.pop("device", "cpu")
    num_epochs = options.pop("num_epochs", 6)
    more = {place: options.pop(f"{place}_keys", {}) for place in ("record", "history", "config")}
    config = make_config(norm, batch_size, seed, **options)
    history = make_history(error, train_error, batch_size, num_epochs if status == "done" else num_epochs // 2)
    final = {"test_error": error, "final_test_error": error, "train_error": train_error, "train_loss": 0.5}
    identity = digest(config, "fingerprint")
    record = {
        "run": run_name(config, identity),
        "digest": identity,
        "status": status,
        "cause": cause,
        "config": {**config, **more["config"]},
        "environment": {"python": "3.11.7", "torch": "2.13.0", "processor": "Made-up 9000", "device": device},
        "num_parameters": 272474,
        "history": [{**entry, **more["history"]} for entry in history],
        "result": {**final, "time_s": 60.0, **result} if status == "done" else None,
        **more["record"],
    }
    path = Path(directory) / record["run"] / "record.json"
    save_record(path, record)
    return path


def make_config(norm: str, batch_size: int, seed: int, **keys) -> dict:
    """A resolved config like those of real records."""
    uses_batch = norm == "bn"
    norm_batch_size = keys.pop("norm_batch_size", batch_size) if uses_batch else None
    own = {**NORMS.get(norm, {"name": norm, "_target_": f"somewhere.{norm}"}), **keys.pop("norm_keys", {})}
    if uses_batch:
        own["norm_batch_size"] = norm_batch_size
    return {
        "norm": own,
        "model": {"name": "resnet20"},
        "data": {"name": "cifar10", "train_size": None, "val_size": 0, "root": "data"},
        "batch_size": batch_size,
        "norm_batch_size": norm_batch_size,
        "epochs": 30,
        "max_steps": None,
        "base_lr": 0.1,
        "base_batch_size": 128,
        "weight_decay": 1e-4,
        "milestones": [0.5, 0.75],
        "report_epochs": 5,
        "seed": seed,
        "precision": "float32",
        "num_threads": 1,
        "device": "cpu",
        "results": "results/x",
        **keys,
    }


def make_history(error: float, train_error: float, batch_size: int, num_epochs: int) -> list[dict]:
    """Errors that fall to their final values, like a training's."""
    return [
        {
            "epoch": epoch,
            "step": epoch * 1000 // batch_size,
            "lr": 0.1,
            "train_loss": 2.3 / epoch,
            "train_error": train_error + 40 / epoch - 40 / num_epochs,
            "test_loss": 2.4 / epoch,
            "test_error": error + 40 / epoch - 40 / num_epochs,
            "val_error": None,
            "time_s": 10.0,
            "peak_memory_mb": 300.0,
        }
        for epoch in range(1, num_epochs + 1)
    ]


def write_sweep(directory: Path, norms=("bn", "gn"), batch_sizes=(32, 16, 8, 4, 2), seeds=(0, 1, 2), **options) -> Path:
    """Write the grid of Figure 1 with a spread of `sd` (default 0.3) points over seeds, the same at every call."""
    sd = options.pop("sd", 0.3)
    for norm in norms:
        for batch_size in batch_sizes:
            for seed in seeds:
                noise = random.Random(f"{norm} {batch_size} {seed}").gauss(0, sd)
                error = round(PAPER[norm][batch_size] + noise, 2)
                train_error = error - (6 if norm == "gn" else 4)
                write_run(directory, norm, batch_size, seed, test_error=error, train_error=train_error, **options)
    return Path(directory)
