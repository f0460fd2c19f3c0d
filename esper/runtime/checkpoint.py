"""Checkpoint files: one self-checking file each, written atomically, holding primitives and tensors only."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT_VERSION = 4
FOLDER = "checkpoints"
BEST = "best.ckpt"

_MAGIC = b"esper checkpoint 1\n"
_NAME = re.compile(r"step_(\d+)\.ckpt$")


class CheckpointError(Exception):
    """A file is not a checkpoint of ours, or it is damaged. The message says which."""


def write(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` to `path`: either the whole file is there afterwards, or what was there before.

    The file is a magic line, the SHA-256 of the payload, and the payload as `torch.save` makes it.

    Raises:
        OSError: the disk is full, the folder is read-only ...; what was there before is untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    _replace(path, _MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    # The rename itself must survive a power cut too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path) -> dict[str, Any]:
    """The state in `path`, loaded with `weights_only=True`, so that no code in the file can run.

    Raises:
        CheckpointError: not one of our files, damaged, or of another format version.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    if not content.startswith(_MAGIC):
        raise CheckpointError(f"{path} is not an Esper checkpoint")
    digest, _, payload = content[len(_MAGIC) :].partition(b"\n")
    if hashlib.sha256(payload).hexdigest().encode() != digest:
        raise CheckpointError(f"{path} is damaged (its checksum does not match)")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and plain values; it was not loaded") from error
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged (its content is none of torch's)") from error
    version = state.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this version of Esper reads {FORMAT_VERSION}; "
            "use the version that wrote it, or train anew"
        )
    return state


def save(run_dir: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of `step` into a run directory and removes all but the newest `keep`.

    Raises:
        OSError: as `write`; older checkpoints are untouched then.
    """
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{step:012d}.ckpt"
    write(path, {"format_version": FORMAT_VERSION, **state})
    for old in found(run_dir)[keep:]:
        old.unlink()
    return path


def keep_as_best(path: Path) -> None:
    """Makes a copy of a checkpoint the best one of its run.

    Raises:
        OSError: as `write`; the best one until now is untouched then.
    """
    _replace(path.with_name(BEST), path.read_bytes())


def found(run_dir: Path) -> list[Path]:
    """The checkpoint files of a run directory, newest first, but for the best one; they need not be valid."""
    return sorted((p for p in (run_dir / FOLDER).glob("*.ckpt") if _NAME.match(p.name)), reverse=True)


def latest(run_dir: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest checkpoint that is whole; the best one if no other is.

    Returns:
        its path, its state, and a line for every newer file that had to be passed over.

    Raises:
        CheckpointError: there is none.
    """
    problems: list[str] = []
    best = run_dir / FOLDER / BEST
    for path in [*found(run_dir), *([best] if best.exists() else [])]:
        try:
            return path, read(path), problems
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
    raise CheckpointError("; ".join(problems) or f"{run_dir / FOLDER} holds no checkpoint")


def rng_state() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's global generators, as primitives and tensors."""
    numpy_state = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": {
            "bit_generator": numpy_state["bit_generator"],
            "state": {"key": inner["key"].tolist(), "pos": int(inner["pos"])},
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    inner = state["numpy"]["state"]
    key = np.array(inner["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {"key": key, "pos": inner["pos"]}})
    torch.set_rng_state(state["torch"])
