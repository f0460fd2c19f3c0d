"""How the hidden contexts of episodes are drawn: what is configured, and a pure function of an instance's key."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from esper.growth.conditions import DECOYS, NEVER, Condition
from esper.growth.context import Context
from esper.runtime import seeding
from esper.runtime.errors import ConfigError

KINDS = ("plain", "repair", "sequential", "shift", "growth")
"""Kinds of context, in the order of the numbers that episodes report."""

_SALT = 102  # of the stream of draws; the salts of esper.growth.population and envs.growth_env are other numbers
_UNLIMITED = 1 << 30


@dataclass
class MixtureConfig:
    """Weight of each kind of context."""

    plain: float = 0.0
    repair: float = 0.0
    sequential: float = 0.0
    shift: float = 0.0
    growth: float = 0.0

    def weights(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in KINDS}


@dataclass
class Regime:
    """One kind of training data."""

    weight: float = 1.0
    train_size: list[int] = field(default_factory=lambda: [400, 700])  # log-uniform, in samples
    label_noise: list[float] = field(default_factory=lambda: [0.0, 0.0])  # uniform, share of labels drawn anew


@dataclass
class RepairConfig:
    """At most one defective stage, there from the start."""

    defects: dict[str, float] = field(
        default_factory=lambda: {
            "none": 0.25,
            "choke": 0.30,
            "saturated": 0.20,
            "dying": 0.08,
            "large_init": 0.09,
            "small_init": 0.08,
        }
    )
    decoys: float = 0.45  # share of the other stages that are unusual but benign


@dataclass
class SequentialConfig:
    """Several defects, some of which strike mid-training, and few seeds."""

    count: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.35, 0.3])  # probability of 0, 1, 2 ... defects
    defects: dict[str, float] = field(default_factory=lambda: {"choke": 0.4, "saturated": 0.4, "dying": 0.2})
    at_start: float = 0.5  # share of the defects that are there from the start
    window: list[float] = field(default_factory=lambda: [0.33, 0.67])  # when the others strike, in episodes
    decoys: float = 0.45
    seeds: int = 2  # germinations allowed


@dataclass
class ShiftConfig:
    """New classes, or inputs of another kind, arrive mid-training."""

    incremental: float = 0.5  # share of the instances where classes arrive; in the others inputs change
    classes: list[float] = field(default_factory=lambda: [0.4, 0.7])  # share of the classes met before
    flipped: list[float] = field(default_factory=lambda: [0.2, 0.5])  # share of input features that change sign
    window: list[float] = field(default_factory=lambda: [0.33, 0.5])
    decoys: float = 0.45
    seeds: int = 3


@dataclass
class GrowthConfig:
    """Healthy but undersized hosts, scored by the area under the validation curve over compute."""

    width: list[int] = field(default_factory=lambda: [4, 6])
    seeds: int = 4


@dataclass
class ContextsConfig:
    """Which contexts are drawn, and from what. Ranges are [low, high]."""

    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    learning_rate: list[float] = field(default_factory=lambda: [1e-3, 6e-3])  # log-uniform
    regimes: list[Regime] = field(default_factory=lambda: [Regime()])
    repair: RepairConfig = field(default_factory=RepairConfig)
    sequential: SequentialConfig = field(default_factory=SequentialConfig)
    shift: ShiftConfig = field(default_factory=ShiftConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)

    def validate(self, prefix: str, pool: int) -> None:
        """Checks the values against a training pool of that many samples.

        Raises:
            ConfigError: names the key, the value and the remedy.
        """
        _check_weights(f"{prefix}.mixture", self.mixture.weights(), KINDS)
        _check_weights(f"{prefix}.repair.defects", self.repair.defects, ("none", *_NAMES))
        _check_weights(f"{prefix}.sequential.defects", self.sequential.defects, ("choke", "saturated", "dying"))
        counts = {str(number): weight for number, weight in enumerate(self.sequential.count)}
        _check_weights(f"{prefix}.sequential.count", counts, tuple(counts))
        ranges: dict[str, tuple[list, float, float]] = {
            "learning_rate": (self.learning_rate, 1e-8, 1.0),
            "sequential.window": (self.sequential.window, 0.0, 1.0),
            "shift.window": (self.shift.window, 0.0, 1.0),
            "shift.classes": (self.shift.classes, 0.0, 1.0),
            "shift.flipped": (self.shift.flipped, 0.0, 1.0),
            "growth.width": (self.growth.width, 1, 4096),
        }
        for number, regime in enumerate(self.regimes):
            ranges[f"regimes.{number}.train_size"] = (regime.train_size, 1, pool)
            ranges[f"regimes.{number}.label_noise"] = (regime.label_noise, 0.0, 1.0)
        for key, (values, low, high) in ranges.items():
            check_range(f"{prefix}.{key}", values, low, high)
        for key in ("repair.decoys", "sequential.decoys", "shift.decoys", "sequential.at_start", "shift.incremental"):
            part, name = key.split(".")
            share = getattr(getattr(self, part), name)
            if not 0 <= share <= 1:
                raise ConfigError(f"{prefix}.{key}={share}: give a share from 0 to 1")
        for part in ("sequential", "shift", "growth"):
            seeds = getattr(self, part).seeds
            if seeds < 1:
                raise ConfigError(f"{prefix}.{part}.seeds={seeds}: must be at least 1")
        _check_weights(f"{prefix}.regimes", {str(i): r.weight for i, r in enumerate(self.regimes)}, None)


_NAMES = ("choke", "saturated", "dying", "large_init", "small_init")


def check_range(key: str, values: list, low: float, high: float) -> None:
    """Refuses what is not [a, b] with low <= a <= b <= high.

    Raises:
        ConfigError: names the key, the value and the remedy.
    """
    if len(values) != 2 or not low <= values[0] <= values[1] <= high:
        raise ConfigError(f"{key}={values}: give [low, high] with {low} <= low <= high <= {high}")


def _check_weights(key: str, weights: dict[str, float], known: tuple[str, ...] | None) -> None:
    for name, weight in weights.items():
        if known is not None and name not in known:
            raise ConfigError(f"{key}.{name}: no such kind; choose from {', '.join(known)}")
        if not weight >= 0:
            raise ConfigError(f"{key}.{name}={weight}: must not be negative")
    if not sum(weights.values()) > 0:
        raise ConfigError(f"{key}={weights}: at least one weight must be above 0")


class _Draws:
    """Uniform numbers of m instances, each taken once and by name, so that adding one does not move the others."""

    def __init__(self, key: Tensor):
        self._key, self._next = seeding.fold(key, _SALT), 0

    def __call__(self, count: int | None = None) -> Tensor:
        """[m], or [m, count]."""
        self._next += 1
        drawn = seeding.uniform(seeding.fold(self._key, self._next), count or 1)
        return drawn if count else drawn.squeeze(1)

    def between(self, bounds: list[float]) -> Tensor:
        low, high = bounds
        return low + (high - low) * self()

    def integer(self, bounds: list[int]) -> Tensor:
        low, high = bounds
        return low + (self() * (high - low + 1)).long().clamp(max=high - low)

    def epoch(self, window: list[float], epochs: int, count: int | None = None) -> Tensor:
        low, high = window
        return ((low + (high - low) * self(count)) * epochs).round().long()


def _pick(weights: list[float], u: Tensor) -> Tensor:
    """int64, the shape of `u`: categories drawn with `weights` from uniforms."""
    edges = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    return torch.searchsorted(edges / edges[-1], u.double(), right=True).clamp(max=len(weights) - 1)


def _log_uniform(low: Tensor, high: Tensor, u: Tensor) -> Tensor:
    low, high = low.double().log(), high.double().log()
    return (low + (high - low) * u.double()).exp()


def _conditions(weights: dict[str, float], u: Tensor) -> Tensor:
    """Condition numbers drawn with `weights` by name."""
    numbers = torch.tensor([0 if name == "none" else Condition[name.upper()] for name in weights])
    return numbers[_pick(list(weights.values()), u)]


def draw(
    config: ContextsConfig, width: list[int], stages: list[int], epochs: int, classes: int, key: Tensor
) -> tuple[Context, Tensor]:
    """The contexts of the instances `key` (int64 [m]), and their kinds [m] (indices into KINDS).

    Args:
        config: what to draw.
        width, stages: [low, high], sizes of the hosts.
        epochs: of an episode.
        classes: of the task.
        key: one per instance; everything follows from it.
    """
    draws = _Draws(key)
    m, deepest = len(key), stages[1]
    context = Context.plain(key, width[1], deepest)
    kind = _pick(list(config.mixture.weights().values()), draws())
    context.width, context.depth = draws.integer(width), draws.integer(stages)
    rate = torch.tensor(config.learning_rate)
    context.learning_rate = _log_uniform(rate[0], rate[1], draws()).float()
    sizes = torch.tensor([regime.train_size for regime in config.regimes])
    noises = torch.tensor([regime.label_noise for regime in config.regimes], dtype=torch.float32)
    regime = _pick([regime.weight for regime in config.regimes], draws())
    context.train_size = _log_uniform(sizes[regime, 0], sizes[regime, 1], draws()).round().long()
    context.label_noise = noises[regime, 0] + (noises[regime, 1] - noises[regime, 0]) * draws()

    is_repair, is_sequential, is_shift, is_growth = (kind == KINDS.index(name) for name in KINDS[1:])
    # The stages of a host in random order, those it does not have last: defects take the first ones.
    rank = seeding.permutation(seeding.fold(key, _SALT, 0), context.depth, deepest).argsort(1)
    exists = torch.arange(deepest) < context.depth[:, None]

    number = _pick(config.sequential.count, draws())
    number = torch.where(is_sequential, number, is_repair.long())
    defective = (rank < number[:, None]) & exists
    repair = _conditions(config.repair.defects, draws(deepest))
    sequence = _conditions(config.sequential.defects, draws(deepest))
    defect = torch.where(is_repair[:, None], repair, sequence)
    later = (draws(deepest) >= config.sequential.at_start) & is_sequential[:, None] & defective
    share = torch.zeros(m)
    decoys = (
        (is_repair, config.repair.decoys),
        (is_sequential, config.sequential.decoys),
        (is_shift, config.shift.decoys),
    )
    for mask, chance in decoys:
        share = torch.where(mask, chance, share)
    unusual = (draws(deepest) < share[:, None]) & ~defective & exists
    decoy = torch.tensor(DECOYS)[(draws(deepest) * len(DECOYS)).long()]
    context.condition = torch.where(defective & ~later, defect, torch.where(unusual, decoy, Condition.HEALTHY))
    context.severity = draws(deepest)
    context.strike = torch.where(later, defect, context.condition)
    context.strike_severity = torch.where(later, draws(deepest), context.severity)
    strikes = draws.epoch(config.sequential.window, epochs, deepest)
    context.strike_epoch = torch.where(later, strikes, NEVER)

    incremental = draws() < config.shift.incremental
    context.shift_epoch = torch.where(is_shift, draws.epoch(config.shift.window, epochs), NEVER)
    first = (draws.between(config.shift.classes) * classes).round().long().clamp(min=1)
    context.first_classes = torch.where(is_shift & incremental, first, classes)
    context.flipped = draws.between(config.shift.flipped) * (is_shift & ~incremental)

    context.width = torch.where(is_growth, draws.integer(config.growth.width), context.width)
    context.priced = is_growth
    budgets = (
        (is_sequential, config.sequential.seeds),
        (is_shift, config.shift.seeds),
        (is_growth, config.growth.seeds),
    )
    for mask, seeds in budgets:
        context.seeds = torch.where(mask, seeds, context.seeds)
    return context, kind
