"""Rollout storage: T steps of N environments, then shuffled minibatches of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.graph import GraphBatch
from esper.simic.gae import gae


@dataclass
class Minibatch:
    """B transitions in random order; every tensor is [B]."""

    graph: GraphBatch
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


class Rollout:
    """Fixed storage for one iteration.

    Args:
        steps: T.
        num_envs: N.
        device: where it is kept.
    """

    def __init__(self, steps: int, num_envs: int, device: torch.device | str = "cpu"):
        shape = (steps, num_envs)
        self.actions = torch.zeros(shape, dtype=torch.int64, device=device)
        self.log_probs, self.values, self.rewards, self.final_values, self.advantages, self.returns = (
            torch.zeros(shape, device=device) for _ in range(6)
        )
        self.terminated, self.truncated = (torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(2))
        self.graphs: list[GraphBatch] = []

    def clear(self) -> None:
        """Makes room for the next iteration."""
        self.graphs = []
        self.final_values.zero_()

    def add(
        self,
        graph: GraphBatch,
        actions: Tensor,
        log_probs: Tensor,
        values: Tensor,
        rewards: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        final_values: Tensor | None = None,
    ) -> None:
        """Appends one step; every tensor is [N]. `final_values` is V of the final observations where truncated.

        Raises:
            IndexError: the storage is full.
        """
        t = len(self.graphs)
        if t == len(self.actions):
            raise IndexError(f"the rollout holds {t} steps already")
        self.graphs.append(graph)
        # Copies: what the actor made under inference_mode must not reach the update.
        self.actions[t], self.log_probs[t], self.values[t] = actions, log_probs, values
        self.rewards[t], self.terminated[t], self.truncated[t] = rewards, terminated, truncated
        if final_values is not None:
            self.final_values[t] = final_values

    def finish(self, last_values: Tensor, gamma: float, lam: float) -> None:
        """Computes advantages and returns; `last_values` [N] is V of the observation after the last step."""
        self._batch = GraphBatch.cat(self.graphs)  # once, for all passes over the minibatches
        self.advantages, self.returns = gae(
            self.rewards,
            self.values,
            self.terminated,
            self.truncated,
            self.final_values,
            last_values.clone(),
            gamma,
            lam,
        )

    def explained_variance(self) -> float:
        """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 one no better than a constant."""
        variance = self.returns.var()
        return float("nan") if variance == 0 else float(1 - (self.returns - self.values).var() / variance)

    def minibatches(self, count: int, generator: torch.Generator) -> Iterator[Minibatch]:
        """One pass over a finished rollout in `count` shuffled minibatches of (nearly) equal size."""
        flat = [t.flatten() for t in (self.actions, self.log_probs, self.values, self.advantages, self.returns)]
        order = torch.randperm(len(self._batch), generator=generator)
        for index in order.tensor_split(count):
            yield Minibatch(self._batch[index], *(t[index] for t in flat))
