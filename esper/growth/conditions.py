"""What can be wrong with a stage, or merely unusual, from the start or from some epoch on.

A stage computes `clamp(z + shift, low, high)` of its linear map z, plus `leak` times what the clamp cut off, on the
units it has left. Every condition is a setting of these five, or of how the stage's weights start. They are hidden
from the controller, which sees their effect on statistics only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

NEVER = 1 << 40
"""The epoch of what is not to happen."""

BEYOND = NEVER - 1
"""An epoch after the end of every episode: a host waits for it in vain."""

LEARNING_RATE_SPIKE = 4.0
"""Factor on the learning rate in the epoch in which a stage saturates mid-training."""

_INF = float("inf")


class Condition(IntEnum):
    """The state of a stage; what is not marked a defect is a benign decoy."""

    HEALTHY = 0  # ReLU
    CHOKE = 1  # defect: 2 to 4 units are left
    SATURATED = 2  # defect: a bounded activation of tiny range, on whose slopes little gradient is left
    DYING = 3  # defect: a bias far below 0, most ReLU units are off on every sample
    LARGE_INIT = 4  # defect: weights start 6 to 16 times too large
    SMALL_INIT = 5  # defect: weights start 20 to 100 times too small
    HALF = 6  # decoy: half of the units
    HARDTANH = 7  # decoy: clamp to [-1, 1]
    SPARSE = 8  # decoy: 60 % of the weights start at 0
    LINEAR = 9  # decoy: no activation


DEFECTS = (Condition.CHOKE, Condition.SATURATED, Condition.DYING, Condition.LARGE_INIT, Condition.SMALL_INIT)
DECOYS = (Condition.HALF, Condition.HARDTANH, Condition.SPARSE, Condition.LINEAR)
STRIKES = (Condition.CHOKE, Condition.SATURATED, Condition.DYING)
"""Defects that can appear mid-training; a saturation that does comes with a spike of the learning rate."""

_SPARSITY = 0.6


class StageSettings(NamedTuple):
    """Of one stage of M hosts, each [M, 1, 1] but for `units`; None where it does nothing to any of them."""

    low: Tensor
    high: Tensor
    leak: Tensor | None
    units: Tensor  # [M, 1, width]
    shift: Tensor | None
    skip: Tensor | None


@dataclass
class Activations:
    """How every stage of N hosts maps its pre-activations now; each [N, S] but for `units`.

    `used` says for each stage whether leak, shift and skip do anything there, known before tensors move to a device.
    """

    low: Tensor
    high: Tensor
    leak: Tensor
    units: Tensor  # [N, S, width], 1 for the units the stage has left
    shift: Tensor
    skip: Tensor  # 1 where the host has no such stage and passes its input on
    used: list[tuple[bool, bool, bool]]

    def map(self, function: Callable[[Tensor], Tensor]) -> Activations:
        """With `function` applied to every tensor."""
        low, high, leak, units, shift, skip = (function(value) for value in self.tensors())
        return Activations(low, high, leak, units, shift, skip, self.used)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.low, self.high, self.leak, self.units, self.shift, self.skip

    def stage(self, number: int) -> StageSettings:
        low, high, leak, shift, skip = (
            getattr(self, name)[:, number, None, None] for name in ("low", "high", "leak", "shift", "skip")
        )
        leaks, shifts, skips = self.used[number]
        return StageSettings(
            low,
            high,
            leak if leaks else None,
            self.units[:, number, None],
            shift if shifts else None,
            skip if skips else None,
        )


def _between(low: float, high: float, severity: Tensor) -> Tensor:
    return low + (high - low) * severity


# [conditions, (low, high, leak, shift)] at severity 0, and what severity 1 adds.
_MILDEST = torch.tensor([0.0, _INF, 0.0, 0.0]).repeat(len(Condition), 1)
_MILDEST[Condition.SATURATED] = torch.tensor([-0.03, 0.03, 0.01, 0.0])
_MILDEST[Condition.DYING, 3] = -3.0
_MILDEST[Condition.HARDTANH, :2] = torch.tensor([-1.0, 1.0])
_MILDEST[Condition.LINEAR, 0] = -_INF
_WORSE = torch.zeros_like(_MILDEST)
_WORSE[Condition.SATURATED] = torch.tensor([0.02, -0.02, 0.0, 0.0])
_WORSE[Condition.DYING, 3] = -3.0


def activations(condition: Tensor, severity: Tensor, width: Tensor, depth: Tensor, widest: int) -> Activations:
    """What `condition` [N, S] of `severity` [N, S] in [0, 1) does to hosts of `width` [N] and `depth` [N]."""
    exists = torch.arange(condition.shape[1], device=depth.device) < depth[:, None]
    settings = _MILDEST[condition] + _WORSE[condition] * severity[..., None]
    low, high, leak, shift = (value.contiguous() for value in settings.unbind(-1))
    left = torch.where(condition == Condition.HALF, (width[:, None] / 2).ceil(), width[:, None].float())
    choked = (4.0 - (3 * severity).floor()).clamp(min=2)
    left = torch.where(condition == Condition.CHOKE, choked, left)
    left = torch.minimum(left, width[:, None]) * exists
    skip = (~exists).float()
    used = torch.stack([(leak > 0).any(0), (shift < 0).any(0), (skip > 0).any(0)], dim=1).tolist()
    units = (torch.arange(widest, device=depth.device) < left[..., None]).float()
    return Activations(low, high, leak, units, shift, skip, [(a, b, c) for a, b, c in used])


def initial_scale(condition: Tensor, severity: Tensor) -> Tensor:
    """[N, S], the factor on a stage's initial weights."""
    large = torch.where(condition == Condition.LARGE_INIT, _between(6.0, 16.0, severity), 1.0)
    return torch.where(condition == Condition.SMALL_INIT, _between(0.05, 0.01, severity), large)


def kept_at_start(condition: Tensor, draw: Tensor) -> Tensor:
    """Bool, the shape of `draw` (uniform in [0, 1)): which initial weights of stages in `condition` are not 0."""
    return (condition != Condition.SPARSE) | (draw >= _SPARSITY)
