"""CIFAR-10 and CIFAR-100: torchvision's archives, prepared once by gnbench.datasets.prepare, then memory-mapped."""

import hashlib
import os
import shlex
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np

from gnbench.datasets import Images, cache_root, make_images, open_images
from gnbench.errors import UserError
from gnbench.torchvision_compat import import_torchvision

# MD5 as in torchvision.datasets, SHA-256 as in keras.datasets; `dataset` is torchvision's class that reads the pickles.
ARCHIVES = {
    "cifar10": {
        "file": "cifar-10-python.tar.gz",
        "url": "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "dataset": "CIFAR10",
        "md5": "c58f30108f718f92721af3b95e74349a",
        "sha256": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    },
    "cifar100": {
        "file": "cifar-100-python.tar.gz",
        "url": "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "dataset": "CIFAR100",
        "md5": "eb9058c3a382ffc7106e4002c42a8d85",
        "sha256": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    },
}
CHUNK = 2**20  # bytes read at once for a checksum


def load_cifar(name: str = "cifar10", root: str | None = None, verify: bool = True) -> Images:
    """The prepared set `name` (cifar10 or cifar100) in `root`; nothing is ever downloaded here.

    Args:
        root: the directory given to the command that prepared it; None is $GNBENCH_DATA, or
            $XDG_CACHE_HOME/gnbench (~/.cache/gnbench).
        verify: compare every array with its checksum; False reads the fingerprint alone.

    Raises:
        UserError: `name` is not known, or the set is missing or corrupt; the message says which command mends it.
    """
    directory = prepared_directory(name, root)
    command = f"python -m gnbench.datasets.prepare {name}" + (f" --root {shlex.quote(str(root))}" if root else "")
    try:
        images = open_images(directory, name, verify)
    except UserError as error:
        raise UserError(f"{error}; run: {command}") from error
    if images is None:
        raise UserError(f"{name} is not in {directory}; run: {command}")
    return images


def prepared_directory(name: str, root: str | Path | None) -> Path:
    """Where the prepared set `name` stands; raises UserError if `name` is not known."""
    if name not in ARCHIVES:
        raise UserError(f"data set {name!r} is not known: it is one of {', '.join(ARCHIVES)}")
    return data_root(root) / name


def data_root(root: str | Path | None) -> Path:
    """`root`, or $GNBENCH_DATA, or the cache's directory."""
    return Path(root or os.environ.get("GNBENCH_DATA") or cache_root()).expanduser()


def check_archive(name: str, path: Path) -> None:
    """Compare a downloaded archive with the checksums of ARCHIVES.

    Raises:
        UserError: it cannot be read or it is another file.
    """
    for algorithm in ("md5", "sha256"):
        expected = ARCHIVES[name][algorithm]
        found = _digest_file(path, algorithm)
        if found != expected:
            raise UserError(f"{path} is not the archive of {name}: its {algorithm} is {found}, expected {expected}")


def _digest_file(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"cannot read the archive {path}: {error.strerror}") from error
    return digest.hexdigest()


def unpack_archive(name: str, path: Path, scratch: Path) -> Images:
    """The images of an archive that `check_archive` has passed; it is unpacked in `scratch`, which is then removed.

    Raises:
        UserError: it cannot be unpacked or does not hold the files that torchvision expects.
    """
    dataset = getattr(import_torchvision().datasets, ARCHIVES[name]["dataset"])
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    try:
        with tarfile.open(path, "r:gz") as archive:
            _check_members(archive, scratch)
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python below 3.11.4 has none
            archive.extractall(scratch)
        train, test = dataset(scratch, train=True), dataset(scratch, train=False)  # these check each file's MD5
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"cannot unpack {path} in {scratch.parent}: {error}") from error
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the files of torchvision's {dataset.__name__}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return make_images(
        name,
        tuple(train.classes),
        train_images=np.ascontiguousarray(train.data),
        train_labels=np.array(train.targets, dtype=np.int64),
        test_images=np.ascontiguousarray(test.data),
        test_labels=np.array(test.targets, dtype=np.int64),
    )


def _check_members(archive: tarfile.TarFile, directory: Path) -> None:
    """Raise TarError where an archive holds anything but files and directories, or one outside of `directory`."""
    for member in archive.getmembers():
        inside = (directory / member.name).resolve().is_relative_to(directory.resolve())
        if not inside or not (member.isfile() or member.isdir()):
            raise tarfile.TarError(f"{member.name} is not a file inside of it")
