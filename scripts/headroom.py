"""How much there is to win in each growth environment, and for whom.

    python scripts/headroom.py [TASK/KIND ...] [--workers 2] (see --help)

TASK/KIND is for instance digits/sequential; KIND is a file of conf/env/contexts. Without arguments: every task with
every kind. For each: never, a host that starts large, every controller with knobs tuned on training instances, the
oracle of one germination, the clairvoyant oracle and the causal look-aheads, all on the same held-out instances; how
the effect depends on the kind of defect; a supervised scorer and its learning curve.

Work is done in chunks of instances that are kept under runs/headroom, so that a stopped study goes on where it was.
Results go to scripts/results/headroom/<task>-<kind>.json, tuned knobs to esper/tamiyo/baselines/fitted.json;
scripts/headroom_report.py makes docs/environments.md of them. Points are percentages of test accuracy over the ungrown
twin, less 10 per 100 % more parameters. An environment takes minutes on two cores; tasks on
grids of tokens take longest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from chunks import Pool
from torch import Tensor

from envs import lookahead, tasks
from envs.config import EnvConfig, load_config
from envs.contexts import KINDS
from envs.growth_env import draw_context, population_spec
from envs.lookahead import Outcome, finish, germinations
from envs.points import Meter
from esper.growth.actions import ActionLayout
from esper.growth.observation import Observer
from esper.growth.population import Population
from esper.growth.state import PopulationSpec
from esper.runtime import seeding
from esper.tamiyo import baselines
from esper.tamiyo.baselines.linear import features

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results" / "headroom"
CACHE = ROOT / "runs" / "headroom"
FITTED = ROOT / "esper" / "tamiyo" / "baselines" / "fitted.json"

TRAINING, TUNING, HELDOUT = range(3)  # splits of instances: to fit on, to tune on, to report on
FIRST, EVERY = 3, 3  # decision epochs of the look-aheads and of the labels
LABELS = 4  # germinations tried at each decision of a random episode
FUTURES = 4  # drawn futures that the non-greedy look-ahead averages over
FINALISTS = 5  # germinations it looks at again
MODES = ("greedy", "planned", "clairvoyant")  # of look-aheads
CHUNK = {"labels": 128, "oracle": 32, "lookahead": 32}

BLOCKS = ("bypass", "norm", "widen", "conv")  # where the environment has them
GRID: dict[str, list[dict[str, Any]]] = {
    "all_at_start": [{"blueprint": b} for b in (*BLOCKS, "mlp")],
    "periodic": [{"blueprint": b, "every": e} for b in (*BLOCKS, "mlp") for e in (4, 8, 16)],
    "plateau": [{"blueprint": b, "slope": s} for b in (*BLOCKS, "mlp") for s in (-0.05, -0.02, 0.0)],
    "statistic": [{"blueprint": b, "threshold": t} for b in BLOCKS for t in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)],
    "gradient_norm": [{"blueprint": b, "threshold": t} for b in BLOCKS for t in (-10.0, 0.0, 0.5, 1.0)],
    "gradmax": [{"blueprint": b, "threshold": t} for b in BLOCKS for t in (-10.0, 0.0, 0.5, 1.0, 1.5)],
    "probe": [{"blueprint": b, "probation": p, "keep": k} for b in BLOCKS for p in (5, 8) for k in (0.0, 0.03)],
    "linear": [{"threshold": t} for t in (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 13.0)],
}
"""Knobs that are tried for each controller, on the tuning instances."""


@dataclass(frozen=True)
class Sizes:
    """How many chunks, and instances to play, a study takes; see `--help`."""

    labels: int
    oracle: int
    lookahead: int
    play: int
    tuning: int
    tune_margins: bool
    modes: list[str]


# ---- what a worker does ---------------------------------------------------------------------------------------------


def config_of(instances: str) -> EnvConfig:
    task, kind = instances.split("/")
    return load_config(task, contexts=kind)


def keys(split: int, first: int, count: int) -> Tensor:
    """Instance keys; those of the splits never coincide."""
    return seeding.fold(torch.arange(first, first + count), 31, split)


def started(config: EnvConfig, key: Tensor, measured: bool) -> Population:
    """Hosts at the start of the episodes `key`."""
    spec = PopulationSpec(**{**vars(population_spec(config)), "measured": measured})
    population = Population(spec, len(key))
    population.reset(torch.arange(len(key)), draw_context(config, key)[0])
    return population


def labels(instances: str, chunk: int) -> dict[str, Tensor]:
    """Random episodes in which some germinations are tried on forks at each decision.

    Returns the features of their slots [m, F], their blueprints [m], what they gained over waiting [m] in points at the
    host's own future, and the episodes [m].
    """
    config = config_of(instances)
    generator = torch.Generator().manual_seed(chunk)
    count = CHUNK["labels"]
    population = started(config, keys(TRAINING, chunk * count, count), True)
    layout = ActionLayout(population.slots, len(population.catalogue))
    observer, everyone = Observer(population, config.epochs), torch.arange(count)
    found: dict[str, list[Tensor]] = {"features": [], "blueprint": [], "gain": [], "episode": [], "epoch": []}
    for epoch in range(config.epochs):
        if epoch >= FIRST and (epoch - FIRST) % EVERY == 0 and epoch < config.epochs - 2:
            mask = layout.mask(population)
            mask[:, 0] = False
            mask[:, 1 + layout.slots * layout.blueprints :] = False
            able = everyone[mask.any(1)]
            if len(able):
                tried = torch.multinomial(mask[able].float(), LABELS, replacement=True, generator=generator)
                actions = torch.cat([torch.zeros_like(tried[:, :1]), tried], dim=1)
                rows = able[:, None].expand_as(actions)
                value = lookahead.tried(population, config, rows.flatten(), actions.flatten(), "own").view_as(actions)
                slot, blueprint = (tried - 1) // layout.blueprints, (tried - 1) % layout.blueprints
                found["features"].append(features(observer())[able[:, None], slot].flatten(0, 1))
                found["blueprint"].append(blueprint.flatten())
                found["gain"].append((value[:, 1:] - value[:, :1]).flatten())
                found["episode"].append((chunk * count + able[:, None].expand_as(tried)).flatten())
                found["epoch"].append(torch.full_like(blueprint.flatten(), epoch))
                act = torch.rand(len(able), generator=generator) < 0.35
                actions = torch.zeros(count, dtype=torch.int64)
                actions[able] = torch.where(act, tried[:, 0], 0)
                layout.execute(population, actions)
        population.train_epoch()
    return {name: torch.cat(values) for name, values in found.items()}


def oracle(instances: str, split: int, chunk: int) -> dict[str, Tensor]:
    """Every single germination at epoch FIRST: value and test points [m, actions], nan where it is not legal; and the
    features of every slot [m, slots, F] at that epoch."""
    config = config_of(instances)
    count = CHUNK["oracle"]
    population = started(config, keys(split, chunk * count, count), True)
    for _ in range(FIRST):
        population.train_epoch()
    seen = features(Observer(population, config.epochs)())
    rows, actions = germinations(population)
    layout = ActionLayout(population.slots, len(population.catalogue))
    outcomes = []
    for first in range(0, len(rows), 384):
        fork = population.fork(rows[first : first + 384], future=True)
        layout.execute(fork, actions[first : first + 384])
        outcomes.append(finish(fork, config))
    outcome = Outcome.cat(outcomes)
    size = 1 + layout.slots * layout.blueprints
    tables = {}
    for name in ("value", "test"):
        tables[name] = torch.full((count, size), torch.nan)
        tables[name][rows, actions] = getattr(outcome, name)
    context = population.context
    start = [context.condition, context.strike, context.strike_epoch]
    return {**tables, "features": seen, "conditions": torch.stack(start, dim=2), "depth": context.depth}


def look(instances: str, split: int, chunk: int, mode: str, margin: float) -> dict[str, Tensor]:
    """Episodes of a controller that trains forks before each decision: test points and growth, each [m].

    Args:
        mode: "greedy" (each germination alone, without what is still to come), "clairvoyant" (with the host's own
            future), or "planned": the best few of the greedy look-ahead again, followed by the linear scorer, in drawn
            futures, against waiting and letting the linear scorer go on.
        margin: points that a germination must gain over waiting.
    """
    config = config_of(instances)
    count = CHUNK["lookahead"]
    population = started(config, keys(split, chunk * count, count), False)
    meter = Meter(population, config.epochs)
    layout = ActionLayout(population.slots, len(population.catalogue))
    for epoch in range(config.epochs):
        if epoch >= FIRST and (epoch - FIRST) % EVERY == 0 and epoch < config.epochs - 2:
            rows, actions = germinations(population)
            able = torch.bincount(rows, minlength=count) > 1
            rows, actions = rows[able[rows]], actions[able[rows]]
            if len(rows):
                future: lookahead.Future = "own" if mode == "clairvoyant" else "none"
                value = lookahead.tried(population, config, rows, actions, future)
                if mode == "planned":
                    rows, actions = lookahead.finalists(rows, actions, value, FINALISTS)

                    def follower(at: int = epoch + 1) -> baselines.Controller:
                        controller = controller_of("linear", instances)
                        controller.epoch = at
                        return controller

                    value = lookahead.tried(population, config, rows, actions, "drawn", follower, FUTURES)
                layout.execute(population, lookahead.best(rows, actions, value, count, margin))
        meter.train_epoch(evaluate=False)
    outcome = finish(population, config, meter=meter)
    return {"test": outcome.test, "growth": outcome.growth, "value": outcome.value}


def controller_of(name: str, instances: str, knobs: dict[str, Any] | None = None) -> Any:
    """A baseline with knobs, else with those that have been tuned; read afresh, since the study writes them."""
    config = config_of(instances)
    given = baselines.BaselinesConfig()
    for key, value in (knobs or {}).items():
        setattr(getattr(given, name), key, value)
    baselines.forget()
    controller = baselines.make(name, given, instances, list(config.blueprints), 0)
    controller.begin(0)
    return controller


def play(instances: str, split: int, count: int, name: str, knobs: dict[str, Any] | None) -> dict[str, Tensor]:
    """Episodes of a controller: test points, growth and value, each [count]; `large` is a host that starts wide."""
    config = config_of(instances)
    if name == "large":
        return large(config, keys(split, 0, count))
    population = started(config, keys(split, 0, count), True)
    controller = controller_of(name, instances, knobs)
    controller.begin(count)
    outcome = finish(population, config, controller)
    return {"test": outcome.test, "growth": outcome.growth, "value": outcome.value}


def large(config: EnvConfig, key: Tensor) -> dict[str, Tensor]:
    """Healthy hosts of twice the width on the same data; no rent is charged."""
    spec = population_spec(config)
    host = type(spec.host)(**{**vars(spec.host), "width": 2 * spec.host.width})
    population = Population(PopulationSpec(**{**vars(spec), "host": host, "measured": False}), len(key))
    context = draw_context(config, key)[0]
    context.width = torch.full_like(context.width, host.width)
    context.condition = context.strike = torch.zeros_like(context.condition)
    population.reset(torch.arange(len(key)), context)
    outcome = finish(population, config)
    return {"test": outcome.test, "growth": outcome.growth, "value": outcome.value}


# ---- the study ------------------------------------------------------------------------------------------------------


class Study:
    """The chunks of one environment: computed by workers once, and read from the cache ever after."""

    def __init__(self, instances: str, pool: Pool, folder: Path):
        self.instances, self._pool, self._folder = instances, pool, folder / instances.replace("/", "-")

    def run(self, what: str, jobs: list[tuple[Callable[..., dict[str, Tensor]], tuple]]) -> list[dict[str, Tensor]]:
        """The results of `function(instances, *arguments)` for each job, in order."""
        paths = []
        for function, arguments in jobs:
            name = "-".join([function.__name__, *map(_plain, arguments)])
            paths.append(self._folder / f"{name}.pt")
        return self._pool.run(
            f"{self.instances} {what}",
            [(f, (self.instances, *a), path) for (f, a), path in zip(jobs, paths, strict=True)],
        )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "_".join(f"{k}={v}" for k, v in value.items()) or "default"
    return "tuned" if value is None else str(value)


def stacked(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def main() -> None:
    import headroom as shared  # as the analysis sees it, which is not __main__
    from headroom_analysis import analyse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [f"{task}/{kind}" for task in tasks.available() for kind in (*KINDS, "mixture")]
    parser.add_argument("instances", nargs="*", default=everything, metavar="TASK/KIND")
    for part, default, what in (
        ("labels", 3, f"{CHUNK['labels']} random episodes to fit the linear scorer on"),
        ("oracle", 3, f"{CHUNK['oracle']} instances for the oracle, as many again for its best fixed choice"),
        ("lookahead", 1, f"{CHUNK['lookahead']} instances for each look-ahead"),
    ):
        parser.add_argument(f"--{part}", type=int, default=default, help=f"chunks of {what} (default {default})")
    parser.add_argument("--play", type=int, default=256, help="instances for the other controllers (default 256)")
    parser.add_argument("--tuning", type=int, default=128, help="instances to tune knobs on (default 128)")
    parser.add_argument("--tune-margins", action="store_true", help="tune the look-aheads' margins too")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, help="look-aheads to play (all)")
    parser.add_argument("--shrink", type=int, default=1, help="divides the sizes of all chunks (default 1)")
    parser.add_argument("--workers", type=int, default=2, help="processes, each of one thread (default 2)")
    arguments = parser.parse_args()
    for name in arguments.instances:
        if name not in everything:
            parser.error(f"{name}: no such environment; choose from {', '.join(everything)}")

    given = vars(arguments)
    sizes = Sizes(**{name: given[name] for name in Sizes.__dataclass_fields__})
    for part in CHUNK:  # before the workers start, which inherit it
        shared.CHUNK[part] = CHUNK[part] // arguments.shrink
    folder = CACHE if arguments.shrink == 1 else CACHE.with_name(f"{CACHE.name}-{arguments.shrink}")
    with Pool(arguments.workers) as pool:
        for name in arguments.instances:
            found = analyse(Study(name, pool, folder), sizes)
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / f"{name.replace('/', '-')}.json").write_text(json.dumps(found, indent=1) + "\n")
            for controller, row in found["controllers"].items():
                print(f"{name:24} {controller:24} {row['points']['mean']:6.1f} {row['over_never']['mean']:+6.1f}")


if __name__ == "__main__":
    main()
