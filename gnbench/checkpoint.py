"""The state of an unfinished run on the disk: tensors and plain values, under a checksum, with one predecessor kept."""

import hashlib
import io
import logging
import os
import pickle
from pathlib import Path

import torch

from gnbench.record import write_atomic

log = logging.getLogger(__name__)
CURRENT = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
DIGEST_BYTES = hashlib.sha256().digest_size


def save_checkpoint(directory: Path, state: dict) -> None:
    """Write `state`; the last good checkpoint stays beside it until the next call.

    Raises:
        UserError: the disk is full or the place cannot be written; the last good checkpoint is untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    if (directory / CURRENT).exists():
        os.replace(directory / CURRENT, directory / PREVIOUS)
    write_atomic(directory / CURRENT, content + hashlib.sha256(content).digest())


def load_checkpoint(directory: Path) -> dict | None:
    """The newest state whose checksum holds, or None. A file that fails it is set aside as `*.corrupt` and named."""
    for path in (directory / CURRENT, directory / PREVIOUS):
        if path.exists():
            state = _load(path)
            if state is not None:
                return state
            path.replace(path.with_suffix(".pt.corrupt"))
            log.warning("%s does not match its checksum; it is kept as %s.corrupt", path, path.name)
    return None


def delete_checkpoints(directory: Path) -> None:
    """Remove what a finished run no longer needs."""
    for name in (CURRENT, PREVIOUS):
        (directory / name).unlink(missing_ok=True)


def _load(path: Path) -> dict | None:
    content = path.read_bytes()
    body, checksum = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != checksum:
        return None
    try:
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):  # written whole, by something else
        return None
