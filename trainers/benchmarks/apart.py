"""Functions that are timed in processes of their own, so that none finds the memory as another has left it."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from trainers.benchmarks.rows import peak_mb


class Apart:
    """A function in a process of its own, which ends with `close`.

    Args:
        build: gives the function, and what is to be known of it; both are called there, without gradients.
        arguments: of `build`; all of this is pickled.

    Attributes:
        found: what is to be known of the function.

    Raises:
        Exception: whatever `build` raised.
    """

    def __init__(self, build: Callable[..., tuple[Callable[[], object], Any]], *arguments: Any):
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        settings = torch.get_num_threads()
        self._process = context.Process(target=_serve, args=(theirs, settings, build, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.found = self._answer()

    def __call__(self) -> None:
        """Calls the function there, and returns when it has."""
        self._connection.send(None)
        self._answer()

    def peak_mb(self, device: torch.device) -> float:
        """See `trainers.benchmarks.rows.peak_mb`."""
        self._connection.send(device)
        return float(self._answer())

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join()

    def _answer(self) -> Any:
        good, answer = self._connection.recv()
        if not good:
            self.close()
            raise answer
        return answer


@torch.no_grad()
def _serve(
    connection: Connection,
    threads: int,
    build: Callable[..., tuple[Callable[[], object], Any]],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(threads)
    try:
        function, found = build(*arguments)
    except Exception as error:  # which is raised again where the process was started
        connection.send((False, error))
        return
    connection.send((True, found))
    while True:
        try:
            device = connection.recv()
        except EOFError:  # closed
            return
        if device is None:
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        connection.send((True, None if device is None else peak_mb(function, device)))
