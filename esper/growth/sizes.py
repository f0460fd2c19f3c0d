"""What of an observation follows from the size of a host alone, made once for every size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from esper.graph import Layout
from esper.graph.schema import ACTIVATION_KINDS, LAYER_KINDS, SCHEMA
from esper.graph.space import BOUND
from esper.growth.blueprints import Blueprint
from esper.growth.state import PopulationState
from esper.growth.topology import edge_masks, nodes

_TINY = 1e-8


def log(x: Tensor) -> Tensor:
    """The natural logarithm, of 1e-8 for what is smaller."""
    return x.clamp(min=_TINY).log()


class Tables(Protocol):
    """Tables with one row for every size of a host.

    Attributes:
        layout: of the observations.
        node_mask, edge_mask: bool [rows, nodes] and [rows, cells].
        x, attr: float32 [rows, nodes, features] and [rows, cells, attributes], features and attributes that never
            change, bounded; 0 for the others, for padding and where there is no edge.
        parameters, flops: float32 [rows], of a host without seeds.
    """

    layout: Layout
    node_mask: Tensor
    edge_mask: Tensor
    x: Tensor
    attr: Tensor
    parameters: Tensor
    flops: Tensor

    def row(self, depth: Tensor, width: Tensor) -> Tensor:
        """int64, the shape of both: the row of hosts of `depth` stages of `width` units."""
        ...


@dataclass(frozen=True)
class Sizes:
    """Hosts of R sizes with L layers, S slots (with an activation each) and K blueprints.

    Attributes:
        at: [R, L], where each layer is, from 0 for the first to 1 for the last.
        fans: [R, L, 2], units in and out of each layer.
        parameters: [R, L], of each layer.
        before: [R, S], where the layer in front of each slot is.
        blueprint_parameters, blueprint_flops: [R, K], of a seed of each blueprint.
        seed_parameters: [R, S, K], of one in each slot.
        flops: [R], of a host without seeds.
        layers, activations: their kinds, L and S names.
        momentum, weight_decay: of the optimiser.
    """

    at: Tensor
    fans: Tensor
    parameters: Tensor
    before: Tensor
    blueprint_parameters: Tensor
    blueprint_flops: Tensor
    seed_parameters: Tensor
    flops: Tensor
    layers: Sequence[str]
    activations: Sequence[str]
    momentum: float
    weight_decay: float = 0.0


def features(layout: Layout, sizes: Sizes, catalogue: Sequence[Blueprint]) -> Tensor:
    """[R, nodes, features] of the nodes, also of those that are padding."""
    rows = len(sizes.at)
    x = torch.zeros(rows, layout.size, layout.features)

    def put(node: str, first: str, *columns: Tensor) -> None:
        """Sets features [R, n] of a type's nodes, from the feature `first` on."""
        at = SCHEMA.feature(node, first)
        x[:, layout.nodes[node], at : at + len(columns)] = torch.stack(columns, dim=2)

    def one_hot(kinds: Sequence[str], names: tuple[str, ...]) -> tuple[Tensor, ...]:
        index = torch.tensor([names.index(kind) for kind in kinds], dtype=torch.int64)
        return F.one_hot(index, len(names)).float().expand(rows, len(kinds), -1).unbind(2)

    def whole(value: float) -> Tensor:
        return torch.full((rows, 1), value)

    width_in, width_out = (log(sizes.fans) / math.log(64)).unbind(2)
    own, total = log(sizes.parameters) / math.log(1000), sizes.parameters.sum(1)[:, None]
    put("layer", "depth_fraction", sizes.at, *one_hot(sizes.layers, LAYER_KINDS), width_in, width_out, own)
    put("activation", "is_relu", *one_hot(sizes.activations, ACTIVATION_KINDS))
    put("parameter", "momentum", whole(sizes.momentum), whole(sizes.weight_decay))
    put("parameter", "log_parameters", log(total) / math.log(1000))
    flags = torch.tensor([[b.mixes_tokens, b.gated, b.residual, b.widens] for b in catalogue]).float()
    put(
        "blueprint",
        "log_parameters",
        log(sizes.blueprint_parameters / total),
        log(sizes.blueprint_flops / sizes.flops[:, None]),
        *flags.expand(rows, -1, -1).unbind(2),
    )
    return x.nan_to_num(nan=BOUND).clamp(-BOUND, BOUND)


def attributes(layout: Layout, sizes: Sizes) -> Tensor:
    """[R, cells, attributes], also where there is no edge."""
    at = sizes.at
    attr = torch.zeros(len(at), layout.cells, layout.attributes)

    def put(source: str, name: str, target: str, first: int, *columns: Tensor) -> None:
        """Sets attributes of a relation, from attribute `first` on; each [R, targets, sources] or what broadcasts to
        it."""
        own = layout.of_relation(attr, (source, name, target))
        for number, column in enumerate(columns):
            own[..., first + number] = column

    ratio = log(sizes.fans[:, :, 1] / sizes.fans[:, :, 0])
    total = sizes.parameters.sum(1)
    cost = torch.log1p(sizes.seed_parameters / total[:, None, None])
    put("layer", "feeds", "layer", 0, at[:, :, None] - at[:, None], ratio[:, :, None])
    put("layer", "feeds", "activation", 0, at[:, None], ratio[:, None])
    put("activation", "feeds", "layer", 0, at[:, :, None], ratio[:, :, None])
    put("parameter", "tunes", "layer", 0, (sizes.parameters / total[:, None])[:, :, None])
    put("slot", "precedes", "slot", 0, sizes.before[:, :, None] - sizes.before[:, None])
    put("blueprint", "fits", "slot", 1, cost)
    put("slot", "fits", "blueprint", 1, cost.transpose(1, 2))
    for node in layout.counts:
        if node != "global":
            put("global", "writes", node, 0, torch.ones(()))
            put(node, "informs", "global", 0, torch.ones(()))
    return attr.nan_to_num(nan=0.0).clamp(-BOUND, BOUND)


class SizeTables:
    """Tables with one row for every depth and width of a population's hosts; see Tables."""

    def __init__(self, population: PopulationState):
        p = population
        self.layout = layout = Layout.of(SCHEMA, nodes(p.slots, len(p.catalogue)))
        self._widest = p.spec.width
        depths, widths = torch.arange(p.slots + 1), torch.arange(p.spec.width + 1)
        depth, width = (grid.flatten() for grid in torch.meshgrid(depths, widths, indexing="ij"))
        stage = torch.arange(p.slots) < depth[:, None]
        one = torch.ones(len(stage), 1, dtype=torch.bool)
        layer = torch.cat([one, stage, one], dim=1)
        own = {"layer": layer, "activation": stage, "slot": stage, "blueprint": one.expand(-1, len(p.catalogue))}
        self.node_mask = torch.cat([own.get(node, one) for node in layout.counts], dim=1)
        self.edge_mask = edge_masks(layout)[depth]
        parameters = p.layer_sizes[width] * layer  # [rows, L]
        self.parameters = parameters.sum(1)
        self.flops = (p.layer_flops[width] * layer).sum(1)
        number = torch.arange(p.spec.layers)
        last = number == len(number) - 1
        at = torch.where(last, 1.0, number / (depth[:, None] + 1))  # 0 the stem, 1 the head
        kinds = ["linear" if p.spec.taps == 1 else "conv"] * p.spec.layers
        kinds[0] = kinds[-1] = "linear"
        sizes = Sizes(
            at=at,
            fans=torch.tensor([p.spec.fans(max(w, 1)) for w in widths.tolist()]).float()[width],
            parameters=parameters,
            before=at[:, 1:-1],
            blueprint_parameters=p.seed_sizes[width].float(),
            blueprint_flops=p.seed_flops[width],
            seed_parameters=p.seed_sizes[width].float()[:, None].expand(-1, p.slots, -1),
            flops=self.flops,
            layers=kinds,
            activations=["relu"] * p.slots,
            momentum=p.training.beta1,
        )
        self.x = features(layout, sizes, p.catalogue).mul_(self.node_mask[..., None])
        self.attr = attributes(layout, sizes).mul_(self.edge_mask[..., None])

    def row(self, depth: Tensor, width: Tensor) -> Tensor:
        """See Tables."""
        return depth * (self._widest + 1) + width
