"""What of an observation follows from the size of a host alone, made once for every size."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from esper.graph import Layout
from esper.graph.schema import ACTIVATION_KINDS, LAYER_KINDS, SCHEMA
from esper.graph.space import BOUND
from esper.growth.state import PopulationState
from esper.growth.topology import edge_masks

_TINY = 1e-8


def log(x: Tensor) -> Tensor:
    """The natural logarithm, of 1e-8 for what is smaller."""
    return x.clamp(min=_TINY).log()


class SizeTables:
    """Tables with one row for every depth and width of a host.

    Attributes:
        node_mask, edge_mask: bool [rows, nodes] and [rows, cells].
        x, attr: float32 [rows, nodes, features] and [rows, cells, attributes], features and attributes that never
            change, bounded; 0 for the others, for padding and where there is no edge.
        parameters, flops: float32 [rows], of a host without seeds.
    """

    def __init__(self, population: PopulationState, layout: Layout):
        self._population, self._layout = population, layout
        p = population
        depths, widths = torch.arange(p.slots + 1), torch.arange(p.spec.width + 1)
        self._depth, self._width = (grid.flatten() for grid in torch.meshgrid(depths, widths, indexing="ij"))
        stage = torch.arange(p.slots) < self._depth[:, None]
        one = torch.ones(len(stage), 1, dtype=torch.bool)
        layer = torch.cat([one, stage, one], dim=1)
        own = {"layer": layer, "activation": stage, "slot": stage, "blueprint": one.expand(-1, len(p.catalogue))}
        self.node_mask = torch.cat([own.get(node, one) for node in layout.counts], dim=1)
        self.edge_mask = edge_masks(layout)[self._depth]
        self._sizes = p.layer_sizes[self._width] * layer  # [rows, L] parameters
        self.parameters = self._sizes.sum(1)
        self.flops = (p.layer_flops[self._width] * layer).sum(1)
        self._fans = torch.tensor([p.spec.fans(max(w, 1)) for w in widths.tolist()]).float()[
            self._width
        ]  # [rows, L, 2]
        number = torch.arange(p.spec.layers)
        last = number == len(number) - 1
        self._at = torch.where(last, 1.0, number / (self._depth[:, None] + 1))  # [rows, L]: 0 the stem, 1 the head
        self.x = self._features().mul_(self.node_mask[..., None])
        self.attr = self._attributes().mul_(self.edge_mask[..., None])

    def row(self, depth: Tensor, width: Tensor) -> Tensor:
        """int64, the shape of both: the row of hosts of `depth` stages of `width` units."""
        return depth * (self._population.spec.width + 1) + width

    def _features(self) -> Tensor:
        p, rows = self._population, len(self._depth)
        x = torch.zeros(rows, self._layout.size, self._layout.features)

        def put(node: str, first: str, *columns: Tensor) -> None:
            """Sets features [rows, n] of a type's nodes, from the feature `first` on."""
            at = SCHEMA.feature(node, first)
            x[:, self._layout.nodes[node], at : at + len(columns)] = torch.stack(columns, dim=2)

        def one_hot(kinds: list[str], names: tuple[str, ...], count: int) -> tuple[Tensor, ...]:
            index = torch.tensor([names.index(kind) for kind in kinds])
            return F.one_hot(index, len(names)).float().expand(rows, count, -1).unbind(2)

        kinds = ["linear" if p.spec.taps == 1 else "conv"] * p.spec.layers
        kinds[0] = kinds[-1] = "linear"
        width_in, width_out = (log(self._fans) / math.log(64)).unbind(2)
        sizes = log(self._sizes) / math.log(1000)
        layer_kinds = one_hot(kinds, LAYER_KINDS, p.spec.layers)
        put("layer", "depth_fraction", self._at, *layer_kinds, width_in, width_out, sizes)
        put("activation", "is_relu", *one_hot(["relu"], ACTIVATION_KINDS, p.slots))
        put("parameter", "momentum", torch.full((rows, 1), p.training.beta1))
        put("parameter", "log_parameters", log(self.parameters)[:, None] / math.log(1000))
        flags = torch.tensor([[b.mixes_tokens, b.gated, b.residual, b.widens] for b in p.catalogue]).float()
        put(
            "blueprint",
            "log_parameters",
            log(p.seed_sizes[self._width] / self.parameters[:, None]),
            log(p.seed_flops[self._width] / self.flops[:, None]),
            *flags.expand(rows, -1, -1).unbind(2),
        )
        return x.nan_to_num(nan=BOUND).clamp(-BOUND, BOUND)

    def _attributes(self) -> Tensor:
        p, at = self._population, self._at
        attr = torch.zeros(len(at), self._layout.cells, self._layout.attributes)

        def put(source: str, name: str, target: str, first: int, *columns: Tensor) -> None:
            """Sets attributes of a relation, from attribute `first` on; each [rows, targets, sources] or what
            broadcasts to it."""
            own = self._layout.of_relation(attr, (source, name, target))
            for number, column in enumerate(columns):
                own[..., first + number] = column

        ratio = log(self._fans[:, :, 1] / self._fans[:, :, 0])
        whole = self.parameters[:, None]
        cost = torch.log1p(p.seed_sizes[self._width] / whole)[:, None].expand(-1, p.slots, -1)  # [rows, S, K]
        put("layer", "feeds", "layer", 0, at[:, :, None] - at[:, None], ratio[:, :, None])
        put("layer", "feeds", "activation", 0, at[:, None], ratio[:, None])
        put("activation", "feeds", "layer", 0, at[:, :, None], ratio[:, :, None])
        put("parameter", "tunes", "layer", 0, (self._sizes / whole)[:, :, None])
        before = at[:, 1:-1]  # of the layer in front of each slot
        put("slot", "precedes", "slot", 0, before[:, :, None] - before[:, None])
        put("blueprint", "fits", "slot", 1, cost)
        put("slot", "fits", "blueprint", 1, cost.transpose(1, 2))
        for node in self._layout.counts:
            if node != "global":
                put("global", "writes", node, 0, torch.ones(()))
                put(node, "informs", "global", 0, torch.ones(()))
        return attr.nan_to_num(nan=0.0).clamp(-BOUND, BOUND)
