"""GraphBatch: B padded heterogeneous graphs as a few dense tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from esper.graph.layout import Layout
from esper.graph.schema import Relation

if TYPE_CHECKING:
    from torch_geometric.data import HeteroData


@dataclass
class Edges:
    """Padded edge lists of one relation, sorted by target within each graph.

    Attributes:
        source: int64 [B, E], node index within the graph.
        target: int64 [B, E].
        attr: float32 [B, E, D].
        mask: bool [B, E]; False on padding, which may stand anywhere.
    """

    source: Tensor
    target: Tensor
    attr: Tensor
    mask: Tensor


@dataclass
class Packed:
    """B graphs as four tensors, however many types and relations there are; Layout says what stands where.

    Attributes:
        layout: the places of nodes and edges.
        x: float32 [B, nodes, features], 0 behind the features that a type has.
        node_mask: bool [B, nodes]; False on padding.
        attr: float32 [B, cells, attributes], 0 where there is no edge and behind the attributes that a relation has.
        mask: bool [B, cells], where there is an edge.
    """

    layout: Layout
    x: Tensor
    node_mask: Tensor
    attr: Tensor
    mask: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.node_mask, self.attr, self.mask

    def map(self, function: Callable[[Tensor], Tensor]) -> Packed:
        """With `function` applied to every tensor."""
        return Packed(self.layout, *(function(value) for value in self.tensors()))

    def padded(self, layout: Layout) -> Packed:
        """The same graphs in a layout of the same schema with as much room or more: padding stands behind the nodes."""
        if layout == self.layout:
            return self
        result = empty(layout, len(self.x), self.x.device)
        for node, count, _ in self.layout.types:
            own, first = self.layout.nodes[node], layout.nodes[node].start
            place = slice(first, first + count)
            result.x[:, place], result.node_mask[:, place] = self.x[:, own], self.node_mask[:, own]
        for relation, _, planes in self.layout.relations:
            sources, targets = self.layout.counts[relation[0]], self.layout.counts[relation[2]]
            room = layout.planes[relation], layout.counts[relation[0]]
            for cells, wider in ((self.attr, result.attr), (self.mask, result.mask)):
                old = self.layout.of_relation(cells, relation).unflatten(2, (planes, sources))
                layout.of_relation(wider, relation).unflatten(2, room)[:, :targets, :planes, :sources] = old
        return result


def empty(layout: Layout, size: int, device: torch.device | str = "cpu") -> Packed:
    """`size` graphs without nodes or edges."""
    return Packed(
        layout,
        torch.zeros(size, layout.size, layout.features, device=device),
        torch.zeros(size, layout.size, dtype=torch.bool, device=device),
        torch.zeros(size, layout.cells, layout.attributes, device=device),
        torch.zeros(size, layout.cells, dtype=torch.bool, device=device),
    )


class GraphBatch:
    """B graphs of one schema. Every tensor has B as its first dimension.

    It is made either of dictionaries, with edges as lists, or `of` Packed, from which the dictionaries are then read:
    their lists name every possible edge, and the masks say which there are.

    Args:
        x: node type -> float32 [B, n, F].
        node_mask: node type -> bool [B, n]; False on padding.
        edges: relation -> Edges.
        action_mask: bool [B, A]; the legal actions of each graph.
    """

    def __init__(
        self, x: dict[str, Tensor], node_mask: dict[str, Tensor], edges: dict[Relation, Edges], action_mask: Tensor
    ):
        self.action_mask = action_mask
        self._packed: Packed | None = None
        self._x: dict[str, Tensor] | None = x
        self._node_mask: dict[str, Tensor] | None = node_mask
        self._edges: dict[Relation, Edges] | None = edges

    @classmethod
    def of(cls, packed: Packed, action_mask: Tensor) -> GraphBatch:
        """The batch that `packed` holds."""
        batch = cls.__new__(cls)
        batch.action_mask, batch._packed = action_mask, packed
        batch._x = batch._node_mask = batch._edges = None
        return batch

    @property
    def x(self) -> dict[str, Tensor]:
        if self._x is None:
            packed = self.pack()
            places = packed.layout.nodes
            self._x = {node: packed.x[:, places[node], :features] for node, _, features in packed.layout.types}
        return self._x

    @property
    def node_mask(self) -> dict[str, Tensor]:
        if self._node_mask is None:
            packed = self.pack()
            self._node_mask = {node: packed.node_mask[:, place] for node, place in packed.layout.nodes.items()}
        return self._node_mask

    @property
    def edges(self) -> dict[Relation, Edges]:
        if self._edges is None:
            self._edges = _unpacked(self.pack())
        return self._edges

    @property
    def relations(self) -> tuple[Relation, ...]:
        """Of the schema; known without reading the edges."""
        if self._packed is not None:
            return tuple(relation for relation, _, _ in self._packed.layout.relations)
        return tuple(self.edges)

    @property
    def layout(self) -> Layout | None:
        """That of the packed form, or None where the batch is made of dictionaries."""
        return None if self._packed is None else self._packed.layout

    def pack(self) -> Packed:
        """The packed form: what the batch was made of, or a copy of its dictionaries."""
        return self._packed if self._packed is not None else _pack(self.x, self.node_mask, self.edges)

    def with_actions(self, action_mask: Tensor) -> GraphBatch:
        """The same graphs with other legal actions [B, A]."""
        if self._packed is not None:
            return GraphBatch.of(self._packed, action_mask)
        return GraphBatch(self.x, self.node_mask, self.edges, action_mask)

    def __len__(self) -> int:
        return len(self.action_mask)

    @property
    def device(self) -> torch.device:
        return self.action_mask.device

    def map(self, function: Callable[[Tensor], Tensor]) -> GraphBatch:
        """A batch with `function` applied to every tensor."""
        if self._packed is not None:
            return GraphBatch.of(self._packed.map(function), function(self.action_mask))
        return self.from_dict({key: function(value) for key, value in self.to_dict().items()})

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> GraphBatch:
        """The graphs at `index`: an int keeps a batch of one; also a slice, a list, an index or a bool tensor."""
        if isinstance(index, int):
            index = [range(len(self))[index]]
        if not isinstance(index, slice):
            # An empty list would become a float tensor, which does not index.
            empty = not isinstance(index, Tensor) and len(index) == 0
            index = torch.as_tensor(index, device=self.device, dtype=torch.int64 if empty else None)
        return self.map(lambda t: t[index])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GraphBatch:
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> GraphBatch:
        return self.map(lambda t: t.pin_memory())

    @staticmethod
    def cat(batches: Sequence[GraphBatch]) -> GraphBatch:
        """Concatenates batches over B: packed ones are padded to the largest, others must have equal padding."""
        packed = [batch._packed for batch in batches if batch._packed is not None]
        if len(packed) == len(batches):
            layout = Layout.largest([each.layout for each in packed])
            joined = (torch.cat(parts) for parts in zip(*(p.padded(layout).tensors() for p in packed), strict=True))
            widest = max(batch.action_mask.shape[1] for batch in batches)
            masks = [F.pad(batch.action_mask, (0, widest - batch.action_mask.shape[1])) for batch in batches]
            return GraphBatch.of(Packed(layout, *joined), torch.cat(masks))
        dicts = [batch.to_dict() for batch in batches]
        return GraphBatch.from_dict({key: torch.cat([d[key] for d in dicts]) for key in dicts[0]})

    # ---- flat dictionaries ----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Tensor]:
        """Flat form with keys that Gymnasium and PyTorch modules accept: `x__slot`, `source__slot__reads__layer` ..."""
        flat = {f"x__{node}": x for node, x in self.x.items()}
        flat |= {f"mask__{node}": mask for node, mask in self.node_mask.items()}
        for relation, edges in self.edges.items():
            name = "__".join(relation)
            flat |= {f"source__{name}": edges.source, f"target__{name}": edges.target}
            flat |= {f"attr__{name}": edges.attr, f"valid__{name}": edges.mask}
        flat["action_mask"] = self.action_mask
        return flat

    @staticmethod
    def from_dict(flat: dict[str, Tensor]) -> GraphBatch:
        """Inverse of `to_dict`; masks may come in any integer type."""
        x, node_mask = {}, {}
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in flat.items():
            kind, _, name = key.partition("__")
            if kind == "x":
                x[name] = value
            elif kind == "mask":
                node_mask[name] = value.bool()
            elif kind in ("source", "target", "attr", "valid"):
                parts.setdefault(name, {})[kind] = value
        edges = {}
        for name, part in parts.items():
            source, relation, target = name.split("__")
            edges[source, relation, target] = Edges(part["source"], part["target"], part["attr"], part["valid"].bool())
        return GraphBatch(x, node_mask, edges, flat["action_mask"].bool())

    # ---- PyG ------------------------------------------------------------------------------------------------------

    def flatten(self) -> tuple[dict[str, Tensor], dict[Relation, Tensor], dict[Relation, Tensor]]:
        """The batch as one disconnected graph in PyG's terms: padded nodes stay (isolated), padded edges go.

        Returns:
            x_dict: node type -> [B * n, F].
            edge_index_dict: relation -> int64 [2, edges], with the nodes of graph b offset by b * n.
            edge_attr_dict: relation -> [edges, D].
        """
        x = {node: value.flatten(0, 1) for node, value in self.x.items()}
        index, attr = {}, {}
        batch = torch.arange(len(self), device=self.device)[:, None]
        for relation, edges in self.edges.items():
            source = edges.source + batch * self.x[relation[0]].shape[1]
            target = edges.target + batch * self.x[relation[2]].shape[1]
            index[relation] = torch.stack([source[edges.mask], target[edges.mask]])
            attr[relation] = edges.attr[edges.mask]
        return x, index, attr

    def to_hetero_data(self) -> list[HeteroData]:
        """One HeteroData per graph, without padding; `action_mask` is a graph attribute."""
        from torch_geometric.data import HeteroData  # takes seconds to import, and only this needs it

        graphs = []
        for b in range(len(self)):
            data = HeteroData()
            for node, x in self.x.items():
                data[node].x = x[b][self.node_mask[node][b]]
            # Padding may lie between nodes: what stands behind it moves up.
            place = {node: mask[b].cumsum(0) - 1 for node, mask in self.node_mask.items()}
            for relation, edges in self.edges.items():
                mask = edges.mask[b]
                source, target = place[relation[0]][edges.source[b]], place[relation[2]][edges.target[b]]
                data[relation].edge_index = torch.stack([source[mask], target[mask]])
                data[relation].edge_attr = edges.attr[b][mask]
            data.action_mask = self.action_mask[b]
            graphs.append(data)
        return graphs

    @staticmethod
    def from_hetero_data(graphs: Sequence[HeteroData]) -> GraphBatch:
        """Pads graphs of one schema (with `x`, `edge_index`, `edge_attr`, and `action_mask` of one length) to the
        largest of each type; edges are sorted by target, then source."""
        first = graphs[0]
        x, node_mask, edges = {}, {}, {}
        for node in first.node_types:
            x[node], node_mask[node] = _pad([graph[node].x for graph in graphs])
        for relation in first.edge_types:
            ordered = []
            for graph in graphs:
                source, target = graph[relation].edge_index
                order = (target * (int(source.max()) + 1 if len(source) else 1) + source).argsort(stable=True)
                ordered.append((source[order], target[order], graph[relation].edge_attr[order]))
            sources, targets, attrs = zip(*ordered, strict=True)
            source, mask = _pad(list(sources))
            edges[relation] = Edges(source, _pad(list(targets))[0], _pad(list(attrs))[0], mask)
        return GraphBatch(x, node_mask, edges, torch.stack([graph.action_mask for graph in graphs]))


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stacks tensors of unequal length with zeros behind; returns them and the mask of what is real."""
    length = torch.tensor([len(row) for row in rows], device=rows[0].device)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, torch.arange(padded.shape[1], device=length.device) < length[:, None]


@torch.inference_mode(False)  # an actor may be the first to ask for them, and the update the next
def _unpacked(packed: Packed) -> dict[Relation, Edges]:
    layout, edges = packed.layout, {}
    for relation, attributes, _ in layout.relations:
        source, target = (index.to(packed.mask.device) for index in _pairs(layout, relation))
        attr = layout.of_relation(packed.attr, relation)[..., :attributes].flatten(1, 2)
        mask = layout.of_relation(packed.mask, relation).flatten(1, 2)
        edges[relation] = Edges(source.expand(mask.shape), target.expand(mask.shape), attr, mask)
    return edges


@cache
@torch.inference_mode(False)
def _pairs(layout: Layout, relation: Relation) -> tuple[Tensor, Tensor]:
    return layout.pairs(relation)


def planes_of(pair: Tensor) -> Tensor:
    """int64 [edges], how many edges before each join the same pair; `pair` int64 [edges] numbers the pairs."""
    order = pair.argsort(stable=True)
    number = torch.arange(len(pair), device=pair.device)
    runs = torch.ones_like(pair, dtype=torch.bool)
    runs[1:] = pair[order][1:] != pair[order][:-1]
    plane = torch.empty_like(pair)
    plane[order] = number - torch.where(runs, number, 0).cummax(0).values  # its place in the run of equals
    return plane


def _pack(x: dict[str, Tensor], node_mask: dict[str, Tensor], edges: dict[Relation, Edges]) -> Packed:
    """Packs lists; pairs that several edges join get as many planes as they need."""
    types = tuple((node, value.shape[1], value.shape[2]) for node, value in x.items())
    cells, relations = {}, []
    for relation, edge in edges.items():
        sources, targets = x[relation[0]].shape[1], x[relation[2]].shape[1]
        batch, place = edge.mask.nonzero(as_tuple=True)
        source, target = edge.source[batch, place], edge.target[batch, place]
        pair = (batch * targets + target) * sources + source
        plane = planes_of(pair)
        planes = int(plane.max()) + 1 if len(plane) else 1
        relations.append((relation, edge.attr.shape[2], planes))
        cells[relation] = batch, target, plane * sources + source, edge.attr[batch, place]
    layout = Layout(types, tuple(relations))
    first = next(iter(x.values()))
    size = len(first)
    packed = Packed(
        layout,
        torch.cat([F.pad(value, (0, layout.features - value.shape[2])) for value in x.values()], 1),
        torch.cat(list(node_mask.values()), 1),
        first.new_zeros(size, layout.cells, layout.attributes),
        first.new_zeros(size, layout.cells, dtype=torch.bool),
    )
    for relation, (batch, row, column, attr) in cells.items():
        layout.of_relation(packed.mask, relation)[batch, row, column] = True
        layout.of_relation(packed.attr, relation)[batch, row, column, : attr.shape[1]] = attr
    return packed
