"""Compiled executables: few for many lengths, the least used goes first, and everything is counted."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from esper.attention import Access, Summary, attend, cache_info, compiled, listening, scalars
from esper.attention.executables import Executables, bucket
from esper.attention.inputs import Inputs


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def doubling(clock: Clock, seconds: float = 0.0) -> Callable[[], Callable[..., Tensor]]:
    """Builds in no time what takes some seconds."""

    def run(x: Tensor) -> Tensor:
        clock.now += seconds
        return 2 * x

    return lambda: run


def test_lengths_are_rounded_up_to_powers_of_two() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 512, 513)] == [1, 2, 4, 4, 8, 8, 16, 512, 1024]


def test_the_one_that_was_not_used_for_longest_goes_first() -> None:
    clock, x = Clock(), torch.ones(1)
    kept = Executables(limit=2, clock=clock)
    hits: list[bool] = []
    with listening(lambda event: hits.append(event.hit) if isinstance(event, Access) else None):
        for key in "abacab":  # c takes the place of b, b that of c
            kept.call(key, doubling(clock), x)
    assert hits == [False, False, True, False, True, False]
    assert len(kept) == 2
    assert kept.summary().evictions == 2


def test_what_is_counted() -> None:
    clock, x = Clock(), torch.ones(3, 2)
    kept = Executables(limit=5, clock=clock)
    for wait, key in ((0, "a"), (10, "b"), (5, "a"), (1, "a")):
        clock.now += wait
        kept.call(key, doubling(clock, seconds=2), x)
    clock.now += 4
    # a: made at 0, used until 24; b: made at 12 (after a's 2 s and 10 s), used until 14. Now it is 28.
    assert clock.now == 28
    assert kept.summary() == Summary(
        hits=2, misses=2, evictions=0, hit_rate=0.5, size=2, limit=5, bytes=4 * 2 * 24, oldest_s=28, newest_s=16,
        idle_s=14, reuses=(0, 2), compile_s=4, call_s=4,
    )  # fmt: skip


def test_a_summary_every_hundred_accesses(caplog: pytest.LogCaptureFixture) -> None:
    clock, summaries = Clock(), list[Summary]()
    kept = Executables(clock=clock)
    with (
        caplog.at_level(logging.INFO, logger="esper.attention"),
        listening(lambda event: summaries.append(event) if isinstance(event, Summary) else None),
    ):
        for _ in range(250):
            kept.call("a", doubling(clock), torch.ones(1))
    assert [(each.hits, each.misses) for each in summaries] == [(99, 1), (199, 1)]
    assert len(caplog.records) == 2


def test_an_executable_that_fails_at_once_is_not_kept() -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel")

    kept = Executables()
    with pytest.raises(RuntimeError, match="no kernel"):
        kept.call("a", lambda: fails, torch.ones(1))
    assert len(kept) == 0
    assert torch.equal(kept.call("a", doubling(Clock()), torch.ones(1)), torch.full((1,), 2.0))


# ---- bucketed attention ----------------------------------------------------------------------------------------------


def product(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, scale: float) -> Tensor:
    """Stands for FlexAttention, whose compilation takes long."""
    assert added is not None
    rows = len(q) // len(added)
    return (scale * q @ k.transpose(-2, -1) + added.repeat(rows, 1, 1, 1)).softmax(-1) @ v


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the programs that torch.compile has made; they run as they were traced."""
    programs: list[int] = []

    def backend(program: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        programs.append(len(program.graph.nodes))
        return program.forward

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *given, **options: whole(*given, **options, backend=backend))
    return programs


def test_growing_sequences_compile_once_for_each_bucket(traced: list[int]) -> None:
    torch.manual_seed(0)
    accesses: list[bool] = []
    with listening(lambda event: accesses.append(event.hit) if isinstance(event, Access) else None):
        for _ in range(2):
            for length in range(1, 513):
                q = torch.randn(1, 1, length, 4)
                compiled.run("product", product, Inputs.of(q, q, q, None, None, True, None))
    assert len(traced) == 10, "one program for each of 1, 2, 4, ... 512"
    assert all(accesses[512:])
    info = cache_info()
    assert (info["size"], info["misses"], info["hits"]) == (10, 10, 1014)
    assert scalars()["attention/hit_rate"] == pytest.approx(1014 / 1024)


@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("shape", [None, (7,), (5, 7), (2, 5, 7), (4, 3, 5, 7)], ids=str)
def test_what_is_padded_changes_nothing(
    shape: tuple[int, ...] | None, biased: bool, is_causal: bool, traced: list[int]
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 3, n, m, requires_grad=True) for n, m in ((5, 6), (7, 6), (7, 2)))
    mask = None if shape is None else torch.rand(shape) < 0.5
    if mask is not None and mask.dim() > 1:
        mask[..., 2, :] = False
    bias = torch.randn(3, 5, 7, requires_grad=True) if biased else None
    inputs = Inputs.of(q, k, v, mask, bias, is_causal, None)
    out = compiled.run("product", product, inputs)
    expected = attend(q, k, v, mask=mask, bias=bias, causal=is_causal, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    wanted = [x for x in (q, k, v, bias) if x is not None]
    found, right = (torch.autograd.grad(each.sin().sum(), wanted) for each in (out, expected))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 2, n, 16) for n in (13, 16, 16))
    mask, bias = torch.rand(2, 13, 16) < 0.5, torch.randn(2, 13, 16)
    mask[0, 3] = False
    events: list[Access] = []
    with torch.no_grad(), listening(lambda event: events.append(event) if isinstance(event, Access) else None):
        out = attend(q, k, v, mask=mask, bias=bias, causal=True, backend="flex")
        more = attend(q[:, :, :9], k, v, backend="flex"), attend(q[:, :, :11], k, v, backend="flex")
    expected = attend(q, k, v, mask=mask, bias=bias, causal=True, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    for each, length in zip(more, (9, 11), strict=True):
        torch.testing.assert_close(each, attend(q[:, :, :length], k, v, backend="reference"), rtol=1e-5, atol=1e-6)
    assert [event.hit for event in events] == [False, False, True]
