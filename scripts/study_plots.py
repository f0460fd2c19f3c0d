"""The plots of docs/results.md. Run scripts/study_report.py."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from study_statistics import (
    LOOKAHEAD,
    ORACLE,
    TAMIYO,
    Array,
    Played,
    by_variant,
    instance_weights,
    points,
    run_shares,
    tasks,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RIVALS = 3  # baselines in the performance profile
CURVED = (TAMIYO, "short", "pooled", "from_scratch")  # trained policies among the learning curves
CAPTIONS = {
    "results_points.png": "points of every controller, by kind of context",
    "results_profile.png": "performance profiles",
    "results_pareto.png": "points against parameters and extra FLOPs",
    "results_learning.png": "learning curves",
}
RED, GREY, BLUE, PURPLE = "#d62728", "#7f7f7f", "#1f77b4", "#9467bd"
OTHERS = (BLUE, "#2ca02c", "#ff7f0e")  # as many as RIVALS, and as CURVED beside Tamiyo


def _save(figure: Any, path: Path) -> str:
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    with Image.open(buffer) as drawn:  # a palette makes a file a third as large
        drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path.name


def _colour(one: Played, name: str) -> str:
    if name in (ORACLE, LOOKAHEAD):
        return GREY
    if name == TAMIYO:
        return RED
    return PURPLE if one.groups[name].policy else BLUE


def plot_points(found: list[Played], folder: Path) -> list[str]:
    """Points of every controller, one panel for the mixture and for each kind of context."""
    own = [(one.name, one, np.arange(len(one.kind))) for one in found if one.training and len(np.unique(one.kind)) > 1]
    panels = own + tasks(found)
    if not panels:
        return []
    names: dict[str, float] = {}
    for _, one, _ in panels:
        for name in one.groups:
            names.setdefault(name, points(one, name).value)
    order = sorted(names, key=lambda name: (names[name], name))
    size = (1.6 + 1.9 * len(panels), 1.2 + 0.21 * len(order))
    figure, grid = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, (heading, one, instances) in zip(grid[0], panels, strict=True):
        shown = []
        for place, name in enumerate(order):
            if name in one.groups:
                where = instances[instances < len(one.shared(name))]
                if len(where):
                    estimate = points(one, name, where)
                    shown.append((place, estimate.value, *estimate.interval, _colour(one, name)))
        places, values, low, high, colours = (list(column) for column in zip(*shown, strict=True))
        axes.hlines(places, low, high, color=colours, linewidth=1.2)
        axes.scatter(values, places, c=colours, s=12)
        axes.axvline(0, color="grey", linewidth=0.5)
        axes.grid(axis="x", alpha=0.25)
        axes.set_title(heading, fontsize=8)
        axes.tick_params(labelsize=7)
    grid[0, 0].set_yticks(range(len(order)), order)
    figure.supxlabel("points over never, 95 % intervals", fontsize=8)
    return [_save(figure, folder / "results_points.png")]


def profile(one: Played, name: str, where: Array, taus: Array) -> tuple[Array, Array, Array]:
    """Share of the instances `where` with more than `taus` points, mean over runs, and its interval, [taus] each."""
    above = one.groups[name].points[:, where, None] > taus
    weights, runs = instance_weights(one.kind[where]), run_shares(name, len(above))
    resampled = np.einsum("rs,srt->rt", runs, np.stack([weights @ run for run in above]))
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return above.mean(axis=(0, 1)), low, high


def plot_profile(found: list[Played], folder: Path) -> list[str]:
    """Performance profiles of Tamiyo, the best baselines and the look-ahead on the sets that were trained on."""
    own = [one for one in found if one.training]
    if not own:
        return []
    columns = min(3, len(own))
    size = (3.6 * columns, 2.7 * -(-len(own) // columns))
    figure, grid = plt.subplots(-(-len(own) // columns), columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(own) :]:
        axes.set_axis_off()
    for axes, one in zip(grid.flat, own, strict=False):
        rivals = sorted(one.baselines(), key=lambda name: -points(one, name).value)[:RIVALS]
        shown = [name for name in (TAMIYO, LOOKAHEAD) if name in one.groups] + rivals
        where = one.shared(*shown)
        every = np.concatenate([one.groups[name].points[:, where].ravel() for name in shown])
        low, high = np.percentile(every, [1, 99])
        taus = np.linspace(float(low), float(high), 81)
        colours = iter(OTHERS)
        for name in shown:
            share, lower, upper = profile(one, name, where, taus)
            colour = _colour(one, name) if name not in rivals else next(colours)
            style = "--" if name == LOOKAHEAD else "-"
            axes.plot(taus, share, color=colour, linestyle=style, linewidth=1.3, label=name)
            axes.fill_between(taus, lower, upper, color=colour, alpha=0.12, linewidth=0)
        axes.axvline(0, color="grey", linewidth=0.5)
        axes.set_title(f"{one.name}, {len(where):,} instances", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=6)
    figure.supxlabel("points over never", fontsize=8)
    figure.supylabel("share of instances above", fontsize=8)
    return [_save(figure, folder / "results_profile.png")]


def on_one_axis(runs: list[dict[str, Any]]) -> tuple[Array, Array]:
    """Steps [n] as far as every run of the variant went, and the runs' returns there, [runs, n]."""
    curves = [np.array(run["curve"], dtype=float).reshape(-1, 2) for run in runs if run.get("curve")]
    if not curves:
        return np.zeros(0), np.zeros((0, 0))
    steps = curves[0][:, 0]
    steps = steps[steps <= min(curve[-1, 0] for curve in curves)]
    return steps, np.array([np.interp(steps, curve[:, 0], curve[:, 1]) for curve in curves])


def plot_learning(training: dict[str, Any], folder: Path) -> list[str]:
    """Learning curves of CURVED: the mean over a variant's runs, from the lowest to the highest run."""
    curves = {name: on_one_axis(runs) for name, runs in by_variant(training).items() if name in CURVED}
    curves = {name: curve for name, curve in curves.items() if len(curve[0])}
    if not curves:
        return []
    figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    colours = iter(OTHERS)
    for name, (steps, values) in curves.items():
        colour = RED if name == TAMIYO else next(colours)
        label = f"{name} ({len(values)} run{'s' * (len(values) > 1)})"
        width, order = (1.8, 3) if name == TAMIYO else (1.0, 2)
        axes.plot(steps / 1e6, values.mean(axis=0), color=colour, linewidth=width, zorder=order, label=label)
        axes.fill_between(steps / 1e6, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("environment steps, millions", fontsize=8)
    axes.set_ylabel("mean return in training, points", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=6, loc="lower right")
    return [_save(figure, folder / "results_learning.png")]


def front(found: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, gain) that no other beats: none costs as little and gains as much. Cheapest first."""
    kept: list[tuple[float, float]] = []
    for cost, gain in sorted(found, key=lambda pair: (pair[0], -pair[1])):
        if not kept or gain > kept[-1][1]:
            kept.append((cost, gain))
    return kept


def plot_pareto(found: list[Played], folder: Path) -> list[str]:
    """Points against parameters and against the compute spent on seeds."""
    own = [one for one in found if one.training and one.context in ("mixture", "sequential")]
    own = own or [one for one in found if one.training][:1]
    if not own:
        return []
    labels = {"params_ratio": "parameters", "flops_ratio": "extra FLOPs"}
    figure, grid = plt.subplots(len(own), 2, figsize=(9.5, 3.6 * len(own)), squeeze=False, layout="constrained")
    for row, one in zip(grid, own, strict=True):
        for axes, (key, label) in zip(row, labels.items(), strict=True):
            names = sorted(name for name, group in one.groups.items() if group.account(key) is not None)
            at = [one.groups[name].account(key) or 0.0 for name in names]
            gains = [points(one, name).value for name in names]
            for name, x, y in zip(names, at, gains, strict=True):
                marker = "*" if name == TAMIYO else "^" if name in (ORACLE, LOOKAHEAD) else "o"
                axes.plot([x], [y], marker, color=_colour(one, name), markersize=9 if name == TAMIYO else 4)
                if name == TAMIYO or not one.groups[name].policy:  # variants crowd around Tamiyo
                    axes.annotate(name, (x, y), xytext=(4, 2), textcoords="offset points", fontsize=6)
            # Ceilings train forks of the host, which no ratio counts.
            playable = [(x, y) for name, x, y in zip(names, at, gains, strict=True) if name not in (ORACLE, LOOKAHEAD)]
            axes.plot(*zip(*front(playable), strict=True), color="grey", linewidth=0.7, zorder=0)
            axes.set_xlabel(f"{label} over the ungrown host's", fontsize=8)
            axes.set_title(one.name, fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25)
        row[0].set_ylabel("points over never", fontsize=8)
    return [_save(figure, folder / "results_pareto.png")]
