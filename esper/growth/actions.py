"""The controller's actions: how they are numbered, which are legal, and how they are carried out.

One categorical over `WAIT; GERMINATE(slot, blueprint); BLEND(slot, ramp); FOSSILIZE(slot); CULL(slot)`, numbered in
that order with the slot as the slower index.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from esper.growth.growable import Growable
from esper.growth.lifecycle import LEGAL, Event

RAMPS = (1, 3, 5, 8)
"""Epochs of the alpha ramp that BLEND can ask for."""

WAIT = 0


class Verb(IntEnum):
    """The kinds of action, in the order of their numbers."""

    WAIT = 0
    GERMINATE = 1
    BLEND = 2
    FOSSILIZE = 3
    CULL = 4


EVENT = {
    Verb.GERMINATE: Event.GERMINATE,
    Verb.BLEND: Event.BLEND,
    Verb.FOSSILIZE: Event.FOSSILIZE,
    Verb.CULL: Event.CULL,
}


_EVENTS = torch.tensor([EVENT.get(verb, Event.GERMINATE) for verb in Verb])  # [verb]; WAIT's is not read


@dataclass(frozen=True)
class ActionLayout:
    """Numbering of the actions for hosts with `slots` slots and `blueprints` blueprints."""

    slots: int
    blueprints: int

    @property
    def choices(self) -> dict[Verb, int]:
        """How many actions of each kind there are per slot."""
        return {Verb.GERMINATE: self.blueprints, Verb.BLEND: len(RAMPS), Verb.FOSSILIZE: 1, Verb.CULL: 1}

    @property
    def size(self) -> int:
        return 1 + self.slots * sum(self.choices.values())

    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """(verb, slot, choice) of every action, each int64 [size]; slot and choice are 0 for WAIT. Shared."""
        return _table(self)

    def index(self, verb: Verb, slot: int = 0, choice: int = 0) -> int:
        """Number of one action.

        Raises:
            ValueError: no such action.
        """
        rows = list(zip(*(t.tolist() for t in self.table()), strict=True))
        if (verb, slot, choice) not in rows:
            raise ValueError(f"no action {verb.name}(slot {slot}, choice {choice}) with {self}")
        return rows.index((verb, slot, choice))

    def mask(self, population: Growable) -> Tensor:
        """bool [N, size]: what the transition table allows, where the host has such a slot, has seeds left, and the
        blueprint fits; WAIT is always legal."""
        verb, slot, _ = self.table()
        allowed = LEGAL[population.lifecycle.stage[:, slot], _EVENTS[verb]]
        self.germinations(allowed).logical_and_(population.germinable())
        allowed[:, WAIT] = True
        return allowed

    def germinations(self, actions: Tensor) -> Tensor:
        """What `actions` [N, size] says of every germination: a view [N, slots, blueprints]."""
        return actions[:, 1 : 1 + self.slots * self.blueprints].unflatten(1, (self.slots, self.blueprints))

    def execute(self, population: Growable, actions: Tensor) -> Tensor:
        """Carries out `actions` (int64 [N], on the CPU); returns their verbs [N].

        Raises:
            ValueError: an action that the mask refuses, or a number out of range; nothing is changed then.
        """
        if len(actions) and not (int(actions.min()) >= 0 and int(actions.max()) < self.size):
            raise ValueError(f"actions must be in [0, {self.size}), got {actions.tolist()}")
        allowed = self.mask(population).gather(1, actions[:, None]).squeeze(1)
        if not allowed.all():
            host = int((~allowed).nonzero()[0])
            raise ValueError(f"action {int(actions[host])} is not legal for host {host}: see action_mask")
        verb, slot, choice = (column[actions] for column in self.table())
        slots = torch.arange(self.slots)

        def where(kind: Verb) -> Tensor:
            return (verb == kind)[:, None] & (slot[:, None] == slots)

        choices = choice[:, None].expand(-1, self.slots)
        if (verb == Verb.GERMINATE).any():
            population.germinate(where(Verb.GERMINATE), choices)
        population.lifecycle.blend(where(Verb.BLEND), torch.tensor(RAMPS)[choices.clamp(max=len(RAMPS) - 1)])
        population.lifecycle.fire(Event.FOSSILIZE, where(Verb.FOSSILIZE))
        population.lifecycle.fire(Event.CULL, where(Verb.CULL))
        return verb


@cache
def _table(layout: ActionLayout) -> tuple[Tensor, Tensor, Tensor]:
    rows = [(Verb.WAIT, 0, 0)]
    for verb, count in layout.choices.items():
        rows += [(verb, slot, choice) for slot in range(layout.slots) for choice in range(count)]
    verbs, slots, choices = torch.tensor(rows).unbind(1)
    return verbs, slots, choices
