"""The configuration of environments that nobody here wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from envs.config import BaseEnvConfig
from esper.runtime.errors import ConfigError, check_positive


@dataclass
class ProcessConfig:
    """Where environments live; beside BaseEnvConfig, whose direct subclasses are the kinds of environments."""

    subprocess: bool = False  # each environment in a process of its own, side by side
    timeout_s: float = 60.0  # how long an answer of such a process may take


@dataclass
class GymConfig(ProcessConfig, BaseEnvConfig):
    """A Gymnasium environment with flat observations."""

    kind: str = "gym"
    name: str = "gym"
    num_envs: int = 8
    id: str = MISSING  # Gymnasium's; `module:id` imports the module first
    normalize: bool = False  # observations by their running mean and standard deviation
    kwargs: dict[str, Any] = field(default_factory=dict)  # of gymnasium.make

    def validate(self, prefix: str = "env") -> None:
        """Checks the values; whether there is such an environment shows when it is made.

        Raises:
            ConfigError: names the key, the value and the remedy.
        """
        _check(self, prefix)


@dataclass
class HeteroConfig(ProcessConfig, BaseEnvConfig):
    """An environment whose observations are PyG's HeteroData."""

    kind: str = "hetero"
    name: str = "hetero"
    num_envs: int = 8
    target: str = MISSING  # package.module:factory
    action_node: str | None = None  # type of the node that an action chooses; null: Discrete actions
    reverse: bool = True  # also every relation in the other direction, as rev_<name>
    kwargs: dict[str, Any] = field(default_factory=dict)  # of the factory

    def validate(self, prefix: str = "env") -> None:
        """Checks the values; whether the factory works shows when it is called.

        Raises:
            ConfigError: names the key, the value and the remedy.
        """
        _check(self, prefix)
        module, _, factory = self.target.partition(":")
        if not module or not factory:
            raise ConfigError(f"{prefix}.target={self.target}: must be of the form package.module:factory")


def _check(config: GymConfig | HeteroConfig, prefix: str) -> None:
    BaseEnvConfig.validate(config, prefix)
    check_positive(prefix, {"num_envs": config.num_envs, "timeout_s": config.timeout_s})
