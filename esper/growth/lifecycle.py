"""The lifecycle of a seed: one enum, one transition table, and the stacked state of every (host, slot).

Both the legality mask and the execution of an event read the same table; nothing else changes a stage.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import torch
from torch import Tensor


class Stage(IntEnum):
    """What a slot holds."""

    DORMANT = 0  # empty slot
    TRAINING = 1  # the seed learns, the host's output is unchanged
    BLENDING = 2  # alpha ramps from 0 to 1
    HOLDING = 3  # alpha = 1, can still be culled
    FOSSILIZED = 4  # part of the host for good
    EMBARGOED = 5  # culled; the slot rests


class Event(IntEnum):
    """What moves a slot from one stage to the next."""

    GERMINATE = 0
    BLEND = 1
    FOSSILIZE = 2
    CULL = 3
    RAMPED = 4  # by itself: alpha has reached 1
    RELEASED = 5  # by itself: the embargo is over


TRANSITIONS: dict[tuple[Stage, Event], Stage] = {
    (Stage.DORMANT, Event.GERMINATE): Stage.TRAINING,
    (Stage.TRAINING, Event.BLEND): Stage.BLENDING,
    (Stage.BLENDING, Event.RAMPED): Stage.HOLDING,
    (Stage.HOLDING, Event.FOSSILIZE): Stage.FOSSILIZED,
    (Stage.TRAINING, Event.CULL): Stage.EMBARGOED,
    (Stage.BLENDING, Event.CULL): Stage.EMBARGOED,
    (Stage.HOLDING, Event.CULL): Stage.EMBARGOED,
    (Stage.EMBARGOED, Event.RELEASED): Stage.DORMANT,
}

_ILLEGAL = -1
# [stage, event] -> next stage, or _ILLEGAL
_NEXT = torch.tensor([[TRANSITIONS.get((s, e), _ILLEGAL) for e in Event] for s in Stage])

LEGAL = _NEXT != _ILLEGAL
"""bool [stage, event], what the transition table has; on the CPU."""

NO_BLUEPRINT = -1


def legal(stage: Tensor, event: Event) -> Tensor:
    """bool, the shape of `stage`: where the table has a transition for `event`."""
    return LEGAL.to(stage.device)[stage, event]


def is_live(stage: Tensor) -> Tensor:
    """bool: a seed exists in the slot (it costs compute)."""
    return (stage >= Stage.TRAINING) & (stage <= Stage.FOSSILIZED)


def is_kept(stage: Tensor) -> Tensor:
    """bool: the seed would stay if the episode ended now (it pays rent)."""
    return (stage == Stage.HOLDING) | (stage == Stage.FOSSILIZED)


@dataclass
class LifecycleSpec:
    """Rules of the lifecycle.

    Attributes:
        embargo_epochs: epochs that a culled slot rests.
        auto_blend: epochs in TRAINING after which blending starts by itself; None waits for BLEND.
        auto_ramp: epochs of the alpha ramp that auto_blend starts.
        zero_init: seeds start with an output of 0 instead of a random one.
    """

    embargo_epochs: int = 3
    auto_blend: int | None = 2
    auto_ramp: int = 3
    zero_init: bool = False


@dataclass
class Lifecycle:
    """State of every slot of N hosts; each tensor is [N, slots] and only the methods below write to it."""

    stage: Tensor  # int64, Stage
    blueprint: Tensor  # int64, NO_BLUEPRINT where no seed lives
    alpha: Tensor  # float32 in [0, 1], 0 where no seed blends
    ramp: Tensor  # int64, epochs of the current alpha ramp
    epochs: Tensor  # int64, epochs spent in the current stage

    @classmethod
    def dormant(cls, hosts: int, slots: int, device: torch.device | str = "cpu") -> Lifecycle:
        """All slots empty."""

        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((hosts, slots), value, dtype=dtype, device=device)

        return cls(
            stage=full(Stage.DORMANT, torch.int64),
            blueprint=full(NO_BLUEPRINT, torch.int64),
            alpha=full(0.0, torch.float32),
            ramp=full(1, torch.int64),
            epochs=full(0, torch.int64),
        )

    def reset(self, hosts: Tensor) -> None:
        """Empties every slot of `hosts` (int64 [m])."""
        fresh = Lifecycle.dormant(len(hosts), self.stage.shape[1], self.stage.device)
        for field in fields(self):
            getattr(self, field.name)[hosts] = getattr(fresh, field.name)

    def fire(self, event: Event, where: Tensor) -> None:
        """Moves every slot of `where` (bool [N, slots]) along the table.

        Raises:
            ValueError: the table has no such transition for one of them; nothing is changed then.
        """
        refused = where & ~legal(self.stage, event)
        if refused.any():
            host, slot = refused.nonzero()[0].tolist()
            stage = Stage(int(self.stage[host, slot])).name
            raise ValueError(f"{event.name} is not legal in stage {stage} (host {host}, slot {slot})")
        self.stage = torch.where(where, _NEXT.to(self.stage.device)[:, event][self.stage], self.stage)
        self.epochs = self.epochs.masked_fill(where, 0)
        if event == Event.CULL:
            self.alpha = self.alpha.masked_fill(where, 0.0)
            self.blueprint = self.blueprint.masked_fill(where, NO_BLUEPRINT)

    def germinate(self, where: Tensor, blueprint: Tensor) -> None:
        """GERMINATE in `where` (bool [N, slots]) with `blueprint` (int64 [N, slots])."""
        self.fire(Event.GERMINATE, where)
        self.blueprint = torch.where(where, blueprint, self.blueprint)

    def blend(self, where: Tensor, ramp: Tensor | int) -> None:
        """BLEND in `where`; alpha will reach 1 after `ramp` epochs (int, or int64 [N, slots])."""
        self.fire(Event.BLEND, where)
        self.ramp = torch.where(where, torch.as_tensor(ramp, device=where.device), self.ramp)

    def begin_epoch(self) -> None:
        """Raises alpha of the blending slots by one step of their ramp."""
        done = (self.epochs + 1).clamp(max=self.ramp)
        blending = self.stage == Stage.BLENDING
        # done / ramp is exactly 1 at the end of the ramp, which a running sum of 1 / ramp would miss.
        self.alpha = torch.where(blending, done / self.ramp, self.alpha)

    def end_epoch(self, spec: LifecycleSpec) -> None:
        """Counts the epoch and fires what happens by itself: RAMPED, RELEASED and, if configured, BLEND."""
        self.epochs = self.epochs + 1
        ramped = (self.stage == Stage.BLENDING) & (self.epochs >= self.ramp)
        released = (self.stage == Stage.EMBARGOED) & (self.epochs >= spec.embargo_epochs)
        self.fire(Event.RAMPED, ramped)
        self.fire(Event.RELEASED, released)
        if spec.auto_blend is not None:
            self.blend((self.stage == Stage.TRAINING) & (self.epochs >= spec.auto_blend), spec.auto_ramp)
