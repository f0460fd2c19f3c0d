"""torch's FlexAttention, compiled: mask, bias and causal mask are added by a score modification.

They are one tensor, since captures in both a score modification and a mask modification break the generation of code.
"""

from __future__ import annotations

from torch import Tensor

from esper.attention import compiled
from esper.attention.inputs import Inputs
from esper.attention.spec import AttentionSpec, Facts

_SMALLEST = 16  # head dimension of the kernels for CUDA


def reject(spec: AttentionSpec, facts: Facts) -> list[str]:
    """See `esper.attention.backends`."""
    reasons = []
    if spec.kind == "graph":
        reasons.append("it computes its scores as products, and those of graph attention are given")
    if facts.no_compiler is not None:
        reasons.append(f"it must be compiled: {facts.no_compiler}")
    if spec.device == "cpu" and spec.needs_grad:
        reasons.append("it has no gradients on CPUs")
    if spec.device == "cpu" and spec.queries is None:
        reasons.append("on CPUs it is compiled by itself, not as a part of a larger program")
    if spec.device == "cuda" and spec.head_dim is not None and spec.head_dim < _SMALLEST:
        reasons.append(f"a head dimension of {spec.head_dim} is below {_SMALLEST}, the smallest on CUDA")
    return reasons


def forward(inputs: Inputs) -> Tensor:
    """See `esper.attention.backends`."""
    return compiled.run("flex", plain, inputs)


def plain(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, scale: float) -> Tensor:
    """What is compiled; `added` is [b, 1 or heads, queries, keys]."""
    from torch.nn.attention.flex_attention import flex_attention  # takes a second to import

    if added is None:
        return flex_attention(q, k, v, scale=scale)
    rows, heads = added.shape[:2]

    def score(value: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return value + added[b % rows, h % heads, query, key]

    return flex_attention(q, k, v, score_mod=score, scale=scale)
