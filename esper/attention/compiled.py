"""Attention as compiled executables of bucketed sizes: sequences are padded to the next power of two, and what is
padded is masked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from esper.attention import masks
from esper.attention.executables import Executable, Executables, bucket
from esper.attention.inputs import Inputs
from esper.runtime.compiled import own_copy

Plain = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""Attention of q, k, v, what is added to the scores, and their scale."""

executables = Executables()
"""Of this process."""


def run(name: str, plain: Plain, inputs: Inputs) -> Tensor:
    """[B, heads, queries, Dv] by the executable of `plain`, which is called `name`, for these sizes; within a function
    that is being compiled it becomes a part of that."""
    added = inputs.added(inputs.q.dtype)
    nothing = None
    if added is not None and inputs.mask is not None:
        nothing = masks.dead(added)
        added = added.masked_fill(nothing, 0.0)
    out = _padded(name, plain, inputs, added)
    if nothing is None:
        return out
    return out.unflatten(0, (-1, len(nothing))).masked_fill(nothing, 0.0).flatten(0, 1)


def _padded(name: str, plain: Plain, inputs: Inputs, added: Tensor | None) -> Tensor:
    q, k, v, scale = inputs.q, inputs.k, inputs.v, inputs.scale
    if torch.compiler.is_compiling():
        return plain(q, k, v, added, scale)
    queries, keys = q.shape[2], k.shape[2]
    to_queries, to_keys = bucket(queries), bucket(keys)
    if added is None:
        added = masks.padding(keys, to_keys, q.dtype, q.device)[None, None].expand(-1, -1, to_queries, -1)
    else:
        added = F.pad(added, (0, to_keys - keys), value=-torch.inf)
        # A padded query may attend to anything, padding included: what it finds is cut off.
        more = to_queries - queries if added.shape[2] > 1 else 0
        added = F.pad(added, (0, 0, 0, more)).expand(-1, -1, to_queries, -1)
    q = F.pad(q, (0, 0, 0, to_queries - queries))
    k, v = (F.pad(x, (0, 0, 0, to_keys - keys)) for x in (k, v))
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, added))
    key = name, q.device, q.dtype, tuple(q.shape), tuple(k.shape), v.shape[3], tuple(added.shape[:2]), scale, grad
    return executables.call(key, lambda: _compile(plain, scale), q, k, v, added)[:, :, :queries]


def _compile(plain: Plain, scale: float) -> Executable:
    function = torch.compile(own_copy(plain), fullgraph=True, dynamic=False)
    return lambda q, k, v, added: function(q, k, v, added, scale)
