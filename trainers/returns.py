"""Environments that nobody here wrote: returns of the policy, and of random actions, over held-out episodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from envs.adapter import AdaptedEnv
from envs.config import BaseEnvConfig
from envs.making import make_envs
from esper.graph import GraphBatch
from esper.tamiyo.actor import Actor
from esper.tamiyo.baselines.simple import Random
from esper.tamiyo.policy import GraphPolicy
from trainers.config import EvaluationConfig
from trainers.progress import Reporter

POLICY, RANDOM = "policy", "random"
HEADINGS = ("controller", "return (mean)", "std", "lowest", "highest", "length")
LEGEND = (
    "Returns are sums of the environment's own rewards over an episode; std, lowest and highest are over the episodes,",
    "and length is their mean number of steps.",
)

Choose = Callable[[GraphBatch], torch.Tensor]


def play(
    choose: Choose,
    config: BaseEnvConfig,
    learned: dict[str, Any],
    episodes: int,
    seed: int,
    device: str,
    on_episode: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Plays held-out episodes, one for each environment; returns their `return` and `length`, [episodes] each.

    Args:
        choose: gives the actions [N] for N graphs.
        config: of the environment; `config.num_envs` episodes are played side by side.
        learned: what training has found out about the observations; it stays as it is.
        seed: episode i of a seed is the same whatever their number and how many are played side by side.
        on_episode: called with the number of episodes done.
    """
    found = {name: np.zeros(episodes) for name in ("return", "length")}
    done = 0
    for first in range(0, episodes, config.num_envs):
        count = min(config.num_envs, episodes - first)
        env = make_envs(config, count, split="heldout", autoreset=False, device=device)
        assert isinstance(env, AdaptedEnv)
        env.load_learned(learned)
        graph = env.reset(seed * 1_000_003 + torch.arange(first, first + count))
        while env.running:
            graph, _, _, _, info = env.step(choose(graph).cpu())
            if info:
                ended = info["episodes"]
                for name, values in found.items():
                    values[first + ended["env"].numpy()] = ended[name].numpy()
                done += len(ended["env"])
                on_episode(done)
        env.close()
    return found


def evaluate(
    policy: GraphPolicy,
    config: BaseEnvConfig,
    settings: EvaluationConfig,
    device: str,
    checkpoint: str,
    learned: dict[str, Any],
) -> dict[str, Any]:
    """Plays the policy and, unless `baselines=none`, random legal actions, from the same seeds; returns the report.

    The report's `controllers` map a name to its scores (episode returns) with mean, standard deviation, lowest and
    highest, and to the mean length of its episodes.
    """
    actor = Actor(policy, settings.seed, settings.deterministic)
    controllers: dict[str, Choose] = {POLICY: lambda graph: actor(graph).actions.clone()}
    if settings.baselines != "none":
        controllers[RANDOM] = Random(settings.seed).act
    report: dict[str, Any] = {
        "kind": config.kind,
        "environment": config.name,
        "checkpoint": checkpoint,
        "episodes": settings.episodes,
        "seed": settings.seed,
        "deterministic": settings.deterministic,
        "controllers": {},
    }
    with Reporter("evaluating", settings.episodes * len(controllers), "episodes") as reporter:
        for number, (name, choose) in enumerate(controllers.items()):
            base = number * settings.episodes

            def shown(done: int, base: int = base, name: str = name) -> None:
                reporter.update(base + done, name)

            played = play(choose, config, learned, settings.episodes, settings.seed, device, shown)
            scores = played["return"]
            report["controllers"][name] = {
                "mean": float(scores.mean()),
                "std": float(scores.std()),
                "lowest": float(scores.min()),
                "highest": float(scores.max()),
                "length": float(played["length"].mean()),
                "scores": [round(float(score), 6) for score in scores],
            }
    return report


def scalars(report: dict[str, Any]) -> dict[str, float]:
    """What is logged as `eval/`."""
    return {f"eval/{name}": row["mean"] for name, row in report["controllers"].items()}


def rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The report's table, best controller first."""
    names = ("mean", "std", "lowest", "highest", "length")
    ordered = sorted(report["controllers"].items(), key=lambda item: -item[1]["mean"])
    return [(name, *(f"{row[each]:.3f}" for each in names)) for name, row in ordered]


def title(report: dict[str, Any]) -> str:
    return f"{report['environment']}: {report['episodes']} held-out episodes, from the same seeds for every controller"
