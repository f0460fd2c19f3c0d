"""The parameters of the encoder: what all its backends read, and none of them owns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from esper.graph.schema import GraphSchema, Relation

SAGE, GAT = "sage", "gat"
CONVOLUTIONS = (SAGE, SAGE, GAT, GAT)
SLOPE = 0.2  # of LeakyReLU, as in PyG's GATConv


def orthogonal_(layer: nn.Linear, gain: float = math.sqrt(2)) -> nn.Linear:
    """Orthogonal weight of the given gain and zero bias, in place (Andrychowicz et al., arXiv 2006.05990)."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


@dataclass(frozen=True, eq=False)
class Shape:
    """Sizes of an encoder.

    Attributes:
        schema: node types and relations.
        hidden: widths of the layers; the first is also the width of the typed input layers.
        heads: attention heads of the GAT layers; must divide their widths.
        read: node types whose final embedding is used; the last layer computes no others.
        convolutions: SAGE or GAT, for each layer.
    """

    schema: GraphSchema
    hidden: tuple[int, ...]
    heads: int
    read: tuple[str, ...]
    convolutions: tuple[str, ...] = CONVOLUTIONS

    @cached_property
    def widths(self) -> list[tuple[int, int]]:
        """(in, out) of every layer."""
        return list(zip((self.hidden[0], *self.hidden[:-1]), self.hidden, strict=True))

    def targets(self, depth: int) -> tuple[str, ...]:
        """The node types that a layer computes."""
        return self.read if depth == len(self.hidden) - 1 else tuple(self.schema.nodes)

    def relations(self, depth: int) -> list[Relation]:
        """Those of a layer in the order of its stacked parameters: by target type, as the blocks of a Layout."""
        return [r for node in self.schema.nodes if node in self.targets(depth) for r in self.into(node)]

    def into(self, node: str) -> list[Relation]:
        """The relations that end in a node type."""
        return [relation for relation in self.schema.relations if relation[2] == node]

    def attends(self, depth: int) -> bool:
        """Whether a layer is GAT."""
        return self.convolutions[depth] == GAT

    @cached_property
    def attributes(self) -> int:
        """Attributes of the relation that has most."""
        return max(len(names) for names in self.schema.relations.values())


def typed_inputs(shape: Shape) -> nn.ModuleDict:
    """A layer for the features of each node type."""
    width = shape.hidden[0]
    return nn.ModuleDict(
        {
            node: nn.Sequential(orthogonal_(nn.Linear(len(names), width)), nn.GELU(), nn.LayerNorm(width))
            for node, names in shape.schema.nodes.items()
        }
    )


def typed_skips(shape: Shape) -> nn.ModuleList:
    """What every layer adds to its output, for each node type."""
    return nn.ModuleList(
        nn.ModuleDict(
            {
                node: nn.Identity() if width == out else orthogonal_(nn.Linear(width, out))
                for node in shape.targets(depth)
            }
        )
        for depth, (width, out) in enumerate(shape.widths)
    )


class SageLayer(nn.Module):
    """Parameters of R relations: `neighbour` and `root` [R, in, out], `bias` [R, out] (arXiv 1706.02216)."""

    def __init__(self, relations: int, width: int, out: int):
        super().__init__()
        self.neighbour, self.root = (nn.Parameter(torch.empty(relations, width, out)) for _ in range(2))
        self.bias = nn.Parameter(torch.empty(relations, out))


class GatLayer(nn.Module):
    """Parameters of R relations: `source` and `target` [R, in, out], `edge` [R, attributes, out], what scores them
    [R, heads, out / heads], and `bias` [R, out] (arXiv 1710.10903). Rows of `edge` that a relation lacks are 0."""

    def __init__(self, relations: int, width: int, out: int, heads: int, attributes: int):
        super().__init__()
        self.source, self.target = (nn.Parameter(torch.empty(relations, width, out)) for _ in range(2))
        self.edge = nn.Parameter(torch.zeros(relations, attributes, out))
        self.att_source, self.att_target, self.att_edge = (
            nn.Parameter(torch.empty(relations, heads, out // heads)) for _ in range(3)
        )
        self.bias = nn.Parameter(torch.empty(relations, out))

    def folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """What scores a source, a target and an edge: each vector folded into its projection, [R, heads, in] twice and
        [R, heads, attributes]."""
        pairs = (self.source, self.att_source), (self.target, self.att_target), (self.edge, self.att_edge)
        by, to, along = (torch.einsum("rihc,rhc->rhi", w.unflatten(2, a.shape[1:]), a).contiguous() for w, a in pairs)
        return by, to, along


class Parameters(nn.Module):
    """Typed inputs, stacked relations and skips of an encoder of some shape; relations start undrawn."""

    def __init__(self, shape: Shape, inputs: nn.ModuleDict, skips: nn.ModuleList):
        super().__init__()
        self.shape = shape
        self.inputs, self.skips, self.layers = inputs, skips, nn.ModuleList()
        for depth, (width, out) in enumerate(shape.widths):
            count = len(shape.relations(depth))
            if shape.attends(depth):
                self.layers.append(GatLayer(count, width, out, shape.heads, shape.attributes))
            else:
                self.layers.append(SageLayer(count, width, out))

    def stages(self) -> Iterator[tuple[Any, Any]]:
        """The parameters of each layer, a SageLayer or GatLayer, with its skips by node type."""
        return zip(self.layers, self.skips, strict=True)
