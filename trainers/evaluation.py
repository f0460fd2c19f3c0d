"""Controllers on held-out instances: episodes, honest statistics, and the report.

Every controller meets the same instances, so that comparisons are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import stats

from envs.config import GrowthConfig
from envs.growth_env import GrowthEnv
from envs.lookahead import LookAhead
from envs.making import make_envs
from esper.graph import GraphBatch
from esper.tamiyo import baselines
from esper.tamiyo.actor import Actor
from esper.tamiyo.baselines import Controller
from esper.tamiyo.policy import GraphPolicy
from trainers.config import EvaluationConfig
from trainers.progress import Reporter

TAMIYO = "tamiyo"
Watch = Callable[[GraphBatch, torch.Tensor | None], None]
"""See Recorder."""
_RESAMPLES = 2000
_BATCH = 64  # episodes side by side
_ACCOUNTS = (
    "gain",
    "points",
    "germinated",
    "fossilized",
    "culled",
    "waited",
    "diverged",
    "params_ratio",
    "flops_ratio",
    "test_accuracy",
    "twin_test_accuracy",
    "test_psnr",
    "twin_test_psnr",
    "bicubic_test_psnr",
)


def unseen(graph: GraphBatch, actions: torch.Tensor | None) -> None:
    """Watches nothing."""


class TamiyoController:
    """A trained policy behind the interface of the baselines."""

    def __init__(self, policy: GraphPolicy, seed: int, deterministic: bool):
        self._actor = Actor(policy, seed, deterministic)

    def begin(self, hosts: int) -> None:
        pass

    def act(self, graph: GraphBatch) -> torch.Tensor:
        return self._actor(graph).actions.clone()


def play(
    controller: Controller,
    config: GrowthConfig,
    episodes: int | range,
    seed: int,
    device: str,
    on_epoch: Callable[[int], None] = lambda done: None,
    split: str = "heldout",
    watch: Watch = unseen,
) -> dict[str, np.ndarray]:
    """Plays episodes; returns what `GrowthEnv.step` tells of each, in the order of the instances.

    Args:
        episodes: instances of the seed, from the first on if a number is given.
        on_epoch: called with the number of host epochs done, after each step.
        split: of the instances, as for GrowthEnv.
        watch: called with what is observed and chosen, as a Recorder is.
    """
    chosen = range(episodes) if isinstance(episodes, int) else episodes
    collected: list[dict[str, torch.Tensor]] = []
    done = 0
    for first in range(chosen.start, chosen.stop, _BATCH):
        count = min(_BATCH, chosen.stop - first)
        env = make_envs(config, count, split=split, autoreset=False, device=device)
        # Instance i of seed s is the same whatever the number of episodes and the batch.
        graph = env.reset(seed * 1_000_003 + torch.arange(first, first + count))
        if isinstance(controller, LookAhead):
            assert isinstance(env, GrowthEnv)
            controller.watch(env)
        controller.begin(count)
        for _ in range(config.epochs):
            actions = controller.act(graph)
            watch(graph, actions)
            graph, _, _, _, info = env.step(actions)
            if info:  # an episode also ends where its host diverges
                collected.append({**info["episodes"], "instance": first + info["episodes"]["env"]})
            done += count
            on_epoch(done)
        watch(graph, None)
    played = {name: torch.cat([part[name] for part in collected]).cpu().numpy() for name in collected[0]}
    order = played["instance"].argsort()
    return {name: values[order] for name, values in played.items()}


def iqm(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean, the mean of the middle half (Agarwal et al., arXiv 2108.13264)."""
    return stats.trim_mean(x, 0.25, axis=axis)


def interval(x: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the IQM over instances. One value, or equal ones, give that value twice."""
    if np.ptp(x) == 0:
        return float(x[0]), float(x[0])
    result = stats.bootstrap(
        (x,), iqm, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(seed), vectorized=True
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _summary(scores: np.ndarray) -> dict[str, Any]:
    return {"iqm": float(iqm(scores)), "interval": list(interval(scores)), "mean": float(scores.mean())}


def evaluate(
    policy: GraphPolicy, config: GrowthConfig, settings: EvaluationConfig, device: str, checkpoint: str, watch: Watch
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Plays Tamiyo and the chosen baselines; returns the report, and what `play` tells of Tamiyo's episodes, which
    `watch` sees.

    The report's `controllers` map a name to its scores (episode returns), their IQM with interval, the means of the
    accounts (accuracies on the test split, with and without growth, among them), and, for baselines, the paired
    comparison with Tamiyo: IQM of the difference and the probability of improvement.
    """
    controllers: dict[str, Controller] = {TAMIYO: TamiyoController(policy, settings.seed, settings.deterministic)}
    for name in settings.names(config.instances):
        kinds = list(config.blueprints)
        controllers[name] = baselines.make(name, settings.controllers, config.instances, kinds, settings.seed)
    report: dict[str, Any] = {
        "kind": config.kind,
        "environment": config.name,
        "checkpoint": checkpoint,
        "episodes": settings.episodes,
        "seed": settings.seed,
        "deterministic": settings.deterministic,
        "controllers": {},
    }
    each = settings.episodes * config.epochs
    found: dict[str, dict[str, np.ndarray]] = {}
    with Reporter("evaluating", each * len(controllers), "host epochs") as reporter:
        for number, (name, controller) in enumerate(controllers.items()):
            base = number * each

            def shown(done: int, base: int = base, name: str = name) -> None:
                reporter.update(base + done, name)

            see = watch if name == TAMIYO else unseen
            played = play(controller, config, settings.episodes, settings.seed, device, shown, watch=see)
            found[name] = played
            scores = played["return"].astype(float)
            row = {**_summary(scores), "scores": [round(float(s), 6) for s in scores]}
            row |= {name: float(played[name].mean()) for name in _ACCOUNTS if name in played}
            report["controllers"][name] = row
    mine = np.array(report["controllers"][TAMIYO]["scores"])
    for name, row in report["controllers"].items():
        if name != TAMIYO:
            theirs = np.array(row["scores"])
            row["tamiyo_minus_this"] = _summary(mine - theirs)
            row["probability_of_improvement"] = float(np.mean((mine > theirs) + 0.5 * (mine == theirs)))
    return report, found[TAMIYO]


def scalars(report: dict[str, Any]) -> dict[str, float]:
    """What is logged as `eval/`."""
    return {f"eval/{name}": row["iqm"] for name, row in report["controllers"].items()}


POLICY = TAMIYO
HEADINGS = ("controller", "return (IQM)", "Tamiyo minus it", "P(better)", "points", "size")
LEGEND = (
    "Returns are on validation data, 0 is the ungrown twin. Brackets are 95 % bootstrap intervals of the",
    "interquartile mean over instances. P(better) is the share of instances on which Tamiyo scores higher (ties count",
    "half); points are what growing added to the accuracy on the test split in percent, less 10 for 100 % more",
    "parameters, in the mean (of super-resolution, to the PSNR in dB, less 0.1); size is the grown host's parameters",
    "over the ungrown one's.",
)


def _figure(summary: dict[str, Any]) -> str:
    low, high = summary["interval"]
    return f"{summary['iqm']:+.3f} [{low:+.3f}, {high:+.3f}]"


def rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The report's table, best controller first."""
    lines: list[tuple[str, ...]] = []
    for name, row in sorted(report["controllers"].items(), key=lambda item: -item[1]["iqm"]):
        versus, better = "", ""
        if name != TAMIYO:
            versus, better = _figure(row["tamiyo_minus_this"]), f"{row['probability_of_improvement']:.2f}"
        lines.append(
            (
                name,
                _figure(row),
                versus,
                better,
                f"{row['points']:+.2f} dB" if "test_psnr" in row else f"{row['points']:+.1f}",
                f"x{row['params_ratio']:.2f}",
            )
        )
    return lines


_DID = {
    "gain": "gain",
    "germinated": "germinated",
    "fossilized": "fossilized",
    "culled": "culled",
    "diverged": "diverged",
    "flops_ratio": "compute of seeds",
    "test_accuracy": "test accuracy",
    "twin_test_accuracy": "twin's",
    "test_psnr": "test PSNR",
    "twin_test_psnr": "twin's",
    "bicubic_test_psnr": "bicubic",
}


_DID_NOTE = (
    "Means over the episodes. The gain is the return before the price of parameters. Germinated, fossilized and culled "
    "are actions; seeds that are held at the end are kept without one. The compute of seeds is in ungrown episodes. "
    "The twin's is the test result of the host that was never grown."
)


def details(report: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Headings, rows and explanation of a table of the accounts, best controller first."""
    ordered = sorted(report["controllers"].items(), key=lambda item: -item[1]["iqm"])
    names = [name for name in _DID if name in ordered[0][1]]
    lines = [(controller, *(f"{row[name]:.3f}" for name in names)) for controller, row in ordered]
    return ("controller", *(_DID[name] for name in names)), lines, _DID_NOTE


def title(report: dict[str, Any]) -> str:
    return f"{report['environment']}: {report['episodes']} held-out instances, the same for every controller"
