"""Generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    final_values: Tensor,
    last_values: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of T steps in N environments (Schulman et al., arXiv 1506.02438).

    An episode that terminated has no future; one that was truncated has the value of its final observation. Neither
    passes anything on to the episode before it.

    Args:
        rewards: [T, N], of the step from observation t.
        values: [T, N], V of observation t.
        terminated: bool [T, N], whether the step from t ended the episode by the task's own rule.
        truncated: bool [T, N], whether it was cut off there.
        final_values: [T, N], V of the final observation where truncated; not read elsewhere.
        last_values: [N], V of the observation after the last step.
        gamma: discount.
        lam: lambda of the estimator.

    Returns:
        advantages [T, N] and returns (advantages + values) [T, N].
    """
    advantages = torch.zeros_like(rewards)
    future = torch.zeros_like(last_values)
    next_values = last_values
    for t in reversed(range(len(rewards))):
        bootstrap = torch.where(truncated[t], final_values[t], next_values).masked_fill(terminated[t], 0.0)
        delta = rewards[t] + gamma * bootstrap - values[t]
        going_on = ~(terminated[t] | truncated[t])
        future = delta + gamma * lam * going_on * future
        advantages[t] = future
        next_values = values[t]
    return advantages, advantages + values
