"""Work in chunks: done by processes of one thread each, kept in files, and never done twice."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from esper.runtime import precision
from trainers.progress import Reporter

Job = tuple[Callable[..., Any], tuple[Any, ...], Path]
"""A function, its arguments, and the file that keeps what it returns."""


class Pool:
    """Workers; they start at the first job, with the modules as they are then."""

    def __init__(self, workers: int):
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *reason: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, what: str, jobs: list[Job]) -> list[Any]:
        """What the jobs return, in their order; those whose file is there are not done again."""
        missing = [job for job in jobs if not job[2].exists()]
        if missing:
            with Reporter(what, len(missing), "chunks") as reporter:
                futures = [self._pool.submit(write, *job) for job in missing]
                for done, future in enumerate(as_completed(futures), 1):
                    future.result()
                    reporter.update(done)
        return [torch.load(path, weights_only=True) for _, _, path in jobs]


def write(function: Callable[..., Any], arguments: tuple[Any, ...], path: Path) -> None:
    """Does one job."""
    precision.set_up("cpu")
    found = function(*arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
