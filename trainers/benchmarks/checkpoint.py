"""The suite `checkpoint`: what it costs to keep a run's state, against the iterations of the default run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from envs.config import load_config
from esper.runtime import checkpoint
from esper.simic.config import PPOConfig
from trainers.benchmarks import Report, suite
from trainers.benchmarks.ratios import LOWER, Ratio
from trainers.benchmarks.timing import Spread
from trainers.config import BenchmarkConfig, TrainConfig, load_policy
from trainers.loop import Trainer
from trainers.progress import Reporter


@suite("checkpoint")
def run(config: BenchmarkConfig) -> Report:
    """Iterations of the default run, the copy of the state after each, and its file, in turns."""
    settings = config.benchmark
    train = TrainConfig(
        seed=config.seed + 1,
        env=load_config("digits"),
        policy=load_policy("tamiyo_small"),
        ppo=PPOConfig(total_steps=10**9),
        runtime=config.runtime,
    )
    every = train.checkpoint.every
    with (
        tempfile.TemporaryDirectory() as directory,
        Reporter("benchmark", settings.warmup + settings.repeats, "iterations") as reporter,
    ):
        trainer = Trainer(train, Path(directory))
        trainer.actor.warm_up(trainer.graph)
        parts: dict[str, Callable[[], object]] = {
            "iteration": trainer.iterate,
            "copy": trainer.keep,
            "file": trainer.save,
        }
        times: dict[str, list[float]] = {name: [] for name in parts}
        for number in range(settings.warmup + settings.repeats):
            for name, part in parts.items():
                start = time.perf_counter()
                part()
                if number >= settings.warmup:
                    times[name].append(1e3 * (time.perf_counter() - start))
            reporter.update(number + 1)
        size = checkpoint.found(Path(directory))[0].stat().st_size / 2**20
    spreads = {name: Spread.of(values) for name, values in times.items()}
    cost = spreads["copy"].median + spreads["file"].median / every
    share = cost / (spreads["iteration"].median + cost)
    results: dict[str, Any] = {
        "ms": times,
        "median_ms": {name: spread.median for name, spread in spreads.items()},
        "file_mib": size,
        "every": every,
        "share": share,
    }
    title = f"Keeping the state: {100 * share:.2f} % of a run's time, files of {size:.1f} MiB"
    table = Table("", "ms (quartiles)", "how often", title=title, box=box.SIMPLE_HEAD, title_justify="left")
    often = {"iteration": "", "copy": "every iteration", "file": f"every {every} iterations"}
    for name, spread in spreads.items():
        table.add_row(name, spread.text(".1f"), often[name])
    return Report({"ratios": ratios(results), "results": results}, [table])


def ratios(results: dict[str, Any]) -> dict[str, Ratio]:
    """Name -> the share of a run's time, turn by turn."""
    shares = []
    for iteration, copy, file in zip(*(results["ms"][name] for name in ("iteration", "copy", "file")), strict=True):
        cost = copy + file / results["every"]
        shares.append(cost / (iteration + cost))
    return {"keeping the state, share of a run's time": Ratio.of(shares, LOWER)}
