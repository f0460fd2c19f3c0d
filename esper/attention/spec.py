"""What is asked of attention, and what is known of the device that is to compute it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import torch

from esper.runtime import native

KINDS = ("dense", "windowed", "channel", "graph")


@dataclass(frozen=True)
class AttentionSpec:
    """A call of attention, as far as it decides what may compute it.

    Attributes:
        kind: one of KINDS: over a sequence, within windows, among channels, or along the edges of graphs.
        device: type of the device: "cpu", "cuda", "mps".
        dtype: of queries, keys and values.
        heads, queries, keys, head_dim: sizes; None where torch.compile is tracing. Of a graph: heads, targets and
            sources of each graph, and the size of a head's values.
        mask: "boolean", "additive" or None.
        bias: whether there is a position bias.
        causal: whether a query attends to no later key.
        needs_grad: whether gradients are taken.
        density: edges over possible edges, of graphs; None elsewhere.
        parallel_edges: whether two nodes may share more than one edge.
    """

    kind: str
    device: str
    dtype: torch.dtype
    heads: int | None = None
    queries: int | None = None
    keys: int | None = None
    head_dim: int | None = None
    mask: str | None = None
    bias: bool = False
    causal: bool = False
    needs_grad: bool = False
    density: float | None = None
    parallel_edges: bool = False

    def __str__(self) -> str:
        """What differs from the defaults, in one line."""
        given = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        return ", ".join(f"{name}={value}" for name, value, usual in given if value != usual)


@dataclass(frozen=True)
class Facts:
    """What a backend needs to know of a device.

    Attributes:
        device: its type.
        no_compiler: why torch.compile cannot make kernels for it, or None.
    """

    device: str
    no_compiler: str | None = None


@cache
def facts(device: str) -> Facts:
    """Of a type of device, here and now."""
    if device == "cpu":
        try:
            native.compiler()
        except native.BuildError as error:
            return Facts(device, str(error))
        return Facts(device)
    if device == "cuda":
        from torch.utils._triton import has_triton

        return Facts(device, None if has_triton() else "Triton is not installed or does not know this GPU")
    return Facts(device, f"torch.compile makes no FlexAttention kernels for {device}")
