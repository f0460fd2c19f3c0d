"""What TensorBoard shows of a run besides its curves: how they are laid out, what the run is, and how it ended."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch_geometric

import esper
from envs.config import BaseEnvConfig, EnvConfig, GrowthConfig
from esper.runtime.telemetry import Layout
from trainers.config import TrainConfig

LAYOUT: Layout = {
    "Learning": {
        "return of an episode": ["rollout/ep_rew_mean$"],
        "held-out instances": ["eval/.+"],
        "entropy": ["train/entropy_loss$"],
        "change of the policy": ["train/approx_kl$", "train/clip_fraction$"],
        "critic": ["train/explained_variance$"],
        "terms of the loss": ["train/(policy_gradient|value|auxiliary)_loss$", "train/loss$"],
        "learning rate": ["train/learning_rate$"],
    },
    "Growth": {
        "actions in an episode": ["growth/germinated$", "growth/fossilized$", "growth/culled$"],
        "size of the grown host": ["growth/params_ratio$"],
        "epochs of an episode": ["rollout/ep_len_mean$"],
    },
    "Speed": {
        "environment steps per second": ["time/fps$"],
        "seconds of an iteration": ["perf/collect_s$", "perf/update_s$", "perf/checkpoint_s$"],
        "milliseconds of a decision": [r"tamiyo\.gnn\.inference\.latency_ms$", "perf/graph_build_ms$"],
        "graphs per second": ["perf/graphs_per_s$"],
        "backends of attention": ["attention/.+/.+"],
    },
    "Health": {
        "gradient norm": ["grad/norm$"],
        "hosts that diverged": ["growth/diverged$"],
        "compilation": ["perf/recompiles$", r"tamiyo\.gnn\.compile_(enabled|fallback_total)$"],
        "steps left out": ["amp/skipped_steps$"],
        "scale of the loss": ["amp/scale$"],
        "compiled attention": ["attention/(hits|misses|evictions)$"],
    },
}
"""Every chart, by category; docs/metrics.md says what the scalars mean. Charts whose scalars a run lacks stay empty."""


def card(config: TrainConfig, run_dir: Path, step: int, overrides: Sequence[str], parameters: int) -> str:
    """What the run is, in Markdown.

    Args:
        config: of the run.
        run_dir: its directory.
        step: environment steps done so far.
        overrides: of this call's command line.
        parameters: of the policy.
    """
    env, ppo = config.env, config.ppo
    given = " ".join(f"`{override}`" for override in overrides) or "none"
    rows = {
        "trained": f"{config.policy.encoder} policy, {parameters:,} parameters, layers {config.policy.hidden}",
        "on": f"`{env.name}`: {_hosts(env)}, {env.num_envs} side by side",
        "steps": f"{step:,} done of {ppo.total_steps:,}, {ppo.num_steps * env.num_envs:,} in an iteration",
        "overrides": given,
        "seed": str(config.seed),
        "starts from": f"`{config.init}`" if config.init else "scratch",
        "runs on": f"{config.runtime.device}, {config.runtime.precision}, {config.runtime.threads} thread(s)",
        "versions": ", ".join(f"{name} {number}" for name, number in _versions().items()),
    }
    first, *others = (f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items())
    table = [first, "|---|---|", *others]
    commands = [
        f"python -m trainers.train resume={run_dir}",
        f"python -m trainers.evaluate checkpoint={run_dir} baselines=all episodes=256",
    ]
    return "\n".join([*table, "", "Go on with it, and evaluate it:", "", *(f"    {line}" for line in commands), ""])


def settings(config: TrainConfig) -> dict[str, Any]:
    """Everything that distinguishes runs, by key: what is trained on what, and how."""
    whole = asdict(config)
    kept = {name: whole[name] for name in ("env", "policy", "ppo", "warm_start", "seed", "init")}
    kept["runtime"] = {name: whole["runtime"][name] for name in ("device", "precision")}
    return dict(_leaves(kept))


def _hosts(env: BaseEnvConfig) -> str:
    if isinstance(env, EnvConfig):
        return f"hosts of {env.host.stages} stages of {env.host.width} units that are trained on {env.task}"
    return "growing networks" if isinstance(env, GrowthConfig) else f"an environment behind the adapter `{env.kind}`"


def _versions() -> dict[str, str]:
    return {
        "Esper": esper.__version__,
        "PyTorch": str(torch.__version__),
        "PyTorch Geometric": torch_geometric.__version__,
        "Python": platform.python_version(),
    }


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
