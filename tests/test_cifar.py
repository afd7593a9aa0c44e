"""gnbench.datasets.cifar and the import of torchvision: a prepared set is loaded, everything else is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gnbench.datasets import ARRAYS, make_images, save_images
from gnbench.datasets.cifar import ARCHIVES, load_cifar
from gnbench.errors import UserError
from gnbench.torchvision_compat import import_torchvision

REPOSITORY = Path(__file__).parent.parent


def made_up_images(name: str = "cifar10"):
    rng = np.random.default_rng(0)
    return make_images(
        name,
        ("airplane", "automobile", "bird"),
        train_images=rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8),
        train_labels=rng.integers(0, 3, 20),
        test_images=rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8),
        test_labels=rng.integers(0, 3, 10),
    )


@pytest.fixture
def root(tmp_path):
    save_images(made_up_images(), tmp_path / "cifar10")
    return tmp_path


def run_python(code: str, path: Path | str = "") -> str:
    """What `code` prints; `path` comes first in the search for modules."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(REPOSITORY)])}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


# The prepared set


def test_loads_what_was_saved(root):
    images, expected = load_cifar("cifar10", root), made_up_images()
    assert (images.name, images.classes, images.fingerprint) == ("cifar10", expected.classes, expected.fingerprint)
    for key in ARRAYS:
        found = getattr(images, key)
        assert isinstance(found, np.memmap)
        assert found.dtype == getattr(expected, key).dtype
        np.testing.assert_array_equal(found, getattr(expected, key))


def test_fingerprint_is_of_content_and_not_of_the_name():
    assert made_up_images("cifar10").fingerprint == made_up_images("other").fingerprint


@pytest.mark.parametrize("key", ARRAYS)
def test_fingerprint_covers_every_array_its_shape_and_type(key):
    arrays = {key: getattr(made_up_images(), key) for key in ARRAYS}
    changed = arrays[key].copy()
    changed.reshape(-1)[-1] ^= 1
    retyped = arrays[key].view(np.int8 if "images" in key else np.float64)  # the same bytes
    versions = [arrays[key], changed, arrays[key][::-1], arrays[key][:, None], retyped]
    fingerprints = {make_images("x", ("a", "b", "c"), **{**arrays, key: version}).fingerprint for version in versions}
    assert len(fingerprints) == len(versions)


def test_fingerprint_covers_the_classes():
    arrays = {key: getattr(made_up_images(), key) for key in ARRAYS}
    names = [("a", "b", "c"), ("a", "c", "b"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    assert len({make_images("x", classes, **arrays).fingerprint for classes in names}) == len(names)


def test_fingerprint_does_not_depend_on_memory_order():
    arrays = {key: getattr(made_up_images(), key) for key in ARRAYS}
    turned = {key: np.asfortranarray(array) for key, array in arrays.items()}
    assert make_images("x", ("a",), **arrays).fingerprint == make_images("x", ("a",), **turned).fingerprint


def test_root_is_the_argument_or_the_environments_or_the_cache(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("GNBENCH_DATA", raising=False)
    with pytest.raises(UserError, match=r"home/\.cache/gnbench/cifar10"):
        load_cifar()
    monkeypatch.setenv("GNBENCH_DATA", str(root))
    assert len(load_cifar().train_labels) == 20
    with pytest.raises(UserError, match="elsewhere/cifar10"):
        load_cifar(root=tmp_path / "elsewhere")


def test_missing_set_names_the_place_and_the_command(tmp_path):
    with pytest.raises(UserError) as refusal:
        load_cifar("cifar100", f"{tmp_path}/my data")
    sentence = str(refusal.value)
    assert f"cifar100 is not in {tmp_path}/my data/cifar100" in sentence
    assert sentence.endswith(f"run: python -m gnbench.datasets.prepare cifar100 --root '{tmp_path}/my data'")


def test_unknown_name_is_refused(root):
    with pytest.raises(UserError, match="'cifar11' is not known: it is one of cifar10, cifar100"):
        load_cifar("cifar11", root)


@pytest.mark.parametrize("key", ARRAYS)
def test_corrupt_set_is_refused_by_name(root, key):
    path = root / "cifar10" / f"{key}.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"corrupt \({key}\.npy .*; run: python -m gnbench\.datasets\.prepare cifar10"):
        load_cifar("cifar10", root)
    assert load_cifar("cifar10", root, verify=False).fingerprint == made_up_images().fingerprint  # pixels are not read


def test_a_run_unpickles_nothing(tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "train_images.npy").write_bytes(b"cos\nabort\n(tR.")  # a pickle that ends Python
    (tmp_path / "cifar10" / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="corrupt"):
        load_cifar("cifar10", tmp_path)


def test_loading_needs_neither_torch_nor_torchvision(root):
    code = f"import sys; from gnbench.datasets.cifar import load_cifar; load_cifar('cifar10', {str(root)!r}); "
    assert run_python(code + "print('torch' in sys.modules)") == "False\n"


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_are_torchvisions(name):
    dataset = getattr(import_torchvision().datasets, ARCHIVES[name]["dataset"])
    assert (dataset.filename, dataset.url, dataset.tgz_md5) == tuple(
        ARCHIVES[name][key] for key in ("file", "url", "md5")
    )


# import_torchvision

HEALTHY = "print('imported')\nworks = True\n"
FAULTY = """
import torch
from . import extension  # a part that loads before the fault
for name in ("nms", "qnms"):
    torch._C._dispatch_has_kernel_for_dispatch_key(f"torchvision::{name}", "Meta")  # raises where no schema is declared
works = True
"""
IMPORT = """
import torch
from gnbench.torchvision_compat import import_torchvision
print(import_torchvision().works, import_torchvision() is import_torchvision())
print("declared" if hasattr(torch.ops.torchvision, "nms") else "not declared")
"""


def write_torchvision(directory: Path, content: str) -> None:
    (directory / "torchvision").mkdir()
    (directory / "torchvision" / "__init__.py").write_text(content)
    (directory / "torchvision" / "extension.py").write_text("print('extension')")


def test_healthy_torchvision_is_left_alone(tmp_path):
    write_torchvision(tmp_path, HEALTHY)
    assert run_python(IMPORT, tmp_path) == "imported\nTrue True\nnot declared\n"


def test_faulty_torchvision_is_mended(tmp_path):
    write_torchvision(tmp_path, FAULTY)
    plain = subprocess.run([sys.executable, "-c", "import torchvision"], cwd=tmp_path, capture_output=True, text=True)
    assert "RuntimeError: operator torchvision::nms does not exist" in plain.stderr  # the fault is the real one
    assert run_python(IMPORT, tmp_path) == "extension\nTrue True\ndeclared\n"


def test_other_faults_of_torchvision_are_not_hidden(tmp_path):
    write_torchvision(tmp_path, "print('tried'); raise RuntimeError('compiled with different CUDA major versions')")
    with pytest.raises(subprocess.CalledProcessError) as failure:
        run_python(IMPORT, tmp_path)
    assert "RuntimeError: compiled with different CUDA major versions" in failure.value.stderr
    assert failure.value.stdout == "tried\n"


def test_torchvision_that_cannot_be_imported_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match=r"torchvision cannot be imported .*: run `pip install torchvision`"):
        import_torchvision()


def test_installed_torchvision_has_its_models_and_data_sets():
    code = "t = __import__('gnbench.torchvision_compat').torchvision_compat.import_torchvision(); "
    assert (
        run_python(code + "print(t.models.resnet18().fc.out_features, t.datasets.CIFAR10.__name__)") == "1000 CIFAR10\n"
    )
