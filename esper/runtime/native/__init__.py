"""Compiles kernels in C++ at their first use and remembers each library by what it was made of.

A kernel is a folder with a `kernel.cpp` and headers; `tile.h` beside this file is there for all of them.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

SHARED = Path(__file__).parent

# No -ffast-math: what is NaN must stay NaN, and linking with it changes how the whole process rounds.
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fPIC", "-shared",
    "-fno-semantic-interposition",
)  # fmt: skip


class BuildError(Exception):
    """Why there is no library."""


@cache
def library(folder: Path) -> ctypes.CDLL | str:
    """The compiled kernel of `folder`, or why there is none."""
    try:
        path = _compiled(folder)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged
            path.unlink()
            return ctypes.CDLL(str(_compiled(folder)))
    except (BuildError, OSError) as error:
        return str(error)


def compiler() -> str:
    """The C++ compiler of this machine.

    Raises:
        BuildError: there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("there is no C++ compiler (CXX, c++, g++ or clang++)")


def _processor() -> str:
    """What -march=native depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.processor()


def _folder() -> Path:
    """Where libraries are kept: the user's cache, or a folder of this process's own where that cannot be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esper"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        pass
    return Path(tempfile.mkdtemp(prefix="esper-"))


def _sources(folder: Path) -> list[Path]:
    return sorted(path for place in (folder, SHARED) for path in place.iterdir() if path.suffix in (".cpp", ".h"))


def _compiled(folder: Path) -> Path:
    command = compiler()
    parts = [path.read_bytes() for path in _sources(folder)]
    identity = b"\0".join([*parts, " ".join(_FLAGS).encode(), command.encode(), _processor().encode()])
    target = _folder() / f"{folder.parent.name}-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if target.exists():
        return target
    log.info("compiling %s (a few seconds, once)", folder)
    descriptor, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(descriptor)
    try:
        done = subprocess.run(
            [command, *_FLAGS, f"-I{SHARED}", str(folder / "kernel.cpp"), "-o", name], capture_output=True, text=True
        )
        if done.returncode:
            raise BuildError(f"{command} fails: {done.stderr.strip().splitlines()[:1] or done.returncode}")
        os.replace(name, target)  # whole or not at all, also where several processes compile at once
    finally:
        Path(name).unlink(missing_ok=True)
    return target


# ---- calling --------------------------------------------------------------------------------------------------------


def fields(**groups: str) -> list[tuple[str, Any]]:
    """The `_fields_` of a structure from its names by kind: `integers`, `pointers` or `doubles`, in this order of the
    arguments; a kind that comes a second time has an underscore behind it."""
    kinds = {"integers": ctypes.c_int64, "pointers": ctypes.c_void_p, "doubles": ctypes.c_double}
    return [(name, kinds[kind.rstrip("_")]) for kind, names in groups.items() for name in names.split()]


def parts(count: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Ranges of `count` rows for as many threads as torch would use, cut at multiples of `multiple`."""
    pieces = -(-count // multiple)
    threads = max(min(torch.get_num_threads(), pieces), 1)
    edges = [min(pieces * i // threads * multiple, count) for i in range(threads + 1)]
    return [(first, last) for first, last in pairwise(edges) if first < last]


def call(function: Callable[..., None], work: Sequence[tuple[tuple[Any, ...], tuple[int, int]]]) -> None:
    """Calls a kernel with (pointers to structures, first, last) of each piece of work, each in a thread of its own; it
    holds no lock of Python's."""

    def one(job: tuple[tuple[Any, ...], tuple[int, int]]) -> None:
        structures, (first, last) = job
        function(*map(ctypes.byref, structures), ctypes.c_int64(first), ctypes.c_int64(last))

    if len(work) > 1:
        futures = [_pool(len(work)).submit(one, job) for job in work]
        try:
            for future in futures:
                future.result()
        finally:
            wait(futures)  # also after a signal: they write to memory that the caller gives up
    else:
        for job in work:
            one(job)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="esper-native")


# ---- memory ---------------------------------------------------------------------------------------------------------


class Memory:
    """Float tensors whose memory is used again: the system clears what it hands out page by page, which for tens of
    megabytes takes as long as the arithmetic on them.

    Args:
        keep: blocks that are kept while nobody uses them.
    """

    def __init__(self, keep: int = 2):
        self._keep = keep
        self._free: list[np.ndarray[Any, np.dtype[np.float32]]] = []

    def take(self, count: int) -> Tensor:
        """float32 [count], of any values, on a multiple of 64 bytes."""
        block = None
        # Tensors end at any time and in any thread, so a block changes hands by one operation: pop here, append there.
        with suppress(IndexError):
            while block is None or len(block) < count + _ALIGNED:
                block = self._free.pop()  # one that is too small is given up
        if block is None or len(block) < count + _ALIGNED:
            block = np.empty(count + _ALIGNED, dtype=np.float32)
        first = -(block.ctypes.data // block.itemsize) % _ALIGNED
        view = block[first : first + count]
        weakref.finalize(view, self._returned, block)  # once the tensor, which holds the view, is gone
        return torch.from_numpy(view)

    def _returned(self, block: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        if len(self._free) < self._keep:
            self._free.append(block)


_ALIGNED = 16  # floats
