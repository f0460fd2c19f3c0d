"""Simic, the PPO learner: rollout storage, advantages, loss and update."""
