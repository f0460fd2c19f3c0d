"""Settings of PPO."""

from __future__ import annotations

from dataclasses import dataclass

from esper.runtime.errors import ConfigError, check_positive


@dataclass
class PPOConfig:
    """Proximal policy optimisation (Schulman et al., arXiv 1707.06347)."""

    total_steps: int = 64_000  # environment steps, rounded up to whole iterations
    num_steps: int = 40  # steps of each environment per iteration
    epochs: int = 4  # passes over an iteration's transitions
    minibatches: int = 4  # per pass
    lr: float = 2e-3
    anneal_lr: bool = True  # linearly to 0 over total_steps
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip: float = 0.2  # of the probability ratio
    entropy_coef: float = 0.003
    value_coef: float = 0.5
    max_grad_norm: float = 0.5
    normalize_advantages: bool = True  # per minibatch
    target_kl: float | None = None  # ends an update once a pass's mean KL is above it

    def validate(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: names the key, the value and the remedy.
        """
        names = ("total_steps", "num_steps", "epochs", "minibatches", "lr", "clip", "max_grad_norm")
        check_positive("ppo", {name: getattr(self, name) for name in names})
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"ppo.{name}={getattr(self, name)}: must lie between 0 and 1")
        for name in ("entropy_coef", "value_coef"):
            if getattr(self, name) < 0:
                raise ConfigError(f"ppo.{name}={getattr(self, name)}: must not be negative")
        if self.target_kl is not None:
            check_positive("ppo", {"target_kl": self.target_kl})
