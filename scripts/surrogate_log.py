"""Who plays the episodes that the surrogate is fitted to, and what is logged of them. Run by `fit_surrogate.py`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from envs.config import EnvConfig
from envs.contexts import MixtureConfig
from envs.growth_env import GrowthEnv, population_spec
from esper.graph import GraphBatch
from esper.growth.actions import Verb
from esper.growth.context import Context
from esper.growth.population import Population
from esper.growth.statistics import Statistics
from esper.tamiyo import baselines
from esper.tamiyo.baselines import BaselinesConfig, Controller
from esper.tamiyo.baselines.base import layout

Choice = tuple[str, dict[str, Any]]  # a controller and its knobs


def planting(name: str, *blueprints: str, **knobs: Any) -> list[Choice]:
    """A controller with each of the blueprints."""
    return [(name, {"blueprint": b, **knobs}) for b in blueprints]


EXPLORER = "explorer"
SCORER = "digits/sequential"  # whose linear scorer plays
MIXTURE = MixtureConfig(repair=0.3, sequential=0.35, shift=0.15, growth=0.1, plain=0.1)  # of the logged instances
ROUNDS = 2  # of all groups, on new instances
EACH, FIRST = 32, 5000  # episodes of a group, and the first group's first instance
GROUPS: list[Choice] = [
    *[("never", {})] * 2,
    *[("random", {})] * 3,
    *[(EXPLORER, {})] * 8,
    *planting("all_at_start", "bypass", "norm", "mlp", "widen", "low_rank"),
    *planting("periodic", "bypass", "norm", "mlp", every=4),
    *planting("plateau", "bypass", "norm", "mlp"),
    *planting("statistic", "bypass", threshold=0.5),
    *planting("statistic", "norm", threshold=0.6),
    *planting("statistic", "mlp", threshold=0.7),
    *planting("gradient_norm", "bypass", "norm"),
    *planting("gradmax", "bypass", "norm"),
    *planting("probe", "bypass", "norm", "mlp"),
]
"""Who plays the logged episodes."""


class Explorer:
    """Random, with a taste of each host's own for verbs and blueprints, so that episodes differ."""

    def __init__(self, seed: int, blueprints: int):
        self._generator, self._blueprints = torch.Generator().manual_seed(seed), blueprints

    def begin(self, hosts: int) -> None:
        verbs = torch.randn(hosts, len(Verb), generator=self._generator)
        self._verbs = 1.2 * verbs + torch.tensor([2.0, 0.5, -1.0, -0.5, -1.5])
        self._kinds = 1.5 * torch.randn(hosts, self._blueprints, generator=self._generator)

    def act(self, graph: GraphBatch) -> Tensor:
        verbs, _, choices = layout(graph).table()
        kinds = self._kinds[:, choices.clamp(max=self._blueprints - 1)]
        taste = (self._verbs[:, verbs] + torch.where(verbs == Verb.GERMINATE, kinds, 0.0)).exp()
        legal = graph.action_mask.float()
        count = (legal @ F.one_hot(verbs, len(Verb)).float())[:, verbs].clamp(min=1)
        # The legal actions of a verb share its weight.
        return torch.multinomial(taste * legal / count, 1, generator=self._generator).squeeze(1)


def controller(choice: Choice, config: EnvConfig, seed: int) -> Controller:
    """The controller of a choice, whose other knobs are at their defaults."""
    name, knobs = choice
    if name == EXPLORER:
        return Explorer(seed, len(config.blueprints))
    settings = BaselinesConfig()
    for key, value in knobs.items():
        setattr(getattr(settings, name), key, value)
    return baselines.make(name, settings, SCORER if name == "linear" else "", list(config.blueprints), seed)


def title(choice: Choice) -> str:
    """How a choice is called in the results."""
    name, knobs = choice
    return " ".join([name, *(f"{key}={value}" for key, value in knobs.items())])


class LoggedPopulation(Population):
    """Keeps what is measured after each epoch."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.log: dict[str, list[Tensor]] = {field.name: [] for field in fields(Statistics)}
        self.log["validation_loss"] = []

    def note(self) -> None:
        for name, values in self.log.items():
            values.append(getattr(self if name == "validation_loss" else self.statistics, name).clone())

    def reset(self, where: Tensor, context: Context) -> None:
        super().reset(where, context)
        self.note()

    def train_epoch(self, evaluate: bool = True) -> None:
        super().train_epoch(evaluate)
        self.note()


def log(config: EnvConfig) -> dict[str, Tensor]:
    """Plays GROUPS. Of E episodes of T epochs: the contexts (`context_*`, [E, ...]), the `actions` [E, T], statistics
    and validation losses before the first epoch and after each (`log_*`, [E, T + 1, ...]), the `final` loss [E],
    without unfinished seeds, the losses of the `twin` [E, T + 1], and the accuracies at the end."""
    parts = []
    for number, choice in enumerate(ROUNDS * GROUPS):
        player = controller(choice, config, 1000 + number)
        env = GrowthEnv(config, EACH, "train", autoreset=False)
        env.population = population = LoggedPopulation(population_spec(config), EACH)
        env._observer.population = population
        graph, actions = env.reset(FIRST + number * EACH + torch.arange(EACH)), []
        player.begin(EACH)
        for _ in range(config.epochs):
            actions.append(player.act(graph))
            graph, _, _, _, info = env.step(actions[-1])
        part = {f"log_{name}": torch.stack(values, dim=1) for name, values in population.log.items()}
        part |= {f"context_{name}": value.clone() for name, value in vars(population.context).items()}
        part |= {name: info["episodes"][name] for name in info["episodes"] if name.endswith("accuracy")}
        part |= {"actions": torch.stack(actions, dim=1), "final": population.validation_loss.clone()}
        part["twin"] = env._twin[:, : config.epochs + 1].clone()
        parts.append(part)
        print(f"{title(choice):40} {info['episodes']['return'].mean():+.3f}", flush=True)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
