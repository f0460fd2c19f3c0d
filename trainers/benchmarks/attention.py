"""The suite `attention`: the backends of attention, each on what it can compute, and the cache of executables."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esper import attention
from esper.runtime.errors import ConfigError, EsperError
from trainers.benchmarks import Report, suite
from trainers.benchmarks.rows import Row, compare, content, table, turns
from trainers.config import BenchmarkConfig

WINDOWS = "DAT windows 16x3x256x30, bias"
LENGTHS = 512
_REFERENCE = "reference"
_LEARNT = 4  # queries, keys, values and bias; masks have no gradients

Attend = Callable[[list[Tensor], str], Tensor]
"""Attention of tensors by a backend."""


def cases(device: torch.device) -> dict[str, tuple[list[Tensor], Attend]]:
    """Name -> tensors, and what is computed of them."""

    def drawn(*shape: int) -> list[Tensor]:
        return list(torch.randn(3, *shape, device=device))

    def windowed(x: list[Tensor], name: str) -> Tensor:
        return attention.attend(*x[:3], kind="windowed", bias=x[3], backend=name)

    def shifted(x: list[Tensor], name: str) -> Tensor:
        return attention.attend(*x[:3], kind="windowed", bias=x[3], mask=x[4], backend=name)

    def causal(x: list[Tensor], name: str) -> Tensor:
        return attention.attend(*x, causal=True, backend=name)

    def channel(x: list[Tensor], name: str) -> Tensor:
        return attention.attend(*x, kind="channel", scale=1.0, backend=name)

    bias = torch.randn(3, 256, 256, device=device)
    mask = -100.0 * (torch.rand(16, 256, 256, device=device) < 0.5)
    found: dict[str, tuple[list[Tensor], Attend]] = {
        WINDOWS: ([*drawn(16, 3, 256, 30), bias], windowed),
        "DAT windows 16x3x256x30, bias, mask": ([*drawn(16, 3, 256, 30), bias, mask], shifted),
        "DAT channels 1x6x10x4096": (drawn(1, 6, 10, 4096), channel),
        "sequence 4x8x512x64, causal": (drawn(4, 8, 512, 64), causal),
    }
    for graphs, nodes, degree in ((8, 100, 4), (8, 100, 25), (4, 300, 75), (1, 1000, 4)):
        found[f"graph {graphs}x{nodes}, degree {degree}, 4 heads of 32"] = _graph(graphs, nodes, degree, device)
    return found


def _graph(graphs: int, nodes: int, degree: int, device: torch.device) -> tuple[list[Tensor], Attend]:
    target = torch.arange(graphs * nodes).repeat_interleave(degree)
    chosen = torch.rand(graphs * nodes, nodes).topk(degree, dim=1).indices.flatten()
    source = chosen + target // nodes * nodes
    edges = attention.Edges.of(source.to(device), target.to(device), graphs, nodes, nodes)
    tensors = [torch.randn(len(target), 4, device=device), torch.randn(graphs * nodes, 4, 32, device=device)]
    return tensors, lambda x, name: attention.attend_edges(x[0], x[1], edges, name)


def able(attend: Attend, tensors: list[Tensor], gradients: bool, compiled: bool) -> dict[str, Callable[[], object]]:
    """The backends that can compute a case, `flex` among them where `compiled`, and what is timed.

    Raises:
        EsperError: they do not agree.
    """
    x = [tensor.requires_grad_(gradients and place < _LEARNT) for place, tensor in enumerate(tensors)]
    found: dict[str, Tensor] = {}
    with torch.set_grad_enabled(gradients):
        for name in [name for name in attention.BACKENDS if compiled or name != "flex"]:
            with suppress(ConfigError):  # which says why it cannot
                found[name] = attend(x, name)
    for name, out in found.items():
        if not torch.allclose(out, found[_REFERENCE], rtol=1e-3, atol=1e-4):
            raise EsperError(f"{name}: differs from {_REFERENCE}, so there is nothing to compare")
    return {name: partial(_both if gradients else _forward, attend, x, name) for name in found}


def _forward(attend: Attend, x: list[Tensor], name: str) -> None:
    with torch.no_grad():
        attend(x, name)


def _both(attend: Attend, x: list[Tensor], name: str) -> None:
    torch.autograd.grad(attend(x, name).square().sum(), x[:_LEARNT])


def growing(device: torch.device) -> dict[str, Any]:
    """FlexAttention over sequences of every length up to LENGTHS, twice."""
    executables = attention.executables
    executables.clear()
    passes = []
    for _ in range(2):
        before, start = executables.summary(), time.perf_counter()
        for length in range(1, LENGTHS + 1):
            q = torch.randn(1, 1, length, 16, device=device)
            with torch.no_grad():
                attention.attend(q, q, q, causal=True, backend="flex")
        after = executables.summary()
        hits, misses = after.hits - before.hits, after.misses - before.misses
        passes.append({"hits": hits, "misses": misses, "s": time.perf_counter() - start})
    last = executables.summary()
    return {"passes": passes, "entries": last.size, "compile_s": last.compile_s, "call_s": last.call_s}


@suite("attention")
def run(config: BenchmarkConfig) -> Report:
    """Every case forward and with the backward pass, and growing sequences where FlexAttention can run."""
    settings, device = config.benchmark, torch.device(config.runtime.device)
    torch.manual_seed(config.seed)
    rows: list[Row] = []
    every = cases(device)
    with turns(2 * len(every), settings) as tick:
        for name, (tensors, attend) in every.items():
            for gradients in (False, True):
                start = time.perf_counter()
                variants = able(attend, tensors, gradients, settings.compile)
                seconds = {"flex": time.perf_counter() - start} if "flex" in variants else {}
                case = f"{name}, {'forward + backward' if gradients else 'forward'}"
                rows += compare("attention", case, variants, settings, device, tick, seconds, _REFERENCE)
    results = content(rows)
    if any(row.variant == "flex" for row in rows):
        results["growing"] = growing(device)
    return Report(results, [table(rows, "Attention", _REFERENCE)])
