"""Encode a folder of images once more as JPEG, chroma halved, and say how far the new ones lie from the old.

A training on them beside one on the old ones shows what an encoding costs, where the images before the first are not
to be had.

    python scripts/reencode.py DIR OUT --quality 55
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

PEAK = 255  # of a pixel


def reencode(source: Path, target: Path, quality: int) -> float:
    """Write `source` anew to `target`; returns the peak signal-to-noise ratio between them in dB."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as image:
        old = image.convert("RGB")
    old.save(target, "JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(target) as image:
        error = np.asarray(image.convert("RGB"), float) - np.asarray(old, float)
    return 10 * np.log10(PEAK**2 / max(np.square(error).mean(), 1e-9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="train/<class>/* and test/<class>/*")
    parser.add_argument("out", type=Path, metavar="OUT", help="the new folder")
    parser.add_argument("--quality", type=int, default=55, choices=range(1, 96), metavar="1..95")
    options = parser.parse_args()
    sources = [path for half in ("train", "test") for path in sorted(options.directory.glob(f"{half}/*/*"))]
    if not sources:
        sys.exit(f"reencode: {options.directory} has no train/<class>/* and test/<class>/*")
    if options.out.exists():
        sys.exit(f"reencode: {options.out} is there already")
    part = options.out.with_name(f"{options.out.name}.part")
    targets = [part / path.relative_to(options.directory).with_suffix(".jpg") for path in sources]
    with ProcessPoolExecutor() as pool:
        work = partial(reencode, quality=options.quality)
        try:
            ratios = np.array(list(pool.map(work, sources, targets, chunksize=500)))
        except OSError as error:  # no image, or no room
            sys.exit(f"reencode: {error}")
    part.rename(options.out)  # whole, or not at all
    low, median, high = np.percentile(ratios, (5, 50, 95))
    print(f"{len(ratios)} images at quality {options.quality}: PSNR {median:.1f} dB in the median, 5 to 95 %: {low:.1f}"
          f" to {high:.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
