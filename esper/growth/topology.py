"""The edges of the observation graph: they follow from a host's depth alone, so they are made once for every depth."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from esper.graph.schema import SCHEMA, Relation


class Wiring(NamedTuple):
    """Padded edges of one relation for every depth from 0 to the deepest, each [depths, E], sorted by target."""

    source: Tensor
    target: Tensor
    mask: Tensor

    def of(self, depth: Tensor) -> Wiring:
        """For hosts of `depth` [n]: each [n, E]."""
        return Wiring(*(value[depth] for value in self))


def nodes(stages: int, blueprints: int) -> dict[str, int]:
    """How many nodes of each type hosts with up to `stages` stages have room for, `global` aside.

    Layers are the stem, the stages and the head, in this order also for hosts of fewer stages, whose layers in between
    are padding.
    """
    return {"layer": stages + 2, "activation": stages, "parameter": 1, "slot": stages, "blueprint": blueprints}


def _pairs(stages: int, depth: int, blueprints: int) -> dict[Relation, list[tuple[int, int]]]:
    """(source, target) of every relation of a host of `depth` stages, in room for `stages`."""
    chain = [*range(depth + 1), stages + 1]  # the layers in the order of the forward pass
    after = {slot: chain[slot + 2] for slot in range(depth)}  # the layer behind each slot
    own = {slot: slot + 1 for slot in range(depth)}  # the layer in front of it
    slots, kinds = range(depth), range(blueprints)
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


def wirings(stages: int, blueprints: int) -> dict[Relation, Wiring]:
    """Of every relation of the schema, for depths 0 to `stages`."""
    by_depth = [_pairs(stages, depth, blueprints) for depth in range(stages + 1)]
    result = {}
    for relation in SCHEMA.relations:
        rows = [sorted(pairs[relation], key=lambda pair: pair[::-1]) for pairs in by_depth]
        length = max(len(row) for row in rows)
        padded = torch.zeros(len(rows), length, 2, dtype=torch.int64)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for depth, row in enumerate(rows):
            if row:
                padded[depth, : len(row)], mask[depth, : len(row)] = torch.tensor(row), True
        result[relation] = Wiring(padded[..., 0], padded[..., 1], mask)
    return result
