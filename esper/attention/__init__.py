"""Attention behind one registry of backends: `attend` over tensors, `attend_edges` along the edges of graphs.

`reference`, `sdpa`, `flex` and, for graphs, `segment` compute the same function. `select` says which one it is that
computes a call, and why not the others (docs/attention.md).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from esper.attention import events
from esper.attention.backends import BACKENDS
from esper.attention.compiled import executables
from esper.attention.events import Access, Selection, Summary, listening
from esper.attention.inputs import Edges, Inputs
from esper.attention.selection import AUTO, asked, configure, resolved, select, using
from esper.attention.spec import KINDS, AttentionSpec, Facts

__all__ = [
    "AUTO", "BACKENDS", "KINDS", "Access", "AttentionSpec", "Edges", "Facts", "Selection", "Summary", "asked", "attend",
    "attend_edges", "backend_of", "cache_info", "configure", "edge_spec", "executables", "listening", "scalars",
    "select", "using",
]  # fmt: skip


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: str = "dense",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`softmax(scale * q k^T + bias + mask) v`, [B, heads, queries, Dv]; 0 for queries without a key to attend to.

    Under `torch.compile` the backend is chosen when the call is traced.

    Args:
        q: [B, heads, queries, D].
        k: [B, heads, keys, D].
        v: [B, heads, keys, Dv].
        kind: "dense"; "windowed", where B counts windows, those of an image side by side; or "channel", where queries
            and keys are channels.
        mask: boolean (True: attend) or additive, of any shape that spreads to [B, heads, queries, keys]; or
            [windows, queries, keys], one for each window of every image.
        bias: of positions, [..., heads, queries, keys].
        causal: query i attends to the keys 0 to i alone.
        scale: of the products; 1 / sqrt(D) by default.
        backend: one of BACKENDS; by default as `select` says.

    Raises:
        ValueError: shapes or dtypes do not fit.
        ConfigError: the backend that was asked for does not exist or cannot compute this; says what can.
    """
    inputs = Inputs.of(q, k, v, mask, bias, causal, scale)
    masked = None if mask is None else "boolean" if mask.dtype == torch.bool else "additive"
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    sizes = None if torch.compiler.is_compiling() else (q.shape[1], q.shape[2], k.shape[2], q.shape[3])
    name = _chosen(kind, q.device.type, q.dtype, sizes, masked, bias is not None, causal, grad, backend)
    return BACKENDS[name].forward(inputs)


def _chosen(
    kind: str,
    device: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int] | None,
    mask: str | None,
    bias: bool,
    causal: bool,
    grad: bool,
    backend: str | None,
) -> str:
    heads, queries, keys, size = sizes or (None,) * 4
    spec = AttentionSpec(kind, device, dtype, heads, queries, keys, size, mask, bias, causal, grad)
    return backend_of(spec, backend)


# What torch.compiler.assume_constant_result does, without the seconds that it takes to import.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attend_edges(scores: Tensor, values: Tensor, edges: Edges, backend: str | None = None) -> Tensor:
    """What every target gathers from its sources, [graphs * targets, heads, D]: the mean of their values, weighted by
    the softmax of its edges' scores (GAT, Velickovic et al., arXiv 1710.10903); 0 without edges.

    Args:
        scores: [E, heads].
        values: [graphs * sources, heads, D].
        edges: from which source to which target.
        backend: one of BACKENDS; by default as `select` says.

    Raises:
        ConfigError: the backend that was asked for does not exist or cannot compute this; says what can.
    """
    needs_grad = torch.is_grad_enabled() and (scores.requires_grad or values.requires_grad)
    name = backend_of(edge_spec(edges, values, needs_grad), backend)
    return BACKENDS[name].forward_edges(scores, values, edges)


def edge_spec(edges: Edges, values: Tensor, needs_grad: bool) -> AttentionSpec:
    """What `attend_edges` asks for. The density is rounded, so that graphs that differ by an edge are one spec."""
    heads, size = values.shape[1:]
    return AttentionSpec(
        "graph",
        values.device.type,
        values.dtype,
        heads,
        edges.targets,
        edges.sources,
        size,
        needs_grad=needs_grad,
        density=round(edges.density, 2),
        parallel_edges=edges.parallel,
    )


def backend_of(spec: AttentionSpec, backend: str | None = None) -> str:
    """The name of what `select` says, which is decided and told once for each spec and wish.

    Raises:
        ConfigError: see `select`.
    """
    return resolved(spec, *asked(backend))


def cache_info() -> dict[str, Any]:
    """Of the compiled executables of this process: the fields of Summary."""
    return asdict(executables.summary())


def scalars() -> dict[str, float]:
    """For TensorBoard: choices by kind and backend, and, once there are any, of the compiled executables. Nothing
    before the first choice."""
    found: dict[str, float] = {f"attention/{kind}/{name}": n for (kind, name), n in events.selected.items()}
    info = cache_info()
    if info["size"]:
        info["reuses"] = sum(info["reuses"])
        found |= {f"attention/{name}": value for name, value in info.items()}
    return found
