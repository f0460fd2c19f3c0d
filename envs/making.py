"""From a configuration to environments of whichever kind."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import OmegaConf

from envs.adapter import AdaptedEnv
from envs.adapter_config import GymConfig, HeteroConfig
from envs.config import BaseEnvConfig, EnvConfig, GrowthConfig, load_any
from envs.growth_env import GrowthEnv
from envs.gym import GymEnv
from envs.hetero import HeteroEnv
from envs.super_resolution import SuperResolutionConfig, SuperResolutionEnv
from esper.runtime.errors import ConfigError

CONFIGS: dict[str, type[BaseEnvConfig]] = {
    each.kind: each for each in (EnvConfig, SuperResolutionConfig, GymConfig, HeteroConfig)
}
"""kind -> class of the configuration"""


def make_envs(
    config: BaseEnvConfig,
    num_envs: int,
    split: str = "train",
    autoreset: bool = True,
    device: torch.device | str = "cpu",
) -> GrowthEnv | SuperResolutionEnv | AdaptedEnv:
    """N environments side by side; see GrowthEnv and AdaptedEnv for the arguments.

    Raises:
        ConfigError: environments that nobody here wrote could not be made; the message says why.
    """
    if isinstance(config, GymConfig):
        return GymEnv(config, num_envs, split, autoreset, device)
    if isinstance(config, HeteroConfig):
        return HeteroEnv(config, num_envs, split, autoreset, device)
    if isinstance(config, SuperResolutionConfig):
        return SuperResolutionEnv(config, num_envs, split, autoreset, device)
    assert isinstance(config, EnvConfig)
    return GrowthEnv(config, num_envs, split, autoreset, device)


def make_growth(
    name: str, num_envs: int, split: str, autoreset: bool, **overrides: Any
) -> GrowthEnv | SuperResolutionEnv:
    """N environments of a file of `conf/env`; see `envs.config.load_any` and GrowthEnv.

    Raises:
        ConfigError: no such environment, one in which nothing grows, or a bad value.
    """
    kinds = {kind: each for kind, each in CONFIGS.items() if issubclass(each, GrowthConfig)}
    env = make_envs(load_any(kinds, name, **overrides), num_envs, split, autoreset)
    assert not isinstance(env, AdaptedEnv)
    return env


def saved_env_config(values: dict[str, Any]) -> BaseEnvConfig:
    """The environment that a checkpoint's configuration holds as plain containers.

    Raises:
        ConfigError: of a kind that this version does not know.
    """
    kind = values.get("kind", EnvConfig.kind)
    if kind not in CONFIGS:
        raise ConfigError(f"env.kind={kind}: no such kind of environment; choose one of {', '.join(CONFIGS)}")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CONFIGS[kind]), values))
    assert isinstance(config, BaseEnvConfig)
    return config
