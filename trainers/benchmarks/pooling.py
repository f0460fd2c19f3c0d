"""The suite `pooling`: segment reductions natively and accelerated, and what torch-scatter itself offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from esper.graph import segment
from esper.runtime.errors import EsperError
from trainers.benchmarks import Report, suite
from trainers.benchmarks.rows import Row, compare, content, turns
from trainers.config import BenchmarkConfig

NATIVE, ACCELERATED, SCATTER, CSR = "native", "accelerated", "torch_scatter", "torch_scatter, csr"
REDUCTIONS = {
    "sum": segment.segment_sum,
    "mean": segment.segment_mean,
    "max": segment.segment_max,
    "softmax": segment.segment_softmax,
}
RIVALS = (SCATTER, CSR)
_FEATURES = 64
_MEMBERS = 10  # rows of a segment, on average
_ROWS_A_TURN = 100_000  # at least: less is too short to be timed

Pool = Callable[[Tensor], Tensor]


def variants(name: str, index: Tensor, segments: int, ordered: bool) -> dict[str, Pool]:
    """Ways to compute one of REDUCTIONS; only the native one where torch-scatter is not used."""
    reduce = REDUCTIONS[name]

    def native(x: Tensor) -> Tensor:
        with segment.native_only():
            return reduce(x, index, segments)

    ways: dict[str, Pool] = {NATIVE: native}
    if not segment.acceleration_status()["acceleration_enabled"]:
        return ways
    import torch_scatter

    ways[ACCELERATED] = lambda x: reduce(x, index, segments)
    if name == "softmax":
        ways[SCATTER] = lambda x: torch_scatter.scatter_softmax(x, index, 0, segments)
        return ways
    ways[SCATTER] = lambda x: torch_scatter.scatter(x, index, 0, None, segments, name)
    if ordered:
        # Its pointers are taken to be known, which is the best case.
        pointers = torch.cat([index.new_zeros(1), torch.bincount(index, minlength=segments).cumsum(0)])
        ways[CSR] = lambda x: torch_scatter.segment_csr(x, pointers, None, name)
    return ways


def forward(pool: Pool, x: Tensor) -> Tensor:
    """The values."""
    with torch.no_grad():
        return pool(x)


def both(pool: Pool, x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with respect to x of what has `gradient` with respect to the values."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(pool(x), x, gradient)[0]


def check(case: str, ways: dict[str, Pool], x: Tensor) -> Tensor:
    """The values, which all ways must agree on; the accelerated way also on the gradient.

    Raises:
        EsperError: they differ.
    """
    expected = forward(ways[NATIVE], x)
    pairs = {name: (forward(pool, x), expected) for name, pool in ways.items()}
    if ACCELERATED in ways:
        pairs[f"{ACCELERATED}, gradient"] = (both(ways[ACCELERATED], x, expected), both(ways[NATIVE], x, expected))
    for name, (mine, native) in pairs.items():
        if not torch.allclose(mine, native, rtol=1e-4, atol=1e-5):
            raise EsperError(f"{case}: {name}: differs from {NATIVE}, so there is nothing to compare")
    return expected


def _repeated(function: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        function()


def table(rows: Iterable[Row], title: str) -> Table:
    """For the terminal: milliseconds, and how many times faster than the native way."""
    result = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    result.add_column("case")
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.variant] = row
    names = [name for name in (NATIVE, ACCELERATED, SCATTER, CSR) if any(name in case for case in cases.values())]
    for name in names:
        result.add_column(f"{name}, ms", justify="right")
    for case, found in cases.items():
        cells = [
            "" if name not in found else f"{found[name].median_ms:.1f} ({found[name].ratio_vs_reference:.2f})"
            for name in names
        ]
        result.add_row(case, *cells)
    return result


@suite("pooling")
def run(config: BenchmarkConfig) -> Report:
    """Every reduction, forward and with the backward pass, of rows in order and in random order."""
    settings, device = config.benchmark, torch.device(config.runtime.device)
    status = segment.acceleration_status()
    rows: list[Row] = []
    cases = [(count, ordered, name) for count in settings.rows for ordered in (True, False) for name in REDUCTIONS]
    with turns(2 * len(cases), settings) as tick:
        for count, ordered, name in cases:
            generator = torch.Generator().manual_seed(config.seed)
            segments, calls = max(count // _MEMBERS, 1), max(_ROWS_A_TURN // count, 1)
            x = torch.randn(count, _FEATURES, generator=generator).to(device)
            index = torch.randint(segments, (count,), generator=generator).to(device)
            ways = variants(name, index.sort().values if ordered else index, segments, ordered)
            pooled = f"{name}, {calls} x {count:,} rows, {'sorted' if ordered else 'random'}"
            gradient = check(pooled, ways, x)
            passes: dict[str, Callable[[Pool], object]] = {
                "forward": partial(forward, x=x),
                "forward + backward": partial(both, x=x, gradient=gradient),
            }
            for kind, function in passes.items():
                case = f"{pooled}, {kind}"
                forms: dict[str, Callable[[], object]] = {
                    way: partial(_repeated, partial(function, pool), calls) for way, pool in ways.items()
                }
                rows += compare("pooling", case, forms, settings, device, tick, reference=NATIVE)
    return Report(content(rows, RIVALS) | {"acceleration": status}, [table(rows, f"Pooling: {status['why']}")])
