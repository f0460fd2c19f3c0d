"""The configuration of a growth environment: dataclasses for types and checks, YAML in `conf/env` for the values."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from envs import tasks
from esper.growth import blueprints
from esper.growth.lifecycle import LifecycleSpec
from esper.growth.state import TrainingSpec
from esper.runtime.errors import ConfigError, check_positive


@dataclass
class HostConfig:
    """Architecture of the hosts; `stages` hidden layers, which is also the number of slots."""

    width: int = MISSING
    stages: int = MISSING


@dataclass
class ContextConfig:
    """Ranges [low, high] of what is drawn per episode and hidden from the controller's choice."""

    learning_rate: list[float] = MISSING  # log-uniform
    train_size: list[int] = MISSING  # log-uniform, in samples
    label_noise: list[float] = MISSING  # uniform, share of labels drawn anew


@dataclass
class RewardConfig:
    """Weights of the reward (DESIGN section 5)."""

    rent: float = 0.1  # lambda: price of the parameters kept, on a log scale
    flops: float = 0.05  # mu: price of the compute spent on seeds, culled ones included
    shaping: float = 0.0  # weight of the potential-based shaping


@dataclass
class EnvConfig:
    """One growth environment."""

    name: str = MISSING  # also the key of its references in envs/references.json
    task: str = MISSING
    num_envs: int = 32  # hosts trained side by side
    epochs: int = MISSING  # steps of an episode
    blueprints: list[str] = MISSING
    host: HostConfig = field(default_factory=HostConfig)
    training: TrainingSpec = field(default_factory=TrainingSpec)
    lifecycle: LifecycleSpec = field(default_factory=LifecycleSpec)
    context: ContextConfig = field(default_factory=ContextConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def validate(self, prefix: str = "env") -> None:
        """Checks the values.

        Raises:
            ConfigError: names the key, the value and the remedy.
        """
        check_positive(
            prefix,
            {
                "num_envs": self.num_envs,
                "epochs": self.epochs,
                "host.width": self.host.width,
                "host.stages": self.host.stages,
                "training.steps_per_epoch": self.training.steps_per_epoch,
                "training.batch_size": self.training.batch_size,
                "lifecycle.auto_ramp": self.lifecycle.auto_ramp,
            },
        )
        if self.task not in tasks.available():
            raise ConfigError(f"{prefix}.task={self.task}: no such task; choose one of {', '.join(tasks.available())}")
        for name in self.blueprints:
            if name not in blueprints.available():
                known = ", ".join(blueprints.available())
                raise ConfigError(f"{prefix}.blueprints={name}: no such blueprint; choose from {known}")
        if not self.blueprints or len(set(self.blueprints)) < len(self.blueprints):
            raise ConfigError(f"{prefix}.blueprints={self.blueprints}: name at least one, and none twice")
        pool = len(tasks.load(self.task).train_y)
        bounds = {"learning_rate": (1e-8, 1.0), "train_size": (1, pool), "label_noise": (0.0, 1.0)}
        for key, (low, high) in bounds.items():
            values = getattr(self.context, key)
            if len(values) != 2 or not low <= values[0] <= values[1] <= high:
                raise ConfigError(
                    f"{prefix}.context.{key}={values}: give [low, high] with {low} <= low <= high <= {high}"
                )


def saved_config(values: Any) -> EnvConfig:
    """The environment that a checkpoint's configuration holds as plain containers."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(EnvConfig), values))
    assert isinstance(config, EnvConfig)
    return config


def load_config(name: str, **overrides: Any) -> EnvConfig:
    """The environment called `name`, with top-level fields replaced by `overrides`.

    Raises:
        ConfigError: no such environment or a bad value.
    """
    folder = resources.files("esper.conf") / "env"
    names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if name not in names:
        raise ConfigError(f"env={name}: no such environment; choose one of {', '.join(names)}")
    values = OmegaConf.create((folder / f"{name}.yaml").read_text())
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(EnvConfig), values, overrides))
    except OmegaConfBaseException as error:
        key, reason = error.full_key, str(error).splitlines()[0]
        raise ConfigError(f"env {name}: {key}: {reason}; the keys are those of conf/env/{name}.yaml") from error
    assert isinstance(config, EnvConfig)
    config.validate()
    return config
