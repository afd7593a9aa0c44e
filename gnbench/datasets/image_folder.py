"""A folder of image files as a data set, decoded once into a cache."""

import contextlib
import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from stat import S_ISREG

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from gnbench.datasets import Images, cache_root, lock, make_images, open_images, save_images
from gnbench.errors import UserError
from gnbench.words import number_of

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
SPLITS = ("train", "test")
LAYOUT = "the layout is train/<class>/* and test/<class>/*"
VERSION = 1  # of how files become pixels; a change starts a new number, and no cache of the old one is used

log = logging.getLogger(__name__)


def load_image_folder(
    root: str, name: str = "image_folder", size: int = 32, cache: str | None = None, verify: bool = True
) -> Images:
    """The images below `root`/train/<class> and `root`/test/<class>, as `size` x `size` RGB.

    Which files: those whose names end in EXTENSIONS (in either case), in a class folder or deeper. All others, and
    whatever begins with a dot, are ignored. Classes and images stand in the order of their names.

    Which pixels: the file's first frame, as stored (no EXIF rotation); transparency over black; grey as RGB; a
    colour's 16 bits as 8; the largest centred square, resized with an antialiased bilinear filter; an image of `size` x
    `size` as it is.

    They are decoded once, into a directory in `cache` (None: $XDG_CACHE_HOME/gnbench, or ~/.cache/gnbench), and
    again when any file's name, size or time changes, or when the cache is corrupt. Several processes that need the
    same cache decode it once.

    Args:
        name: what the set is called in records and figures.
        verify: compare every cached array with its checksum; False reads the fingerprint alone.

    Raises:
        UserError: the layout is another, a class is empty, train and test differ in their classes, a file is
            broken or grey with more than 8 bits, or the cache cannot be written.
    """
    if not isinstance(size, int) or size < 1:
        raise UserError(f"data.size={size} is not legal for the images of {root}: it is a number of pixels, 1 or more")
    root = Path(root).expanduser()
    files = find_images(root)
    listing = digest_listing(root, files)
    place = (Path(cache).expanduser() if cache else cache_root()) / "image_folder"
    series = f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}-{size}"  # the caches of this folder
    directory = place / f"{series}-{listing[:16]}"
    with contextlib.suppress(UserError):  # a corrupt cache is mended below, by one process
        if images := open_images(directory, name, verify):
            return images
    with lock(place / series):
        try:
            images = open_images(directory, name, verify)  # another process may have made it by now
        except UserError as error:
            log.warning("%s; decoding %s again", error, root)
            images = None
        if images is None:
            images = decode_folder(root, files, name, size)
            if digest_listing(root, files) != listing:
                raise UserError(f"the images in {root} changed while they were decoded: run again when they are whole")
            save_images(images, directory)
            for other in place.glob(f"*{series}-*"):
                if other != directory:  # of files that have changed since, or of a process that was killed
                    shutil.rmtree(other, ignore_errors=True)
            images = open_images(directory, name, verify=False)
    return images


def find_images(root: Path) -> dict[str, dict[str, list[str]]]:
    """The image files of each split and class, as paths below `root`; classes and paths are sorted.

    Raises:
        UserError: a folder is missing or empty, or train and test differ in their classes.
    """
    files = {split: {name: [] for name in _class_names(root / split)} for split in SPLITS}
    unpaired = sorted(files["train"].keys() ^ files["test"].keys())
    if unpaired:
        raise UserError(f"{root}/train and {root}/test differ in their classes: {', '.join(unpaired)} is in one alone")
    for split, classes in files.items():
        for name, paths in classes.items():
            paths += sorted(_walk_images(root, f"{split}/{name}"))
            if not paths:
                raise UserError(f"{root}/{split}/{name} has no image: names of images end in {' '.join(EXTENSIONS)}")
    return files


def _class_names(folder: Path) -> list[str]:
    try:
        folders = [entry.name for entry in list(os.scandir(folder)) if entry.is_dir()]
    except OSError as error:
        raise UserError(f"cannot read the folder {folder} ({error.strerror}): {LAYOUT}") from error
    names = [name for name in folders if not name.startswith(".")]
    if not names:
        raise UserError(f"{folder} has no class folder: {LAYOUT}")
    if len(names) == 1:
        raise UserError(f"{folder} has one class alone, {names[0]}: there is nothing to tell apart")
    return sorted(names)


def _walk_images(root: Path, folder: str) -> Iterator[str]:
    """The image files in `root`/`folder` and below, as paths below `root`."""
    try:
        for entry in list(os.scandir(root / folder)):
            path = f"{folder}/{entry.name}"
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk_images(root, path)
            elif entry.name.lower().endswith(EXTENSIONS):
                yield path
    except OSError as error:
        raise UserError(f"cannot read the folder {root / folder}: {error.strerror}") from error


def digest_listing(root: Path, files: dict[str, dict[str, list[str]]]) -> str:
    """A hex digest of the files' names, sizes and times, which changes when any of them does.

    The time of the last change (ctime) counts beside that of the last write (mtime): unpacking and copying may set
    the latter to that of an older file.
    """
    digest = hashlib.sha256(str(VERSION).encode())
    for classes in files.values():
        for path in chain.from_iterable(classes.values()):
            try:
                stat = os.stat(f"{root}/{path}")
            except OSError as error:
                raise UserError(f"cannot read {root}/{path}: {error.strerror}") from error
            if not S_ISREG(stat.st_mode):  # a pipe would be waited for without end
                raise UserError(f"{root}/{path} is no file, though its name ends like an image's")
            digest.update(os.fsencode(f"{path}\0{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n"))
    return digest.hexdigest()


def decode_folder(root: Path, files: dict[str, dict[str, list[str]]], name: str, size: int) -> Images:
    """Decode the `files` that `find_images` found; stderr gets a bar, or a line where it is no terminal."""
    num_images = sum(len(paths) for classes in files.values() for paths in classes.values())
    arrays = {}
    with tqdm(total=num_images, desc=f"decoding {name}", unit="image", disable=None) as bar:
        if bar.disable:
            told = f"decoding {number_of(num_images, 'image')} of {root} to {size} x {size}, once for all runs"
            print(f"gnbench: {told}", file=sys.stderr, flush=True)
        for split, classes in files.items():
            counts = [len(paths) for paths in classes.values()]
            images = np.empty((sum(counts), size, size, 3), dtype=np.uint8)
            for image, path in zip(images, chain.from_iterable(classes.values()), strict=True):
                image[:] = decode_image(f"{root}/{path}", size)
                bar.update()
            arrays[f"{split}_images"] = images
            arrays[f"{split}_labels"] = np.repeat(np.arange(len(counts)), counts)
    return make_images(name, tuple(files["train"]), **arrays)


def decode_image(path: str, size: int) -> np.ndarray:
    """One file as RGB (size, size, 3), uint8, by the rules of `load_image_folder`.

    Raises:
        UserError: it is broken, no image, or grey with more than 8 bits.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{path} is grey with more than 8 bits (mode {image.mode}): save it with 8")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.convert("RGB").crop((left, top, left + side, top + side))
            return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))  # as it is, if it has that size
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image, though its name ends like one") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise errors of many kinds
        raise UserError(f"{path} cannot be decoded: {error}") from error
