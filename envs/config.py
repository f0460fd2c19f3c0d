"""The configuration of a growth environment: dataclasses for types and checks, YAML in `conf/env` for the values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from envs import tasks
from envs.contexts import ContextsConfig, check_range
from esper.growth import blueprints
from esper.growth.host import HostSpec
from esper.growth.lifecycle import LifecycleSpec
from esper.growth.state import ENGINES, TrainingSpec
from esper.runtime.errors import ConfigError, check_positive


@dataclass
class HostConfig:
    """Sizes of the hosts, drawn per episode from [low, high]; the number of stages is that of the slots."""

    width: list[int] = MISSING
    stages: list[int] = MISSING


MEASURES = ("accuracy", "loss")


@dataclass
class RewardConfig:
    """What an episode is rewarded for."""

    measure: str = "accuracy"  # improvement over the twin in validation accuracy, or in validation "loss"
    twin: bool = True  # false, for ablations: accuracy as it is, or loss against the task's ungrown host, in the mean
    rent: float = 0.1  # lambda: price of the parameters kept; accuracy: of 100 % more; loss: on a log scale
    flops: float = 0.0  # mu: price of the compute spent on seeds, culled ones included
    shaping: float = 0.0  # weight of the potential-based shaping by the loss
    foresight: bool = False  # shaping by forks: an action is paid at once what it gains if nothing is done after it


@dataclass
class BaseEnvConfig:
    """What every environment has. `kind` says which class a configuration is of, also once it is plain containers."""

    kind: str = MISSING
    name: str = MISSING  # of the folder that runs go to
    num_envs: int = MISSING  # side by side

    def validate(self, prefix: str = "env") -> None:
        """Checks the values.

        Raises:
            ConfigError: names the key, the value and the remedy.
        """
        own = type(self).kind
        if self.kind != own:
            raise ConfigError(f"{prefix}.kind={self.kind}: is {own} for this environment; choose another by env=NAME")


@dataclass
class GrowthConfig(BaseEnvConfig):
    """What all growth environments have."""

    epochs: int = MISSING  # steps of an episode
    blueprints: list[str] = MISSING
    training: TrainingSpec = field(default_factory=TrainingSpec)
    lifecycle: LifecycleSpec = field(default_factory=LifecycleSpec)

    @property
    def instances(self) -> str:
        """Which instances it draws: the key of what is tuned to them."""
        raise NotImplementedError

    def validate(self, prefix: str = "env") -> None:
        """See BaseEnvConfig."""
        super().validate(prefix)
        check_positive(
            prefix,
            {
                "num_envs": self.num_envs,
                "epochs": self.epochs,
                "training.steps_per_epoch": self.training.steps_per_epoch,
                "training.batch_size": self.training.batch_size,
                "lifecycle.auto_ramp": self.lifecycle.auto_ramp,
            },
        )
        for name in self.blueprints:
            if name not in blueprints.available():
                known = ", ".join(blueprints.available())
                raise ConfigError(f"{prefix}.blueprints={name}: no such blueprint; choose from {known}")
        if not self.blueprints or len(set(self.blueprints)) < len(self.blueprints):
            raise ConfigError(f"{prefix}.blueprints={self.blueprints}: name at least one, and none twice")


@dataclass
class EnvConfig(GrowthConfig):
    """One growth environment of a population."""

    kind: str = "growth"
    num_envs: int = 64  # hosts trained side by side
    task: str = MISSING
    dynamics: str = "trained"  # or "surrogate": epochs are drawn from a model fitted to real ones
    engine: str = "auto"  # what trains the hosts, one of ENGINES
    host: HostConfig = field(default_factory=HostConfig)
    contexts: ContextsConfig = field(default_factory=ContextsConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    @property
    def instances(self) -> str:
        """Which instances it draws, `<task>/<kind of context>`: the key of what is tuned to them."""
        kinds = [kind for kind, weight in self.contexts.mixture.weights().items() if weight > 0]
        return f"{self.task}/{kinds[0] if len(kinds) == 1 else 'mixture'}"

    def validate(self, prefix: str = "env") -> None:
        """Checks the values.

        Raises:
            ConfigError: names the key, the value and the remedy.
        """
        super().validate(prefix)
        if self.task not in tasks.available():
            raise ConfigError(f"{prefix}.task={self.task}: no such task; choose one of {', '.join(tasks.available())}")
        if self.reward.measure not in MEASURES:
            raise ConfigError(f"{prefix}.reward.measure={self.reward.measure}: choose one of {', '.join(MEASURES)}")
        if self.reward.foresight and self.reward.shaping:
            raise ConfigError(
                f"{prefix}.reward.shaping={self.reward.shaping}: must be 0 with {prefix}.reward.foresight"
            )
        if self.engine not in ENGINES:
            raise ConfigError(f"{prefix}.engine={self.engine}: no such engine; choose one of {', '.join(ENGINES)}")
        data = tasks.load(self.task)
        check_range(f"{prefix}.host.width", self.host.width, 1, 4096)
        check_range(f"{prefix}.host.stages", self.host.stages, 1, 64)
        self.contexts.validate(f"{prefix}.contexts", len(data.train_y))
        site = host_spec(self).site
        if not any(blueprints.get(name).fits(site) for name in self.blueprints):
            raise ConfigError(
                f"{prefix}.blueprints={self.blueprints}: none of them fits a host of {site.tokens} token(s); add mlp"
            )


def host_spec(config: EnvConfig) -> HostSpec:
    """The architecture with room for every host that `config` can draw."""
    data = tasks.load(config.task)
    width = config.host.width[1]
    if config.contexts.mixture.growth:
        width = max(width, config.contexts.growth.width[1])
    return HostSpec(
        inputs=data.train_x.shape[2],
        classes=data.classes,
        width=width,
        stages=config.host.stages[1],
        grid=data.grid,
        causal=data.causal,
        per_token=data.train_y.dim() > 1,
    )


def saved_config(values: Any) -> EnvConfig:
    """The environment that a checkpoint's configuration holds as plain containers."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(EnvConfig), values))
    assert isinstance(config, EnvConfig)
    return config


def load_config(name: str, contexts: str | None = None, **overrides: Any) -> EnvConfig:
    """The environment of populations called `name`.

    Args:
        name: a file of `conf/env`.
        contexts: a file of `conf/env/contexts`; default: the one that the environment names.
        overrides: top-level fields that replace those of the file.

    Raises:
        ConfigError: no such environment or contexts, or a bad value.
    """
    config = load_any({EnvConfig.kind: EnvConfig}, name, contexts, **overrides)
    assert isinstance(config, EnvConfig)
    return config


def load_any(
    kinds: Mapping[str, type[BaseEnvConfig]], name: str, contexts: str | None = None, **overrides: Any
) -> BaseEnvConfig:
    """As `load_config`, of any of the `kinds` (kind -> class).

    Raises:
        ConfigError: no such environment or contexts, one of another kind, or a bad value.
    """
    folder = resources.files("esper.conf") / "env"
    values = _read(folder, "env", name)
    defaults = list(values.pop("defaults"))
    schema = str(defaults[0]).removeprefix("/").split("_schema")[0]
    if schema not in kinds:
        raise ConfigError(f"env={name}: is of the kind {schema}; choose one of the kind {' or '.join(kinds)}")
    drawn = [entry["contexts"] for entry in defaults if isinstance(entry, Mapping)]
    if contexts and not drawn:
        raise ConfigError(f"env/contexts={contexts}: env={name} has none")
    named = {"contexts": _read(folder / "contexts", "env/contexts", contexts or drawn[0])} if drawn else {}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kinds[schema]), named, values, overrides)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key, reason = error.full_key, str(error).splitlines()[0]
        raise ConfigError(f"env {name}: {key}: {reason}; the keys are those of conf/env/{name}.yaml") from error
    assert isinstance(config, BaseEnvConfig)
    config.validate()
    return config


def _read(folder: Traversable, group: str, name: str) -> DictConfig:
    names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if name not in names:
        raise ConfigError(f"{group}={name}: no such option; choose one of {', '.join(names)}")
    values = OmegaConf.create((folder / f"{name}.yaml").read_text())
    assert isinstance(values, DictConfig)
    return values
