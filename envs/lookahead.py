"""Controllers that may train forks of a host to see what an action leads to: ceilings for those that may not.

A causal look-ahead forks a host as it is now and takes the strikes and shifts that are still to come out of the fork,
or draws others in their place; it never sees the host's own future. The clairvoyant oracle keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from envs.config import EnvConfig
from envs.growth_env import GrowthEnv, draw_context
from envs.points import PARTS, RENT, Meter
from esper.graph import GraphBatch
from esper.growth.actions import WAIT, ActionLayout, Verb
from esper.growth.conditions import NEVER
from esper.growth.context import Context
from esper.growth.lifecycle import is_kept
from esper.growth.observation import Observer
from esper.growth.population import Population
from esper.runtime import seeding
from esper.tamiyo.baselines.base import Controller

Future = Literal["none", "own", "drawn"]

_BATCH = 384  # forks trained side by side


@dataclass
class Outcome:
    """How episodes ended; each [m]. Points are percentages of accuracy, less RENT per 100 % more parameters."""

    value: Tensor  # validation points, averaged over the last epochs: what choices are made by
    test: Tensor  # points
    growth: Tensor  # parameters kept over those of the host

    @staticmethod
    def cat(parts: list[Outcome]) -> Outcome:
        return Outcome(*(torch.cat([getattr(p, name) for p in parts]) for name in Outcome.__dataclass_fields__))


def finish(
    population: Population, config: EnvConfig, controller: Controller | None = None, meter: Meter | None = None
) -> Outcome:
    """Trains to the end of the episode, with `controller` deciding from now on (None: nothing more is done).

    All hosts must be at the same epoch; a controller must have begun, and be at that epoch. A meter that has run from
    the start of the episode makes outcomes of hosts that are scored by area absolute; else only their differences mean
    anything. Hosts that have diverged are worth 0 points, less what they keep.
    """
    everyone = torch.arange(population.hosts)
    layout = ActionLayout(population.slots, len(population.catalogue))
    observer = Observer(population, config.epochs) if controller else None
    meter = meter or Meter(population, config.epochs)
    for _ in range(int(population.epoch[0]), config.epochs):
        if controller and observer:
            layout.execute(population, controller.act(observer()).cpu())
        meter.train_epoch(evaluate=controller is not None)
    diverged = population.diverged()  # before the seeds are gone that it may be due to
    population.remove_unfinished(torch.ones(population.hosts, dtype=torch.bool))
    growth = population.seed_parameters(is_kept(population.lifecycle.stage)) / population.host_parameters()
    value, test = (meter.accuracy(everyone, split).masked_fill(diverged, 0.0) for split in PARTS)
    return Outcome(100 * value - RENT * growth, 100 * test - RENT * growth, growth)


def germinations(population: Population) -> tuple[Tensor, Tensor]:
    """(row, action) of WAIT and of every legal germination, row by row."""
    layout = ActionLayout(population.slots, len(population.catalogue))
    verbs = layout.table()[0]
    allowed = layout.mask(population) & ((verbs == Verb.GERMINATE) | (verbs == Verb.WAIT))
    rows, actions = allowed.nonzero(as_tuple=True)
    return rows, actions


def redrawn(context: Context, config: EnvConfig, epoch: Tensor, salt: int) -> Context:
    """The same instances with other strikes after `epoch`, drawn as the environment draws them.

    Stages that are defective or have been struck are not struck anew.
    """
    now = context.without_future(epoch)
    other, _ = draw_context(config, seeding.fold(context.key, 977, salt))
    exists = torch.arange(context.condition.shape[1]) < context.depth[:, None]
    struck = (now.strike_epoch < NEVER) | ((now.condition >= 1) & (now.condition <= 5))
    hit = (other.strike_epoch > epoch[:, None]) & (other.strike_epoch < NEVER) & exists & ~struck
    now.strike_epoch = torch.where(hit, other.strike_epoch, now.strike_epoch)
    now.strike = torch.where(hit, other.strike, now.strike)
    now.strike_severity = torch.where(hit, other.strike_severity, now.strike_severity)
    return now


def tried(
    population: Population,
    config: EnvConfig,
    rows: Tensor,
    actions: Tensor,
    future: Future,
    controller: Callable[[], Controller] | None = None,
    futures: int = 1,
) -> Tensor:
    """[m], the value of doing `actions` [m] now on copies of the hosts `rows` [m], averaged over drawn futures.

    Args:
        controller: makes a controller, at this epoch, that decides after the action; None does nothing more.
    """
    layout = ActionLayout(population.slots, len(population.catalogue))
    total = torch.zeros(len(rows))
    for salt in range(futures):
        values = []
        for first in range(0, len(rows), _BATCH):
            part = slice(first, first + _BATCH)
            fork = population.fork(rows[part], future=future != "none", measured=controller is not None)
            if future == "drawn":
                fork.context = redrawn(fork.context, config, fork.epoch, salt)
            layout.execute(fork, actions[part])
            acting, meter = None, Meter(fork, config.epochs)
            if controller:
                # The action has been taken; the controller goes on from the next epoch.
                meter.train_epoch(evaluate=True)
                acting = controller()
            values.append(finish(fork, config, acting, meter).value)
        total += torch.cat(values)
    return total / futures


def finalists(rows: Tensor, actions: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(rows, actions) of WAIT and of the `count` germinations with the largest values of each host."""
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]  # by host, best first
    order = order[actions[order] != WAIT]
    before = torch.arange(len(order)) - torch.searchsorted(rows[order], rows[order])
    chosen = torch.cat([order[before < count], (actions == WAIT).nonzero().squeeze(1)])
    chosen = chosen[rows[chosen].argsort(stable=True)]
    return rows[chosen], actions[chosen]


def best(rows: Tensor, actions: Tensor, values: Tensor, hosts: int, margin: float = 0.0) -> Tensor:
    """[hosts], the action of the largest value of each host; WAIT unless it gains more than `margin` over WAIT."""
    table = torch.full((hosts, int(actions.max()) + 1), -torch.inf)
    table[rows, actions] = values
    top, action = table.max(1)
    return torch.where(top > table[:, WAIT] + margin, action, WAIT)


class LookAhead:
    """The greedy look-ahead behind the interface of the baselines, in the environment's own returns: it germinates what
    gains most over waiting if nothing more is done.

    Args:
        margin: return that a germination must gain.
        future: forks keep the host's own future: the clairvoyant oracle.
        first: the first epoch it may act in.
        every: epochs between two decisions.
    """

    def __init__(self, margin: float = 0.0, future: bool = False, first: int = 3, every: int = 3):
        self.margin, self.future, self.first, self.every = margin, future, first, every

    def watch(self, env: GrowthEnv) -> None:
        """Tells it whose hosts it is to fork."""
        self._env = env

    def begin(self, hosts: int) -> None:
        self._epoch = 0

    def act(self, graph: GraphBatch) -> Tensor:
        env, epoch = self._env, self._epoch
        self._epoch += 1
        if epoch < self.first or (epoch - self.first) % self.every or not env.running:
            return torch.full((len(graph),), WAIT)
        rows, actions = germinations(env.population)
        return best(rows, actions, env.tried(rows, actions, self.future), len(graph), self.margin)
