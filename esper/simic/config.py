"""Settings of PPO."""

from __future__ import annotations

from dataclasses import dataclass

from esper.runtime.errors import ConfigError, check_positive

LR_SCHEDULES = ("linear", "adaptive", "constant")


@dataclass
class PPOConfig:
    """Proximal policy optimisation (Schulman et al., arXiv 1707.06347)."""

    total_steps: int = 320_000  # environment steps, rounded up to whole iterations
    starts: int = 1  # from the same policy, each with its share of total_steps; the one that ends best is kept
    num_steps: int = 48  # steps of each environment per iteration
    epochs: int = 3  # passes over an iteration's transitions
    minibatches: int = 8  # per pass
    lr: float = 1e-3
    lr_schedule: str = (
        "linear"  # linear: to 0 over the steps of a start; adaptive: so that a pass's KL is near desired_kl; constant
    )
    desired_kl: float = 0.01  # of the adaptive learning rate (arXiv 2109.11978)
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip: float = 0.2  # of the probability ratio
    clip_final: float | None = None  # the clip moves to it linearly over a start; None: constant
    value_clip: float | None = None  # of a value around the old one (arXiv 2005.12729); None: no clipping
    entropy_coef: float = 0.003
    entropy_final: float | None = None  # the coefficient moves to it linearly over a start; None: constant
    value_coef: float = 0.5
    critic_first: float = 0.0  # share of a start in which only the value head learns, for a policy that is trained
    auxiliary_coef: float = 0.0  # of predicting each slot's contribution one step ahead
    max_grad_norm: float = 0.5
    normalize_advantages: bool = True  # per minibatch
    normalize_returns: bool = True  # the critic predicts returns of zero mean and unit variance (arXiv 2103.01955)
    target_kl: float | None = None  # ends an update once a pass's mean KL is above it

    def validate(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: names the key, the value and the remedy.
        """
        steps = ("total_steps", "starts", "num_steps", "epochs", "minibatches")
        names = (*steps, "lr", "clip", "max_grad_norm", "desired_kl")
        check_positive("ppo", {name: getattr(self, name) for name in names})
        if self.lr_schedule not in LR_SCHEDULES:
            raise ConfigError(f"ppo.lr_schedule={self.lr_schedule}: choose one of {', '.join(LR_SCHEDULES)}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"ppo.{name}={getattr(self, name)}: must lie between 0 and 1")
        if not 0 <= self.critic_first < 1:
            raise ConfigError(f"ppo.critic_first={self.critic_first}: must be at least 0 and below 1")
        for name in ("entropy_coef", "entropy_final", "value_coef", "auxiliary_coef"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"ppo.{name}={getattr(self, name)}: must not be negative")
        for name in ("target_kl", "value_clip", "clip_final"):
            if getattr(self, name) is not None:
                check_positive("ppo", {name: getattr(self, name)})
