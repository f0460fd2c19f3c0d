"""GraphBatch: B padded heterogeneous graphs as a few dense tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
        mask: bool [B, E]; False on padding, whose other entries are 0.
    """

    source: Tensor
    target: Tensor
    attr: Tensor
    mask: Tensor


@dataclass
class GraphBatch:
    """B graphs of one schema. Every tensor has B as its first dimension.

    Attributes:
        x: node type -> float32 [B, n, F].
        node_mask: node type -> bool [B, n]; False on padding.
        edges: relation -> Edges.
        action_mask: bool [B, A]; the legal actions of each graph.
    """

    x: dict[str, Tensor]
    node_mask: dict[str, Tensor]
    edges: dict[Relation, Edges]
    action_mask: Tensor

    def __len__(self) -> int:
        return len(self.action_mask)

    @property
    def device(self) -> torch.device:
        return self.action_mask.device

    def map(self, function: Callable[[Tensor], Tensor]) -> GraphBatch:
        """A batch with `function` applied to every tensor."""
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
        """Concatenates batches of equal padding over B."""
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
