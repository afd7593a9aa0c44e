"""Fetch, check and prepare a data set, once: python -m gnbench.datasets.prepare cifar10.

The archive comes from its home page, from a mirror (--url) or from a file at hand (--archive). What a broken
download has left is kept and continued. A set is never half there: it is written aside and renamed.
"""

import argparse
import http.client
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from gnbench.console import as_command
from gnbench.datasets import Images, lock, open_images, save_images
from gnbench.datasets.cifar import ARCHIVES, check_archive, data_root, prepared_directory, unpack_archive
from gnbench.errors import UserError
from gnbench.files import PART, set_aside

CHUNK = 2**16  # bytes read at once from a server
GZIP = b"\x1f\x8b"  # the first bytes of every .gz file
LONGEST_PAUSE_S = 60  # between two tries
NETWORK_ERRORS = (http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError)
RETRIED_STATUSES = (http.client.REQUEST_TIMEOUT, http.client.TOO_MANY_REQUESTS)  # beside the server's errors, 5xx


def prepare(
    name: str,
    root: str | None = None,
    archive: str | None = None,
    url: str | None = None,
    timeout_s: float = 30,
    retries: int = 5,
) -> Images:
    """Make the prepared set `name` in `root`, unless it is there and whole.

    Args:
        archive: a copy of the archive to use; None fetches it from `url`, which None makes its home page.
        timeout_s, retries: see `fetch`.

    Raises:
        UserError: the archive cannot be had or is not the expected one, or the set cannot be written.
    """
    directory = prepared_directory(name, root)
    with lock(directory):
        try:
            images = open_images(directory, name)
        except UserError as error:
            tell(f"{error}; preparing them again")
            images = None
        if images is None:
            path = Path(archive).expanduser() if archive else data_root(root) / ARCHIVES[name]["file"]
            if archive:
                check_archive(name, path)
            else:
                obtain_archive(name, path, url or ARCHIVES[name]["url"], timeout_s, retries)
            tell(f"unpacking {path}")
            save_images(unpack_archive(name, path, directory.with_name(f".{name}.unpacked")), directory)
            images = open_images(directory, name)
    return images


def obtain_archive(name: str, path: Path, url: str, timeout_s: float, retries: int) -> None:
    """Have the checked archive at `path`: fetch it unless it is there; a file that fails its checksum is set aside.

    Raises:
        UserError: it cannot be fetched, or what was fetched is not the archive.
    """
    if path.exists():
        try:
            check_archive(name, path)
            return
        except UserError as error:
            tell(f"{error}; kept as {set_aside(path)}, fetching it again")
    part = path.with_name(f"{path.name}{PART}")
    fetch(url, part, timeout_s, retries)
    try:
        check_archive(name, part)
    except UserError as error:
        raise UserError(f"{error}; kept as {set_aside(part)}, run again to fetch it from the start") from error
    part.replace(path)


def fetch(url: str, part: Path, timeout_s: float = 30, retries: int = 5) -> None:
    """Fetch `url` into the file `part`, from where an earlier try stopped.

    Args:
        timeout_s: seconds without a byte after which the server counts as stalled.
        retries: how often it is tried again after tries in a row that brought nothing; the pauses double.

    Raises:
        UserError: it is given up; `part` stays, to be continued.
    """
    tell(f"fetching {url}" + (f", continuing {part} at {size_of(part) / 1e6:.1f} MB" if size_of(part) else ""))
    failures = 0
    while True:
        before = size_of(part)
        try:
            return receive(url, part, timeout_s)
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures = 1 if size_of(part) > before else failures + 1
            reason = explain(error, timeout_s)
            if failures > retries or is_final(error):
                kept = f"{size_of(part) / 1e6:.1f} MB are kept in {part}, run again to continue; " * part.exists()
                raise UserError(f"cannot fetch {url}: {reason}; {kept}--archive FILE takes a copy") from error
            pause_s = min(2 ** (failures - 1), LONGEST_PAUSE_S)
            tell(f"{reason}; trying again in {pause_s} s")
            time.sleep(pause_s)


def receive(url: str, part: Path, timeout_s: float) -> None:
    """One try of `fetch`: ask for the bytes that `part` lacks and append them."""
    offset = size_of(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is lacking; the checksum decides
        raise
    with response:
        first = response.read(len(GZIP))
        resumed = (response.headers["Content-Range"] or "").startswith(f"bytes {offset}-")
        if not resumed:
            offset = 0
            if first != GZIP:  # a page of HTML, say: never over what is already there
                kind = response.headers.get_content_type()
                raise UserError(f"cannot fetch {url}: the server sent {kind}, expected a gzip archive")
        length = response.headers["Content-Length"]
        total = offset + int(length) if length else None
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(total=total, initial=offset, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar,
        ):
            chunk = first
            while chunk:
                file.write(chunk)
                bar.update(len(chunk))
                chunk = response.read1(CHUNK)
    if total and size_of(part) < total:
        raise ConnectionError(f"the connection closed at {size_of(part)} of {total} bytes")


def explain(error: Exception, timeout_s: float) -> str:
    """What went wrong, as a clause."""
    cause = error
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        cause = error.reason
    return f"no byte in {timeout_s:g} s" if isinstance(cause, TimeoutError) else str(cause) or type(cause).__name__


def is_final(error: Exception) -> bool:
    """Whether another try cannot help: a refusal by the server, an illegal URL, a full disk."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code < http.client.INTERNAL_SERVER_ERROR and error.code not in RETRIED_STATUSES
    if isinstance(error, urllib.error.URLError):
        return isinstance(error.reason, str)  # no host, an unknown scheme; a failure of the network is an exception
    return isinstance(error, http.client.InvalidURL) or not isinstance(error, NETWORK_ERRORS)


def size_of(path: Path) -> int:
    """The bytes of a file; 0 where it is not there."""
    return path.stat().st_size if path.exists() else 0


def tell(message: str) -> None:
    """Print a line to standard error at once."""
    print(message, file=sys.stderr, flush=True)


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 2 where the user can mend it (one sentence on stderr), 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(prog="prepare_data", description="Fetch, check and prepare a data set, once.")
    parser.add_argument("name", choices=ARCHIVES, help="the data set")
    parser.add_argument(
        "--root", help="where it goes (default: $GNBENCH_DATA, or gnbench in the cache directory, mostly ~/.cache)"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--archive", metavar="FILE", help="a copy of the archive, instead of fetching it")
    source.add_argument("--url", help="a mirror of the archive (default: its home page)")
    parser.add_argument("--timeout", type=float, default=30, metavar="S", help="a stalled server's limit (default: 30)")
    parser.add_argument("--retries", type=int, default=5, help="tries in a row that may bring nothing (default: 5)")
    args = parser.parse_args(argv)
    try:
        images = prepare(args.name, args.root, args.archive, args.url, args.timeout, args.retries)
    except UserError as error:
        tell(f"prepare_data: {error}")
        return 2
    except KeyboardInterrupt:
        tell("prepare_data: interrupted; run again to continue")
        raise
    sizes = f"{len(images.train_labels)} training and {len(images.test_labels)} test images"
    print(
        f"{args.name} is ready in {prepared_directory(args.name, args.root)}: {sizes} of {len(images.classes)} classes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
