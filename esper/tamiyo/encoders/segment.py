"""Graphs of any size: edges are lists, messages are gathered and summed by target.

All relations of a layer are packed: what every relation sends stands in one tensor, and all edges are reduced at once.
Memory grows with nodes and edges, not with their product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from esper import attention
from esper.graph import GraphBatch
from esper.graph.segment import segment_softmax, segment_sum
from esper.tamiyo.encoders.parameters import SLOPE, GatLayer, Parameters, SageLayer, Shape


class _Part(NamedTuple):
    """One relation, as slices of what is packed."""

    edges: slice
    sent: slice  # of what all relations send
    targets: slice  # of all nodes that the layer computes
    own: attention.Edges


class _Edges(NamedTuple):
    """All edges of a layer, relation after relation."""

    source: Tensor  # int64 [E], row among what all relations send
    target: Tensor  # int64 [E], row among all nodes that the layer computes
    into: Tensor  # int64 [E], row among the targets of all relations, so that each relation has rows of its own
    relation: Tensor  # int64 [E]
    attr: Tensor  # [E, attributes]
    relations: Tensor  # [targets], how many relations end in a node's type
    rows: int  # targets of all relations
    counts: dict[str, int]  # nodes of each computed type
    parts: list[_Part]  # of each relation


def forward(encoder: Parameters, graph: GraphBatch) -> dict[str, Tensor]:
    """See Encoder.forward."""
    shape = encoder.shape
    x, index, attr = graph.flatten()
    h = {node: encoder.inputs[node](value) for node, value in x.items()}
    edges: dict[tuple[str, ...], _Edges] = {}
    for depth, (layer, skips) in enumerate(encoder.stages()):
        targets = shape.targets(depth)
        if targets not in edges:
            edges[targets] = _edges(shape, depth, h, index, attr, len(graph))
        own = edges[targets]
        new = (_gat if shape.attends(depth) else _sage)(layer, shape, depth, h, own)
        parts = new.split(list(own.counts.values()))
        h = {node: skips[node](h[node]) + F.gelu(part) for node, part in zip(own.counts, parts, strict=True)}
    return {node: h[node].view(*graph.x[node].shape[:2], h[node].shape[-1]) for node in shape.read}


def _edges(shape: Shape, depth: int, h: dict[str, Tensor], index: dict, attr: dict, graphs: int) -> _Edges:
    counts = {node: len(h[node]) for node in shape.schema.nodes if node in shape.targets(depth)}
    first, place = 0, {}
    for node, count in counts.items():
        place[node] = first
        first += count
    sources, targets, into, relations, attrs, parts = [], [], [], [], [], []
    sent = rows = known = 0
    for number, relation in enumerate(shape.relations(depth)):
        source, target = index[relation]
        sources.append(source + sent)
        targets.append(target + place[relation[2]])
        into.append(target + rows)
        relations.append(torch.full_like(source, number))
        attrs.append(F.pad(attr[relation], (0, shape.attributes - attr[relation].shape[1])))
        by, to, start = len(h[relation[0]]), len(h[relation[2]]), place[relation[2]]
        own = attention.Edges(source, target, graphs, by // graphs, to // graphs, parallel=True)
        parts.append(_Part(slice(known, known + len(source)), slice(sent, sent + by), slice(start, start + to), own))
        known += len(source)
        sent += by
        rows += to
    per_type = torch.tensor([float(len(shape.into(node))) for node in counts], device=sources[0].device)
    sizes = torch.tensor(list(counts.values()), device=sources[0].device)
    return _Edges(
        torch.cat(sources),
        torch.cat(targets),
        torch.cat(into),
        torch.cat(relations),
        torch.cat(attrs),
        torch.repeat_interleave(per_type, sizes, output_size=first),
        rows,
        counts,
        parts,
    )


def _sent(shape: Shape, depth: int, h: dict[str, Tensor], weights: Tensor) -> Tensor:
    """What every relation sends, [sources of all relations, out]."""
    return torch.cat([h[r[0]] @ weight for r, weight in zip(shape.relations(depth), weights, strict=True)])


def _per_type(shape: Shape, depth: int, counts: dict[str, int], values: Tensor) -> list[Tensor]:
    """`values` [R, ...] of the relations that end in each computed type."""
    return list(values.split([len(shape.into(node)) for node in counts]))


def _sage(layer: SageLayer, shape: Shape, depth: int, h: dict[str, Tensor], edges: _Edges) -> Tensor:
    count = segment_sum(torch.ones_like(edges.attr[:, 0]), edges.into, edges.rows)
    weight = 1 / (count[edges.into] * edges.relations[edges.target])
    sent = _sent(shape, depth, h, layer.neighbour)
    arrived = segment_sum(sent[edges.source] * weight[:, None], edges.target, len(edges.relations))
    roots = _per_type(shape, depth, edges.counts, layer.root)
    biases = _per_type(shape, depth, edges.counts, layer.bias)
    kept = [h[n] @ root.mean(0) + bias.mean(0) for n, root, bias in zip(edges.counts, roots, biases, strict=True)]
    return torch.cat(kept) + arrived


def _gat(layer: GatLayer, shape: Shape, depth: int, h: dict[str, Tensor], edges: _Edges) -> Tensor:
    heads, size = layer.att_source.shape[1:]

    _, scoring, scoring_edge = layer.folded()  # sources are scored by what they send
    relations = shape.relations(depth)
    sent = _sent(shape, depth, h, layer.source).unflatten(1, (heads, size))
    sizes = torch.tensor([len(h[relation[0]]) for relation in relations], device=sent.device)
    own = torch.repeat_interleave(torch.arange(len(relations), device=sent.device), sizes, output_size=len(sent))
    by = (sent * layer.att_source[own]).sum(2)  # [sources, heads]
    to = torch.cat([h[r[2]] @ weight.T for r, weight in zip(relations, scoring, strict=True)])
    along = (edges.attr[:, None] * scoring_edge[edges.relation]).sum(2)
    score = F.leaky_relu(by[edges.source] + to[edges.into] + along, SLOPE)
    dense = [part for part in edges.parts if _is_dense(part, sent)]
    arrived = _gathered(score, sent, edges, dense)
    for part in dense:
        exact = attention.Edges.of(*part.own[:5])
        gathered = attention.attend_edges(score[part.edges], sent[part.sent], exact).flatten(1)
        arrived[part.targets] += gathered / edges.relations[part.targets, None]
    biases = _per_type(shape, depth, edges.counts, layer.bias)
    spread = [bias.mean(0).expand(count, -1) for bias, count in zip(biases, edges.counts.values(), strict=True)]
    return arrived + torch.cat(spread)


def _is_dense(part: _Part, sent: Tensor) -> bool:
    """Whether the attention of a relation is computed by itself, from a score for every possible edge: where that is
    asked for. Lists are reduced for all relations at once, which was faster however dense they were (`suite=encoder`).
    """
    spec = attention.edge_spec(part.own, sent, torch.is_grad_enabled() and sent.requires_grad)
    wish, _ = attention.asked(None)
    return attention.backend_of(spec, "segment" if wish == attention.AUTO else None) != "segment"


def _gathered(score: Tensor, sent: Tensor, edges: _Edges, without: list[_Part]) -> Tensor:
    """[nodes, heads * size], what arrives from all relations but those `without`."""
    source, target, into = edges.source, edges.target, edges.into
    if without:
        left = torch.ones_like(target, dtype=torch.bool)
        for part in without:
            left[part.edges] = False
        score, source, target, into = score[left], source[left], target[left], into[left]
    share = segment_softmax(score, into, edges.rows) / edges.relations[target, None]
    return segment_sum((sent[source] * share[:, :, None]).flatten(1), target, len(edges.relations))
