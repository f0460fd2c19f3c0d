"""The update step: forward, loss and backward of one minibatch, then clip and optimiser step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.simic.config import PPOConfig
from esper.simic.rollout import Minibatch
from esper.tamiyo.policy import Tamiyo


@dataclass
class Loss:
    """The PPO loss of a minibatch and what is logged of it; scalars."""

    total: Tensor
    policy_gradient: Tensor
    value: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


def ppo_loss(policy: Tamiyo, batch: Minibatch, config: PPOConfig) -> Loss:
    """Clipped surrogate, squared value error and entropy bonus (arXiv 1707.06347, eq. 9).

    The KL estimate is `mean((r - 1) - log r)` (Schulman, "Approximating KL divergence", 2020).
    """
    distribution, values = policy.evaluate(batch.graph)
    log_ratio = distribution.log_prob(batch.actions) - batch.log_probs
    ratio = log_ratio.exp()
    advantages = batch.advantages
    if config.normalize_advantages:
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - config.clip, 1 + config.clip) * advantages)
    policy_gradient = -surrogate.mean()
    value = 0.5 * (values - batch.returns).square().mean()
    entropy = distribution.entropy().mean()
    total = policy_gradient + config.value_coef * value - config.entropy_coef * entropy
    with torch.no_grad():
        approx_kl = ((ratio - 1) - log_ratio).mean()
        clip_fraction = ((ratio - 1).abs() > config.clip).float().mean()
    return Loss(total, policy_gradient, value, entropy, approx_kl, clip_fraction)


class UpdateStep:
    """One optimiser step on one minibatch.

    Args:
        policy: what is trained.
        optimizer: over its parameters.
        config: settings of PPO.
    """

    def __init__(self, policy: Tamiyo, optimizer: torch.optim.Optimizer, config: PPOConfig):
        self.policy, self.optimizer, self.config = policy, optimizer, config

    def __call__(self, batch: Minibatch) -> dict[str, Tensor]:
        """Takes the step; returns scalars on the device, so that nothing here waits for it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = ppo_loss(self.policy, batch, self.config)
        loss.total.backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        return {
            "loss": loss.total.detach(),
            "policy_gradient_loss": loss.policy_gradient.detach(),
            "value_loss": loss.value.detach(),
            "entropy_loss": -loss.entropy.detach(),
            "approx_kl": loss.approx_kl,
            "clip_fraction": loss.clip_fraction,
            "grad_norm": norm.detach(),
        }
