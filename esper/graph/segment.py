"""Reductions over segments: rows of a tensor that share an index.

They are built from `index_add` and `scatter_reduce`, whose gradients are right where a maximum is shared or a segment
is empty, and which `torch.compile` understands.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(x: Tensor, index: Tensor, segments: int) -> Tensor:
    """[segments, ...], the sum of the rows of x [E, ...] with each index [E]; 0 for empty segments."""
    return x.new_zeros(segments, *x.shape[1:]).index_add(0, index, x)


def segment_max(x: Tensor, index: Tensor, segments: int) -> Tensor:
    """As `segment_sum`, the largest; where several rows share it they share its gradient."""
    # From -inf: starting from 0 would hide a maximum of exactly 0 from the gradient.
    top = x.new_full((segments, *x.shape[1:]), -torch.inf)
    spread = index.view(-1, *[1] * (x.dim() - 1)).expand_as(x)
    top = top.scatter_reduce(0, spread, x, "amax", include_self=True)
    return top.masked_fill(top == -torch.inf, 0.0)


def segment_softmax(x: Tensor, index: Tensor, segments: int) -> Tensor:
    """[E, ...], the softmax of x [E, ...] among the rows with the same index."""
    top = segment_max(x.detach(), index, segments)
    weight = (x - top[index]).exp()
    return weight / segment_sum(weight, index, segments)[index]
