"""Small graphs: the edges into each node type are one padded block, and messages are batched products.

A block has a column for each source of each relation and a row for each target (`esper.graph.layout`). What all
relations send to a type is then one product [rows, columns] x [columns, width] for each graph, with weights that are
means for GraphSAGE and softmaxes per relation for GAT. The vectors that score are folded into the projections, so that
targets and attributes are never projected. Embeddings are [n, B, width] and scores [rows, columns, heads, B]: with the
graphs innermost, arithmetic on few nodes and few heads still fills whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from esper.graph import GraphBatch, Layout
from esper.graph.layout import Block
from esper.tamiyo.encoders.parameters import SLOPE, GatLayer, Parameters, SageLayer

_NEVER = -1e30  # a score that leaves nothing of an edge; finite, so that rows without edges are no NaN


def of_tensors(encoder: Parameters, layout: Layout) -> Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """See Encoder.of_tensors."""
    # torch.compile does not take the lock of a property that is not yet cached.
    _ = layout.nodes, layout.blocks, layout.planes

    def encode(x: Tensor, attr: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x, attr, mask = x.transpose(0, 1), attr.permute(2, 1, 0), mask.T
        return _encode(encoder, layout, x.contiguous(), attr.contiguous(), mask.contiguous())

    return encode


def forward(encoder: Parameters, graph: GraphBatch) -> dict[str, Tensor]:
    """See Encoder.forward."""
    packed = graph.pack()
    return of_tensors(encoder, packed.layout)(packed.x, packed.attr, packed.mask)


def _encode(encoder: Parameters, layout: Layout, x: Tensor, attr: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Embeddings of the types to be read, from x [nodes, B, features], attr [attributes, cells, B], mask [cells, B]."""
    shape = encoder.shape
    h = {node: encoder.inputs[node](x[layout.nodes[node], :, :features]) for node, _, features in layout.types}
    masks, attrs, means = {}, {}, {}
    for node, block in layout.blocks.items():
        cells = block.rows, block.columns
        masks[node] = mask[block.cells].unflatten(0, cells)  # [rows, columns, B]
        attrs[node] = attr[:, block.cells].unflatten(1, cells)  # [attributes, rows, columns, B]
        means[node] = _mean_weights(masks[node], block)
    for depth, (layer, skips) in enumerate(encoder.stages()):
        out, first = {}, 0
        folded = layer.folded() if shape.attends(depth) else ()
        for node, block in layout.blocks.items():
            if node not in shape.targets(depth):
                continue
            part = slice(first, first + len(block.relations))
            first = part.stop
            sources = [
                h[relation[0]].repeat(layout.planes[relation], 1, 1) if layout.planes[relation] > 1 else h[relation[0]]
                for relation in block.relations
            ]
            if shape.attends(depth):
                new = _gat(layer, folded, part, block, sources, h[node], masks[node], attrs[node])
            else:
                new = _sage(layer, part, block, sources, h[node], means[node])
            out[node] = skips[node](h[node]) + F.gelu(new)
        h = out
    return {node: h[node].transpose(0, 1) for node in shape.read}


def _mean_weights(mask: Tensor, block: Block) -> Tensor:
    """[rows, columns, B], the mean over each relation's edges and then over the relations."""
    parts = mask.float().split(block.sizes, dim=1)
    return torch.cat([part / part.sum(1, keepdim=True).clamp(min=1) for part in parts], 1) / len(parts)


def _aggregates_first(block: Block) -> bool:
    """Whether it is cheaper to project what a node has gathered than what is sent to it."""
    return block.rows * len(block.relations) < block.columns


def _gather(weights: Tensor, sent: Tensor) -> Tensor:
    """[rows, B, heads, size], what `weights` [rows, columns, heads, B] let through of `sent`
    [columns, B, heads, size]."""
    if torch.compiler.is_compiling():
        # One fused loop that reads each operand where it is; a batched product would have to copy them first.
        return (weights.transpose(2, 3)[..., None] * sent).sum(1)
    product = weights.permute(3, 2, 0, 1) @ sent.permute(1, 2, 0, 3)  # [B, heads, rows, size]
    return product.permute(2, 0, 1, 3)


def _sage(layer: SageLayer, part: slice, block: Block, sources: list[Tensor], own: Tensor, weights: Tensor) -> Tensor:
    """[rows, B, out] for one target type from `sources` [n, B, in] of each relation."""
    kept = own @ layer.root[part].mean(0) + layer.bias[part].mean(0)
    weights = weights[:, :, None]  # as if of one head
    if _aggregates_first(block):
        pieces = zip(weights.split(block.sizes, dim=1), sources, strict=True)
        gathered = torch.cat([_gather(weight, source[:, :, None]) for weight, source in pieces], dim=3)
        return kept + gathered.flatten(2) @ layer.neighbour[part].flatten(0, 1)
    sent = torch.cat([source @ w for source, w in zip(sources, layer.neighbour[part], strict=True)])
    return kept + _gather(weights, sent[:, :, None]).flatten(2)


def _gat(
    layer: GatLayer,
    folded: tuple[Tensor, ...],
    part: slice,
    block: Block,
    sources: list[Tensor],
    own: Tensor,
    mask: Tensor,
    attr: Tensor,
) -> Tensor:
    """[rows, B, out] for one target type from `sources` [n, B, in] of each relation."""
    count, (heads, size) = len(block.relations), layer.att_source.shape[1:]

    def scores(weight: Tensor, x: Tensor) -> Tensor:
        """[..., n, B], weight [..., in] times x [n, B, in]."""
        return (weight.flatten(0, -2) @ x.flatten(0, 1).T).view(*weight.shape[:-1], *x.shape[:2])

    def spread(value: Tensor, dim: int) -> Tensor:
        """What there is once for each relation, for each column."""
        pieces = value.split(1, dim)
        return torch.cat(
            [
                piece.expand(*value.shape[:dim], columns, *value.shape[dim + 1 :])
                for piece, columns in zip(pieces, block.sizes, strict=True)
            ],
            dim,
        )

    by, to, along = (vectors[part] for vectors in folded)
    to = scores(to, own).permute(2, 0, 1, 3)  # [rows, R, heads, B]
    sent_by = torch.cat([scores(w, s).transpose(0, 1) for w, s in zip(by, sources, strict=True)])  # [columns, heads, B]
    edge = spread(along, 0)  # [columns, heads, attributes]
    score = sent_by + spread(to, 1)
    for value, weight in zip(attr, edge.unbind(2), strict=True):
        score = score + value[:, :, None] * weight[..., None]  # [rows, columns, heads, B]
    score = F.leaky_relu(score, SLOPE).masked_fill(~mask[:, :, None], _NEVER)
    share = torch.cat([piece.softmax(1) for piece in score.split(block.sizes, dim=1)], dim=1)
    share = share * (mask[:, :, None] / count)  # also where there is no edge at all
    if _aggregates_first(block):
        pieces = zip(share.split(block.sizes, dim=1), sources, strict=True)
        gathered = [_gather(piece, s[:, :, None].expand(-1, -1, heads, -1)) for piece, s in pieces]
        weight = layer.source[part].unflatten(2, (heads, size)).permute(2, 0, 1, 3).flatten(1, 2)  # [heads, R in, size]
        whole = torch.cat(gathered, dim=3)  # [rows, B, heads, R in]
        new = (whole.permute(2, 0, 1, 3).flatten(1, 2) @ weight).transpose(0, 1).reshape(*own.shape[:2], heads * size)
    else:
        sent = torch.cat([source @ w for source, w in zip(sources, layer.source[part], strict=True)])
        new = _gather(share, sent.unflatten(2, (heads, size))).flatten(2)
    return new + layer.bias[part].mean(0)
