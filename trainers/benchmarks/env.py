"""The suite `env`: how fast the growth engine is, and whether what it is compared with does the same work."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from envs.config import EnvConfig, load_config
from envs.growth_env import GrowthEnv, draw_context, population_spec
from esper.growth.actions import RAMPS, WAIT, ActionLayout, Verb
from esper.growth.lifecycle import Stage
from esper.growth.population import Population
from esper.runtime import seeding
from esper.runtime.errors import ConfigError, EsperError
from trainers.benchmarks import Report, suite
from trainers.benchmarks.plain import PlainHost
from trainers.benchmarks.ratios import LOWER, Ratio
from trainers.benchmarks.timing import Spread, timed
from trainers.config import BenchmarkConfig
from trainers.progress import Reporter

TOLERANCE = 1e-3
"""How far the validation losses of the engine and the plain loop may lie apart, relative to losses above 1."""

AGE = 6
"""Epochs that hosts grow for before anything is timed."""

_KEYS = 201  # salt of the instances' keys


# ---- hosts in the middle of an episode -------------------------------------------------------------------------------


@dataclass
class _Plan:
    """What happens to one seed: germinated at an epoch, blended a while later, then kept, fossilized or culled."""

    slot: int
    blueprint: int
    epoch: int
    fate: str
    cull_at: int
    germinated: bool = False


def _plans(population: Population, host: int, dice: random.Random) -> list[_Plan]:
    """0 to 2 seeds in different slots, germinated at any epoch up to AGE."""
    depth = int(population.context.depth[host])
    fitting = population.fits.nonzero().flatten().tolist()
    plans = []
    for slot in dice.sample(range(depth), min(dice.randint(0, 2), depth)):
        epoch, fate = dice.randint(0, AGE), dice.choices(("fossilize", "keep", "cull"), (4, 3, 3))[0]
        plans.append(_Plan(slot, dice.choice(fitting), epoch, fate, cull_at=epoch + dice.randint(1, 4)))
    return plans


def _action(layout: ActionLayout, stages: list[int], legal: list[bool], plans: list[_Plan], epoch: int) -> int:
    """The first action that is due and legal."""
    for plan in plans:
        if not plan.germinated:
            action = layout.index(Verb.GERMINATE, plan.slot, plan.blueprint)
            if plan.epoch <= epoch and legal[action]:
                plan.germinated = True
                return action
            continue
        due = []
        if plan.fate == "cull" and plan.cull_at <= epoch:
            due.append(layout.index(Verb.CULL, plan.slot))
        if plan.fate == "fossilize":
            due.append(layout.index(Verb.FOSSILIZE, plan.slot))
        if stages[plan.slot] == Stage.TRAINING and plan.epoch < epoch:
            due.append(layout.index(Verb.BLEND, plan.slot, RAMPS.index(3)))
        for action in due:
            if legal[action]:
                return action
    return WAIT


def grown(config: EnvConfig, hosts: int, seed: int, device: str, on_epoch: Callable[[int], None]) -> Population:
    """Hosts of `config`'s mixture of contexts after AGE epochs, with seeds in every stage of their lifecycle.

    Args:
        on_epoch: called with the number of host epochs that each step has done.
    """
    population = Population(population_spec(config), hosts, device)
    everyone = torch.arange(hosts)
    key = seeding.fold(torch.full_like(everyone, seed), _KEYS, everyone)
    population.reset(everyone, draw_context(config, key)[0])
    layout = ActionLayout(population.slots, len(population.catalogue))
    dice = random.Random(seed)
    plans = [_plans(population, host, dice) for host in range(hosts)]
    for epoch in range(AGE + 1):
        mask, stages = layout.mask(population).tolist(), population.lifecycle.stage.tolist()
        actions = [_action(layout, stages[host], mask[host], plans[host], epoch) for host in range(hosts)]
        layout.execute(population, torch.tensor(actions))
        if epoch < AGE:
            population.train_epoch()
            on_epoch(hosts)
    return population


def stage_counts(population: Population) -> dict[str, int]:
    """How many slots are in each stage."""
    stage = population.lifecycle.stage
    return {kind.name: int((stage == kind).sum()) for kind in Stage}


def picked(population: Population, count: int) -> list[int]:
    """`count` hosts that stand for all: evenly over their order by compute."""
    p = population
    live = p.lifecycle.blueprint >= 0
    order = (p.host_flops() + p.seed_flops_now(live)).argsort(stable=True).tolist()
    return [order[int((i + 0.5) * len(order) / count)] for i in range(count)]


# ---- one task --------------------------------------------------------------------------------------------------------


class _Task:
    """The measurements of one task; `tick` is told of host epochs done."""

    def __init__(self, env: EnvConfig, config: BenchmarkConfig, tick: Callable[[int], None]):
        self.env, self.settings, self.seed = env, config.benchmark, config.seed
        self.device, self.tick = torch.device(config.runtime.device), tick
        self.population = grown(env, self.settings.hosts, config.seed, config.runtime.device, tick)
        self.state = self.population.state_dict()
        self.one_by_one = picked(self.population, self.settings.hosts_one_by_one)
        self.stages = stage_counts(self.population)

    def _population(self, hosts: int, **changed: Any) -> Population:
        return Population(replace(self.population.setup, **changed), hosts, self.device)

    def _timed(self, function: Callable[[], object]) -> float:
        return timed(function, self.device, self.settings.clock)

    def _time(self, population: Population, rows: Tensor | None = None) -> float:
        """Seconds of an epoch from the saved state (of its hosts `rows`)."""
        population.load_state_dict(self.state, rows)
        seconds = self._timed(population.train_epoch)
        self.tick(population.hosts)
        return seconds

    def check(self) -> dict[str, Any]:
        """The same epoch in the population, alone in the engine, and in the plain loop.

        Raises:
            EsperError: they do not do the same.
        """
        stage = self.population.lifecycle.stage
        examples = [(stage == kind).any(1).nonzero().flatten().tolist()[:1] for kind in Stage]
        hosts = sorted({*self.one_by_one, *(host for example in examples for host in example)})
        self.population.load_state_dict(self.state)
        self.population.train_epoch()
        alone, rows = self._population(1), []
        for host in hosts:
            together = float(self.population.validation_loss[host])
            alone.load_state_dict(self.state, torch.tensor([host]))
            plain = float(PlainHost(alone, 0).epoch()["validation_loss"])
            alone.train_epoch()
            single = float(alone.validation_loss[0])
            names = [Stage(s).name for s in stage[host].unique().tolist()]
            rows.append({"host": host, "stages": names, "population": together, "engine": single, "plain": plain})
            for name, loss in (("plain loop", plain), ("engine with one host", single)):
                if not abs(loss - together) <= TOLERANCE * max(1.0, abs(together)):
                    raise EsperError(
                        f"{self.env.name}, host {host} ({', '.join(names)}): validation loss {together:.6f} in the "
                        f"population but {loss:.6f} in the {name}; the comparison would not be honest"
                    )
        return {
            "hosts": rows,
            "largest_difference": {
                name: max(abs(row[name] - row["population"]) for row in rows) for name in ("plain", "engine")
            },
        }

    def throughput(self) -> dict[str, Any]:
        """Seconds of an epoch: the population with and without statistics and as stacked tensors, then some hosts one
        by one in both ways."""
        settings = self.settings
        everyone, bare = self._population(settings.hosts), self._population(settings.hosts, measured=False)
        stacked, alone = self._population(settings.hosts, engine="stacked"), self._population(1)
        names = ("population", "unmeasured", "stacked", "plain", "engine")
        rounds: dict[str, list[Any]] = {name: [] for name in names}
        for number in range(settings.warmup + settings.repeats):
            taken: dict[str, Any] = {"plain": [], "engine": []}
            together = {"population": everyone, "unmeasured": bare, "stacked": stacked}
            # What runs first must not always be the same.
            for name in sorted(together, reverse=bool(number % 2)):
                taken[name] = self._time(together[name])
            for host in self.one_by_one:
                rows = torch.tensor([host])
                alone.load_state_dict(self.state, rows)
                plain = PlainHost(alone, 0)
                taken["plain"].append(self._timed(plain.epoch))
                taken["engine"].append(self._time(alone, rows))
                self.tick(1)
            if number >= settings.warmup:
                for name, seconds in taken.items():
                    rounds[name].append(seconds)
        return rounds

    def sizes(self) -> dict[str, list[float]]:
        """Seconds of an epoch of N hosts, which are copies of those of the population."""
        populations = {n: self._population(n) for n in self.settings.sizes}
        seconds: dict[str, list[float]] = {str(n): [] for n in populations}
        for number in range(1 + self.settings.size_repeats):
            for n, population in populations.items():
                taken = self._time(population, torch.arange(n) % self.settings.hosts)
                if number:
                    seconds[str(n)].append(taken)
        return seconds

    def steps(self) -> dict[str, list[float]]:
        """Seconds of every step of the environment over one episode, and of building its observations."""
        env = GrowthEnv(self.env, self.settings.hosts, device=self.device)
        env.reset(torch.arange(self.settings.hosts) + self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        result: dict[str, list[float]] = {"step": [], "observation": []}
        for _ in range(self.env.epochs):
            actions = torch.multinomial(env.action_mask().float(), 1, generator=generator).squeeze(1)
            env.graph_build_s.clear()
            result["step"].append(self._timed(partial(env.step, actions)))
            result["observation"].append(sum(env.graph_build_s))
            self.tick(self.settings.hosts)
        return result

    def run(self) -> dict[str, Any]:
        check = self.check()
        raw = {"epoch": self.throughput(), "sizes": self.sizes(), "steps": self.steps()}
        return {
            "environment": asdict(self.env),
            "stages": self.stages,
            "one_by_one": self.one_by_one,
            "check": check,
            "seconds": raw,
            "summary": self._summary(raw),
        }

    def _summary(self, raw: dict[str, Any]) -> dict[str, Any]:
        hosts, epoch = self.settings.hosts, raw["epoch"]
        rates = {
            "population": [hosts / seconds for seconds in epoch["population"]],
            **{name: [hosts / seconds for seconds in epoch[name]] for name in ("unmeasured", "stacked")},
            **{name: [len(each) / sum(each) for each in epoch[name]] for name in ("plain", "engine")},
        }

        def over(name: str) -> Spread:
            return Spread.of([a / b for a, b in zip(rates["population"], rates[name], strict=True)])

        fastest = min(("plain", "engine"), key=lambda name: over(name).median)
        share = [1 - b / a for a, b in zip(epoch["population"], epoch["unmeasured"], strict=True)]
        steps, observations = raw["steps"]["step"], raw["steps"]["observation"]
        ordinary = slice(0, max(len(steps) - 1, 1))  # the last one also begins new episodes
        return {
            "host_epochs_per_second": {name: Spread.of(values)._asdict() for name, values in rates.items()},
            "engine": "native" if self.population.native else "stacked",
            "population_over": {name: over(name)._asdict() for name in ("stacked", "plain", "engine")},
            "faster_one_by_one": fastest,
            "milliseconds_per_host": {
                n: Spread.of([1000 * value / int(n) for value in values])._asdict()
                for n, values in raw["sizes"].items()
            },
            "statistics_share": Spread.of(share)._asdict(),
            "steps_per_second": hosts * len(steps) / sum(steps),
            "step_milliseconds": Spread.of([1000 * value for value in steps[ordinary]])._asdict(),
            "observation_share": sum(observations[ordinary]) / sum(steps[ordinary]),
        }


# ---- the suite -------------------------------------------------------------------------------------------------------


def _work(env: EnvConfig, config: BenchmarkConfig) -> int:
    """Host epochs that a task takes."""
    s = config.benchmark
    rounds = (s.warmup + s.repeats) * (3 * s.hosts + 2 * s.hosts_one_by_one)
    return s.hosts * AGE + rounds + (1 + s.size_repeats) * sum(s.sizes) + env.epochs * s.hosts


@suite("env")
def run(config: BenchmarkConfig) -> Report:
    """All measurements, task by task."""
    environments = []
    for name in config.benchmark.tasks:
        try:
            environments.append(load_config(name))
        except ConfigError as error:
            raise ConfigError(f"benchmark.tasks={name}: {error}") from error
    results, done = {}, 0
    with Reporter("benchmark", sum(_work(env, config) for env in environments), "host-epochs") as reporter:

        def tick(count: int) -> None:
            nonlocal done
            done += count
            reporter.update(done, note)

        for env in environments:
            note = env.name
            results[env.name] = _Task(env, config, tick).run()
    compared = ratios(results, config.benchmark.hosts)
    return Report({"ratios": compared, "results": results}, _tables(results, config))


def ratios(results: dict[str, Any], hosts: int) -> dict[str, Ratio]:
    """Name -> what is compared, turn by turn, of each task with `hosts` hosts together."""
    found: dict[str, Ratio] = {}
    others = {"stacked": "as stacked tensors", "plain": "as the plain loop", "engine": "as one by one"}
    for task, result in results.items():
        epoch, sizes = result["seconds"]["epoch"], result["seconds"]["sizes"]

        def add(name: str, ratio: Ratio, task: str = task) -> None:
            found[f"{task}, {hosts} hosts: {name}"] = ratio

        def over(a: list[float], b: list[float], factor: float = 1.0) -> Ratio:
            return Ratio.of((factor * x / y for x, y in zip(a, b, strict=True)), LOWER)

        for other, label in others.items():
            together = result["summary"]["population_over"][other]
            add(f"together, times as fast {label}", Ratio(together["median"], together["low"], together["high"]))
        add("an epoch with statistics, times one without", over(epoch["population"], epoch["unmeasured"]))
        counts = list(sizes)
        for n in counts[1:]:
            cost = over(sizes[n], sizes[counts[0]], int(counts[0]) / int(n))
            add(f"a host among {n}, times one among {counts[0]}", cost)
    return found


def _spread(values: dict[str, float], form: str, factor: float = 1.0) -> str:
    return Spread(*(factor * value for value in values.values())).text(form)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right")
    return table


def _tables(results: dict[str, Any], config: BenchmarkConfig) -> list[Table]:
    s, runtime = config.benchmark, config.runtime
    where = f"{runtime.device}, {runtime.threads} thread(s), {s.clock} clock"
    names = {
        "population": f"{s.hosts} together",
        "stacked": f"{s.hosts} together, stacked tensors",
        "plain": "plain loop, one by one",
        "engine": "engine, one by one",
    }
    throughput = _table(f"An epoch with statistics, {where}", "task", "hosts", "host-epochs/s", "together is faster by")
    sizes = _table("Cost of a host in an epoch of N", "task", "N", "ms per host", "of the smallest N")
    last = ("task", "stages of the slots", "statistics", "env steps/s", "ms a step", "observation")
    rest = _table(f"Statistics and steps, {s.hosts} hosts", *last)
    for task, result in results.items():
        summary = result["summary"]
        for variant, label in names.items():
            times = "" if variant == "population" else _spread(summary["population_over"][variant], ".2f")
            throughput.add_row(task, label, _spread(summary["host_epochs_per_second"][variant], ".1f"), times)
        costs = summary["milliseconds_per_host"]
        smallest = [cost["median"] for cost in costs.values()][:1]
        for n, cost in costs.items():
            sizes.add_row(task, n, _spread(cost, ".2f"), f"{cost['median'] / smallest[0]:.2f}")
        stages = ", ".join(f"{count} {name.lower()}" for name, count in result["stages"].items() if count)
        rest.add_row(
            task,
            stages,
            _spread(summary["statistics_share"], ".1f", 100) + " %",
            f"{summary['steps_per_second']:.0f}",
            _spread(summary["step_milliseconds"], ".0f"),
            f"{100 * summary['observation_share']:.1f} %",
        )
    return [throughput, sizes, rest]
