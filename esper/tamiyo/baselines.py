"""Controllers that do not learn. They see what Tamiyo sees, GraphBatch and action mask, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from esper.graph import GraphBatch
from esper.graph.schema import SCHEMA
from esper.growth.actions import RAMPS, WAIT, ActionLayout, Verb
from esper.growth.observation import SLOPE_SCALE
from esper.runtime.errors import ConfigError


@dataclass
class AllAtStartConfig:
    """Knobs of `all_at_start`."""

    blueprint: int = 1  # index into env.blueprints


@dataclass
class PlateauConfig:
    """Knobs of `plateau`."""

    blueprint: int = 1
    slope: float = -0.02  # grow when the log validation loss falls by less than this per epoch
    patience: int = 3  # epochs between two germinations


@dataclass
class BaselinesConfig:
    """Knobs of all of them."""

    ramp: int = 3  # alpha ramp of BLEND, where blending does not start by itself
    all_at_start: AllAtStartConfig = field(default_factory=AllAtStartConfig)
    plateau: PlateauConfig = field(default_factory=PlateauConfig)

    def validate(self, blueprints: int, prefix: str) -> None:
        """Checks the values against an environment with that many blueprints.

        Raises:
            ConfigError: names the key, the value and the remedy.
        """
        if self.ramp not in RAMPS:
            raise ConfigError(f"{prefix}.ramp={self.ramp}: choose one of {RAMPS}")
        for name in ("all_at_start", "plateau"):
            index = getattr(self, name).blueprint
            if not 0 <= index < blueprints:
                raise ConfigError(
                    f"{prefix}.{name}.blueprint={index}: the environment has {blueprints} blueprints; "
                    f"give an index from 0 to {blueprints - 1}"
                )


class Controller(Protocol):
    """Chooses one legal action for each of N hosts; `begin` starts N new episodes.

    The actions are on the device of the graph.
    """

    def begin(self, hosts: int) -> None: ...

    def act(self, graph: GraphBatch) -> Tensor: ...


class Never:
    """Never grows: the twin itself."""

    def begin(self, hosts: int) -> None:
        pass

    def act(self, graph: GraphBatch) -> Tensor:
        return torch.full((len(graph),), WAIT, device=graph.device)


class Random:
    """Uniform over the legal actions."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def begin(self, hosts: int) -> None:
        pass

    def act(self, graph: GraphBatch) -> Tensor:
        weights = graph.action_mask.float().cpu()
        return torch.multinomial(weights, 1, generator=self._generator).squeeze(1).to(graph.device)


def _layout(graph: GraphBatch) -> ActionLayout:
    return ActionLayout(graph.x["slot"].shape[1], graph.x["blueprint"].shape[1])


def _first_legal(graph: GraphBatch, verb: Verb, choice: int) -> tuple[Tensor, Tensor]:
    """The legal action `verb(slot, choice)` with the smallest slot: (whether there is one, its number), each [N]."""
    verbs, _, choices = (column.to(graph.device) for column in _layout(graph).table())
    legal = graph.action_mask & (verbs == verb) & (choices == choice)
    return legal.any(1), legal.int().argmax(1)


def _grow(graph: GraphBatch, when: Tensor, blueprint: int, ramp: int) -> Tensor:
    """GERMINATE in the first free slot of the hosts `when` (bool [N]); else BLEND what waits for it; else WAIT."""
    blendable, blend = _first_legal(graph, Verb.BLEND, RAMPS.index(ramp))
    free, germinate = _first_legal(graph, Verb.GERMINATE, blueprint)
    actions = torch.where(blendable, blend, WAIT)
    return torch.where(when & free, germinate, actions)


class AllAtStart:
    """Fills every slot with one blueprint as early as one action per epoch allows, and keeps what it planted."""

    def __init__(self, config: AllAtStartConfig, ramp: int):
        self.config, self.ramp = config, ramp

    def begin(self, hosts: int) -> None:
        pass

    def act(self, graph: GraphBatch) -> Tensor:
        return _grow(graph, graph.action_mask.any(1), self.config.blueprint, self.ramp)


class Plateau:
    """Germinates in the next free slot when the validation loss has stopped falling."""

    def __init__(self, config: PlateauConfig, ramp: int):
        self.config, self.ramp = config, ramp
        self.begin(0)

    def begin(self, hosts: int) -> None:
        self._since = torch.full((hosts,), self.config.patience)

    def act(self, graph: GraphBatch) -> Tensor:
        feature = graph.x["global"][:, 0]
        slope = feature[:, SCHEMA.feature("global", "slope")] / SLOPE_SCALE
        known = feature[:, SCHEMA.feature("global", "slope_known")] > 0
        self._since = self._since.to(graph.device)
        when = known & (slope > self.config.slope) & (self._since >= self.config.patience)
        actions = _grow(graph, when, self.config.blueprint, self.ramp)
        germinated = _layout(graph).table()[0].to(graph.device)[actions] == Verb.GERMINATE
        self._since = (self._since + 1).masked_fill(germinated, 0)
        return actions


NAMES = ("never", "random", "all_at_start", "plateau")


def make(name: str, config: BaselinesConfig, seed: int) -> Controller:
    """The baseline called `name`.

    Raises:
        KeyError: no such baseline; the message lists those there are.
    """
    if name == "never":
        return Never()
    if name == "random":
        return Random(seed)
    if name == "all_at_start":
        return AllAtStart(config.all_at_start, config.ramp)
    if name == "plateau":
        return Plateau(config.plateau, config.ramp)
    raise KeyError(f"unknown baseline {name!r}; available: {', '.join(NAMES)}")
