"""What all tests share."""

from collections.abc import Callable
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
