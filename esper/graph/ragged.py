"""From graphs of different sizes, as lists of tensors, to Packed: room for powers of two of nodes, so that few layouts
occur however much sizes vary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esper.graph.batch import Packed, empty, planes_of
from esper.graph.layout import Layout
from esper.graph.schema import GraphSchema, Relation


class Graph(NamedTuple):
    """One graph without padding.

    Attributes:
        x: node type -> float32 [n, F].
        edges: relation -> (source int64 [E], target int64 [E], attr float32 [E, D]).
    """

    x: dict[str, Tensor]
    edges: dict[Relation, tuple[Tensor, Tensor, Tensor]]


def pack(schema: GraphSchema, graphs: list[Graph], room: Layout | None = None) -> Packed:
    """The graphs, padded.

    Args:
        schema: of all of them.
        graphs: at least one.
        room: a layout to have room for as well.
    """
    sizes = {node: torch.tensor([len(graph.x[node]) for graph in graphs]) for node in schema.nodes}
    counts = {node: _bucket(int(size.max())) for node, size in sizes.items()}
    cells, planes = {}, {}
    for relation in schema.relations:
        lists = [graph.edges[relation] for graph in graphs]
        batch = torch.repeat_interleave(torch.tensor([len(source) for source, _, _ in lists]))
        source, target, attr = (torch.cat(column) for column in zip(*lists, strict=True))
        plane = planes_of((batch * counts[relation[2]] + target) * counts[relation[0]] + source)
        planes[relation] = int(plane.max()) + 1 if len(plane) else 1
        cells[relation] = batch, source, target, plane, attr
    layout = Layout(
        tuple((node, counts[node], len(names)) for node, names in schema.nodes.items()),
        tuple((relation, len(names), planes[relation]) for relation, names in schema.relations.items()),
    )
    if room is not None:
        layout = Layout.largest([layout, room])
    packed = empty(layout, len(graphs))
    for node, size in sizes.items():
        batch = torch.repeat_interleave(size)
        place = torch.arange(len(batch)) - (size.cumsum(0) - size)[batch] + layout.nodes[node].start
        packed.x[batch, place, : len(schema.nodes[node])] = torch.cat([graph.x[node] for graph in graphs])
        packed.node_mask[batch, place] = True
    for relation, (batch, source, target, plane, attr) in cells.items():
        column = plane * layout.counts[relation[0]] + source
        layout.of_relation(packed.mask, relation)[batch, target, column] = True
        layout.of_relation(packed.attr, relation)[batch, target, column, : attr.shape[1]] = attr
    return packed


def _bucket(count: int) -> int:
    """The smallest power of two that holds `count`."""
    return 1 << max(count - 1, 0).bit_length()
