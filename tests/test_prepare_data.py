"""gnbench.datasets.prepare: archives good and bad, servers good and bad, and two commands at once.

The archive is made here, in the layout of CIFAR-10's and with checksums of its own, and served on this machine.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from gnbench.datasets import cifar, prepare
from gnbench.datasets.cifar import ARCHIVES, load_cifar
from gnbench.torchvision_compat import import_torchvision

REPOSITORY = Path(__file__).parent.parent
SCRIPT = REPOSITORY / "scripts" / "prepare_data"
CLASSES = ["airplane", "automobile", "bird"]
BATCHES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
ARCHIVE = "cifar-10-python.tar.gz"


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def make_batch(seed: int) -> dict:
    """10 images in CIFAR's layout: a row is 1024 red, 1024 green, 1024 blue."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
    return {"batch_label": f"batch {seed}", "labels": rng.integers(0, 3, 10).tolist(), "data": data}


def make_archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


FILES = {f"cifar-10-batches-py/{name}": pickle.dumps(make_batch(seed)) for seed, name in enumerate(BATCHES)}
FILES["cifar-10-batches-py/batches.meta"] = pickle.dumps({"label_names": CLASSES})
CONTENT = make_archive(FILES)  # about 185 kB: three reads from a server


def checksums(archive: bytes) -> dict[str, str]:
    return {algorithm: hashlib.new(algorithm, archive).hexdigest() for algorithm in ("md5", "sha256")}


def expect_archive(monkeypatch, archive: bytes) -> None:
    for algorithm, digest in checksums(archive).items():
        monkeypatch.setitem(ARCHIVES["cifar10"], algorithm, digest)


@pytest.fixture(autouse=True)
def small_cifar(monkeypatch):
    """The archive made here is the expected one; each file's checksum is torchvision's to know."""
    expect_archive(monkeypatch, CONTENT)
    digests = {path.split("/")[1]: md5(content) for path, content in FILES.items()}
    dataset = import_torchvision().datasets.CIFAR10
    monkeypatch.setattr(dataset, "train_list", [[name, digests[name]] for name in BATCHES[:5]])
    monkeypatch.setattr(dataset, "test_list", [["test_batch", digests["test_batch"]]])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": digests["batches.meta"]})
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "copy.tar.gz"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def run_command(root, capfd):
    """Run the command on cifar10 and return its exit status, what it printed and the sentence that it ended with."""

    def run(*options: object) -> tuple[int, str, str]:
        status = prepare.main(["cifar10", "--root", str(root), *map(str, options)])
        output, errors = capfd.readouterr()
        assert "Traceback" not in errors
        return status, output, (errors.splitlines() or [""])[-1]

    return run


def assert_refused(answer: tuple[int, str, str], *parts: object) -> None:
    status, output, sentence = answer
    assert status == 2
    assert output == ""
    for part in parts:
        assert str(part) in sentence


def assert_whole(root: Path) -> None:
    images = load_cifar("cifar10", root)
    rows = np.concatenate([make_batch(seed)["data"] for seed in range(6)])
    pixels = rows.reshape(60, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = [label for seed in range(6) for label in make_batch(seed)["labels"]]
    np.testing.assert_array_equal(images.train_images, pixels[:50])
    np.testing.assert_array_equal(images.test_images, pixels[50:])
    assert images.train_labels.tolist() + images.test_labels.tolist() == labels
    assert images.train_labels.dtype == images.test_labels.dtype == np.int64
    assert images.classes == tuple(CLASSES)


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.name.endswith(".lock")}


# A copy at hand


def test_archive_at_hand_is_prepared_and_left_alone(run_command, root, archive):
    status, output, _ = run_command("--archive", archive)
    assert status == 0
    assert output == f"cifar10 is ready in {root}/cifar10: 50 training and 10 test images of 3 classes\n"
    assert_whole(root)
    assert names_in(root) == {"cifar10"}
    assert archive.read_bytes() == CONTENT


def test_second_run_does_nothing(run_command, root, archive, monkeypatch):
    run_command("--archive", archive)
    before = {path: path.stat().st_ctime_ns for path in (root / "cifar10").iterdir()}
    monkeypatch.setattr(cifar, "import_torchvision", None)
    archive.unlink()
    assert run_command("--archive", archive)[0] == 0
    assert {path: path.stat().st_ctime_ns for path in (root / "cifar10").iterdir()} == before


def test_corrupt_set_is_prepared_again(run_command, root, archive, capfd):
    run_command("--archive", archive)
    os.truncate(root / "cifar10" / "test_images.npy", 1000)
    assert prepare.main(["cifar10", "--root", str(root), "--archive", str(archive)]) == 0
    assert "corrupt" in capfd.readouterr().err
    assert_whole(root)


def bad_archives() -> dict[str, bytes]:
    flipped = bytearray(CONTENT)
    flipped[len(CONTENT) // 2] ^= 1
    html = b"<!DOCTYPE html><html>Sign in to the network</html>"
    return {"truncated": CONTENT[:-1000], "flipped": bytes(flipped), "html": html, "empty": b""}


@pytest.mark.parametrize("fault", bad_archives())
def test_bad_archive_is_refused_before_anything_is_unpacked(run_command, root, archive, monkeypatch, fault):
    monkeypatch.setattr(prepare, "unpack_archive", None)
    archive.write_bytes(bad_archives()[fault])
    answer = run_command("--archive", archive)
    assert_refused(answer, f"{archive} is not the archive of cifar10", f"expected {md5(CONTENT)}")
    assert names_in(root) == set()
    assert archive.exists()


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_each_checksum_counts(run_command, archive, monkeypatch, algorithm):
    monkeypatch.setitem(ARCHIVES["cifar10"], algorithm, "0" * 32)
    assert_refused(run_command("--archive", archive), f"its {algorithm} is {checksums(CONTENT)[algorithm]}")


def test_archive_that_is_not_there_is_refused(run_command, tmp_path):
    assert_refused(run_command("--archive", tmp_path / "none"), f"cannot read the archive {tmp_path}/none")
    assert_refused(run_command("--archive", tmp_path), f"cannot read the archive {tmp_path}")


# Archives that pass their checksum and are bad all the same


def test_archive_that_reaches_out_of_its_directory_is_refused(run_command, root, archive, monkeypatch):
    evil = make_archive({**FILES, "../../evil": b"evil"})
    expect_archive(monkeypatch, evil)
    archive.write_bytes(evil)
    assert_refused(run_command("--archive", archive), f"cannot unpack {archive}", "evil")
    assert names_in(root) == set()
    assert names_in(root.parent) == {"data", "copy.tar.gz"}


@pytest.mark.parametrize("fault", ["truncated", "html", "empty"])
def test_archive_that_cannot_be_unpacked_is_refused(run_command, root, archive, monkeypatch, fault):
    content = bad_archives()[fault]
    expect_archive(monkeypatch, content)
    archive.write_bytes(content)
    assert_refused(run_command("--archive", archive), f"cannot unpack {archive}")
    assert names_in(root) == set()


def test_file_inside_that_torchvision_does_not_know_is_never_unpickled(run_command, root, archive, monkeypatch):
    other = make_archive({**FILES, "cifar-10-batches-py/data_batch_3": b"cos\nabort\n(tR."})  # would end Python
    expect_archive(monkeypatch, other)
    archive.write_bytes(other)
    assert_refused(run_command("--archive", archive), f"{archive} does not hold the files of torchvision's CIFAR10")
    assert names_in(root) == set()


def test_leftovers_of_a_killed_command_are_replaced(run_command, root, archive):
    for name in (".cifar10.unpacked", ".cifar10.partial"):
        (root / name).mkdir(parents=True)
        (root / name / "cifar-10-batches-py").write_bytes(b"half")
    assert run_command("--archive", archive)[0] == 0
    assert_whole(root)
    assert names_in(root) == {"cifar10"}


# Servers


class Server(ThreadingHTTPServer):
    """Serves `content`; `faults` is used up from its start, one a request, then all goes well."""

    daemon_threads = True

    def __init__(self, content: bytes = CONTENT):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.faults, self.ranges = content, [], []
        self.stop = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/{ARCHIVE}"

    def handle_error(self, request, client_address):
        """A client that hangs up is part of these tests."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.ranges.append(self.headers["Range"])
        fault, argument = server.faults.pop(0) if server.faults else ("none", None)
        if fault == "status":
            self.send_error(argument)
            return
        start = int(self.headers["Range"][6:-1]) if self.headers["Range"] and fault != "no ranges" else 0
        if start >= len(server.content):
            self.send_error(416)
            return
        body = b"<html>Sign in</html>" if fault == "html" else server.content[start:]
        resumed = start > 0 and fault != "html"
        self.send_response(206 if resumed else 200)
        self.send_header("Content-Type", "text/html" if fault == "html" else "application/gzip")
        if resumed:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if fault != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:argument] if fault in ("drop", "stall") else body)
        if fault == "stall":
            server.stop.wait(30)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between tries, not waited for."""
    pauses = []
    monkeypatch.setattr(prepare.time, "sleep", pauses.append)
    return pauses


def part_of(root: Path) -> Path:
    return root / f"{ARCHIVE}.part"


def test_fetches_and_keeps_the_archive(run_command, root, server):
    assert run_command("--url", server.url)[0] == 0
    assert_whole(root)
    assert names_in(root) == {"cifar10", ARCHIVE}
    assert server.ranges == [None]


def test_kept_archive_is_used_without_a_network(run_command, root, archive):
    root.mkdir()
    shutil.copy(archive, root / ARCHIVE)
    assert run_command("--url", "http://127.0.0.1:9/")[0] == 0
    assert_whole(root)


def test_kept_archive_that_is_corrupt_is_set_aside(run_command, root, server):
    root.mkdir()
    (root / ARCHIVE).write_bytes(CONTENT[:-5])
    assert run_command("--url", server.url)[0] == 0
    assert_whole(root)
    assert (root / f"{ARCHIVE}.corrupt").read_bytes() == CONTENT[:-5]


def test_dropped_connections_are_resumed(run_command, root, server, pauses):
    server.faults = [("drop", 100_000), ("drop", 50_000)]
    assert run_command("--url", server.url)[0] == 0
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert pauses == [1, 1]
    assert_whole(root)


def test_stalled_server_is_resumed(run_command, root, server, pauses):
    server.faults = [("stall", 70_000)]
    assert run_command("--url", server.url, "--timeout", 1)[0] == 0
    assert server.ranges == [None, "bytes=70000-"]
    assert_whole(root)


def test_server_that_stays_stalled_is_given_up_and_resumed_by_the_next_command(run_command, root, server, pauses):
    server.faults = [("stall", 70_000), ("stall", 0)]
    answer = run_command("--url", server.url, "--timeout", 1, "--retries", 1)
    assert_refused(answer, server.url, "no byte in 1 s", f"0.1 MB are kept in {part_of(root)}")
    assert part_of(root).read_bytes() == CONTENT[:70_000]
    assert names_in(root) == {part_of(root).name}
    assert pauses == [1]
    assert run_command("--url", server.url)[0] == 0
    assert server.ranges[-1] == "bytes=70000-"
    assert_whole(root)


def test_server_that_never_answers_is_given_up(run_command, pauses):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        assert_refused(run_command("--url", url, "--timeout", 0.1, "--retries", 1), url, "no byte in 0.1 s")


def test_server_without_ranges_starts_from_the_beginning(run_command, root, server, pauses):
    server.faults = [("drop", 100_000), ("no ranges", None)]
    assert run_command("--url", server.url)[0] == 0
    assert_whole(root)


def test_server_that_tells_no_length_is_believed(run_command, root, server):
    server.faults = [("no length", None)]
    assert run_command("--url", server.url)[0] == 0
    assert_whole(root)


def test_download_that_was_complete_is_used(run_command, root, server):
    root.mkdir()
    part_of(root).write_bytes(CONTENT)
    assert run_command("--url", server.url)[0] == 0
    assert server.ranges == [f"bytes={len(CONTENT)}-"]
    assert_whole(root)


@pytest.mark.parametrize("kept", [0, 90_000])
def test_page_of_html_is_refused_and_does_not_touch_what_is_kept(run_command, root, server, kept):
    root.mkdir()
    if kept:
        part_of(root).write_bytes(CONTENT[:kept])
    server.faults = [("html", None)]
    assert_refused(run_command("--url", server.url), server.url, "sent text/html, expected a gzip archive")
    assert prepare.size_of(part_of(root)) == kept
    assert run_command("--url", server.url)[0] == 0
    assert_whole(root)


def test_wrong_download_is_set_aside_and_the_next_command_starts_again(run_command, root, server):
    server.content = bad_archives()["flipped"]
    answer = run_command("--url", server.url)
    assert_refused(answer, "is not the archive of cifar10", f"expected {md5(CONTENT)}", f"{ARCHIVE}.part.corrupt")
    assert names_in(root) == {f"{ARCHIVE}.part.corrupt"}
    server.content = CONTENT
    assert run_command("--url", server.url)[0] == 0
    assert server.ranges == [None, None]
    assert_whole(root)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_refusal_of_the_server_is_final(run_command, server, pauses, status):
    server.faults = [("status", status)]
    assert_refused(run_command("--url", server.url), server.url, f"HTTP Error {status}", "--archive FILE")
    assert pauses == []


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_passing_errors_of_the_server_are_tried_again(run_command, root, server, pauses, status):
    server.faults = [("status", status)] * 3
    assert run_command("--url", server.url)[0] == 0
    assert pauses == [1, 2, 4]
    assert_whole(root)


def test_no_network_is_one_sentence(run_command, root, pauses):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    assert_refused(run_command("--url", url, "--retries", 1), url, "Connection refused", "--archive FILE")
    assert names_in(root) == set()


@pytest.mark.parametrize("url", ["cifar", "http://", "http://a b/", "gopher://a/", "http://127.0.0.1:port/"])
def test_illegal_url_is_refused_at_once(run_command, pauses, url):
    assert_refused(run_command("--url", url), f"cannot fetch {url}")
    assert pauses == []


def test_root_that_cannot_be_written_is_one_sentence(run_command, root):
    root.write_text("a file")
    assert_refused(run_command(), f"cannot write {root}")


def test_interrupted_command_keeps_what_came(run_command, root, server, monkeypatch):
    server.faults = [("drop", 70_000)]

    def interrupt(pause_s):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare.time, "sleep", interrupt)
    status, _, sentence = run_command("--url", server.url)
    assert status == 130
    assert "run again to continue" in sentence
    assert part_of(root).read_bytes() == CONTENT[:70_000]


# The command itself

COMMAND = """
import json, resource, sys
import numpy
from gnbench.datasets import ARRAYS, cifar, make_images, prepare
cifar.ARCHIVES["cifar10"].update(json.loads(sys.argv[1]))
def unpack_archive(name, path, scratch):
    print("unpacked", flush=True)
    return make_images(name, ("a",), **{key: numpy.zeros(4) for key in ARRAYS})
prepare.unpack_archive = unpack_archive
if sys.argv[2] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
sys.exit(prepare.main(sys.argv[3:]))
"""


def start_command(root: Path, *options: object, file_limit: int = 0) -> subprocess.Popen:
    """The command in a process of its own; unpacking, which takes an import of torch, is made up."""
    arguments = [json.dumps(checksums(CONTENT)), file_limit, "cifar10", "--root", root, *options]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_commands_at_once_fetch_and_unpack_once(root, server):
    server.faults = [("stall", 70_000)]
    first = start_command(root, "--url", server.url)
    while not server.ranges:
        assert first.poll() is None
        time.sleep(0.01)
    second = start_command(root, "--url", server.url)
    assert "waiting for another process that is preparing" in second.stderr.readline()
    server.stop.set()  # the first one's connection ends, and it resumes
    outputs = [process.communicate()[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert server.ranges == [None, "bytes=70000-"]
    assert ["unpacked" in output for output in outputs] == [True, False]
    assert all("cifar10 is ready" in output for output in outputs)


def test_killed_download_is_continued(run_command, root, server):
    server.faults = [("stall", 70_000)]
    process = start_command(root, "--url", server.url)
    while prepare.size_of(part_of(root)) < 65_536:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    kept = prepare.size_of(part_of(root))
    assert run_command("--url", server.url)[0] == 0
    assert server.ranges == [None, f"bytes={kept}-"]
    assert_whole(root)


def test_full_disk_is_final_and_one_sentence(root, server):
    process = start_command(root, "--url", server.url, file_limit=100_000)
    output, errors = process.communicate()
    assert process.returncode == 2
    assert output == ""
    assert "File too large" in errors.splitlines()[-1]
    assert len(server.ranges) == 1
    assert CONTENT.startswith(part_of(root).read_bytes())


def run_script(*arguments: object, script: Path = SCRIPT, python: tuple[str, ...] = (sys.executable,)):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [*python, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)


def test_script_runs_the_code_of_its_clone_whatever_is_installed(tmp_path):
    for folder in ("scripts", "gnbench/datasets"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "gnbench/__init__.py").touch()
    (tmp_path / "gnbench/datasets/__init__.py").touch()
    (tmp_path / "gnbench/datasets/prepare.py").write_text("def main():\n    print('of this clone')\n    return 3\n")
    found = run_script(script=shutil.copy(SCRIPT, tmp_path / "scripts"))
    assert (found.returncode, found.stdout) == (3, "of this clone\n")


def test_script_ends_with_one_sentence(tmp_path):
    found = run_script("cifar10", "--root", tmp_path, "--archive", tmp_path / "none")
    assert found.returncode == 2
    assert found.stderr == f"prepare_data: cannot read the archive {tmp_path}/none: No such file or directory\n"
    assert os.access(SCRIPT, os.X_OK)


def test_script_says_that_gnbench_is_not_installed():
    found = run_script("cifar10", python=(sys.executable, "-S"))  # without site-packages
    assert found.returncode == 2
    assert f"gnbench is not installed for {sys.executable} (No module named" in found.stderr
    assert f"-m pip install {REPOSITORY}" in found.stderr
    assert found.stderr.count("\n") == 1


def test_script_refuses_an_unknown_data_set():
    found = run_script("cifar11")
    assert found.returncode == 2
    assert "invalid choice: 'cifar11'" in found.stderr


def test_command_without_work_needs_no_torch():
    code = "import sys, gnbench.datasets.prepare; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) == "False\n"
