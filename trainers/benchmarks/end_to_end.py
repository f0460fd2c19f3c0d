"""The suite `end_to_end`: whole training iterations against Stable-Baselines3's MaskablePPO with a PyG policy."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from envs.config import load_config
from esper.graph import GraphBatch
from esper.runtime.errors import ConfigError
from esper.runtime.telemetry import Telemetry
from esper.simic.config import PPOConfig
from esper.tamiyo.actor import Actor, Decision
from esper.tamiyo.encoder import masked_mean
from esper.tamiyo.encoders.pyg import PyGEncoder
from esper.tamiyo.policy import Tamiyo
from trainers.benchmarks import Report, suite
from trainers.benchmarks.rows import Row, content, table
from trainers.config import BenchmarkConfig, TrainConfig, load_policy
from trainers.loop import Trainer
from trainers.progress import Reporter

_REFERENCE = "MaskablePPO"


def _extractor() -> type[nn.Module]:
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

    class Extractor(BaseFeaturesExtractor):
        """PyG's encoder on the padded Dict observation: the global embedding beside the mean of the slots'."""

        def __init__(self, space: gymnasium.spaces.Dict, policy: Tamiyo):
            super().__init__(space, 2 * policy.config.hidden[-1])
            self.encoder = PyGEncoder(policy.encoder.shape)

        def forward(self, observation: dict[str, Tensor]) -> Tensor:
            # Stable-Baselines3 hands out floats only.
            indices = {k: v.long() for k, v in observation.items() if k.startswith(("source__", "target__"))}
            graph = GraphBatch.from_dict({**observation, **indices})
            x = self.encoder(graph)
            return torch.cat([x["global"][:, 0], masked_mean(x["slot"], graph.node_mask["slot"])], dim=1)

    return Extractor


def _sb3(config: TrainConfig, name: str) -> Callable[[], object]:
    """One iteration of MaskablePPO on `name` with the same numbers of environments, steps, passes and minibatches."""
    try:
        from sb3_contrib import MaskablePPO
        from stable_baselines3.common.env_util import make_vec_env
    except ImportError as error:
        raise ConfigError(f"suite=end_to_end: {error}; install it with: pip install -e '.[dev]'") from error

    ppo, hosts, width = config.ppo, config.env.num_envs, config.policy.hidden[-1]
    environments = make_vec_env(lambda: gymnasium.make(f"envs:esper/{name}-v0"), n_envs=hosts, seed=config.seed)
    agent = MaskablePPO(
        "MultiInputPolicy",
        environments,
        learning_rate=ppo.lr,
        n_steps=ppo.num_steps,
        batch_size=ppo.num_steps * hosts // ppo.minibatches,
        n_epochs=ppo.epochs,
        gamma=ppo.gamma,
        gae_lambda=ppo.gae_lambda,
        clip_range=ppo.clip,
        ent_coef=ppo.entropy_coef,
        seed=config.seed,
        policy_kwargs={
            "features_extractor_class": _extractor(),
            "features_extractor_kwargs": {"policy": Tamiyo(config.policy)},
            "net_arch": [width],
        },
    )
    return lambda: agent.learn(ppo.num_steps * hosts, reset_num_timesteps=False)


class _Watch:
    """Adds up the seconds within calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def over(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, watched."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return timed


class _WatchedActor(Actor):
    """The trainer's actor, with its calls watched."""

    def __init__(self, actor: Actor, watch: _Watch):
        vars(self).update(vars(actor))
        self._decided = watch.over("actor", actor)
        self._valued = watch.over("actor", actor.value)

    def __call__(self, graph: GraphBatch) -> Decision:
        return self._decided(graph)

    def value(self, graph: GraphBatch) -> Tensor:
        return self._valued(graph)


def _watched(trainer: Trainer, watch: _Watch) -> None:
    trainer.actor = _WatchedActor(trainer.actor, watch)
    for name, owner, method in (("environment", trainer.env, "step"), ("update", trainer.learner, "update")):
        setattr(owner, method, watch.over(name, getattr(owner, method)))


def _first_update(directory: str) -> float:
    """Seconds from the start of the command to the end of a run of one iteration."""
    overrides = ["env=segment", "ppo.total_steps=1", "evaluation.episodes=0", f"output_dir={directory}"]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "trainers.train", *overrides], check=True, capture_output=True)
    return time.perf_counter() - start


@suite("end_to_end")
def run(config: BenchmarkConfig) -> Report:
    """Whole iterations of training on Segment-v0, in turns."""
    settings, watch = config.benchmark, _Watch()
    train = TrainConfig(
        seed=config.seed + 1,
        env=load_config("segment", num_envs=settings.hosts),
        policy=load_policy(settings.policies[0]),
        ppo=PPOConfig(total_steps=10**9),
        runtime=config.runtime,
    )
    steps = train.ppo.num_steps * settings.hosts
    case = f"iteration of {steps:,} steps on Segment-v0"
    times: dict[str, list[float]] = {"esper": [], _REFERENCE: []}
    with (
        tempfile.TemporaryDirectory() as directory,
        Reporter("benchmark", settings.iterations + 1, "iterations of each") as reporter,
    ):
        trainer, telemetry = Trainer(train, Path(directory)), Telemetry(Path(directory))
        trainer.actor.warm_up(trainer.graph)
        _watched(trainer, watch)

        def iterate() -> None:
            telemetry.log(trainer.step, trainer.iterate())

        variants: dict[str, Callable[[], object]] = {"esper": iterate, _REFERENCE: _sb3(train, "Segment")}
        for number in range(settings.iterations + 1):  # the first one, which compiles, does not count
            for name, one in variants.items():
                if number == 1 and name == "esper":
                    watch.seconds.clear()
                start = time.perf_counter()
                one()
                if number:
                    times[name].append(1e3 * (time.perf_counter() - start))
            reporter.update(number + 1, case)
        telemetry.close()
        first = _first_update(directory)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    rows = [
        Row(
            "end_to_end",
            case,
            name,
            medians[name],
            float(np.percentile(values, 95)),
            0.0,
            medians[_REFERENCE] / medians[name],
            reference=_REFERENCE,
            ms=values,
        )
        for name, values in times.items()
    ]
    whole = sum(times["esper"]) / 1e3
    shares = {name: seconds / whole for name, seconds in watch.seconds.items()}
    found = {
        "steps_per_second": {name: 1e3 * steps / median for name, median in medians.items()},
        "shares_of_wall_time": {**shares, "everything else": 1 - sum(shares.values())},
        "whole_run_of_one_iteration_s": first,
    }
    return Report(content(rows) | found, [table(rows, "Training, end to end"), _summary(found)])


def _summary(found: dict[str, Any]) -> Table:
    result = Table("what", "value", box=box.SIMPLE_HEAD, title="Where the time goes", title_justify="left")
    for name, value in found["steps_per_second"].items():
        result.add_row(f"{name}, environment steps per second", f"{value:,.0f}")
    for name, share in found["shares_of_wall_time"].items():
        result.add_row(f"share of {name}", f"{share:.1%}")
    result.add_row(
        "start of the command to the end of its first iteration, warm cache",
        f"{found['whole_run_of_one_iteration_s']:.1f} s",
    )
    return result
