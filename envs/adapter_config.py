"""The configuration of environments that nobody here wrote, and how their failures are told in one line."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from envs.config import BaseEnvConfig
from esper.runtime.errors import ConfigError, check_positive


@dataclass
class GymConfig(BaseEnvConfig):
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
        _check(self, prefix, GymConfig.kind)


@dataclass
class HeteroConfig(BaseEnvConfig):
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
        _check(self, prefix, HeteroConfig.kind)
        module, _, factory = self.target.partition(":")
        if not module or not factory:
            raise ConfigError(f"{prefix}.target={self.target}: must be of the form package.module:factory")


def _check(config: BaseEnvConfig, prefix: str, kind: str) -> None:
    if config.kind != kind:
        raise ConfigError(f"{prefix}.kind={config.kind}: is {kind} for this environment; choose another by env=NAME")
    check_positive(prefix, {"num_envs": config.num_envs})


def failure(error: Exception) -> str:
    """What went wrong and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}{where}"
