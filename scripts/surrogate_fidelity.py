"""How well the surrogate ranks controllers, and what it costs, beside the environment that it stands in for.

Run by `fit_surrogate.py`.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from scipy import stats
from surrogate_log import Choice, Explorer, controller, planting, title

from envs.config import EnvConfig
from envs.contexts import KINDS
from envs.growth_env import GrowthEnv
from trainers.evaluation import play

INSTANCES = 192
CLOSE: list[Choice] = [
    ("never", {}),
    ("random", {}),
    *planting("all_at_start", "bypass"),
    *planting("periodic", "bypass", every=6),
    *planting("plateau", "bypass"),
    *planting("best_fixed", "bypass", slot=0),
    *planting("best_fixed", "bypass", slot=3),
    *planting("statistic", "bypass", threshold=0.4),
    *planting("statistic", "bypass", threshold=0.7),
    *planting("gradient_norm", "bypass"),
    *planting("gradmax", "bypass"),
    *planting("gradmax", "bypass", threshold=1.0),
    *planting("probe", "bypass"),
    ("linear", {"threshold": 2.0}),
    ("linear", {"threshold": 6.0}),
]
"""Controllers that differ in what they look at, not in a blueprint that is bad on most instances."""

CONTROLLERS: list[Choice] = [
    *CLOSE,
    *planting("all_at_start", "norm", "mlp"),
    *planting("periodic", "mlp", every=6),
    *planting("plateau", "mlp"),
    *planting("best_fixed", "mlp", slot=0),
    *planting("best_fixed", "norm", slot=2),
    *planting("statistic", "norm", threshold=0.5),
    *planting("gradmax", "norm"),
    *planting("probe", "norm", "mlp"),
]
"""Whose scores are compared."""

HOSTS = (1, 32, 256)  # episodes side by side, whose cost is measured
REPEATS = 5


def scores(config: EnvConfig) -> dict[str, np.ndarray]:
    """Returns of every controller of CONTROLLERS on the held-out instances, [INSTANCES] each; `kind` is theirs."""
    found = {}
    for choice in CONTROLLERS:
        played = play(controller(choice, config, 7), config, INSTANCES, 0, "cpu", lambda done: None)
        found[title(choice)] = played["return"].astype(float)
        print(f"{config.name:10} {title(choice):40} {played['return'].mean():+.3f}", flush=True)
    return found | {"kind": played["kind"]}


def ranks(real: np.ndarray, surrogate: np.ndarray) -> float:
    """Spearman's correlation of mean scores [controllers, instances]."""
    return float(stats.spearmanr(real.mean(1), surrogate.mean(1)).statistic)


def agreement(real: np.ndarray, surrogate: np.ndarray) -> dict[str, Any]:
    """`ranks` with a 95 % bootstrap interval over instances."""
    dice = np.random.default_rng(0)
    drawn = [ranks(real[:, i], surrogate[:, i]) for i in dice.integers(real.shape[1], size=(1000, real.shape[1]))]
    interval = [round(float(x), 3) for x in np.quantile(drawn, [0.025, 0.975])]
    return {"controllers": len(real), "spearman": round(ranks(real, surrogate), 3), "interval": interval}


def compared(real: dict[str, np.ndarray], surrogate: dict[str, np.ndarray]) -> dict[str, Any]:
    """How well the ranks of the controllers agree: of `all`, of those in CLOSE, and by kind of instance; how well the
    scores of one controller on single instances do (Pearson, the `median` over controllers); and their mean scores in
    both environments with standard errors."""
    names = [title(choice) for choice in CONTROLLERS]
    a, b = (np.stack([found[name] for name in names]) for found in (real, surrogate))
    single = [stats.pearsonr(u, v).statistic for u, v in zip(a, b, strict=True) if u.any()]
    kinds = {name: real["kind"] == number for number, name in enumerate(KINDS)}

    def score(values: np.ndarray) -> list[float]:
        return [round(float(x), 4) for x in (values.mean(), values.std() / len(values) ** 0.5)]

    return {
        "instances": INSTANCES,
        "all": agreement(a, b),
        "close": agreement(a[: len(CLOSE)], b[: len(CLOSE)]),
        "kinds": {
            name: {"instances": int(rows.sum()), **agreement(a[:, rows], b[:, rows])} for name, rows in kinds.items()
        },
        "single_instances": {"pearson_median": round(float(np.median(single)), 3)},
        "controllers": {
            name: {"real": score(u), "surrogate": score(v)} for name, u, v in zip(names, a, b, strict=True)
        },
    }


def speeds(config: EnvConfig, hosts: int) -> dict[str, list[float]]:
    """Environment steps (one host, one epoch) per second of CPU time under random actions, REPEATS values each: of
    `train_epoch` alone, and of whole episodes, in which actions, observations, resets and twins count too."""
    env, explorer = GrowthEnv(config, hosts, autoreset=False), Explorer(0, len(config.blueprints))
    trained, spent = env.population.train_epoch, 0.0

    def train_epoch() -> None:
        nonlocal spent
        start = time.process_time()
        trained()
        spent += time.process_time() - start

    env.population.train_epoch = train_epoch
    found: dict[str, list[float]] = {"epoch": [], "episode": []}
    for repeat in range(REPEATS + 1):
        explorer.begin(hosts)
        chosen, spent, start = 0.0, 0.0, time.process_time()
        graph = env.reset()
        for _ in range(config.epochs):
            before = time.process_time()
            actions = explorer.act(graph)
            chosen += time.process_time() - before
            graph = env.step(actions)[0]
        whole = time.process_time() - start - chosen
        if repeat:  # the first is to warm up
            for name, seconds in (("epoch", spent), ("episode", whole)):
                found[name].append(hosts * config.epochs / seconds)
    return found


def costs(real: EnvConfig, surrogate: EnvConfig) -> dict[str, Any]:
    """By number of hosts and by what is timed: median, lowest and highest of `speeds` in both environments, and how
    many times as fast the surrogate is."""

    def summary(values: list[float]) -> list[float]:
        return [round(float(x), 1) for x in (np.median(values), min(values), max(values))]

    out: dict[str, Any] = {"unit": "environment steps per second of CPU time: median, lowest, highest"}
    out |= {"repeats": REPEATS, "threads": torch.get_num_threads()}
    for hosts in HOSTS:
        a, b = speeds(real, hosts), speeds(surrogate, hosts)
        out[f"hosts={hosts}"] = {
            what: {
                "real": summary(a[what]),
                "surrogate": summary(b[what]),
                "factor": round(float(np.median(b[what]) / np.median(a[what])), 1),
            }
            for what in a
        }
        print(hosts, out[f"hosts={hosts}"], flush=True)
    return out
