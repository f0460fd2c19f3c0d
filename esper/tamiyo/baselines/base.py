"""What controllers have in common. They see what Tamiyo sees, GraphBatch and action mask, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from esper.graph import GraphBatch
from esper.graph.schema import SCHEMA
from esper.growth.actions import RAMPS, WAIT, ActionLayout, Verb


class Controller(Protocol):
    """Chooses one legal action for each of N hosts; `begin` starts N new episodes.

    The actions are on the device of the graph.
    """

    def begin(self, hosts: int) -> None: ...

    def act(self, graph: GraphBatch) -> Tensor: ...


REGISTRY: dict[str, tuple[type, type | None]] = {}
"""Controllers by name, each with the dataclass of its knobs."""

_C = TypeVar("_C", bound=type)


def register(name: str, knobs: type[Any] | None = None) -> Callable[[_C], _C]:
    """Class decorator: makes a controller known as `name`, with the dataclass of its knobs."""

    def add(cls: _C) -> _C:
        REGISTRY[name] = (cls, knobs)
        return cls

    return add


def layout(graph: GraphBatch) -> ActionLayout:
    """How the actions of these graphs are numbered."""
    return ActionLayout(graph.x["slot"].shape[1], graph.x["blueprint"].shape[1])


def column(graph: GraphBatch, node: str, name: str) -> Tensor:
    """[N, n], one feature of all nodes of a type."""
    return graph.x[node][:, :, SCHEMA.feature(node, name)]


def germinable(graph: GraphBatch) -> Tensor:
    """Bool [N, slots, blueprints]: which germinations are legal."""
    return layout(graph).germinations(graph.action_mask)


def germination(graph: GraphBatch, slot: Tensor, blueprint: Tensor) -> Tensor:
    """[N], the number of the action GERMINATE(slot, blueprint)."""
    return 1 + slot * layout(graph).blueprints + blueprint


class Grower(ABC):
    """Germinates what `choose` says, on every `every`-th epoch from `first` on; blends what waits for it; keeps it.

    Args:
        ramp: alpha ramp of BLEND, where blending does not start by itself.
        first: the first epoch it may act in, counted from 0.
        every: epochs between two decisions.
    """

    def __init__(self, ramp: int, first: int = 0, every: int = 1):
        self.ramp, self.first, self.every = ramp, first, every
        self.begin(0)

    def begin(self, hosts: int) -> None:
        self.epoch = 0

    def act(self, graph: GraphBatch) -> Tensor:
        actions = blend_waiting(graph, self.ramp)
        if self.epoch >= self.first and (self.epoch - self.first) % self.every == 0:
            when, slot, blueprint = self.choose(graph)
            chosen = germination(graph, slot, blueprint)
            legal = graph.action_mask.gather(1, chosen[:, None]).squeeze(1)
            actions = torch.where(when & legal, chosen, actions)
        self.epoch += 1
        return actions

    @abstractmethod
    def choose(self, graph: GraphBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(whether to germinate, the slot, the blueprint), each [N]. What is not legal is not carried out."""


def blend_waiting(graph: GraphBatch, ramp: int) -> Tensor:
    """BLEND in the first slot that waits for it, else WAIT: [N]."""
    verbs, _, choices = (values.to(graph.device) for values in layout(graph).table())
    legal = graph.action_mask & (verbs == Verb.BLEND) & (choices == RAMPS.index(ramp))
    return torch.where(legal.any(1), legal.int().argmax(1), WAIT)


def best_slot(score: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """(the largest score [N], -inf where nothing is allowed; its slot [N]) of score, allowed [N, slots]."""
    best, slot = score.masked_fill(~allowed, -torch.inf).max(1)
    return best, slot
