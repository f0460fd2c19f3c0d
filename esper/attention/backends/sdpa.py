"""torch's `scaled_dot_product_attention`, with mask, bias and causal mask added in one tensor."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from esper.attention import masks
from esper.attention.inputs import Edges, Inputs
from esper.attention.spec import AttentionSpec, Facts


def reject(spec: AttentionSpec, facts: Facts) -> list[str]:
    """See `esper.attention.backends`."""
    return []


def forward(inputs: Inputs) -> Tensor:
    """See `esper.attention.backends`."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if inputs.causal and inputs.mask is None and inputs.bias is None and q.device.type != "mps":
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=inputs.scale)
    added = inputs.added(q.dtype)
    if added is None or len(added) in (1, len(q)):
        return _attend(inputs, added)
    # Windows share a mask over the images of a batch: with windows beside heads it need not be copied for each image.
    batch, heads, windows = len(q), q.shape[1], len(added)
    beside = [x.reshape(batch // windows, windows * heads, *x.shape[2:]) for x in (q, k, v)]
    added = added.expand(-1, heads, -1, -1).reshape(1, windows * heads, *added.shape[2:])
    out = _attend(inputs._replace(q=beside[0], k=beside[1], v=beside[2]), added)
    return out.reshape(batch, heads, *out.shape[2:])


def _attend(inputs: Inputs, added: Tensor | None) -> Tensor:
    q, k, v = inputs.q, inputs.k, inputs.v
    device = q.device.type
    nothing = None
    if added is not None:
        if device != "cpu" and inputs.mask is not None:
            # Not every kernel gives 0 for a query without a key, as those of the CPU do.
            nothing = masks.dead(added)
            added = added.masked_fill(nothing, 0.0)
        added = whole(added, inputs, device)
    with path(device, torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        out = scaled_dot_product_attention(q, k, v, attn_mask=added, scale=inputs.scale)
    return out if nothing is None else out.masked_fill(nothing, 0.0)


def whole(added: Tensor, inputs: Inputs, device: str) -> Tensor:
    """What is added as the kernels of a type of device want it: those of "mps" contiguous and of full size."""
    if device != "mps":
        return added
    return added.expand(*inputs.q.shape[:3], inputs.k.shape[2]).contiguous()


def path(device: str, needs_grad: bool) -> nullcontext[None] | sdpa_kernel:  # type: ignore[valid-type]
    """The kernels that may be used: on "mps" the fused ones have no gradients."""
    return sdpa_kernel(SDPBackend.MATH) if device == "mps" and needs_grad else nullcontext()


def forward_edges(scores: Tensor, values: Tensor, edges: Edges) -> Tensor:
    """See `esper.attention.backends`; takes memory for every possible edge. Its score is added to a product of 0."""
    added = edges.scores(scores)
    sent = values.unflatten(0, (edges.graphs, edges.sources)).transpose(1, 2)
    zero = values.new_zeros(1).expand(edges.graphs, values.shape[1], edges.targets, values.shape[2])
    inputs = Inputs(zero, torch.zeros_like(sent), sent, added, None, False, 1.0)
    return _attend(inputs, added).transpose(1, 2).flatten(0, 1)
