"""The learner: optimiser, schedules, and one update over a rollout."""

from __future__ import annotations

from typing import Any

import torch

from esper.runtime.errors import TrainingError
from esper.simic.config import PPOConfig
from esper.simic.rollout import Rollout
from esper.simic.update import UpdateStep
from esper.tamiyo.policy import Tamiyo


class Simic:
    """Trains a policy by PPO.

    Args:
        policy: what is trained.
        config: settings of PPO.
        seed: of the order of minibatches.
    """

    def __init__(self, policy: Tamiyo, config: PPOConfig, seed: int):
        self.policy, self.config = policy, config
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=config.lr, eps=1e-5)
        self.update_step = UpdateStep(policy, self.optimizer, config)
        self.generator = torch.Generator().manual_seed(seed)

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        """Several passes over a finished rollout.

        Args:
            rollout: with advantages and returns.
            progress: share of the total steps taken before this iteration, in [0, 1); drives the schedules.

        Returns:
            Means over all minibatches, `learning_rate` and `explained_variance`.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        lr = self.config.lr * (1 - progress) if self.config.anneal_lr else self.config.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        metrics: list[dict[str, torch.Tensor]] = []
        for _ in range(self.config.epochs):
            passed = [self.update_step(b) for b in rollout.minibatches(self.config.minibatches, self.generator)]
            metrics += passed
            if self.config.target_kl is not None:
                kl = torch.stack([m["approx_kl"] for m in passed]).mean()
                if kl > self.config.target_kl:
                    break
        means = {name: float(torch.stack([m[name] for m in metrics]).mean()) for name in metrics[0]}
        if not all(torch.isfinite(torch.tensor([means["loss"], means["grad_norm"]]))):
            raise TrainingError(
                f"the loss ({means['loss']}) or its gradient ({means['grad_norm']}) is not finite; "
                "resume from the last checkpoint with a smaller ppo.lr"
            )
        return {**means, "learning_rate": lr, "explained_variance": rollout.explained_variance()}

    def state_dict(self) -> dict[str, Any]:
        """Policy, optimiser and generator."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
