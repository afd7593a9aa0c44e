"""gnbench.datasets.image_folder: which files, which pixels, and a cache that survives what happens to caches."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gnbench.datasets import ARRAYS, image_folder, open_images
from gnbench.datasets.image_folder import decode_image, load_image_folder
from gnbench.errors import UserError

REPOSITORY = Path(__file__).parent.parent
CLASSES = ("bird", "cat", "deer")


def random_pixels(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_image(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """3 classes; 2 training images and 1 test image a class; image k has the pixels of seed k."""
    root = tmp_path / "folder"
    seed = 0
    for split, count in (("train", 2), ("test", 1)):
        for name in CLASSES:
            for number in range(count):
                write_image(root / split / name / f"{number}.png", random_pixels(seed))
                seed += 1
    return root


@pytest.fixture
def load(folder, tmp_path):
    """load_image_folder of that folder at the images' own size, with a cache of its own."""
    return lambda **options: load_image_folder(folder, **{"size": 8, "cache": tmp_path / "cache", **options})


def only_cache(tmp_path: Path) -> Path:
    (directory,) = [path for path in (tmp_path / "cache" / "image_folder").iterdir() if path.is_dir()]
    return directory


def run_python(code: str, *args: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Which files


def test_arrays_are_the_files_in_the_order_of_their_names(load):
    images = load(name="mine")
    assert (images.name, images.classes) == ("mine", CLASSES)
    assert images.train_images.dtype == images.test_images.dtype == np.uint8
    assert images.train_labels.dtype == images.test_labels.dtype == np.int64
    assert images.train_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.test_labels.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(images.train_images, [random_pixels(seed) for seed in range(6)])
    np.testing.assert_array_equal(images.test_images, [random_pixels(seed) for seed in range(6, 9)])


def test_hidden_and_foreign_files_are_ignored_and_nested_ones_found(folder, load):
    write_image(folder / "train/cat/.hidden.png", random_pixels(100))
    write_image(folder / "train/cat/.folder/0.png", random_pixels(100))
    write_image(folder / "train/.hidden/0.png", random_pixels(100))
    write_image(folder / "train/loose.png", random_pixels(100))
    (folder / "train/cat/Thumbs.db").write_bytes(b"no image")
    (folder / "train/cat/0.png.txt").write_text("a note")
    write_image(folder / "train/cat/deep/er/0.PNG", random_pixels(50))
    images = load()
    assert images.train_labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    np.testing.assert_array_equal(images.train_images[4], random_pixels(50))  # "deep/..." comes after "1.png"


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda root: shutil.rmtree(root), "cannot read the folder {root}/train"),
        (lambda root: shutil.rmtree(root / "test"), "cannot read the folder {root}/test"),
        (lambda root: [shutil.rmtree(path) for path in (root / "test").iterdir()], "{root}/test has no class folder"),
        (
            lambda root: [shutil.rmtree(root / split / name) for split in ("train", "test") for name in CLASSES[1:]],
            f"{{root}}/train has one class alone, {CLASSES[0]}",
        ),
        (lambda root: shutil.rmtree(root / "test/cat"), "differ in their classes: cat is in one alone"),
        (lambda root: (root / "test/cat").rename(root / "test/Cat"), "differ in their classes: Cat, cat"),
        (lambda root: (root / "test/cat/0.png").unlink(), "{root}/test/cat has no image"),
        (lambda root: (root / "train/cat/2.png").symlink_to("nowhere"), "cannot read {root}/train/cat/2.png"),
        (lambda root: (root / "train/cat/loop").symlink_to("."), "Too many levels of symbolic links"),
    ],
)
def test_wrong_layout_is_one_sentence(folder, load, harm, sentence):
    harm(folder)
    with pytest.raises(UserError) as refusal:
        load()
    assert sentence.format(root=folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("size", [0, -1, 2.5, None])
def test_illegal_size_is_refused(load, size):
    with pytest.raises(UserError, match=f"size={size} is not legal"):
        load(size=size)


# Which pixels


def resize_naively(pixels: np.ndarray, size: int) -> np.ndarray:
    """The centred square through a triangle filter that is as wide as two output pixels, in float64."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side].astype(np.float64)
    scale = side / size
    centres = (np.arange(size) + 0.5) * scale
    distance = np.abs(np.arange(side) + 0.5 - centres[:, None]) / max(scale, 1)
    weights = np.maximum(1 - distance, 0)
    weights /= weights.sum(1, keepdims=True)
    return np.einsum("yi,xj,ijc->yxc", weights, weights, square)


@pytest.mark.parametrize(("height", "width", "size"), [(16, 16, 8), (24, 40, 8), (40, 25, 7), (5, 5, 8), (9, 3, 8)])
def test_resize_is_a_centre_crop_and_an_antialiased_triangle_filter(tmp_path, height, width, size):
    pixels = random_pixels(0, height, width)
    write_image(tmp_path / "a.png", pixels)
    found = decode_image(tmp_path / "a.png", size)
    np.testing.assert_allclose(found, resize_naively(pixels, size), atol=1.01)  # Pillow rounds after each axis


def test_grey_is_rgb_with_equal_channels(tmp_path):
    grey = random_pixels(0)[..., 0]
    write_image(tmp_path / "a.png", grey)
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png", 8), np.stack([grey] * 3, axis=-1))


def test_transparency_is_composited_over_black(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    write_image(tmp_path / "a.png", rgba)
    expected = rgba[..., :3] * (rgba[..., 3:] / 255.0)
    np.testing.assert_allclose(decode_image(tmp_path / "a.png", 8), expected, atol=0.51)


def test_transparent_colour_of_a_palette_is_black(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    found = decode_image(tmp_path / "a.png", 8)
    assert found[0, 0].tolist() == [0, 0, 0]
    assert found[0, 1].tolist() == [0, 255, 0]


@pytest.mark.parametrize(("height", "width", "suffix"), [(1, 1, "png"), (3000, 4000, "jpg"), (1, 500, "bmp")])
def test_tiny_and_huge_images(tmp_path, height, width, suffix):
    write_image(tmp_path / f"a.{suffix}", np.full((height, width, 3), 77, dtype=np.uint8))
    np.testing.assert_array_equal(decode_image(tmp_path / f"a.{suffix}", 32), np.full((32, 32, 3), 77))


def test_sixteen_bits_are_refused(tmp_path):
    write_image(tmp_path / "a.png", np.full((8, 8), 60000, dtype=np.uint16))
    with pytest.raises(UserError, match=r"a\.png is grey with more than 8 bits"):
        decode_image(tmp_path / "a.png", 8)


def test_sixteen_bits_of_a_colour_become_eight(tmp_path):
    pixels = np.array([[[0x1212, 0x8080, 0xFFFF]]], dtype=">u2")
    (tmp_path / "a.ppm").write_bytes(b"P6 1 1 65535\n" + pixels.tobytes())
    assert decode_image(tmp_path / "a.ppm", 1).tolist() == [[[0x12, 0x80, 0xFF]]]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(folder, load):
    os.mkfifo(folder / "train/cat/pipe.png")
    with pytest.raises(UserError, match=r"train/cat/pipe\.png is no file, though its name ends like an image's"):
        load()


@pytest.mark.parametrize("name", ["0.png", "0.jpg", "0.tif", "0.webp", "0.bmp"])
@pytest.mark.parametrize("fault", ["truncated", "empty", "text"])
def test_broken_file_is_named_and_nothing_is_cached(folder, load, tmp_path, name, fault):
    path = folder / "test/cat" / name
    write_image(path, random_pixels(0, 64, 64))
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"<html></html>"}[fault])
    with pytest.raises(UserError) as refusal:
        load()
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)
    assert not [entry for entry in (tmp_path / "cache" / "image_folder").iterdir() if entry.is_dir()]


# Fingerprint


def test_fingerprint_is_of_content_alone(folder, load, tmp_path):
    fingerprint = load().fingerprint
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copy)  # new times
    for path in copy.rglob("*.png"):
        path.rename(path.with_name(f"x{path.name}"))
    assert load_image_folder(copy, "other name", 8, tmp_path / "cache2").fingerprint == fingerprint
    assert load(verify=False).fingerprint == fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda root: write_image(root / "train/cat/0.png", random_pixels(99)),
        lambda root: write_image(root / "test/cat/1.png", random_pixels(99)),
        lambda root: (root / "train/cat/1.png").rename(root / "train/bird/2.png"),  # a label
        lambda root: [(root / split / "cat").rename(root / split / "cow") for split in ("train", "test")],
    ],
)
def test_fingerprint_changes_with_pixels_labels_and_classes(folder, load, change):
    before = load().fingerprint
    change(folder)
    assert load().fingerprint != before


# The cache


def refuse_to_decode(path: str, size: int) -> None:
    raise AssertionError(f"{path} was decoded again")


def test_second_load_decodes_nothing_and_says_nothing(load, monkeypatch, capfd, caplog):
    first = load()
    told = capfd.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1), "a line, and no bar: stderr is no terminal"
    monkeypatch.setattr(image_folder, "decode_image", refuse_to_decode)
    for verify in (True, False):
        again = load(verify=verify)
        assert again.fingerprint == first.fingerprint
        for key in ARRAYS:
            np.testing.assert_array_equal(getattr(again, key), getattr(first, key))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_plan_says_that_it_decodes_and_then_no_more(gnbench, folder):
    words = (
        "data=image_folder",
        f"data.root={folder}",
        "data.size=8",
        "data.cache=cache",
        "model=resnet8",
        "batch_size=2",
    )
    plan = ("-m", *words, "norm=gn", "hydra/launcher=plan", "hydra.launcher.commands=true")
    for said in (f"gnbench: decoding 9 images of {folder} to 8 x 8, once for all runs\n", ""):
        done = gnbench(*plan)
        assert (done.returncode, done.stderr) == (0, said)
        assert done.stdout.startswith("gnbench norm=gn ")


def test_arrays_are_mapped_and_read_only(load):
    images = load()
    assert isinstance(images.train_images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        images.train_images[0] = 0


def test_sizes_have_caches_of_their_own(load, monkeypatch):
    small, large = load(size=4), load(size=16)
    assert small.train_images.shape == (6, 4, 4, 3)
    assert large.train_images.shape == (6, 16, 16, 3)
    monkeypatch.setattr(image_folder, "decode_image", refuse_to_decode)
    assert load(size=4).fingerprint == small.fingerprint


def test_changed_file_is_noticed_whatever_its_size_and_write_time(folder, load, tmp_path):
    path = folder / "train/cat/0.bmp"  # without compression: every image has the same size
    write_image(path, random_pixels(20))
    before, stat = load(), path.stat()
    write_image(path, random_pixels(21))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = load()
    np.testing.assert_array_equal(before.train_images[2], random_pixels(20))  # an open map outlives its cache
    np.testing.assert_array_equal(after.train_images[2], random_pixels(21))
    only_cache(tmp_path)  # the stale one is gone


def test_change_while_decoding_is_refused(folder, load, monkeypatch):
    def decode_and_touch(path, size):
        os.utime(folder / "train/bird/0.png", (0, 0))
        return decode_image(path, size)

    monkeypatch.setattr(image_folder, "decode_image", decode_and_touch)
    with pytest.raises(UserError, match="changed while they were decoded"):
        load()
    monkeypatch.undo()
    assert len(load().train_labels) == 6


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("file", [*(f"{key}.npy" for key in ARRAYS), "meta.json"])
@pytest.mark.parametrize(
    "harm", [flip_a_bit, lambda path: os.truncate(path, path.stat().st_size - 1), lambda path: os.truncate(path, 0)]
)
def test_corrupt_cache_is_rebuilt_with_a_word(load, tmp_path, caplog, file, harm):
    before = load().fingerprint
    harm(only_cache(tmp_path) / file)
    after = load()
    assert "corrupt" in caplog.text
    assert after.fingerprint == before
    np.testing.assert_array_equal(after.train_images[0], random_pixels(0))
    caplog.clear()
    load()
    assert not caplog.records


@pytest.mark.parametrize("file", [*(f"{key}.npy" for key in ARRAYS), "meta.json"])
def test_cache_that_lacks_a_file_is_rebuilt(load, tmp_path, file):
    before = load().fingerprint
    (only_cache(tmp_path) / file).unlink()
    assert load().fingerprint == before


def test_corrupt_description_never_yields_a_wrong_fingerprint(load, tmp_path):
    right = load(verify=False).fingerprint
    meta = only_cache(tmp_path) / "meta.json"
    meta.write_text(meta.read_text().replace(right[:8], "00000000"))
    assert load(verify=False).fingerprint == right


def test_no_flipped_byte_of_an_array_passes(load, tmp_path):
    images = load()
    directory = only_cache(tmp_path)
    path = directory / "test_labels.npy"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            found = open_images(directory, "x")
        except UserError:
            continue
        np.testing.assert_array_equal(found.test_labels, images.test_labels)  # a blank of the header's padding


COUNTED_LOAD = """
import sys, time
from gnbench.datasets import image_folder
decode = image_folder.decode_image
def decode_and_count(path, size):
    with open(sys.argv[3], "a") as file:
        file.write("x")
    time.sleep(0.02)
    return decode(path, size)
image_folder.decode_image = decode_and_count
print(image_folder.load_image_folder(sys.argv[1], "x", 8, sys.argv[2]).fingerprint, "torch" in sys.modules)
"""


def test_processes_that_start_together_decode_once(folder, tmp_path):
    count = tmp_path / "count"
    processes = [run_python(COUNTED_LOAD, folder, tmp_path / "cache", count) for _ in range(3)]
    answers = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert count.read_text() == "x" * 9
    assert len(answers) == 1
    assert answers.pop().endswith(" False\n")  # a plan needs no torch


KILLED_LOAD = """
import os, signal, sys
from gnbench.datasets import image_folder
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)  # with the first array written
image_folder.load_image_folder(sys.argv[1], "x", 8, sys.argv[2])
"""


def test_process_killed_while_it_writes_leaves_nothing_wrong(folder, load, tmp_path):
    process = run_python(KILLED_LOAD, folder, tmp_path / "cache")
    process.communicate()
    assert process.returncode == -9
    assert list((tmp_path / "cache" / "image_folder").glob("*.partial"))
    os.utime(folder / "train/cat/0.png", (0, 0))  # another listing, so another cache
    assert len(load().train_labels) == 6
    only_cache(tmp_path)  # and what it left is gone


FULL_DISK_LOAD = """
import resource, sys
from gnbench.datasets.image_folder import load_image_folder
from gnbench.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
try:
    load_image_folder(sys.argv[1], "x", 8, sys.argv[2])
except UserError as error:
    print(error)
"""


def test_disk_that_takes_no_more_is_one_sentence(folder, load, tmp_path):
    output, errors = run_python(FULL_DISK_LOAD, folder, tmp_path / "cache").communicate()
    assert output.startswith(f"cannot write {tmp_path}/cache/image_folder/"), errors
    assert output.count("\n") == 1
    assert "File too large" in output
    assert not [entry for entry in (tmp_path / "cache" / "image_folder").iterdir() if entry.is_dir()]
    assert len(load().train_labels) == 6


def test_cache_below_a_file_is_one_sentence(load, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/image_folder"):
        load(cache=tmp_path / "file")


def test_default_cache_follows_xdg(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_image_folder(str(folder), size=8)
    assert list((tmp_path / "xdg/gnbench/image_folder").glob("*/meta.json"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_image_folder(str(folder), size=8)
    assert list((tmp_path / "home/.cache/gnbench/image_folder").glob("*/meta.json"))
