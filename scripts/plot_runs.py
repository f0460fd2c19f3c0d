"""Curves of training runs in one picture: a line for each group of runs, with a band over its seeds.

python scripts/plot_runs.py RUN ... [--tag rollout/ep_rew_mean] [--group ppo.lr] [--centre iqm] [--out runs.png]

Runs whose configurations differ in nothing but the seed are a group; with --group, those with the same value of a key.
The band is the 95 % bootstrap interval over the runs of a group, or the lowest and the highest where there are two.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from omegaconf import OmegaConf
from scipy import stats

from esper.runtime.errors import ConfigError
from esper.runtime.telemetry import METRICS_FILE

mpl.use("Agg")
import matplotlib.pyplot as plt

CENTRES = {"mean": np.mean, "iqm": lambda values, axis: stats.trim_mean(values, 0.25, axis=axis)}
_OWN = ("seed", "output_dir", "resume")  # keys that do not tell groups apart
_RESAMPLES = 2000
_ABSENT = "absent"


class Run(NamedTuple):
    """One run: its configuration by dotted keys, and a curve."""

    config: dict[str, Any]
    steps: np.ndarray  # [points]
    values: np.ndarray  # [points]


class Curve(NamedTuple):
    """A group of runs, [steps] each; `low` and `high` are those of the band, equal to `centre` for a single run."""

    label: str
    steps: np.ndarray
    centre: np.ndarray
    low: np.ndarray
    high: np.ndarray
    runs: int


def read(folder: Path, tag: str) -> Run:
    """The curve of `tag` in a run directory; points that are not finite are left out.

    Raises:
        ConfigError: there is no such run, or it has no such tag.
    """
    metrics, config = folder / METRICS_FILE, folder / ".hydra" / "config.yaml"
    for path in (metrics, config):
        if not path.exists():
            raise ConfigError(f"{folder}: not a run directory of Esper's (it has no {path.relative_to(folder)})")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    points = [(line["step"], line[tag]) for line in lines if line.get(tag) is not None]
    if not points:
        known = sorted({name for line in lines for name in line} - {"step", "time"})
        raise ConfigError(f"{folder}: it has logged no {tag}; choose one of {', '.join(known)}")
    steps, values = np.array(points, dtype=float).T
    return Run(_flat(OmegaConf.to_container(OmegaConf.load(config))), steps, values)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: each
        for key, inner in value.items()
        for name, each in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
    }


def grouped(runs: Sequence[Run], key: str | None) -> dict[str, list[Run]]:
    """Runs by label, in the order in which they were given.

    Args:
        runs: to be grouped.
        key: whose values tell groups apart; None: all but those of the seed.

    Raises:
        ConfigError: no run has such a key.
    """
    names = sorted({name for run in runs for name in run.config} - set(_OWN))
    if key is not None:
        if not any(key in run.config for run in runs):
            raise ConfigError(f"--group {key}: no run has such a key; choose one of {', '.join(names)}")
        names = [key]
    found: dict[str, list[Run]] = {}
    telling = [name for name in names if len({repr(run.config.get(name, _ABSENT)) for run in runs}) > 1 or key]
    for run in runs:
        label = ", ".join(f"{name}={run.config.get(name, _ABSENT)}" for name in telling)
        found.setdefault(label or str(run.config.get("env.name", "")), []).append(run)
    return found


def curve(label: str, runs: Sequence[Run], centre: str) -> Curve:
    """What a group did at every step of any of its runs that all of them had reached, and none had passed."""
    steps = np.unique(np.concatenate([run.steps for run in runs]))
    first, last = max(run.steps[0] for run in runs), min(run.steps[-1] for run in runs)
    steps = steps[(steps >= first) & (steps <= last)]
    values = np.stack([np.interp(steps, run.steps, run.values) for run in runs])  # [runs, steps]
    middle = CENTRES[centre](values, axis=0)
    if len(runs) < 3:
        low, high = values.min(0), values.max(0)
    else:
        drawn = np.random.default_rng(0).integers(len(runs), size=(_RESAMPLES, len(runs)))
        resampled = np.stack([CENTRES[centre](values[which], axis=0) for which in drawn])
        low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return Curve(label, steps, middle, low, high, len(runs))


def draw(curves: Sequence[Curve], tag: str, out: Path) -> None:
    """Writes the picture."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for each in curves:
        (line,) = axes.plot(each.steps, each.centre, linewidth=1.3, label=f"{each.label} ({each.runs})")
        axes.fill_between(each.steps, each.low, each.high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("environment steps")
    axes.set_ylabel(tag)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--tag", default="rollout/ep_rew_mean", help="scalar to draw")
    parser.add_argument("--group", metavar="KEY", help="key whose values tell groups apart")
    parser.add_argument("--centre", choices=CENTRES, default="mean", help="of the runs of a group")
    parser.add_argument("--out", type=Path, default=Path("runs.png"))
    given = parser.parse_args(arguments)
    try:
        groups = grouped([read(folder, given.tag) for folder in given.runs], given.group)
        curves = [curve(label, runs, given.centre) for label, runs in groups.items()]
        for each in curves:
            if not len(each.steps):
                raise ConfigError(f"{each.label}: its runs have no steps in common; plot them one by one")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    draw(curves, given.tag, given.out)
    for each in curves:
        band = f"[{each.low[-1]:+.4f}, {each.high[-1]:+.4f}]" if each.runs > 1 else ""
        print(f"{each.label}: {each.runs} run(s), {each.centre[-1]:+.4f} {band} at step {each.steps[-1]:,.0f}")
    print(f"plot: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
