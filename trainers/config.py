"""The configuration of the entry points: dataclasses give types and defaults, YAML in `conf/` gives values."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from envs.config import BaseEnvConfig, EnvConfig, GrowthConfig
from envs.making import CONFIGS
from esper.attention import selection
from esper.runtime import launch, precision
from esper.runtime.compiled import CompileGuard
from esper.runtime.distributed import launched
from esper.runtime.errors import ConfigError, check_positive
from esper.simic.config import PPOConfig
from esper.tamiyo import baselines
from esper.tamiyo.baselines import BaselinesConfig
from esper.tamiyo.policy import PolicyConfig

LAUNCH_FILE = "launch"
"""In a run directory: `launch.identity()` of the launch that began it."""


@dataclass
class RuntimeConfig:
    """Where and how it runs."""

    device: str = "cpu"
    threads: int = 1  # of torch, per process
    precision: str = "fp32"  # of the policy's matrix products: fp32, bf16 or fp16
    compile: bool = True  # the actor and the update step by torch.compile
    cuda_graphs: bool = False  # capture them
    actor_device: str | None = None  # where the actor runs; None: on `device`
    attention: str = selection.AUTO  # backend of attention: one of attention.BACKENDS or its aliases
    patience_s: float = 600.0  # that the processes of a run wait for each other

    def validate(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: names the key, the value and the remedy.
        """
        check_positive("runtime", {"threads": self.threads, "patience_s": self.patience_s})
        precision.check(self.precision)
        selection.checked(self.attention, "config")
        for name in ("device", "actor_device"):
            device = getattr(self, name)
            try:
                torch.zeros(1, device=device)
            except (RuntimeError, AssertionError) as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(f"runtime.{name}={device}: {reason}; try runtime.{name}=cpu") from error
        if self.cuda_graphs and torch.device(self.device).type != "cuda":
            raise ConfigError(f"runtime.cuda_graphs=true: needs runtime.device=cuda, not {self.device}")
        if self.cuda_graphs and not self.compile:
            raise ConfigError("runtime.cuda_graphs=true: needs runtime.compile=true")

    def set_up(self) -> None:
        """Sets how this process calculates; once, when it starts."""
        precision.set_up(self.device, self.threads)
        selection.configure(self.attention)

    def guard(self, name: str, device: str) -> CompileGuard:
        """Of what is called `name` and runs on `device`."""
        why_not = None
        if not self.compile:
            why_not = "runtime.compile=false"
        elif torch.device(device).type not in ("cpu", "cuda"):
            why_not = f"device {device}"
        return CompileGuard(name, why_not, self.cuda_graphs)


@dataclass
class CheckpointConfig:
    """When checkpoints are saved, besides the end of the run."""

    every: int = 10  # iterations
    every_seconds: float = 300.0  # also when that long has passed
    keep: int = 3  # newest files


@dataclass
class EvaluationConfig:
    """Evaluation on held-out instances; the instances depend on `seed` alone, so controllers are compared in pairs."""

    episodes: int = 64  # per controller; 0 skips the evaluation after training
    seed: int = 0
    deterministic: bool = True  # Tamiyo's most probable action instead of a sample
    baselines: Any = "all"  # "all", "none", or a list of names
    controllers: BaselinesConfig = field(default_factory=BaselinesConfig)  # knobs of the baselines

    def names(self, instances: str, prefix: str = "") -> list[str]:
        """The chosen baselines for an environment with those instances; "all" leaves out what has not been fitted.

        Raises:
            ConfigError: one is unknown.
        """
        if self.baselines in ("all", "none"):
            return list(baselines.usable(instances)) if self.baselines == "all" else []
        chosen = [self.baselines] if isinstance(self.baselines, str) else list(self.baselines)
        for name in chosen:
            if name not in baselines.NAMES:
                known = ", ".join(baselines.NAMES)
                raise ConfigError(f"{prefix}baselines={name}: no such baseline; choose all, none, or from {known}")
        return chosen

    def validate(self, env: BaseEnvConfig, prefix: str) -> None:
        """Checks the values against an environment.

        Raises:
            ConfigError: names the key, the value and the remedy.
        """
        if self.episodes < 0:
            raise ConfigError(f"{prefix}episodes={self.episodes}: must not be negative")
        if not isinstance(env, GrowthConfig):
            names = [self.baselines] if isinstance(self.baselines, str) else self.baselines
            for name in names:
                if name not in ("all", "none", "random"):
                    raise ConfigError(
                        f"{prefix}baselines={name}: the only baseline of this environment is random; choose all or none"
                    )
            return
        self.controllers.validate(list(env.blueprints), f"{prefix}controllers")
        for name in self.names(env.instances, prefix):
            baselines.make(name, self.controllers, env.instances, list(env.blueprints), self.seed)


@dataclass
class WarmStartConfig:
    """Regression on what single actions gain, before PPO."""

    episodes: int = 0  # random episodes in which actions are tried on forks; 0: no warm start
    tried: int = 4  # actions at each decision
    epochs: int = 8  # passes over the decisions
    batch_size: int = 128  # decisions
    lr: float = 2e-3  # highest of one cycle
    huber: float | None = 0.02  # return; errors above it count by their size; null: all by their square
    temperature: float = 0.005  # return by which a prediction must be larger for the action to be e times as probable
    caution: float = 8.0  # added to the logit of WAIT

    def validate(self, env: BaseEnvConfig) -> None:
        """Checks the values against an environment.

        Raises:
            ConfigError: names the key, the value and the remedy.
        """
        if self.episodes < 0:
            raise ConfigError(f"warm_start.episodes={self.episodes}: must not be negative")
        if self.episodes:
            if not isinstance(env, EnvConfig):
                raise ConfigError(
                    f"warm_start.episodes={self.episodes}: env={env.name} has no hosts to fork; set it to 0"
                )
            if env.epochs < 3:
                raise ConfigError(f"env.epochs={env.epochs}: a warm start needs at least 3; set warm_start.episodes=0")
        names = ("tried", "epochs", "batch_size", "lr", "temperature")
        check_positive("warm_start", {name: getattr(self, name) for name in names})
        if self.huber is not None:
            check_positive("warm_start", {"huber": self.huber})


@dataclass
class TrainConfig:
    """`python -m trainers.train`."""

    seed: int = 1
    output_dir: str = "runs"
    resume: str | None = None
    # a run directory, checkpoint file or shipped policy that PPO starts from, without a warm start
    init: str | None = None
    env: BaseEnvConfig = field(default_factory=BaseEnvConfig)  # of the class that conf/env names
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def validate(self) -> None:
        """Checks all values.

        Raises:
            ConfigError: names the key, the value and the remedy.
        """
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must not be negative")
        self.env.validate()
        self.policy.validate()
        self.warm_start.validate(self.env)
        self.ppo.validate()
        self.runtime.validate()
        check_positive("checkpoint", vars(self.checkpoint))
        self.evaluation.validate(self.env, "evaluation.")
        transitions = self.ppo.num_steps * self.env.num_envs
        if self.ppo.minibatches > transitions:
            raise ConfigError(
                f"ppo.minibatches={self.ppo.minibatches}: more than the ppo.num_steps * env.num_envs = {transitions} "
                "transitions of an iteration"
            )
        if self.ppo.starts > 1 and self.ppo.total_steps < self.ppo.starts * transitions:
            raise ConfigError(
                f"ppo.starts={self.ppo.starts}: ppo.total_steps={self.ppo.total_steps} does not give each an iteration "
                f"of ppo.num_steps * env.num_envs = {transitions}; use more steps or fewer starts"
            )


@dataclass
class EvaluateConfig(EvaluationConfig):
    """`python -m trainers.evaluate`."""

    checkpoint: str = MISSING  # a run directory, a checkpoint file, or a shipped policy
    env: BaseEnvConfig | None = None  # another environment; default: the one it was trained on
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass
class ExportConfig:
    """`python -m trainers.export`."""

    checkpoint: str = MISSING  # a run directory, a checkpoint file, or a shipped policy
    format: str = "torch_export"  # or onnx
    out: str = MISSING  # the file to write


@dataclass
class BenchmarkSettings:
    """What a benchmark measures, and how often."""

    tasks: list[str] = field(default_factory=lambda: ["digits", "digits_conv"])  # files of conf/env
    hosts: int = 32  # trained together
    hosts_one_by_one: int = 8  # of these, also trained one by one
    sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])  # numbers of hosts that are compared
    repeats: int = 15
    size_repeats: int = 3  # of `sizes`
    warmup: int = 2  # repeats that do not count
    clock: str = "wall"  # wall, or cpu: the process's own time, for a busy machine
    policies: list[str] = field(default_factory=lambda: ["tamiyo_small", "tamiyo"])  # files of conf/policy
    graphs: list[int] = field(default_factory=lambda: [32, 256])  # batches that are encoded
    compile: bool = True  # also the compiled encoder
    large: list[int] = field(default_factory=lambda: [1_000, 10_000, 100_000])  # nodes of single graphs
    rows: list[int] = field(default_factory=lambda: [1_000, 100_000, 1_000_000])  # that are pooled
    iterations: int = 5  # of training, end to end
    processes: list[int] = field(default_factory=lambda: [1, 2])  # that train together


@dataclass
class BenchmarkConfig:
    """`python -m trainers.benchmark`."""

    suite: str = "env"
    seed: int = 0
    out: str = MISSING  # the file to write
    compare: str | None = None  # an earlier report, whose suite and settings are measured again and compared with it
    against: str | None = None  # a second report to compare with it, instead of measuring
    tolerance: float = 0.1  # relative change of a ratio, beyond which it is called better or worse
    strict: bool = False  # exit code 3 where a ratio is worse
    benchmark: BenchmarkSettings = field(default_factory=BenchmarkSettings)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def validate(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: names the key, the value and the remedy.
        """
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must not be negative")
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"tolerance={self.tolerance}: must lie between 0 and 1")
        if self.compare is None and self.against is not None:
            raise ConfigError(f"against={self.against}: needs compare=REPORT.json, the report that comes first")
        if self.compare is None and self.strict:
            raise ConfigError("strict=true: needs compare=REPORT.json")
        self.runtime.validate()
        s = self.benchmark
        check_positive(
            "benchmark", {name: getattr(s, name) for name in ("hosts", "repeats", "size_repeats", "iterations")}
        )
        if not 1 <= s.hosts_one_by_one <= s.hosts:
            raise ConfigError(
                f"benchmark.hosts_one_by_one={s.hosts_one_by_one}: must be from 1 to {s.hosts}, all hosts"
            )
        if s.warmup < 0:
            raise ConfigError(f"benchmark.warmup={s.warmup}: must not be negative")
        if any(n < 1 for n in s.sizes):
            raise ConfigError(f"benchmark.sizes={s.sizes}: numbers of hosts must be above 0")
        if s.clock not in ("wall", "cpu"):
            raise ConfigError(f"benchmark.clock={s.clock}: choose wall or cpu")
        if s.clock == "cpu" and self.runtime.device != "cpu":
            raise ConfigError(f"benchmark.clock=cpu: does not see what runs on {self.runtime.device}; choose wall")
        lists = {"graphs": s.graphs, "large": s.large, "rows": s.rows, "processes": s.processes}
        for name, sizes in lists.items():
            if any(n < 1 for n in sizes):
                raise ConfigError(f"benchmark.{name}={sizes}: sizes must be above 0")
        for name in s.policies:
            load_policy(name)
        if not s.tasks:
            raise ConfigError("benchmark.tasks=[]: name at least one file of conf/env")


def load_policy(name: str) -> PolicyConfig:
    """The policy called `name`.

    Raises:
        ConfigError: no such file of `conf/policy`.
    """
    folder = resources.files("esper.conf") / "policy"
    known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if name not in known:
        raise ConfigError(f"benchmark.policies={name}: no such policy; choose from {', '.join(known)}")
    values = OmegaConf.create((folder / f"{name}.yaml").read_text())
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PolicyConfig), values))
    assert isinstance(config, PolicyConfig)
    return config


def register() -> None:
    """Makes the schemas known to Hydra."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    for kind in CONFIGS.values():
        store.store(name=f"{kind.kind}_schema", node=kind)
    store.store(name="benchmark_schema", node=BenchmarkConfig)
    store.store(name="export_schema", node=ExportConfig)


def _run_dir(resume: str | None, output_dir: str, name: str, now: str) -> str:
    """The run directory, which the first of several processes chooses: that of the resumed run, that of the launch if
    it has been restarted, or a new one under `output_dir`."""

    def chosen() -> str:
        if resume:
            return str(existing_run(resume))
        folder, number = Path(output_dir) / name, 1
        if launch.restarts() and (begun := _launched_run(folder)):
            return str(begun)
        path = folder / now
        while path.exists():
            number += 1
            path = path.with_name(f"{now}_{number}")
        return str(path)

    return launched().told("run_dir", chosen)


def _launched_run(folder: Path) -> Path | None:
    """The newest run that this launch has begun."""
    found = [path for path in folder.glob(f"*/{LAUNCH_FILE}") if path.read_text() == launch.identity()]
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


def _output_subdir(resume: str | None) -> str | None:
    """Where Hydra keeps what it was given, which is alike in all processes."""
    if launch.rank():
        return None
    return ".hydra_resume" if resume else ".hydra"


def _study(output_dir: str, name: str) -> str:
    """The database of the study called `name`, which is the same whenever its sweep is started."""
    folder = Path(output_dir).resolve() / name
    folder.mkdir(parents=True, exist_ok=True)  # SQLite makes no folders
    return f"sqlite:///{folder / 'study.db'}"


# Here, since the processes in which a sweep's launcher runs jobs import this module but do not call `register`.
OmegaConf.register_new_resolver("esper.run_dir", _run_dir, use_cache=True, replace=True)
OmegaConf.register_new_resolver("esper.study", _study, replace=True)
OmegaConf.register_new_resolver("esper.output_subdir", _output_subdir, replace=True)


def existing_run(given: str) -> Path:
    """The run directory that the user named.

    Raises:
        ConfigError: it does not exist or is no run directory.
    """
    path = Path(given)
    if not path.is_dir():
        raise ConfigError(f"resume={given}: no such directory; give the run directory that training printed")
    if not (path / "checkpoints").is_dir():
        raise ConfigError(f"resume={given}: not a run directory of Esper's (it has no checkpoints folder)")
    return path.resolve()


def to_train_config(config: DictConfig) -> TrainConfig:
    """The typed, resolved and checked configuration.

    Raises:
        ConfigError: names the key, the value and the remedy.
    """
    typed = OmegaConf.to_object(config)
    assert isinstance(typed, TrainConfig)
    typed.validate()
    return typed
