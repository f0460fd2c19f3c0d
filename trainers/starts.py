"""Several starts of PPO from one policy, of which a run keeps the best.

What PPO settles on depends on which actions it happens to draw. A run depends on that less with random restarts: each
share of its steps begins anew with the same episodes and other draws, and what returned most at its end is kept.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from esper.simic.config import PPOConfig
from trainers.episodes import LatestEpisodes

log = logging.getLogger(__name__)

LATE = 0.8  # of a start's steps are behind it where what it returns begins to count


class Starts:
    """Where a run is among its starts.

    Attributes:
        begun: state of the learner from which each start begins, without its generator; None before the first.
        best: number, mean return, policy and latest episodes of the best start that has ended; None before that.
    """

    def __init__(self, config: PPOConfig):
        self.config = config
        self.begun: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self._late: list[float] = []

    def place(self, step: int) -> tuple[int, float]:
        """The number of the start that takes the step, from 0, and the share of its steps that are behind it."""
        number, share = divmod(step * self.config.starts / self.config.total_steps, 1)
        return int(number), share

    def begin(self, learner: dict[str, Any]) -> None:
        """From this state of the learner, if there are several starts, and none before."""
        if self.config.starts > 1 and self.begun is None:
            self.begun = _copy({name: value for name, value in learner.items() if name != "generator"})

    def note(self, before: int, step: int, window: LatestEpisodes, policy: dict[str, torch.Tensor]) -> bool:
        """Takes note of an iteration from one step to another; returns whether a start has ended with it.

        Args:
            window: the latest episodes.
            policy: to be kept, with the window, if this start has ended and is the best so far.
        """
        number, share = self.place(before)
        if share >= LATE:
            self._late.append(window.mean("return"))
        if self.place(step)[0] == number:
            return False
        mean = sum(self._late) / len(self._late) if self._late else window.mean("return")
        self._late.clear()
        log.info("start %d of %d ended with a mean return of %+.4f", number + 1, self.config.starts, mean)
        if self.best is None or mean > self.best["return"]:
            self.best = {"number": number, "return": mean, "policy": _copy(policy), "window": list(window)}
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun, "best": self.best, "late": list(self._late)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begun, self.best, self._late = state["begun"], state["best"], list(state["late"])


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return tree_map_only(torch.Tensor, torch.clone, state)
