"""ResNet-20 with Batch or Group Normalization, in plain PyTorch: what gnbench's trainer is checked against.

Nothing here is shared with gnbench: the network of arXiv:1512.03385 with shortcuts of its option A, crops from images
padded with 4 black pixels, flips, SGD with momentum 0.9 and a cosine, as the public CIFAR loops have them.

    python scripts/plain_loop.py DIR --epochs 50 --bf16 --out results/plain.json
"""

import argparse
import itertools
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn


class Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.norm1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.norm2 = norm(planes)
        self.stride, self.more = stride, planes - in_planes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(y + shortcut)


def resnet20(name: str) -> nn.Module:
    norm = {"bn": nn.BatchNorm2d, "gn": lambda planes: nn.GroupNorm(8, planes)}[name]
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    pairs = itertools.pairwise(widths)
    blocks = [Block(norm, before, after, 1 if before == after else 2) for before, after in pairs]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), norm(16), nn.ReLU()]
    net = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return net


def load(directory: Path) -> tuple[np.ndarray, torch.Tensor]:
    images, labels = [], []
    for label, folder in enumerate(sorted(path for path in directory.iterdir() if path.is_dir())):
        for path in sorted(folder.iterdir()):
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB")))
            labels.append(label)
    return np.stack(images), torch.tensor(labels)


def crop_and_flip(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    out = np.empty_like(images)
    for i, (top, left, flip) in enumerate(zip(*rng.integers(0, [[9], [9], [2]], (3, len(images))), strict=True)):
        crop = padded[i, top : top + 32, left : left + 32]
        out[i] = crop[:, ::-1] if flip else crop
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="holds train/<class>/* and test/<class>/*")
    parser.add_argument("--norm", choices=["bn", "gn"], default="bn")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="convolutions in bf16, as torch.autocast chooses")
    parser.add_argument("--out", type=Path, help="a JSON of the settings and of every epoch's errors, in %%")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    train_images, train_labels = load(options.directory / "train")
    test_images, test_labels = load(options.directory / "test")
    mean = torch.tensor(train_images.mean(axis=(0, 1, 2)), dtype=torch.float32)
    std = torch.tensor(train_images.std(axis=(0, 1, 2)), dtype=torch.float32)

    def to_input(images: np.ndarray) -> torch.Tensor:
        return ((torch.from_numpy(images).float() - mean) / std).permute(0, 3, 1, 2)

    net = resnet20(options.norm).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=options.lr, momentum=0.9, weight_decay=options.weight_decay)
    steps = len(train_images) // options.batch_size
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=options.bf16)
    rows, start = [], time.time()
    for epoch in range(options.epochs):
        net.train()
        wrong, order = 0, rng.permutation(len(train_images))
        for step in range(steps):
            progress = (epoch * steps + step) / (options.epochs * steps)
            optimizer.param_groups[0]["lr"] = options.lr * 0.5 * (1 + math.cos(math.pi * progress))
            index = order[step * options.batch_size : (step + 1) * options.batch_size]
            labels = train_labels[index]
            with autocast:
                outputs = net(to_input(crop_and_flip(train_images[index], rng)))
            loss = F.cross_entropy(outputs.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            wrong += (outputs.argmax(1) != labels).sum().item()
        row = {"epoch": epoch + 1, "train_error": 100 * wrong / (steps * options.batch_size)}
        if (epoch + 1) % 5 == 0 or epoch + 1 == options.epochs:
            net.eval()
            with torch.no_grad(), autocast:
                outputs = torch.cat([net(to_input(batch)) for batch in np.array_split(test_images, 20)])
            row["test_error"] = 100 * (outputs.argmax(1) != test_labels).float().mean().item()
        rows.append(row)
        print(f"{time.time() - start:.0f} s", row, flush=True)
    if options.out:
        settings = {key: str(value) for key, value in vars(options).items() if key not in ("out", "directory")}
        environment = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        found = {"settings": settings, "environment": environment, "epochs": rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
