"""Trains on classic control environments with several seeds, and says whether every one of them learned.

    python scripts/learning.py [cartpole acrobot mountaincar] [--seeds 1 2 3 4 5] [KEY=VALUE ...]

For each environment, one after the other: `python -m trainers.train experiment=NAME seed=N` for every seed, on one
thread, then 100 held-out episodes of the most probable actions. Writes scripts/results/learning_NAME.json with every
seed's score, the settings and the command. Runs go to runs/learning/NAME; a seed that is in the file with the same
overrides is not run again, so that a stopped study goes on where it was. About 2 minutes a seed of cartpole, and 4 of
the others, on one core.

The bars: the mean return of every seed is at least 495 (CartPole-v1, 100,000 steps) or -85 (Acrobot-v1, 500,000 steps).
MountainCar-v0 is a negative control without a bar: its reward says nothing until the goal is reached, which random
actions hardly ever do, and PPO without a bonus for exploring is known to stay at -200 with common settings.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from pathlib import Path
from typing import Any

import gymnasium
import torch
from child import output_of
from omegaconf import OmegaConf

from trainers.progress import Reporter

RESULTS = Path(__file__).parent / "results"
BARS = {"cartpole": 495.0, "acrobot": -85.0, "mountaincar": None}
"""Least mean return of each seed; None where there is none."""
KEPT = ("env", "policy", "ppo")
"""Parts of the configuration that are written down."""


def train(name: str, seed: int, overrides: list[str], reporter: Reporter, before: int) -> dict[str, Any]:
    """One run in a process of its own: its scores, wall time, learning curve and settings."""
    command = ["-m", "trainers.train", f"experiment={name}", f"seed={seed}", *overrides]
    folder = Path("runs") / "learning"
    start = time.perf_counter()
    run = None
    for line in output_of([*command, f"output_dir={folder}"]):
        if match := re.match(r"training\s+([\d,]+)/", line):
            reporter.update(before + int(match[1].replace(",", "")), f"{name}, seed {seed}")
        if match := re.match(r"run directory:\s+(.+)", line):
            run = Path(match[1])
    if run is None:
        raise SystemExit(f"error: {name}, seed {seed} ended without the line that names its run directory")
    report = json.loads((run / "eval" / "report.json").read_text())
    curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [[each["step"], round(each["rollout/ep_rew_mean"], 2)] for each in curve if "rollout/ep_rew_mean" in each]
    config = OmegaConf.to_container(OmegaConf.load(run / ".hydra" / "config.yaml"))
    return {
        "command": " ".join(["python", *command]),
        "seconds": round(time.perf_counter() - start, 1),
        "controllers": report["controllers"],
        "curve": curve[:: max(len(curve) // 50, 1)],
        "settings": {part: config[part] for part in KEPT},
    }


def summary(name: str, seeds: dict[str, Any]) -> dict[str, Any]:
    """The study of one environment, as it is written."""
    means = {seed: row["controllers"]["policy"]["mean"] for seed, row in seeds.items()}
    bar = BARS[name]
    first = next(iter(seeds.values()))
    return {
        "command": f"python scripts/learning.py {name}",
        "bar": bar,
        "reached_by_every_seed": None if bar is None else all(mean >= bar for mean in means.values()),
        "mean_return": means,
        "random": first["controllers"]["random"]["mean"],
        "settings": first["settings"],
        "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"gymnasium {gymnasium.__version__}, one thread",
        "seeds": {seed: {key: value for key, value in row.items() if key != "settings"} for seed, row in seeds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", nargs="*", metavar="NAME or KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    overrides = [each for each in arguments.given if "=" in each]
    names = [each for each in arguments.given if "=" not in each] or list(BARS)
    for name in names:
        if name not in BARS:
            parser.error(f"{name}: no such environment; choose from {', '.join(BARS)}")
    for name in names:
        path = arguments.out / f"learning_{name}.json"
        old = json.loads(path.read_text()) if path.exists() else {"seeds": {}}
        wanted = {seed: " ".join(["experiment=" + name, f"seed={seed}", *overrides]) for seed in arguments.seeds}
        rows = {
            seed: {**row, "settings": old["settings"]}
            for seed, row in old["seeds"].items()
            if row["command"].endswith(wanted.get(int(seed), "no such seed"))
        }
        missing = [seed for seed in arguments.seeds if str(seed) not in rows]
        total = OmegaConf.load(Path(__file__).parents[1] / "conf" / "experiment" / f"{name}.yaml").ppo.total_steps
        given = [each.partition("=")[2] for each in overrides if each.startswith("ppo.total_steps=")]
        total = int(given[-1]) if given else total
        with Reporter(f"{name}:", total * len(missing), "steps") as reporter:
            for number, seed in enumerate(missing):
                rows[str(seed)] = train(name, seed, overrides, reporter, number * total)
                arguments.out.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(summary(name, dict(sorted(rows.items()))), indent=1) + "\n")
                played = rows[str(seed)]["controllers"]["policy"]
                print(f"{name}, seed {seed}: {played['mean']:.1f} +- {played['std']:.1f}", flush=True)


if __name__ == "__main__":
    main()
