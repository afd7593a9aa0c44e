"""The state of an unfinished run on the disk: tensors and plain values, under a checksum, with one predecessor kept."""

import contextlib
import io
import logging
import os
from pathlib import Path

import torch

from gnbench.crash import crash_at
from gnbench.errors import UserError
from gnbench.files import cannot_write, seal, set_aside, unseal, write_atomic
from gnbench.record import CHECKPOINTS, PROGRESS

log = logging.getLogger(__name__)
CURRENT, PREVIOUS = CHECKPOINTS


def save_checkpoint(directory: Path, state: dict) -> None:
    """Write `state`; the last good checkpoint stays beside it until the next call.

    Raises:
        UserError: the disk is full or the place cannot be written; the last good checkpoint is untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        if (directory / CURRENT).exists():
            os.replace(directory / CURRENT, directory / PREVIOUS)
    except OSError as error:
        raise cannot_write(directory / CURRENT, error) from error
    crash_at("rotated")
    write_atomic(directory / CURRENT, seal(buffer.getvalue()))


def load_checkpoints(directory: Path) -> list[dict]:
    """The states whose checksums hold, newest first. A file that fails it is set aside as `*.corrupt` and named.

    Raises:
        UserError: a file cannot be read, or not be set aside.
    """
    states, damaged, whose = [], False, {"run": directory.name}
    for path in (directory / name for name in CHECKPOINTS):
        if path.exists():
            state = _load(path)
            if state is not None:
                states.append(state)
                continue
            damaged = True
            log.warning("%s does not match its checksum; it is kept as %s", path, set_aside(path).name, extra=whose)
    if damaged and not states:
        log.warning("%s: no checkpoint is whole; the run starts again", directory, extra=whose)
    return states


def delete_checkpoints(directory: Path) -> None:
    """Remove what a finished run no longer needs. What cannot be removed stays: it does no harm."""
    for name in (*CHECKPOINTS, PROGRESS):
        with contextlib.suppress(OSError):
            (directory / name).unlink(missing_ok=True)


def _load(path: Path) -> dict | None:
    try:
        content = unseal(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if content is None:
        return None
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # written whole, by something else: what torch raises then is anything
        return None
    return state if isinstance(state, dict) else None
