"""What test_distributed.py starts by torchrun: steps of several workers beside the reference's, in float64.

The first worker prints, as JSON, the largest difference of each case: of losses, errors, and all that 6 steps change.
"""

import json
import sys

import torch
from test_train import make_training

import gnbench
from gnbench.data import train_batches
from gnbench.engine import Eager
from gnbench.engine.distributed import Distributed
from gnbench.train import Diverged, Training, train
from gnbench.workers import connected, rank

NUM_STEPS = 6
RECIPE = {
    "batch_size": 12,
    "epochs": 30,
    "base_lr": 0.05,
    "drop_last": False,
    "label_smoothing": 0.1,
    "nesterov": True,
    "weight_decay": 0.01,
    "clip_grad_norm": 5.0,
}


def make(norm: str, num_images: int, params: dict, recipe: dict) -> Training:
    training = make_training(norm, **{**RECIPE, **recipe})
    training.dataset.train.images = training.dataset.train.images[:num_images]
    training.dataset.train.labels = training.dataset.train.labels[:num_images]
    model = gnbench.model("resnet8", norm=gnbench.norm(norm, **params), num_classes=3, seed=1)
    return Training(model.double(), training.dataset, training.recipe, seed=1)


def step(engine) -> list[float]:
    """NUM_STEPS steps; of each its loss and number of errors."""
    (training,), told = engine.members, []
    recipe = training.recipe
    while True:
        epoch, first = divmod(training.progress.step, training.steps_per_epoch)
        frozen = epoch >= recipe.epochs - recipe.frozen_epochs
        engine.set_train_mode(frozen)
        for images, labels in train_batches(
            training.dataset, recipe.batch_size, recipe.drop_last, 1, epoch, first, share=training.share
        ):
            loss, errors = engine.step([(images.double(), labels)])
            told += [float(loss), int(errors)]
            training.progress.step += 1
            if training.progress.step == NUM_STEPS:
                return told


def compare(norm: str, num_images: int, params: dict, recipe: dict) -> float | None:
    ours, reference = (make(norm, num_images, params, recipe) for _ in range(2))
    start = {key: value.clone() for key, value in reference.model.state_dict().items()}
    engine = Distributed(ours)
    told = step(engine)
    if rank() != 0:
        return None
    differences = [abs(a - b) for a, b in zip(told, step(Eager(reference)), strict=True)]
    for key, value in reference.model.state_dict().items():
        scale = (value - start[key]).abs().max().clamp_min(1e-3)
        differences.append(float((ours.model.state_dict()[key] - value).abs().max() / scale))
    return max(differences)


def diverge() -> bool:
    training = make("bn", 24, {}, {"base_lr": 1e30, "epochs": 3, "clip_grad_norm": None})
    training.model.float()
    try:
        train(Distributed(training), pause=lambda: None)
    except Diverged:
        return True
    return False


def main() -> None:
    torch.set_num_threads(1)
    with connected(torch.device("cpu")):
        found = [compare(*case) for case in json.loads(sys.argv[1])]
        found.append(diverge())
    if rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
