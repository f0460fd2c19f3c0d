"""Edges as lists: scores are normalised and messages summed by target. Memory grows with the edges."""

from __future__ import annotations

from torch import Tensor

from esper.attention.inputs import Edges
from esper.attention.spec import AttentionSpec, Facts
from esper.graph.segment import segment_softmax, segment_sum


def reject(spec: AttentionSpec, facts: Facts) -> list[str]:
    """See `esper.attention.backends`."""
    return [] if spec.kind == "graph" else ["it follows the edges of graphs only"]


def forward_edges(scores: Tensor, values: Tensor, edges: Edges) -> Tensor:
    """See `esper.attention.backends`."""
    rows = edges.graphs * edges.targets
    shares = segment_softmax(scores, edges.target, rows).to(values.dtype)
    return segment_sum(values[edges.source] * shares[:, :, None], edges.target, rows)
