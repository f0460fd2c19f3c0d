"""torch.compile behind a guard: what cannot be compiled runs eagerly, which is said once and counted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from itertools import count
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")

_NUMBERS = count()


class CompileGuard:
    """Compiles functions, and runs work in its compiled form or, once that has failed, in its eager form.

    Args:
        name: of what is compiled, for messages.
        why_not: why nothing is to be compiled, or None.
        cuda_graphs: capture CUDA graphs; every batch size is then a program of its own.

    Attributes:
        why_not: why work runs eagerly, or None while it runs compiled.
        fallback_total: how often it fell back to eager execution.
        recompiles: programs that were compiled after the warm-up.
        runs: how often a compiled program has run.
        warm: whether the warm-up is over.
        warm_ms: wall time of the warm-up, compilation included; 0 before it.
    """

    def __init__(self, name: str, why_not: str | None = None, cuda_graphs: bool = False):
        self.name, self.why_not, self.cuda_graphs = name, why_not, cuda_graphs
        self.fallback_total, self.recompiles, self.runs = 0, 0, 0
        self.warm, self.warm_ms = False, 0.0

    @property
    def enabled(self) -> bool:
        return self.why_not is None

    def compile(self, function: Callable[..., T]) -> Callable[..., T]:
        """`function` of tensors [B, ...] as one program for all B above 1."""
        return torch.compile(
            own_copy(function), fullgraph=True, dynamic=False if self.cuda_graphs else None, backend=self._inductor
        )

    def _inductor(self, program: Any, inputs: list[Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx  # takes a second to import

        self.recompiles += self.warm
        compiled: Any = compile_fx(program, inputs, config_patches={"triton.cudagraphs": self.cuda_graphs})

        def counted(*args: Any) -> Any:
            self.runs += 1
            return compiled(*args)

        return counted

    def run(self, compiled: Callable[[], T], eager: Callable[[], T]) -> T:
        """The result of `compiled`; if it fails that of `eager`, now and from now on. What `eager` raises is raised."""
        if self.why_not is not None:
            return eager()
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            return compiled()
        except Exception as error:
            result = eager()
            when = "at run time" if self.warm else "at its first run"
            self.why_not = (
                f"error {when}: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            )
            self.fallback_total += 1
            log.warning("the compiled %s failed, it runs eagerly from now on (%s)", self.name, self.why_not)
            return result

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs `work`, which is to call `run`, for the first time; programs compiled later count as recompiled."""
        start = time.perf_counter()
        if self.enabled:
            log.info("compiling the %s (seconds; up to half a minute the first time) ...", self.name)
        else:
            log.info("the %s runs eagerly (%s)", self.name, self.why_not)
        work()
        self.warm_ms = 1e3 * (time.perf_counter() - start)
        self.warm = True


def own_copy(function: Callable[..., T]) -> Callable[..., T]:
    """A copy with a code object of its own: torch.compile keeps only a few programs for each, whatever they close over,
    and takes numbers in which they differ for ones that vary."""
    code = function.__code__
    code = code.replace(co_name=f"{code.co_name}_{next(_NUMBERS)}")
    copied: Any = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    return copied


@torch.inference_mode(False)  # copies of another kind would be inputs of another program
def any_batch(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies whose first dimension torch.compile takes for one that varies."""
    copies = [tensor.clone() for tensor in tensors]
    for copy in copies:
        torch._dynamo.maybe_mark_dynamic(copy, 0)
    return copies
