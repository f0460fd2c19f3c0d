"""Controllers that may train forks of a host to see what an action leads to: ceilings for those that may not.

A causal look-ahead forks a host as it is now and takes the strikes and shifts that are still to come out of the fork, or
draws others in their place; it never sees the host's own future. The clairvoyant oracle keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from envs.config import EnvConfig
from envs.growth_env import draw_context
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
    """How episodes ended; each [m]. Points are percentages of accuracy, less `RENT` per 100 % more parameters."""

    loss: Tensor
    validation: Tensor  # points
    test: Tensor
    growth: Tensor  # parameters kept over those of the host

    @staticmethod
    def cat(parts: list[Outcome]) -> Outcome:
        return Outcome(*(torch.cat([getattr(p, name) for p in parts]) for name in Outcome.__dataclass_fields__))

    def value(self) -> Tensor:
        """What a choice is made by: validation points, the loss breaking near-ties of few samples."""
        return self.validation - LOSS_WEIGHT * self.loss.nan_to_num(nan=20.0, posinf=20.0).clamp(max=20)


RENT = 10.0
LOSS_WEIGHT = 1.0


def finish(population: Population, config: EnvConfig, controller: Controller | None = None) -> Outcome:
    """Trains to the end of the episode, with `controller` deciding from now on (None: nothing more is done).

    All hosts must be at the same epoch; a controller must have begun, and be at that epoch.
    """
    everyone = torch.arange(population.hosts)
    layout = ActionLayout(population.slots, len(population.catalogue))
    observer = Observer(population, config.epochs) if controller else None
    left = config.epochs - int(population.epoch[0])
    for _ in range(left):
        if controller and observer:
            layout.execute(population, controller.act(observer()).cpu())
        population.train_epoch(evaluate=controller is not None)
    population.remove_unfinished(torch.ones(population.hosts, dtype=torch.bool))
    growth = population.seed_parameters(is_kept(population.lifecycle.stage)) / population.host_parameters()
    losses, asked, _ = population._validate(everyone, population.lifecycle.alpha)
    return Outcome(
        loss=((losses * asked).sum(1) / asked.sum(1).clamp(min=1)).cpu(),
        validation=100 * population.accuracy(everyone, "validation").cpu() - RENT * growth,
        test=100 * population.accuracy(everyone, "test").cpu() - RENT * growth,
        growth=growth,
    )


def germinations(population: Population) -> tuple[Tensor, Tensor]:
    """(row, action) of WAIT and of every legal germination, row by row."""
    layout = ActionLayout(population.slots, len(population.catalogue))
    verbs = layout.table()[0]
    return (layout.mask(population) & ((verbs == Verb.GERMINATE) | (verbs == Verb.WAIT))).nonzero(as_tuple=True)


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
            acting = None
            if controller:
                # The action has been taken; the controller goes on from the next epoch.
                fork.train_epoch()
                acting = controller()
            values.append(finish(fork, config, acting).value())
        total += torch.cat(values)
    return total / futures


def best(rows: Tensor, actions: Tensor, values: Tensor, hosts: int, margin: float = 0.0) -> Tensor:
    """[hosts], the action of the largest value of each host; WAIT unless it gains more than `margin` over WAIT."""
    table = torch.full((hosts, int(actions.max()) + 1), -torch.inf)
    table[rows, actions] = values
    top, action = table.max(1)
    return torch.where(top > table[:, WAIT] + margin, action, WAIT)
