"""The edges of the observation graph: they follow from a host's depth alone, so they are made once for every depth."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from esper.graph.layout import Layout
from esper.graph.schema import Relation


def nodes(stages: int, blueprints: int) -> dict[str, int]:
    """How many nodes of each type hosts with up to `stages` stages have room for.

    Layers are the stem, the stages and the head, in this order also for hosts of fewer stages, whose layers in between
    are padding.
    """
    return {
        "global": 1,
        "layer": stages + 2,
        "activation": stages,
        "parameter": 1,
        "slot": stages,
        "blueprint": blueprints,
    }


def pairs(chain: list[int], own: list[int], after: list[int], blueprints: int) -> dict[Relation, list[tuple[int, int]]]:
    """(source, target) of every relation.

    Args:
        chain: the layers in the order of the forward pass.
        own, after: of each slot, and the activation there, the layer in front of it and the one behind it.
        blueprints: how many there are.
    """
    slots, kinds = range(len(own)), range(blueprints)
    every = {"layer": chain, "activation": slots, "parameter": range(1), "slot": slots, "blueprint": kinds}
    return {
        ("layer", "feeds", "layer"): list(pairwise(chain)),
        ("layer", "feeds", "activation"): [(own[s], s) for s in slots],
        ("activation", "feeds", "layer"): [(s, after[s]) for s in slots],
        ("parameter", "tunes", "layer"): [(0, layer) for layer in chain],
        ("slot", "reads", "layer"): [(s, own[s]) for s in slots],
        ("slot", "writes", "layer"): [(s, after[s]) for s in slots],
        ("layer", "hosts", "slot"): [(layer, s) for s in slots for layer in (own[s], after[s])],
        ("slot", "precedes", "slot"): [(i, j) for j in slots for i in range(j)],
        ("blueprint", "fits", "slot"): [(k, s) for s in slots for k in kinds],
        ("slot", "fits", "blueprint"): [(s, k) for s in slots for k in kinds],
        **{("global", "writes", node): [(0, i) for i in members] for node, members in every.items()},
        **{(node, "informs", "global"): [(i, 0) for i in members] for node, members in every.items()},
    }


def edge_masks(layout: Layout) -> Tensor:
    """bool [stages + 1, cells], the edges of hosts of every depth."""
    stages, blueprints = layout.counts["slot"], layout.counts["blueprint"]
    masks = torch.zeros(stages + 1, layout.cells, dtype=torch.bool)
    for depth in range(stages + 1):
        chain = [*range(depth + 1), stages + 1]
        own, after = chain[1:-1], chain[2:]
        masks[depth] = edge_mask(layout, pairs(chain, own, after, blueprints))
    return masks


def edge_mask(layout: Layout, edges: dict[Relation, list[tuple[int, int]]]) -> Tensor:
    """bool [cells], where `edges` are."""
    mask = torch.zeros(1, layout.cells, dtype=torch.bool)
    for relation, members in edges.items():
        own = layout.of_relation(mask, relation)[0]  # [targets, sources]
        for source, target in members:
            own[target, source] = True
    return mask[0]
