"""The guard of compiled code: it falls back once and says so, hides no error, and counts what it compiles and runs."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from esper.runtime.compiled import CompileGuard, any_batch


def raising(error: BaseException) -> Callable[[], str]:
    def run() -> str:
        raise error

    return run


def eager() -> str:
    return "eager"


# ---- falling back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True], ids=["at its first run", "at run time"])
def test_it_falls_back_once_with_one_warning(
    caplog: pytest.LogCaptureFixture, warm: bool, request: pytest.FixtureRequest
) -> None:
    guard = CompileGuard("thing")
    if warm:
        guard.warm_up(lambda: guard.run(lambda: "compiled", eager))
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="esper.runtime.compiled"):
        assert guard.run(raising(ValueError("no room\nand more lines")), eager) == "eager"
    why_not = f"error {'at run time' if warm else 'at its first run'}: ValueError: no room"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", f"the compiled thing failed, it runs eagerly from now on ({why_not})")
    ]
    assert (guard.why_not, guard.enabled, guard.fallback_total) == (why_not, False, 1)
    caplog.clear()
    # From now on the compiled form is not even tried.
    assert guard.run(raising(AssertionError("tried again")), eager) == "eager"
    assert guard.fallback_total == 1
    assert not caplog.records


def test_an_error_without_a_message_is_named() -> None:
    guard = CompileGuard("thing")
    guard.run(raising(ValueError()), eager)
    assert guard.why_not == "error at its first run: ValueError: no message"


def test_what_eager_raises_too_is_raised_and_is_no_fallback() -> None:
    guard = CompileGuard("thing")
    with pytest.raises(KeyError, match="the eager one"):
        guard.run(raising(ValueError("the compiled one")), raising(KeyError("the eager one")))
    assert (guard.enabled, guard.fallback_total) == (True, 0)
    assert guard.run(lambda: "compiled", eager) == "compiled"


def test_an_interrupt_is_not_taken_for_a_failure() -> None:
    guard = CompileGuard("thing")
    with pytest.raises(KeyboardInterrupt):
        guard.run(raising(KeyboardInterrupt()), eager)
    assert guard.enabled


def test_what_is_not_to_be_compiled_runs_eagerly_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    guard = CompileGuard("thing", "runtime.compile=false")
    with caplog.at_level(logging.DEBUG, logger="esper.runtime.compiled"):
        assert guard.run(raising(AssertionError("tried")), eager) == "eager"
    assert (guard.enabled, guard.fallback_total, caplog.records) == (False, 0, [])


def test_what_torch_cannot_compile_runs_eagerly() -> None:
    guard = CompileGuard("thing")

    def function(x: Tensor) -> Tensor:
        return x + 1 if float(x.sum()) > 0 else x - 1  # whose branch depends on data

    compiled, x = guard.compile(function), torch.ones(3)
    assert guard.run(lambda: compiled(x), lambda: function(x)).tolist() == [2.0, 2.0, 2.0]
    assert guard.fallback_total == 1
    assert "at its first run" in (guard.why_not or "")


def test_the_warm_up_is_timed() -> None:
    guard = CompileGuard("thing")
    assert (guard.warm, guard.warm_ms) == (False, 0)
    guard.warm_up(lambda: None)
    assert guard.warm
    assert guard.warm_ms > 0


# ---- compiling -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doubled() -> tuple[CompileGuard, Callable[..., Tensor]]:
    """A guard, and its program of a function of [B, 3], compiled for any B."""
    guard = CompileGuard("thing")
    compiled = guard.compile(lambda x: (2 * x).sum(1))
    guard.warm_up(lambda: guard.run(lambda: compiled(*any_batch([torch.ones(2, 3)])), lambda: torch.zeros(2)))
    return guard, compiled


@pytest.mark.slow
def test_all_batch_sizes_share_a_program(doubled: tuple[CompileGuard, Callable[..., Tensor]]) -> None:
    guard, compiled = doubled
    runs = guard.runs
    for size in (5, 31, 33, 64, 2):
        assert compiled(torch.ones(size, 3)).tolist() == [6.0] * size
    assert (guard.runs - runs, guard.recompiles, guard.fallback_total) == (5, 0, 0)


@pytest.mark.slow
def test_programs_after_the_warm_up_are_counted(doubled: tuple[CompileGuard, Callable[..., Tensor]]) -> None:
    guard, compiled = doubled
    compiled(torch.ones(4, 3, dtype=torch.float64))
    assert guard.recompiles == 1


@pytest.mark.slow
def test_there_may_be_more_programs_than_torch_keeps_for_one_code() -> None:
    # As where a policy is compiled for one layout after the other, or a process trains many policies.
    guard = CompileGuard("thing")

    def times(factor: int) -> Callable[[Tensor], Tensor]:
        return lambda x: x[:, :factor].sum(1) * factor

    with torch._dynamo.config.patch(recompile_limit=1):
        for factor in (1, 2, 3):
            compiled = guard.compile(times(factor))
            assert compiled(*any_batch([torch.ones(2, 3)])).tolist() == [factor**2] * 2
            assert compiled(torch.ones(5, 3)).tolist() == [factor**2] * 5
    assert guard.runs == 6


def test_any_batch_copies_outside_inference_mode() -> None:
    tensors = [torch.arange(4.0), torch.ones(4, 2)]
    with torch.inference_mode():
        copies = any_batch(tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        assert torch.equal(copy, tensor)
        assert copy.data_ptr() != tensor.data_ptr()
        assert not copy.is_inference()
