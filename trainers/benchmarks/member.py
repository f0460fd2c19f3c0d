"""One process of a run that the suite `distributed` measures: does what it is told on its input, line by line.

    python -m trainers.benchmarks.member SETTINGS       (JSON; RANK, WORLD_SIZE and so on in the environment)

`iterate` trains an iteration, `exchange N` adds up N numbers; each is answered by a line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from envs.config import load_config
from esper.runtime import launch
from esper.runtime.distributed import World
from esper.simic.config import PPOConfig
from trainers.config import RuntimeConfig, TrainConfig, load_policy
from trainers.loop import Trainer

_EXCHANGES = 20  # of which the mean is taken


class _Timed(World):
    """Keeps the time of each exchange."""

    def __init__(self, rank: int, size: int):
        super().__init__(rank, size)
        self.each: list[float] = []

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        before = self.seconds
        with super()._exchange():
            yield
        self.each.append(self.seconds - before)


def _iterated(trainer: Trainer, world: _Timed) -> dict[str, Any]:
    world.total([torch.zeros(1)])  # all begin at once
    world.sums.clear()
    world.each.clear()
    start = time.perf_counter()
    scalars = trainer.iterate()
    return {
        "s": time.perf_counter() - start,
        "collect_s": scalars["perf/collect_s"],
        "update_s": scalars["perf/update_s"],
        "exchanges_s": world.each,
        "steps": trainer.steps_per_iteration,
        "sums": [*world.sums.items()],
    }


def _exchanged(world: World, count: int) -> dict[str, Any]:
    values = [torch.zeros(count)]
    world.total(values)
    start = time.perf_counter()
    for _ in range(_EXCHANGES):
        world.total(values)
    return {"s": (time.perf_counter() - start) / _EXCHANGES, "bytes": 4 * count}


def main() -> None:
    """Until the input ends."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    train = TrainConfig(
        seed=settings["seed"] + 1,
        env=load_config("digits", num_envs=settings["hosts"]),
        policy=load_policy(settings["policy"]),
        ppo=PPOConfig(total_steps=10**9),
        runtime=RuntimeConfig(**settings["runtime"]),
    )
    world = _Timed(launch.rank(), launch.size())
    world.connect(train.runtime.patience_s)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(train, Path(folder), world=world)
        trainer.actor.warm_up(trainer.graph)
        for line in sys.stdin:
            order, *count = line.split()
            answer = _iterated(trainer, world) if order == "iterate" else _exchanged(world, int(count[0]))
            print(json.dumps(answer), flush=True)
    world.close()


if __name__ == "__main__":
    main()
