"""gnbench's throughput beside the common loop's, in interleaved rounds of one run, with the machine's own limit.

Three ways to train the same ResNet on the same random images are timed in turn, over the whole machine:

- common: the loop of kuangliu/pytorch-cifar and torchvision's references: DataLoader with workers, per-image
  transforms, eager, NCHW, one training at a time with all threads;
- eager: images and augmentation resident (gnbench engine=eager), one training at a time with all threads;
- gnbench: what a sweep does by default: a process a core, the seeds of a cell as one network where batches are small.

A round times each of them for `--seconds`, in an order of its own; ratios are of the same round. Small batches are of
up to 8 seeds of a cell; a sweep of fewer seeds gains less. A network without any norm is measured too: what the
convolutions alone leave to win. The common loop is in float32, beside cells in bf16 too; on a GPU torch computes its
convolutions in TF32, as for everybody who does not ask, and gnbench's in float32.

With --side-by-side it measures instead how the rate and the memory of gnbench's way grow with the number of runs at a
time: seeds of a cell as one network, and processes.
"""

import argparse
import contextlib
import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

import gnbench
from gnbench.data import Dataset, Split, images_ahead, train_batches
from gnbench.engine import check_engine, make_engine, most_lanes
from gnbench.errors import UserError
from gnbench.machine import name_processor, num_cores, peak_memory_mb, set_arithmetic
from gnbench.recipe import Recipe
from gnbench.timing import wait_for_device
from gnbench.torchvision_compat import import_torchvision
from gnbench.train import Training
from hydra_plugins.gnbench.cores import count_processes

WAYS = ("common", "eager", "gnbench")
NUM_IMAGES = 50_000
SEEDS = 8  # of a cell: what a sweep may train as one network
MATRIX = 1024  # rows and columns of the matrix product that stands for the machine's limit
STEP_FLOP = {"resnet8": 75e6, "resnet20": 246e6}  # of a training step an image: 3 x 2 x multiply-adds forward


@dataclass(frozen=True)
class Cell:
    """A point of the comparison."""

    norm: str
    batch_size: int
    norm_batch_size: int | None = None
    precision: str = "float32"

    @property
    def name(self) -> str:
        nbs = f" NBS {self.norm_batch_size}" if self.norm_batch_size else ""
        return f"{self.norm} {self.batch_size}{nbs}" + (" bf16" if self.precision == "bf16" else "")

    def model(self, name: str, seed: int = 0) -> torch.nn.Module:
        params = {"norm_batch_size": self.norm_batch_size} if self.norm_batch_size else {}
        return gnbench.model(name, norm=gnbench.norm(self.norm, **params), seed=seed)


BATCHES = (2, 8, 32, 128)
CELLS = [Cell(norm, batch) for batch in BATCHES for norm in ("bn", "gn", "ln", "in", "none")]
CELLS += [Cell("bn", 128, size) for size in (2, 8, 32)]
CELLS += [Cell(norm, batch, precision="bf16") for batch in BATCHES for norm in ("bn", "gn", "ln", "in")]
SIDE_BY_SIDE = ["bn 2", "bn 8", "bn 32"]
LANES = (1, 2, 4, 8)  # seeds as one network, side by side
MEMORY = ("pages that processes share, as libraries', counted in each", "tensors, without each process's context")


class RandomImages(torch.utils.data.Dataset):
    """Images as torchvision's CIFAR10 gives them, with the transforms of every CIFAR script."""

    def __init__(self) -> None:
        transforms = import_torchvision().transforms
        self.images, self.labels = random_images()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def random_images() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (NUM_IMAGES, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, NUM_IMAGES)


def common_loop(cell: Cell, model_name: str, device: str):
    """Yield after every step the number of images it trained."""
    torch.set_num_threads(num_cores())
    net = cell.model(model_name).to(device)
    loader = torch.utils.data.DataLoader(
        RandomImages(), batch_size=cell.batch_size, shuffle=True, num_workers=2, pin_memory=device != "cpu"
    )
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    net.train()
    train_loss, correct, total = 0.0, 0, 0
    while True:
        for inputs, targets in loader:
            inputs, targets = inputs.to(device), targets.to(device)
            optimizer.zero_grad()
            outputs = net(inputs)
            loss = criterion(outputs, targets)
            loss.backward()
            optimizer.step()
            train_loss += loss.item()
            _, predicted = outputs.max(1)
            total += targets.size(0)
            correct += predicted.eq(targets).sum().item()
            yield len(targets)


def gnbench_loop(cell: Cell, model_name: str, device: str, engine: str, num_lanes: int, num_threads: int):
    """The same by gnbench's own engine, data and step."""
    set_arithmetic({"num_threads": num_threads, "precision": cell.precision})
    dataset = resident(device)
    recipe = Recipe(batch_size=cell.batch_size)
    members = [
        Training(cell.model(model_name, seed).to(device), dataset, recipe, seed, cell.precision)
        for seed in range(num_lanes)
    ]
    engine = make_engine(members, engine)
    engine.set_train_mode(frozen=False)
    loss_sums = torch.zeros(num_lanes, dtype=torch.float64, device=device)
    epoch = 0
    while True:
        chunk = images_ahead(dataset, num_lanes)
        epochs = [train_batches(dataset, cell.batch_size, True, m.seed, epoch, chunk=chunk) for m in members]
        for batch in zip(*epochs, strict=True):
            losses, _ = engine.step(list(batch))
            loss_sums += losses.double()
            yield num_lanes * cell.batch_size
        epoch += 1


def resident(device: str) -> Dataset:
    images, labels = random_images()
    split = Split(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device), torch.from_numpy(labels).to(device)
    )
    mean, std = torch.full((3, 1, 1), 127.5, device=device), torch.full((3, 1, 1), 73.6, device=device)
    return Dataset(split, split, split, 10, mean, std, "crop_flip")


def matrix_products(device: str):
    """Yield the floating-point operations of each matrix product, in float32 on one thread or a GPU."""
    set_arithmetic({"num_threads": 1, "precision": "float32"})
    size = MATRIX if device == "cpu" else 8 * MATRIX
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    while True:
        a @ b
        wait_for_device(torch.device(device))
        yield 2 * size**3


def serve(connection, make, device: str) -> None:
    """In a process: build a loop, report how long its first step took, then count for so many seconds when told."""
    started = time.perf_counter()
    loop = make()
    next(loop)
    wait_for_device(torch.device(device))
    first_step_s = time.perf_counter() - started
    next(loop)
    wait_for_device(torch.device(device))
    connection.send(first_step_s)
    while (seconds := connection.recv()) is not None:
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            count += next(loop)
        wait_for_device(torch.device(device))
        connection.send((count / (time.perf_counter() - started), peak_memory_mb(torch.device(device))))


class Workers:
    """Processes that do the same side by side; their rates add up to the machine's."""

    def __init__(self, number: int, make, device: str) -> None:
        context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
        self.pipes, self.processes, self.peak_mb = [], [], 0.0
        for _ in range(number):
            ours, theirs = context.Pipe()
            self.processes.append(context.Process(target=serve, args=(theirs, make, device)))
            self.processes[-1].start()
            theirs.close()  # so that a process that dies is heard of
            self.pipes.append(ours)

    def wait(self) -> None:
        """Until each has done its first step."""
        self.first_step_s = max(pipe.recv() for pipe in self.pipes)

    def measure(self, seconds: float) -> float:
        for pipe in self.pipes:
            pipe.send(seconds)
        rates, peaks = zip(*(pipe.recv() for pipe in self.pipes), strict=True)
        self.peak_mb = max(self.peak_mb, sum(peaks))
        return sum(rates)

    def stop(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):  # of one that died
                pipe.send(None)
        for process in self.processes:
            process.join(5)
            process.kill()


Makers = dict[object, tuple[int, Callable]]  # of each way: how many processes, and the loop of one


def measure_rounds(makers: Makers, options: argparse.Namespace) -> tuple[dict[object, list[float]], dict]:
    """The rates of all ways in interleaved rounds, and the processes that had them, ended."""
    workers: dict[object, Workers] = {}
    rates: dict[object, list[float]] = {way: [] for way in makers}
    shuffle = random.Random(0).sample
    try:
        for way, (number, make) in makers.items():
            workers[way] = Workers(number, make, options.device)
            workers[way].wait()
        for _ in range(options.rounds):
            for way in shuffle(list(makers), len(makers)):  # whoever comes after the loader's workers has them to bear
                rates[way].append(workers[way].measure(options.seconds))
    finally:
        for each in workers.values():
            each.stop()
    return rates, workers


def measure(cell: Cell, options: argparse.Namespace) -> dict:
    """The rates of all ways, beside the machine's matrix products in the same rounds."""
    on_gpu = options.device != "cpu"
    config = {"norm": {"_target_": "gnbench."}, "model": {"_target_": "gnbench."}, "engine": options.engine}
    lanes = min(SEEDS, most_lanes({**config, "batch_size": cell.batch_size, "clip_grad_norm": None}, 32 * 32, on_gpu))
    name, device = options.model, options.device
    makers: Makers = {
        "common": (1, partial(common_loop, cell, name, device)),
        "eager": (1, partial(gnbench_loop, cell, name, device, "eager", 1, num_cores())),
        "gnbench": (
            count_processes(on_gpu, num_cores()),
            partial(gnbench_loop, cell, name, device, options.engine, lanes, 1),
        ),
        "matrix": (1 if on_gpu else num_cores(), partial(matrix_products, device)),
    }
    rates, workers = measure_rounds(makers, options)
    return {
        "cell": cell.name,
        "seeds_as_one_network": lanes,
        "images_per_s": {way: rates[way] for way in WAYS},
        "matrix_flop_per_s": rates["matrix"],
        "first_step_s": {way: workers[way].first_step_s for way in WAYS},
        "peak_memory_mb": {way: workers[way].peak_mb for way in WAYS},
    }


def measure_side_by_side(cell: Cell, options: argparse.Namespace) -> list[dict]:
    """The rate and the memory of gnbench's way, by processes and by seeds that each trains as one network.

    Rounds are interleaved over the numbers of seeds, for one number of processes after the other: all of them at once
    are more than a GPU holds.
    """
    rows = []
    for number in sorted({1, count_processes(options.device != "cpu", num_cores())}):
        makers: Makers = {
            lanes: (number, partial(gnbench_loop, cell, options.model, options.device, options.engine, lanes, 1))
            for lanes in LANES
        }
        rates, workers = measure_rounds(makers, options)
        rows += [
            {
                "cell": cell.name,
                "processes": number,
                "seeds_as_one_network": lanes,
                "images_per_s": rates[lanes],
                "peak_memory_mb": workers[lanes].peak_mb,
            }
            for lanes in LANES
        ]
    return rows


def summarize(result: dict, model: str) -> dict:
    """Medians over the rounds, and the least and largest ratio of a round."""
    rates = result["images_per_s"]
    ratios = {
        way: [ours / theirs for ours, theirs in zip(rates["gnbench"], rates[way], strict=True)]
        for way in ("common", "eager")
    }
    of_limit = [
        rate * STEP_FLOP[model] / limit
        for rate, limit in zip(rates["gnbench"], result["matrix_flop_per_s"], strict=True)
    ]
    return {
        "cell": result["cell"],
        **{way: statistics.median(rates[way]) for way in WAYS},
        "ratio": statistics.median(ratios["common"]),
        "least": min(ratios["common"]),
        "most": max(ratios["common"]),
        "over_eager": statistics.median(ratios["eager"]),
        "of_limit": statistics.median(of_limit),
        "memory_mb": result["peak_memory_mb"]["gnbench"],
        "first_step_s": result["first_step_s"]["gnbench"],
    }


def write_table(rows: list[dict], head: str, path: Path) -> None:
    lines = [
        head, "",
        "| norm, batch size | common loop | eager, resident | gnbench | over common (range) | over eager "
        "| of the limit | memory MiB | first step s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        lines.append(
            f"| {r['cell']} | {r['common']:.0f} | {r['eager']:.0f} | {r['gnbench']:.0f} "
            f"| {r['ratio']:.2f}× ({r['least']:.2f}–{r['most']:.2f}) | {r['over_eager']:.2f}× "
            f"| {100 * r['of_limit']:.0f} % | {r['memory_mb']:.0f} | {r['first_step_s']:.1f} |"
        )
    path.write_text("\n".join(lines) + "\n")


def draw(rows: list[dict], limit: float, title: str, path: Path) -> None:
    """Images a second of each way, a row a cell, and the rate at which the arithmetic alone would be done."""
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
    styles = {"common": ("#bbbbbb", ""), "eager": ("#7aa6c2", "//"), "gnbench": ("#1b4f72", "")}
    names = {"common": "common loop", "eager": "images resident, eager", "gnbench": "gnbench, × common loop (range)"}
    for place, way in enumerate(WAYS):
        colour, hatch = styles[way]
        y = np.arange(len(rows)) + 0.27 * (place - 1)
        axes.barh(y, [r[way] for r in rows], 0.26, color=colour, hatch=hatch, edgecolor="white", label=names[way])
    for y, r in enumerate(rows):
        text = f"{r['ratio']:.1f}× ({r['least']:.1f}–{r['most']:.1f})"
        place, look = (r["gnbench"], y + 0.27), {"fontsize": 7, "va": "center", "textcoords": "offset points"}
        axes.annotate(text, place, (3, 0), **look, bbox={"color": "white", "pad": 0.2})
    name = "convolutions as float32 matrix products"
    axes.axvline(limit, color="black", linestyle="--", linewidth=1, zorder=0, label=name)
    axes.set_yticks(range(len(rows)), [r["cell"] for r in rows])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, max(limit, *(r["gnbench"] for r in rows)) * 1.2))
    axes.set_xlabel("training, images per second (whole machine)")
    axes.set_title(title, fontsize=9)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)


def write_side_by_side_table(results: list[dict], head: str, path: Path) -> None:
    lines = [
        head, "",
        "| norm, batch size | processes | seeds as one network | runs at a time | images/s (range) "
        "| time of a run, of one alone | memory MiB |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in results:
        rates, runs = r["images_per_s"], r["processes"] * r["seeds_as_one_network"]
        (alone,) = [
            statistics.median(each["images_per_s"]) for each in results
            if each["cell"] == r["cell"] and each["processes"] == each["seeds_as_one_network"] == 1
        ]  # fmt: skip
        lines.append(
            f"| {r['cell']} | {r['processes']} | {r['seeds_as_one_network']} | {runs} "
            f"| {statistics.median(rates):.0f} ({min(rates):.0f}–{max(rates):.0f}) "
            f"| {runs * alone / statistics.median(rates):.1f}× | {r['peak_memory_mb']:.0f} |"
        )
    path.write_text("\n".join(lines) + "\n")


def draw_side_by_side(results: list[dict], title: str, path: Path) -> None:
    """A column a cell: above the rate over the whole machine, below the memory of all processes."""
    cells = list(dict.fromkeys(r["cell"] for r in results))
    size = (1 + 2.4 * len(cells), 4.6)
    figure, axes = plt.subplots(2, len(cells), figsize=size, sharex=True, sharey="row", squeeze=False,
                                layout="constrained")  # fmt: skip
    looks = {1: {"color": "#7aa6c2", "linestyle": "--", "marker": "o"}}
    for cell, (above, below) in zip(cells, axes.T, strict=True):
        own = [r for r in results if r["cell"] == cell]
        for number in sorted({r["processes"] for r in own}):
            rows = [r for r in own if r["processes"] == number]
            look = looks.get(number, {"color": "#1b4f72", "marker": "s"})
            lanes = [r["seeds_as_one_network"] for r in rows]
            rates = [statistics.median(r["images_per_s"]) for r in rows]
            spread = [[rate - min(r["images_per_s"]) for rate, r in zip(rates, rows, strict=True)],
                      [max(r["images_per_s"]) - rate for rate, r in zip(rates, rows, strict=True)]]  # fmt: skip
            label = "1 process" if number == 1 else f"{number} processes"
            above.errorbar(lanes, rates, spread, capsize=2, label=label, **look)
            below.plot(lanes, [r["peak_memory_mb"] for r in rows], **look)
        above.set_title(cell, fontsize=9)
        below.set_xscale("log", base=2)
        below.set_xticks(LANES, LANES)
        below.set_xlabel("seeds as one network")
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("images per second\n(all processes)")
    axes[1, 0].set_ylabel("peak memory, MiB\n(all processes)")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)


def describe_machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device != "cpu" else name_processor()
    return f"{num_cores()} cores of {name}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/speed"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each way in each round")
    parser.add_argument("--model", choices=STEP_FLOP, default="resnet20")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--engine", choices=("auto", "cuda_graph"), default="auto", help="of gnbench's own way")
    parser.add_argument("--side-by-side", action="store_true", help="rate and memory against runs at a time, instead")
    parser.add_argument("--cells", nargs="+", metavar="CELL", choices=[cell.name for cell in CELLS],
                        help="such as 'bn 2' or 'bn 128 NBS 8'")  # fmt: skip
    options = parser.parse_args()
    try:
        check_engine(options.engine, torch.device(options.device))
    except UserError as error:
        parser.error(str(error))
    names = options.cells or (SIDE_BY_SIDE if options.side_by_side else [cell.name for cell in CELLS])
    cells = [cell for cell in CELLS if cell.name in names]
    options.out.mkdir(parents=True, exist_ok=True)
    (compare_side_by_side if options.side_by_side else compare)(cells, options)
    print(f"written to {options.out}")


def compare(cells: list[Cell], options: argparse.Namespace) -> None:
    """gnbench's way beside the common loop."""
    results = []
    for cell in cells:
        results.append(measure(cell, options))
        row = summarize(results[-1], options.model)
        print(
            f"{row['cell']}: common {row['common']:.0f}, eager {row['eager']:.0f}, gnbench {row['gnbench']:.0f} "
            f"images/s, {row['ratio']:.2f}x ({row['least']:.2f} to {row['most']:.2f})",
            flush=True,
        )
    rows = [summarize(result, options.model) for result in results]
    flops = statistics.median(rate for result in results for rate in result["matrix_flop_per_s"])
    machine, limit = describe_machine(options.device), flops / STEP_FLOP[options.model]
    head = (
        f"{options.model}, training, images per second over the whole machine; medians of {options.rounds} "
        f"interleaved rounds of {options.seconds:g} s. {machine}. Matrix products reach {flops / 1e9:.0f} GFLOP/s in "
        f"float32, which would allow {limit:.0f} images/s, the limit, by the multiplications of a convolution's "
        "formula; Winograd's convolutions need fewer. Memory is the sum of what each process has at its peak "
        f"({MEMORY[options.device != 'cpu']})."
    )
    write_json(results, options, options.out / "speed.json")
    write_table(rows, head, options.out / "speed.md")
    draw(rows, limit, f"{options.model}, {machine}", options.out / "speed.png")


def compare_side_by_side(cells: list[Cell], options: argparse.Namespace) -> None:
    """gnbench's way with ever more runs at a time."""
    results = []
    for cell in cells:
        results += measure_side_by_side(cell, options)
        print(f"{cell.name}: measured", flush=True)
    machine = describe_machine(options.device)
    write_json(results, options, options.out / "side_by_side.json")
    head = (
        f"{options.model}, training, images per second of all processes together, a thread each; medians of "
        f"{options.rounds} rounds of {options.seconds:g} s, interleaved over the numbers of seeds. Memory is the sum "
        f"of what each process has at its peak ({MEMORY[options.device != 'cpu']}). {machine}."
    )
    write_side_by_side_table(results, head, options.out / "side_by_side.md")
    draw_side_by_side(results, f"{options.model}, {machine}", options.out / "side_by_side.png")


def write_json(results: list[dict], options: argparse.Namespace, path: Path) -> None:
    """Every rate, and how it was measured."""
    command = subprocess.list2cmdline(["scripts/speed", *sys.argv[1:]])
    content = {"machine": describe_machine(options.device), "model": options.model, "rounds": options.rounds,
               "seconds": options.seconds, "command": command, "results": results}  # fmt: skip
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
