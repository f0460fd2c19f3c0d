"""Rollout storage: T steps of N environments, then shuffled minibatches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esper.graph import GraphBatch
from esper.runtime.distributed import ALONE, World
from esper.simic.gae import gae


class Targets(NamedTuple):
    """What the loss of B transitions reads besides their graphs; each [B], but the last two."""

    actions: Tensor
    log_probs: Tensor
    values: Tensor  # as the critic gave them, normalised where returns are
    advantages: Tensor
    returns: Tensor  # normalised where that is asked for
    auxiliary: Tensor  # [B, n], n = 0 where there are none
    auxiliary_mask: Tensor  # bool [B, n]


class Totals(NamedTuple):
    """Of a minibatch over all processes; each 0-dimensional, float32."""

    graphs: Tensor  # how many transitions
    mean: Tensor  # of their advantages
    std: Tensor
    known: Tensor  # auxiliary targets that are known

    @classmethod
    def of(cls, targets: Targets) -> Totals:
        """Of a minibatch of this process alone."""
        advantages = targets.advantages
        parts = advantages.mean(), advantages.std(correction=0), targets.auxiliary_mask.sum().float()
        return cls(advantages.new_tensor(len(advantages)), *parts)


class Minibatch(NamedTuple):
    """B transitions in random order: this process's part of a minibatch."""

    graph: GraphBatch
    targets: Targets
    totals: Totals


class Rollout:
    """Fixed storage for one iteration.

    Args:
        steps: T.
        num_envs: N of this process; it may have none where there are others.
        device: where it is kept.
        world: the processes that share the iteration.
    """

    def __init__(self, steps: int, num_envs: int, device: torch.device | str = "cpu", world: World = ALONE):
        self.world = world
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

    def finish(
        self,
        last_values: Tensor,
        gamma: float,
        lam: float,
        normalizer: ReturnNormalizer | None = None,
        auxiliary: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Computes advantages and returns.

        Args:
            last_values: [N], V of the observation after the last step.
            gamma: discount.
            lam: lambda of the estimator.
            normalizer: of which the critic's values are outputs; it then learns from these returns.
            auxiliary: targets [T, N, n] and which of them are known.
        """
        self._batch = GraphBatch.cat(self.graphs) if self.graphs else None  # once, for all passes over the minibatches
        restored = normalizer.restored if normalizer else torch.clone
        self._predicted = restored(self.values)
        self.advantages, self.returns = gae(
            self.rewards,
            self._predicted,
            self.terminated,
            self.truncated,
            restored(self.final_values),
            restored(last_values.clone()),
            gamma,
            lam,
        )
        wanted = self.returns
        if normalizer:
            normalizer.learn(self.returns, self.world)
            wanted = normalizer.normalized(self.returns)
        nothing = self.values.new_zeros(*self.values.shape, 0)
        found, known = auxiliary or (nothing, nothing.bool())
        columns = self.actions, self.log_probs, self.values, self.advantages, wanted, found, known
        self._targets = Targets(*(column.flatten(0, 1) for column in columns))

    def explained_variance(self) -> float:
        """1 - Var(returns - values) / Var(returns) over all processes: 1 is a perfect critic, 0 one no better than a
        constant; NaN where returns are all alike."""
        columns = torch.stack([self.returns, self.returns - self._predicted]).double().flatten(1)
        size = columns.new_tensor([columns.shape[1]])
        total, sums, squares = self.world.total([size, columns.sum(1), columns.square().sum(1)])
        variances = squares / total - (sums / total).square()
        # Below it there is nothing but the rounding of float32.
        return float("nan") if variances[0] <= 1e-14 * squares[0] / total else float(1 - variances[1] / variances[0])

    def minibatches(self, count: int, generator: torch.Generator) -> Iterator[Minibatch | None]:
        """One pass over a finished rollout in `count` shuffled minibatches of (nearly) equal size, as many in every
        process; None where this process has nothing to add to one."""
        indices = torch.randperm(self.actions.numel(), generator=generator).to(self.actions.device).tensor_split(count)
        for index, totals in zip(indices, self._totals(indices), strict=True):
            if self._batch is None or not len(index):
                yield None
            else:
                yield Minibatch(self._batch[index], Targets(*(column[index] for column in self._targets)), totals)

    def _totals(self, indices: Sequence[Tensor]) -> list[Totals]:
        """Of minibatches that consist of these transitions in this process."""
        advantages, known = self._targets.advantages.double(), self._targets.auxiliary_mask.sum(1)
        parts = [(advantages[index], known[index]) for index in indices]
        rows = [[a.new_tensor(len(a)), a.sum(), a.square().sum(), k.sum().double()] for a, k in parts]
        (table,) = self.world.total([torch.stack([torch.stack(row) for row in rows])])
        graphs, sums, squares, known = table.unbind(1)
        mean = sums / graphs
        std = (squares / graphs - mean.square()).clamp(min=0).sqrt()
        return [Totals(*row) for row in torch.stack([graphs, mean, std, known], 1).float().unbind()]


class ReturnNormalizer:
    """Running mean and standard deviation of returns, so that the critic's outputs have unit scale (Yu et al.,
    arXiv 2103.01955, section 5.1)."""

    def __init__(self, device: torch.device | str = "cpu"):
        self._moments = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, device=device)  # count, mean, variance

    def learn(self, returns: Tensor, world: World = ALONE) -> None:
        """Takes in the returns of all processes, of any shape (Chan et al., 1979, for the sum of two samples)."""
        count, mean, variance = self._moments.unbind()
        values = returns.double()
        (sums,) = world.total([torch.stack([values.new_tensor(values.numel()), values.sum(), values.square().sum()])])
        new, added, squared = sums.unbind()
        total = count + new
        delta = added / new - mean
        squares = variance * count + (squared - added.square() / new)
        squares = squares + delta.square() * count * new / total
        moments = torch.stack([total, mean + delta * new / total, squares / total])
        # Numbers that are not finite would stay in them for good.
        self._moments = torch.where(moments.isfinite().all(), moments, self._moments)

    def normalized(self, returns: Tensor) -> Tensor:
        """Returns as the critic is to predict them."""
        mean, std = self._scale()
        return (returns - mean) / std

    def restored(self, values: Tensor) -> Tensor:
        """The critic's outputs as returns."""
        mean, std = self._scale()
        return values * std + mean

    def _scale(self) -> tuple[Tensor, Tensor]:
        _, mean, variance = self._moments.float().unbind()
        return mean, (variance + 1e-8).sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """Its moments."""
        return {"moments": self._moments.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        self._moments = state["moments"].to(self._moments.device)
