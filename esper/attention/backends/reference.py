"""Matrix product, softmax, matrix product (Vaswani et al., arXiv 1706.03762): computes everything, everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.attention import masks
from esper.attention.inputs import Edges, Inputs
from esper.attention.spec import AttentionSpec, Facts


def reject(spec: AttentionSpec, facts: Facts) -> list[str]:
    """See `esper.attention.backends`."""
    return []


def forward(inputs: Inputs) -> Tensor:
    """See `esper.attention.backends`; the softmax of half precision is in float32."""
    q, k, v = inputs.q, inputs.k, inputs.v
    scores = ((q * inputs.scale) @ k.transpose(-2, -1)).to(_wide(q.dtype))
    added = inputs.added(scores.dtype)
    if added is not None:
        scores = (scores.unflatten(0, (-1, len(added))) + added).flatten(0, 1)
    # A causal mask leaves every query its first key.
    return _shares(scores, inputs.mask is not None).to(v.dtype) @ v


def forward_edges(scores: Tensor, values: Tensor, edges: Edges) -> Tensor:
    """See `esper.attention.backends`; takes memory for every possible edge."""
    shares = _shares(edges.scores(scores.to(_wide(scores.dtype))), True).to(values.dtype)
    gathered = shares @ values.unflatten(0, (edges.graphs, edges.sources)).transpose(1, 2)
    return gathered.transpose(1, 2).flatten(0, 1)


def _shares(scores: Tensor, masked: bool) -> Tensor:
    if not masked:
        return scores.softmax(-1)
    nothing = masks.dead(scores)
    return scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
