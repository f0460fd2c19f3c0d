"""Where the nodes and the possible edges of a graph stand in packed tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from esper.graph.schema import GraphSchema, Relation


@dataclass(frozen=True)
class Block:
    """The cells of all edges into the nodes of one type: `rows` x `columns`, one row for each target.

    The columns are the sources of each relation, one relation after the other: those of relation r from `starts[r]` to
    `starts[r + 1]`. Where a pair may be joined by several edges its relation has all sources several times.
    """

    target: str
    rows: int
    relations: tuple[Relation, ...]
    starts: tuple[int, ...]  # one more than relations
    offset: int  # of its first cell

    @property
    def columns(self) -> int:
        return self.starts[-1]

    @property
    def sizes(self) -> list[int]:
        """Columns of each relation."""
        return [after - before for before, after in pairwise(self.starts)]

    @property
    def cells(self) -> slice:
        """Its place among all cells."""
        return slice(self.offset, self.offset + self.rows * self.columns)


@dataclass(frozen=True)
class Layout:
    """Of graphs with a fixed number of nodes of each type.

    Attributes:
        types: (node type, nodes, features) of each.
        relations: (relation, attributes, planes) of each, where `planes` edges may join a pair.
    """

    types: tuple[tuple[str, int, int], ...]
    relations: tuple[tuple[Relation, int, int], ...]

    @classmethod
    def of(cls, schema: GraphSchema, counts: Mapping[str, int]) -> Layout:
        """For graphs of `schema` with `counts` nodes of each type, whose pairs are joined once at most."""
        return cls(
            tuple((node, counts[node], len(names)) for node, names in schema.nodes.items()),
            tuple((relation, len(names), 1) for relation, names in schema.relations.items()),
        )

    @classmethod
    def largest(cls, layouts: Sequence[Layout]) -> Layout:
        """With room for the graphs of each of `layouts`, which are of one schema."""
        first = layouts[0]
        if all(layout == first for layout in layouts):
            return first
        return cls(
            tuple((node, max(each.counts[node] for each in layouts), features) for node, _, features in first.types),
            tuple(
                (relation, attributes, max(each.planes[relation] for each in layouts))
                for relation, attributes, _ in first.relations
            ),
        )

    @cached_property
    def counts(self) -> dict[str, int]:
        """Node type -> nodes."""
        return {node: count for node, count, _ in self.types}

    @cached_property
    def nodes(self) -> dict[str, slice]:
        """Node type -> its place among all nodes."""
        places, first = {}, 0
        for node, count, _ in self.types:
            places[node] = slice(first, first + count)
            first += count
        return places

    @cached_property
    def size(self) -> int:
        """Nodes of all types."""
        return sum(self.counts.values())

    @cached_property
    def features(self) -> int:
        """Columns of packed features: those of the type that has most."""
        return max(features for _, _, features in self.types)

    @cached_property
    def attributes(self) -> int:
        """Columns of packed attributes: those of the relation that has most."""
        return max(attributes for _, attributes, _ in self.relations)

    @cached_property
    def planes(self) -> dict[Relation, int]:
        """Relation -> edges that may join a pair."""
        return {relation: planes for relation, _, planes in self.relations}

    @cached_property
    def blocks(self) -> dict[str, Block]:
        """Target type -> its block; types that no relation ends in have none."""
        result, offset = {}, 0
        for node, rows, _ in self.types:
            relations = tuple(relation for relation, _, _ in self.relations if relation[2] == node)
            if not relations:
                continue
            starts = [0]
            for relation in relations:
                starts.append(starts[-1] + self.counts[relation[0]] * self.planes[relation])
            result[node] = Block(node, rows, relations, tuple(starts), offset)
            offset += rows * starts[-1]
        return result

    @cached_property
    def cells(self) -> int:
        """Edges that there may be in a graph."""
        return sum(block.rows * block.columns for block in self.blocks.values())

    def of_relation(self, cells: Tensor, relation: Relation) -> Tensor:
        """What `cells` [B, cells, ...] says of a relation: a view [B, targets, sources * planes, ...]."""
        block = self.blocks[relation[2]]
        place = block.relations.index(relation)
        whole = cells[:, block.cells].unflatten(1, (block.rows, block.columns))
        return whole[:, :, block.starts[place] : block.starts[place + 1]]

    def pairs(self, relation: Relation) -> tuple[Tensor, Tensor]:
        """(source, target) of the cells of a relation, each int64 [targets * sources * planes], target by target."""
        source = torch.arange(self.counts[relation[0]]).repeat(self.planes[relation])
        targets = self.counts[relation[2]]
        return source.repeat(targets), torch.arange(targets).repeat_interleave(len(source))
