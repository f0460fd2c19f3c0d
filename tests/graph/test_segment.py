"""Segment reductions against loops over segments, natively and with torch-scatter, and which of the two runs."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper.graph import segment
from esper.graph.segment import (
    acceleration_status,
    native_only,
    segment_max,
    segment_mean,
    segment_softmax,
    segment_sum,
)

STATUS = acceleration_status()
needs_torch_scatter = pytest.mark.skipif(not STATUS["acceleration_enabled"], reason=STATUS["why"])
both_ways = pytest.mark.parametrize("way", ["native", pytest.param("accelerated", marks=needs_torch_scatter)])

Reduction = Callable[[Tensor, Tensor, int], Tensor]
REDUCTIONS: dict[str, Reduction] = {
    "sum": segment_sum,
    "mean": segment_mean,
    "max": segment_max,
    "softmax": segment_softmax,
}
every_reduction = pytest.mark.parametrize("name", REDUCTIONS)


def taking(way: str) -> Any:
    """A context in which the reductions take this way."""
    return native_only() if way == "native" else nullcontext()


def naive(name: str, x: Tensor, index: Tensor, segments: int) -> Tensor:
    """A loop over segments; `amax` shares the gradient of a maximum among all that have it."""
    groups = [x[index == number] for number in range(segments)]
    if name == "softmax":
        out = 0 * x
        for number, group in enumerate(groups):
            out = out.index_put((index == number,), group.softmax(0))
        return out
    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": lambda group: group.sum(0),
        "mean": lambda group: group.mean(0),
        "max": lambda group: group.amax(0),
    }
    zero = 0 * x.sum(0)
    return torch.stack([plain[name](group) if len(group) else zero for group in groups] or [zero])[:segments]


def gradient(function: Reduction, x: Tensor, index: Tensor, segments: int) -> Tensor:
    """Of a sum in which every value has a weight of its own."""
    x = x.detach().clone().requires_grad_()
    out = function(x, index, segments)
    weights = torch.arange(1.0, out.numel() + 1).to(out).view_as(out)
    return torch.autograd.grad((out * weights).sum(), x)[0]


# ---- values and gradients --------------------------------------------------------------------------------------------

X = torch.tensor([[1.0, -2.0], [3.0, 0.0], [3.0, -1.0], [-5.0, 0.0]])
INDEX = torch.tensor([2, 0, 2, 0])  # and nothing in segment 1


@both_ways
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sum", [[-2.0, 0.0], [0.0, 0.0], [4.0, -3.0]]),
        ("mean", [[-1.0, 0.0], [0.0, 0.0], [2.0, -1.5]]),
        ("max", [[3.0, 0.0], [0.0, 0.0], [3.0, -1.0]]),
        # 1 / (1 + e^2), 1 / (1 + e^8), 1 / (1 + e)
        ("softmax", [[0.1192029, 0.2689414], [0.9996646, 0.5], [0.8807971, 0.7310586], [0.0003354, 0.5]]),
    ],
)
def test_by_hand(way: str, name: str, expected: list[list[float]]) -> None:
    with taking(way):
        found = REDUCTIONS[name](X, INDEX, 3)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-6)


@both_ways
def test_gradients_by_hand(way: str) -> None:
    x = torch.tensor([0.0, 0.0, -1.0, 4.0, 2.0])  # a maximum of exactly 0 that two rows share, as after a ReLU
    index = torch.tensor([0, 0, 0, 1, 1])
    with taking(way):
        assert gradient(segment_sum, x, index, 3).tolist() == [1, 1, 1, 2, 2]
        assert gradient(segment_mean, x, index, 3).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1, 1])
        assert gradient(segment_max, x, index, 3).tolist() == [0.5, 0.5, 0, 2, 0]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Rows of small whole numbers, so that maxima are shared and 0; often there are more segments than rows."""
    segments = draw(st.integers(0, 6))
    rows = draw(st.integers(0, 12)) if segments else 0
    trailing = draw(st.lists(st.integers(1, 3), max_size=2))
    count = rows * int(torch.tensor(trailing).prod())
    values = draw(st.lists(st.integers(-2, 2), min_size=count, max_size=count))
    index = draw(st.lists(st.integers(0, max(segments - 1, 0)), min_size=rows, max_size=rows))
    x = torch.tensor(values, dtype=torch.float64).view(rows, *trailing)
    return x, torch.tensor(index, dtype=torch.int64), segments


@both_ways
@every_reduction
@given(case=cases())
def test_values_and_gradients_are_those_of_a_loop(way: str, name: str, case: tuple[Tensor, Tensor, int]) -> None:
    def loop(*arguments: Any) -> Tensor:
        return naive(name, *arguments)

    with taking(way):
        found = REDUCTIONS[name](*case), gradient(REDUCTIONS[name], *case)
    for mine, theirs in zip(found, (loop(*case), gradient(loop, *case)), strict=True):
        torch.testing.assert_close(mine, theirs)


@needs_torch_scatter
@every_reduction
@given(rows=st.integers(0, 300), segments=st.integers(1, 40), seed=st.integers(0, 1000), half=st.booleans())
def test_both_ways_are_equal(name: str, rows: int, segments: int, seed: int, half: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator).to(torch.float16 if half else torch.float32)
    index = torch.randint(segments, (rows,), generator=generator)
    accelerated = REDUCTIONS[name](x, index, segments), gradient(REDUCTIONS[name], x, index, segments)
    with native_only():
        native = REDUCTIONS[name](x, index, segments), gradient(REDUCTIONS[name], x, index, segments)
    for mine, theirs in zip(accelerated, native, strict=True):
        assert mine.dtype == x.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-3 if half else 1e-6, atol=1e-3 if half else 1e-6)


@both_ways
@every_reduction
def test_gradcheck(way: str, name: str) -> None:
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    index = torch.tensor([0, 3, 3, 1, 0, 3, 5])
    with taking(way):
        assert torch.autograd.gradcheck(lambda x: REDUCTIONS[name](x, index, 6), x)
        assert torch.autograd.gradgradcheck(lambda x: REDUCTIONS[name](x, index, 6), x)


@both_ways
def test_infinite_and_undefined_values(way: str) -> None:
    inf, nan = torch.inf, torch.nan
    index = torch.tensor([0, 0, 1, 1, 2, 2])
    with taking(way):
        top = segment_max(torch.tensor([-inf, -inf, -inf, 1.0, nan, 2.0]), index, 3)
        share = segment_softmax(torch.tensor([0.0, 0.0, -inf, 1.0, nan, 2.0]), index, 3)
        lowest = segment_softmax(torch.full((2,), torch.finfo(torch.float32).min), torch.tensor([0, 0]), 1)
    torch.testing.assert_close(top, torch.tensor([0.0, 1.0, nan]), equal_nan=True)
    torch.testing.assert_close(share, torch.tensor([0.5, 0.5, 0.0, 1.0, nan, nan]), equal_nan=True)
    assert lowest.tolist() == [0.5, 0.5]


@both_ways
def test_a_softmax_of_large_scores_does_not_overflow(way: str) -> None:
    with taking(way):
        share = segment_softmax(torch.tensor([1000.0, 1000.0, -1000.0]), torch.tensor([0, 0, 1]), 2)
    assert share.tolist() == [0.5, 0.5, 1.0]


# ---- what they take --------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("trailing", [(), (3,)])
def test_sums_in_half_precision_do_not_stop(way: str, dtype: torch.dtype, trailing: tuple[int, ...]) -> None:
    x, index = torch.ones(70_000, *trailing, dtype=dtype), torch.zeros(70_000, dtype=torch.int64)
    with taking(way):
        total = segment_sum(x[:8192], index[:8192], 1)
        mean = segment_mean(x, index, 1)
        share = segment_softmax(x[:8192], index[:8192], 1)
    assert {total.dtype, mean.dtype, share.dtype} == {dtype}
    assert total.unique().tolist() == [8192]
    assert mean.unique().tolist() == [1]
    assert share.unique().tolist() == [1 / 8192]


@both_ways
def test_whole_numbers(way: str) -> None:
    x, index = torch.tensor([2**53 + 1, -3, -4, 2]), torch.tensor([0, 1, 1, 3])
    with taking(way):
        assert segment_sum(x, index, 4).tolist() == [2**53 + 1, -7, 0, 2]
        assert segment_max(x, index, 4).tolist() == [2**53 + 1, -3, 0, 2]
        mean, share = segment_mean(x[1:], index[1:], 4), segment_softmax(x[1:], index[1:], 4)
    torch.testing.assert_close(mean, torch.tensor([0.0, -3.5, 0.0, 2.0]))
    torch.testing.assert_close(share, torch.tensor([0.7310586, 0.2689414, 1.0]))


@both_ways
@every_reduction
def test_strided_rows_and_indices(way: str, name: str) -> None:
    x = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0)).transpose(0, 2)[::2]
    index = torch.tensor([0, 9, 2, 9, 2, 9, 0, 9, 1, 9, 1, 9])[::2]
    assert not x.is_contiguous()
    with taking(way):
        found = REDUCTIONS[name](x, index, 4)
        torch.testing.assert_close(found, REDUCTIONS[name](x.contiguous(), index.contiguous(), 4), rtol=0, atol=0)
    torch.testing.assert_close(found, naive(name, x, index, 4))


@both_ways
@every_reduction
def test_indices_that_do_not_fit_are_refused(way: str, name: str) -> None:
    with taking(way):
        with pytest.raises(ValueError, match="1 indices for 4 rows"):
            REDUCTIONS[name](X, torch.tensor([0]), 3)
        for wrong in (3, -1):
            with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
                REDUCTIONS[name](X, torch.tensor([0, 1, wrong, 2]), 3)


# ---- which way -------------------------------------------------------------------------------------------------------


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`load(module)`: torch-scatter is looked for anew, and `module` found."""

    def forget(module: object) -> None:
        monkeypatch.delenv("ESPER_TORCH_SCATTER", raising=False)
        monkeypatch.setitem(sys.modules, "torch_scatter", module)
        segment._extension.cache_clear()

    yield forget
    segment._extension.cache_clear()


def scatter_sum(src: Tensor, index: Tensor, dim: int, out: None, dim_size: int) -> Tensor:
    return torch.full((dim_size, *src.shape[1:]), 7.0)


FAKE = SimpleNamespace(__version__="9.8.7", scatter_sum=scatter_sum)


def test_without_torch_scatter_everything_is_native(load: Callable[..., None]) -> None:
    load(None)
    assert acceleration_status() == {
        "torch_scatter_available": False,
        "acceleration_enabled": False,
        "fallback_mode": True,
        "version": None,
        "why": "torch-scatter is not installed",
    }
    assert segment_sum(X, INDEX, 3).tolist() == [[-2.0, 0.0], [0.0, 0.0], [4.0, -3.0]]


def test_eager_code_uses_it_where_it_is_installed(load: Callable[..., None]) -> None:
    load(FAKE)
    assert acceleration_status() == {
        "torch_scatter_available": True,
        "acceleration_enabled": True,
        "fallback_mode": False,
        "version": "9.8.7",
        "why": "torch-scatter 9.8.7 is installed",
    }
    assert segment_sum(X, INDEX, 3).unique().tolist() == [7]
    assert segment_mean(X, INDEX, 3).unique().tolist() == [1]
    torch.testing.assert_close(segment_softmax(torch.zeros(4), INDEX, 3), torch.full((4,), 1 / 7))
    assert segment_max(X, INDEX, 3)[0].tolist() == [3, 0]


def test_native_only_turns_it_off_and_on_again(load: Callable[..., None]) -> None:
    load(FAKE)
    with native_only():
        status = acceleration_status()
        assert segment_sum(X, INDEX, 3)[0].tolist() == [-2, 0]
    assert (status["torch_scatter_available"], status["acceleration_enabled"], status["fallback_mode"]) == (1, 0, 1)
    assert status["why"] == "turned off by native_only"
    assert acceleration_status()["acceleration_enabled"]


@pytest.mark.parametrize(("value", "enabled"), [("0", False), ("1", True), ("", True)])
def test_the_variable_turns_it_off(
    load: Callable[..., None], monkeypatch: pytest.MonkeyPatch, value: str, enabled: bool
) -> None:
    load(FAKE)
    monkeypatch.setenv("ESPER_TORCH_SCATTER", value)
    status = acceleration_status()
    assert status["torch_scatter_available"]
    assert status["version"] == "9.8.7"
    assert (status["acceleration_enabled"], status["fallback_mode"]) == (enabled, not enabled)
    assert enabled or status["why"] == "torch-scatter 9.8.7 is turned off by ESPER_TORCH_SCATTER=0"
    assert (segment_sum(X, INDEX, 3)[0, 0] == 7) == enabled


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("OSError('not loaded') from OSError('x.so: undefined symbol: _ZN3c\\nmore')", "x.so: undefined symbol: _ZN3c"),
        ("ImportError('Could not find _version_cpu')", "Could not find _version_cpu"),
        ("RuntimeError('Detected that PyTorch and torch_scatter ...')", "Detected that PyTorch and torch_scatter ..."),
        ("ModuleNotFoundError('No module named scipy', name='scipy')", "No module named scipy"),
        ("OSError()", "OSError()"),
    ],
)  # fmt: skip
def test_one_that_does_not_load_is_reported_once(
    load: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    error: str,
    shown: str,
) -> None:
    load(None)
    monkeypatch.delitem(sys.modules, "torch_scatter")
    (tmp_path / "torch_scatter.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.WARNING, "esper"):
        assert segment_sum(X, INDEX, 3)[0].tolist() == [-2, 0]
        status = acceleration_status()
    assert status["why"] == f"torch-scatter is installed but does not load: {shown}"
    assert [status["torch_scatter_available"], status["acceleration_enabled"]] == [False, False]
    assert status["fallback_mode"]
    assert status["version"] is None
    (message,) = caplog.messages
    assert status["why"] in message
    assert "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps torch-scatter" in message


def test_one_that_is_turned_off_may_be_broken(
    load: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(None)
    monkeypatch.delitem(sys.modules, "torch_scatter")
    monkeypatch.setenv("ESPER_TORCH_SCATTER", "0")
    (tmp_path / "torch_scatter.py").write_text("raise OSError('undefined symbol')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert acceleration_status()["fallback_mode"]
    assert not caplog.messages


def pooled(x: Tensor, index: Tensor, segments: int) -> Tensor:
    """All reductions, in one."""
    return torch.cat([reduce(x, index, segments).flatten() for reduce in REDUCTIONS.values()])


@pytest.mark.parametrize("installed", ["nothing", "fake", pytest.param("real", marks=needs_torch_scatter)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_compiled_code_is_native_and_one_graph(load: Callable[..., None], installed: str, dtype: torch.dtype) -> None:
    with native_only():
        expected = pooled(X.to(dtype), INDEX, 3)
    if installed != "real":
        load(FAKE if installed == "fake" else None)
    torch._dynamo.reset()
    compiled = torch.compile(pooled, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X.to(dtype), INDEX, 3), expected)
    if dtype == torch.float32:
        with native_only():
            theirs = gradient(pooled, X, INDEX, 3)
        torch.testing.assert_close(gradient(compiled, X, INDEX, 3), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("installed", ["nothing", pytest.param("real", marks=needs_torch_scatter)])
def test_inductor_computes_the_same(load: Callable[..., None], installed: str) -> None:
    if installed == "nothing":
        load(None)
    torch._dynamo.reset()
    compiled = torch.compile(pooled, dynamic=True, fullgraph=True)
    for rows, segments in ((50, 7), (31, 9)):
        generator = torch.Generator().manual_seed(rows)
        x, index = torch.randn(rows, 3, generator=generator), torch.randint(segments, (rows,), generator=generator)
        torch.testing.assert_close(compiled(x, index, segments), pooled(x, index, segments))
        mine, theirs = (gradient(function, x, index, segments) for function in (compiled, pooled))
        torch.testing.assert_close(mine, theirs)
