"""What all tests share."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings

from esper.runtime.compiled import CompileGuard

# Bit-for-bit comparisons hold for one thread count, and small tests are fastest on one thread.
torch.set_num_threads(1)

# A deadline per example would be a timed assertion.
settings.register_profile("esper", deadline=None)
settings.load_profile("esper")


class FailingGuard(CompileGuard):
    """Its compiled forms are the functions themselves, and raise from call number `at` on."""

    def __init__(self, name: str, at: int):
        super().__init__(name)
        self.at, self.calls = at, 0

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def fails(*tensors: torch.Tensor) -> Any:
            self.calls += 1
            if self.calls >= self.at:
                raise RuntimeError("the compiler is not well")
            return function(*tensors)

        return fails


@pytest.fixture(scope="session")
def failing_guard() -> Callable[[str, int], FailingGuard]:
    """`failing_guard(name, at)`: a guard whose compiled forms raise from call number `at` on."""
    return FailingGuard


@pytest.fixture(scope="session")
def start_together() -> Callable[..., list[subprocess.Popen[str]]]:
    """`start_together(arguments, size)`: `python ARGUMENT ...` as each of `size` processes that find each other."""

    def start(arguments: Sequence[Any], size: int, **given: Any) -> list[subprocess.Popen[str]]:
        with socket.socket() as probe:  # a port that nothing listens at
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, arguments)]
        return [
            subprocess.Popen(command, text=True, env={**os.environ, **world, "RANK": str(rank)}, **given)
            for rank in range(size)
        ]

    return start
