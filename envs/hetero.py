"""Environments whose observations are PyG's HeteroData, of any size; the first one shows their schema."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from envs.adapter import AdaptedEnv, asked, make_workers
from envs.adapter_config import HeteroConfig
from envs.worker import Misbehaved, TargetFactory, short
from esper.graph import GraphBatch
from esper.graph.interface import DISCRETE, NODE, Interface
from esper.graph.ragged import Graph, pack
from esper.graph.schema import GraphSchema, Relation
from esper.runtime.errors import ConfigError

if TYPE_CHECKING:
    from torch_geometric.data import HeteroData

ITSELF = "itself"
"""The relation that joins each node of a type with itself, where no other relation ends in the type."""


class HeteroEnv(AdaptedEnv):
    """N environments that a factory makes; see AdaptedEnv for the other arguments.

    Args:
        config: which factory, and what its actions are; `config.num_envs` is not used.
        num_envs: N.

    Raises:
        ConfigError: the factory cannot be imported or called, or what it makes is not such an environment.
    """

    def __init__(
        self,
        config: HeteroConfig,
        num_envs: int,
        split: str = "train",
        autoreset: bool = True,
        device: torch.device | str = "cpu",
    ):
        origin = f"env.target={config.target}"
        workers = make_workers(TargetFactory(config.target, config.kwargs), config, num_envs, origin)
        first = asked(workers[0], origin, "reset", 0).observation
        try:
            self._reader = HeteroReader(first, config.reverse)
            seen = self._reader(first)
        except Misbehaved as error:
            raise ConfigError(f"{origin}: {error}") from error
        schema, start = self._reader.schema, 0
        if config.action_node is None:
            _, acted = asked(workers[0], origin, "spaces")
            if not isinstance(acted, spaces.Discrete):
                raise ConfigError(
                    f"{origin}: its action_space is {acted}; only Discrete actions can be learned, or the choice of a "
                    f"node: env.action_node={next(iter(schema.nodes))}"
                )
            interface, start = Interface(schema, DISCRETE, int(acted.n)), int(acted.start)
        elif config.action_node in schema.nodes:
            interface = Interface(schema, NODE, node=config.action_node)
        else:
            known = ", ".join(schema.nodes)
            raise ConfigError(
                f"env.action_node={config.action_node}: its observations have no such node type; choose one of {known}"
            )
        self._start = start
        super().__init__(workers, origin, interface, split, autoreset, device)
        # Room never shrinks, so that layouts repeat.
        self._room = pack(schema, [seen]).layout

    def _taken(self, observation: Any) -> Graph:
        return self._reader(observation)

    def _arrays(self, observation: Graph) -> list[np.ndarray]:
        tables = [*observation.x.values(), *(part for edges in observation.edges.values() for part in edges)]
        return [table.numpy() for table in tables]

    def _count(self, observation: Graph) -> int:
        if self.interface.actions == DISCRETE:
            return self.interface.count
        return len(observation.x[self.interface.node])

    def _graphs(self, observations: list[Graph], masks: list[np.ndarray]) -> GraphBatch:
        packed = pack(self.interface.schema, observations, self._room)
        self._room = packed.layout
        width = self.interface.count or self._room.counts[self.interface.node]
        padded = np.zeros((len(masks), width), dtype=bool)
        for row, mask in zip(padded, masks, strict=True):
            row[: len(mask)] = mask
        return GraphBatch.of(packed, torch.from_numpy(padded))

    def _action(self, index: int) -> int:
        return self._start + index

    def learned(self) -> dict[str, Any]:
        # Sums over more padding round differently, so that room is part of a run's numbers.
        counts, planes = self._room.counts, self._room.planes
        return {"counts": dict(counts), "planes": [[*relation, count] for relation, count in planes.items()]}

    def load_learned(self, learned: dict[str, Any]) -> None:
        planes = {(source, name, target): count for source, name, target, count in learned["planes"]}
        self._room = type(self._room)(
            tuple((node, learned["counts"][node], features) for node, _, features in self._room.types),
            tuple((relation, attributes, planes[relation]) for relation, attributes, _ in self._room.relations),
        )


class HeteroReader:
    """Reads HeteroData as graphs of one schema, the first observation's.

    Node types without `x` get a constant feature, relations without `edge_attr` a constant attribute. With `reverse`,
    each relation is also there in the other direction as `rev_<name>` (unless the observations have one of that name);
    types that no relation ends in are joined with themselves.

    Args:
        first: an observation that has every node type and relation.
        reverse: see above.

    Raises:
        Misbehaved: the first observation is not of this kind.
    """

    def __init__(self, first: Any, reverse: bool):
        self._check(first)
        if not first.node_types:
            raise Misbehaved("its first observation has no node types; they are read from it")
        for name in {part for relation in first.edge_types for part in relation} | set(first.node_types):
            taken = name in first.node_types and hasattr(nn.ModuleDict(), name)  # parameters are kept by node type
            if not re.fullmatch(r"\w+", name) or "__" in name or taken:
                raise Misbehaved(
                    f"a node type or relation is called {name!r}; choose another name, of letters and digits"
                )
        self._given = {relation: _width(first[relation], "edge_attr", relation) for relation in first.edge_types}
        self._features = {node: _width(first[node], "x", (node,)) for node in first.node_types}
        self._reversed: dict[Relation, Relation] = {}
        if reverse:
            pairs = {relation: (relation[2], f"rev_{relation[1]}", relation[0]) for relation in self._given}
            self._reversed = {back: relation for relation, back in pairs.items() if back not in self._given}
        widths = self._given | {back: self._given[relation] for back, relation in self._reversed.items()}
        alone = [node for node in self._features if all(relation[2] != node for relation in widths)]
        self._loops = [(node, ITSELF, node) for node in alone]
        relations = {relation: _names("a", width) for relation, width in widths.items()}
        relations |= dict.fromkeys(self._loops, ("presence",))
        self.schema = GraphSchema({node: _names("f", width) for node, width in self._features.items()}, relations)

    def __call__(self, data: HeteroData) -> Graph:
        """One observation.

        Raises:
            Misbehaved: it is not of the schema, or not finite.
        """
        self._check(data)
        for kind in (*data.node_types, *data.edge_types):
            if kind not in self._features and kind not in self._given:
                raise Misbehaved(
                    f"an observation has {kind!r}, which the first one had not; give every type from "
                    "the start, without nodes or edges where there are none"
                )
        x = {node: self._nodes(data, node, width) for node, width in self._features.items()}
        edges = {relation: self._edges(data, relation, width, x) for relation, width in self._given.items()}
        for back, relation in self._reversed.items():
            source, target, attr = edges[relation]
            edges[back] = target, source, attr
        for loop in self._loops:
            everyone = torch.arange(len(x[loop[0]]))
            edges[loop] = everyone, everyone, torch.ones(len(everyone), 1)
        return Graph(x, edges)

    def _check(self, data: Any) -> None:
        from torch_geometric.data import HeteroData  # takes seconds to import, and only this needs it

        if not isinstance(data, HeteroData):
            raise Misbehaved(
                f"its observations are {type(data).__name__}; they must be "
                "torch_geometric.data.HeteroData (for flat observations: env=gym)"
            )

    def _nodes(self, data: HeteroData, node: str, width: int | None) -> Tensor:
        if node not in data.node_types:
            return torch.zeros(0, width or 1)
        if width is None:
            return torch.ones(int(data[node].num_nodes or 0), 1)
        return self._table(data[node].get("x"), f"{node}.x", width)

    def _edges(
        self, data: HeteroData, relation: Relation, width: int | None, x: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        name = "__".join(relation)
        if relation not in data.edge_types:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0, width or 1)
        given = data[relation].get("edge_index")
        if given is None:
            raise Misbehaved(f"{name} has no edge_index; give one of shape [2, edges]")
        index = _tensor(given, f"{name}.edge_index").long()
        if index.dim() != 2 or len(index) != 2:
            raise Misbehaved(f"{name}.edge_index has shape {tuple(index.shape)}; it must be [2, edges]")
        for end, nodes in zip(index, (relation[0], relation[2]), strict=True):
            if len(end) and not 0 <= int(end.min()) <= int(end.max()) < len(x[nodes]):
                raise Misbehaved(
                    f"{name}.edge_index names a node from {int(end.min())} to {int(end.max())} where "
                    f"there are {len(x[nodes])} of type {nodes}; number them from 0"
                )
        count = index.shape[1]
        if width is None:
            return index[0], index[1], torch.ones(count, 1)
        return index[0], index[1], self._table(data[relation].get("edge_attr"), f"{name}.edge_attr", width, count)

    def _table(self, value: Any, name: str, width: int, count: int | None = None) -> Tensor:
        rows = None if value is None else _tensor(value, name).float()
        if rows is not None and rows.dim() == 1:
            rows = rows[:, None]
        if rows is None or rows.dim() != 2 or rows.shape[1] != width or (count is not None and len(rows) != count):
            shape = None if rows is None else tuple(rows.shape)
            wanted = f"[{'n' if count is None else count}, {width}]"
            raise Misbehaved(f"{name} has shape {shape}; it must be {wanted}, as at first")
        if not rows.isfinite().all():
            at = (~rows.isfinite()).nonzero()[0].tolist()
            raise Misbehaved(f"{name} is {float(rows[tuple(at)])} at {at}; it must be finite in float32")
        return rows


def _tensor(value: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Misbehaved(f"{name} is {short(value)}; it must be a tensor of numbers") from error


def _width(store: Any, key: str, kind: tuple[str, ...]) -> int | None:
    """Columns of a table of the first observation; None where there is none."""
    value = store.get(key)
    if value is None:
        return None
    table = _tensor(value, f"{'__'.join(kind)}.{key}")
    return 1 if table.dim() == 1 else table.shape[-1]


def _names(letter: str, width: int | None) -> tuple[str, ...]:
    return ("presence",) if width is None else tuple(f"{letter}{number}" for number in range(width))
