"""The learner: optimiser, schedules, and one update over a rollout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esper.runtime.compiled import CompileGuard
from esper.runtime.distributed import ALONE, World
from esper.runtime.precision import AUTOCAST, LossScaler
from esper.simic.config import PPOConfig
from esper.simic.rollout import ReturnNormalizer, Rollout
from esper.simic.update import METRICS, UpdateStep
from esper.tamiyo.policy import GraphPolicy

SKIPPED_IN_A_ROW = 3
"""Steps without finite numbers after which training has failed."""

_FASTER = 1.5  # factor of the adaptive learning rate
_LR_BOUNDS = 1e-6, 1e-2


class Simic:
    """Trains a policy by PPO.

    Args:
        policy: what is trained.
        config: settings of PPO.
        seed: of the order of minibatches.
        precision: one of AUTOCAST.
        guard: of the compiled update step; by default nothing is compiled.
        world: the processes that train the policy together, each with a learner of its own.

    Attributes:
        skipped_total: optimiser steps that were left out because numbers were not finite.
        failed: why training cannot go on, or None.
    """

    def __init__(
        self,
        policy: GraphPolicy,
        config: PPOConfig,
        seed: int,
        precision: str = "fp32",
        guard: CompileGuard | None = None,
        world: World = ALONE,
    ):
        self.policy, self.config, self.guard = policy, config, guard or CompileGuard("update step", "not asked for")
        self.world = world
        device = next(policy.parameters()).device
        # A tensor, so that a compiled or captured step sees that it changes.
        self._lr = torch.tensor(config.lr, device=device)
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=self._lr, eps=1e-5, fused=True)
        self.scaler = LossScaler(precision, self.optimizer, device)
        policy.autocast = AUTOCAST[precision]
        self.update_step = UpdateStep(policy, self.scaler, config, self.guard, world)
        self.normalizer = ReturnNormalizer(device) if config.normalize_returns else None
        self.generator = torch.Generator().manual_seed(seed)
        self.skipped_total, self._in_a_row = 0, 0
        self.failed: str | None = None

    def finish(self, rollout: Rollout, last_values: Tensor) -> None:
        """Computes what the update of a filled rollout reads; `last_values` [N] is V of the next observation."""
        config = self.config
        auxiliary = self._auxiliary(rollout) if config.auxiliary_coef else None
        rollout.finish(last_values, config.gamma, config.gae_lambda, self.normalizer, auxiliary)

    def _auxiliary(self, rollout: Rollout) -> tuple[Tensor, Tensor] | None:
        """Of each step what its successor shows, where that belongs to the same episode."""
        shown = [pair for graph in rollout.graphs if (pair := self.policy.shown(graph)) is not None]
        if not shown:
            return None
        found, known = (torch.stack(column) for column in zip(*shown, strict=True))
        going_on = ~(rollout.terminated | rollout.truncated)[:-1, :, None]
        return found.roll(-1, 0), torch.cat([known[1:] & going_on, torch.zeros_like(known[:1])])

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        """Several passes over a finished rollout.

        Args:
            rollout: with advantages and returns.
            progress: share of the steps taken before this iteration, in [0, 1); drives the schedules.

        Returns:
            Means over all minibatches whose step was taken, `learning_rate`, `explained_variance`, and the number of
            `skipped` steps of this update.
        """
        if not self.guard.warm:
            self._warm_up(rollout)
        self._schedule(progress)
        self._freeze(progress)
        passes: list[Tensor] = []
        for _ in range(self.config.epochs):
            self.world.check()
            steps = [self.update_step(b) for b in rollout.minibatches(self.config.minibatches, self.generator)]
            passes.append(torch.stack(steps))
            if self._kl_acts() and not self._adapted(float(passes[-1][:, METRICS.index("approx_kl")].nanmean())):
                break
        rows = torch.cat(passes).cpu()  # the one time that the device is waited for
        taken = rows[:, -1] == 0
        self._count(rows)
        means = rows[taken].mean(0).tolist() if taken.any() else rows.mean(0).tolist()
        return {
            **dict(zip((*METRICS, "grad_norm"), means, strict=False)),
            "learning_rate": float(self._lr),
            "explained_variance": rollout.explained_variance(),
            "skipped": float((~taken).sum()),
        }

    def _warm_up(self, rollout: Rollout) -> None:
        """Compiles the update step for minibatches like those of the rollout; changes nothing."""
        # An order of its own: a warm-up must not move the generator.
        batches = rollout.minibatches(self.config.minibatches, torch.Generator().manual_seed(0))
        if (batch := next(iter(batches))) is not None:
            self.update_step.warm_up(batch)
        self.guard.warm = True  # in all processes at once, since finding minibatches is an exchange

    def _schedule(self, progress: float) -> None:
        config = self.config
        if config.lr_schedule == "linear":
            self._lr.fill_(config.lr * (1 - progress))
        elif config.lr_schedule == "constant":
            self._lr.fill_(config.lr)
        for tensor, start, end in (
            (self.update_step.coefficients.clip, config.clip, config.clip_final),
            (self.update_step.coefficients.entropy, config.entropy_coef, config.entropy_final),
        ):
            tensor.fill_(start if end is None else start + (end - start) * progress)

    def _freeze(self, progress: float) -> None:
        """At first only the value head learns: the large errors of a new critic would move a policy that is trained."""
        early, named = progress < self.config.critic_first, self.policy.named_parameters()
        self.update_step.frozen = [p for name, p in named if early and not name.startswith("value.")]

    def _kl_acts(self) -> bool:
        return self.config.target_kl is not None or self.config.lr_schedule == "adaptive"

    def _adapted(self, kl: float) -> bool:
        """Moves the adaptive learning rate after a pass; returns whether another pass may follow."""
        if self.config.lr_schedule == "adaptive":
            desired = self.config.desired_kl
            factor = 1 / _FASTER if kl > 2 * desired else _FASTER if kl < desired / 2 else 1.0
            self._lr.mul_(factor).clamp_(*_LR_BOUNDS)
        return self.config.target_kl is None or kl <= self.config.target_kl

    def _count(self, rows: Tensor) -> None:
        """Counts skipped steps; rows [steps, METRICS, norm, skipped]."""
        finite, scale = rows[:, 0].isfinite(), self.scaler.scale
        for loss_finite, skipped in zip(finite.tolist(), rows[:, -1].tolist(), strict=True):
            self.skipped_total += int(skipped)
            # While the scale of fp16 is still being found its gradients overflow, which says nothing of the run.
            searching = loss_finite and scale > 1
            self._in_a_row = self._in_a_row + 1 if skipped and not searching else 0
            if self._in_a_row >= SKIPPED_IN_A_ROW:
                self.failed = (
                    f"{SKIPPED_IN_A_ROW} steps in a row had a loss or a gradient that is not finite and were left out; "
                    "use a smaller ppo.lr"
                )

    def state_dict(self) -> dict[str, Any]:
        """Policy, optimiser, scaler, normaliser and counters, alike in all processes, and `generator`, which is not."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.scaler.state_dict(),
            "normalizer": self.normalizer.state_dict() if self.normalizer else {},
            "skipped": [self.skipped_total, self._in_a_row],
            "halved": self.update_step.halved,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        # Loading puts a new tensor in the place of the learning rate.
        self._lr.copy_(torch.as_tensor(self.optimizer.param_groups[0]["lr"]))
        self.optimizer.param_groups[0]["lr"] = self._lr
        if self.scaler.scaler.is_enabled() and state["scaler"]:
            self.scaler.scaler.load_state_dict(state["scaler"])
        if self.normalizer:
            self.normalizer.load_state_dict(state["normalizer"])
        self.skipped_total, self._in_a_row = state["skipped"]
        self.failed = None
        self.update_step.halved = state["halved"]
        self.generator.set_state(state["generator"])
