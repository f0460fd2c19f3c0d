"""What the workers of scripts/study.py do: pure functions of their arguments, whose results are kept in files."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from headroom_analysis import Neural as Shallow
from headroom_analysis import neural as shallow
from headroom_analysis import regress, ridge
from torch import Tensor, nn

from envs import fork_gains
from envs.config import EnvConfig, load_config
from envs.growth_env import GrowthEnv, population_spec
from envs.lookahead import LookAhead
from envs.points import PARTS, RENT, Meter
from esper.graph import GraphBatch
from esper.growth.population import Population
from esper.growth.state import PopulationSpec
from esper.tamiyo import baselines
from esper.tamiyo.baselines import Controller
from esper.tamiyo.baselines.linear import Linear, LinearKnobs, features
from esper.tamiyo.loading import load_policy
from trainers.evaluation import TamiyoController, play

SETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "digits/mixture": ("training", "held-out instances", {}),
    "digits/repair": ("training", "held-out instances", {}),
    "digits/sequential": ("training", "held-out instances", {}),
    "digits/shift": ("training", "held-out instances", {}),
    "digits/growth": ("training", "held-out instances", {}),
    "digits/plain": ("training", "held-out instances", {}),
    "a/digits/mixture": ("generalisation", "(a) new initialisations", {}),
    "b/digits/mixture": ("generalisation", "(b) wider and deeper", {"host": {"width": [18, 24], "stages": [7, 8]}}),
    "c/digits/mixture": ("generalisation", "(c) more slots", {"host": {"width": [12, 16], "stages": [8, 10]}}),
    "d/digits/mixture": ("generalisation", "(d) longer horizon", {"epochs": 40}),
    "e/segment/mixture": ("generalisation", "(e) new data: segment", {}),
    "e/digits_conv/mixture": ("generalisation", "(e) new data and hosts: digits_conv", {}),
    "e/signal/mixture": ("generalisation", "(e) new data and hosts: signal", {}),
    "f/digits/mixture-without": (
        "generalisation",
        "(f) without bypass",
        {"blueprints": ["low_rank", "widen", "mlp", "norm"]},
    ),
    "f/digits/mixture-with": (
        "generalisation",
        "(f) with a gated unit",
        {"blueprints": ["bypass", "low_rank", "widen", "mlp", "norm", "glu"]},
    ),
}
"""Sets of instances, [SPLIT/]TASK/CONTEXTS[-NAME]: role, their name, and what differs from the environment."""

TRAINED_ON = "digits/mixture"
REWARD = {"measure": "accuracy", "rent": RENT / 100, "flops": 0.0}
"""Of every set, so that the return of an episode is its points on the validation split, over 100."""

SEED = {"a": 1}  # of the instances of a set that would be the same as another's
ACCOUNTS = ("points", "return", "kind", "label_noise", "params_ratio", "flops_ratio", "germinated", "culled", "waited")


def config_of(name: str) -> EnvConfig:
    """The environment of a set."""
    parts = name.split("/")
    return load_config(parts[-2], parts[-1].partition("-")[0], reward=REWARD, **SETS[name][2])


def seed_of(name: str) -> int:
    """Of the instances of a set."""
    return SEED.get(name.split("/")[0], 0)


# ---- supervised scorers ---------------------------------------------------------------------------------------------

SCORERS = ("linear", "shallow", "neural")
NETWORKS, HIDDEN = 5, 128  # of the neural scorer: how many, and units of their hidden layers


class Neural(nn.Module):
    """The mean of several networks with two hidden layers, [..., F] -> [..., blueprints], in points."""

    def __init__(self, inputs: int, blueprints: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        sizes = (inputs, HIDDEN, HIDDEN)
        layers = [[m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.GELU())] for _ in range(NETWORKS)]
        self.networks = nn.ModuleList(nn.Sequential(*own, nn.Linear(HIDDEN, blueprints)) for own in layers)

    def forward(self, x: Tensor) -> Tensor:
        z = (x - self.mean) / self.scale
        return 10 * torch.stack([network(z) for network in self.networks]).mean(0)

    def fit(self, x: Tensor, blueprint: Tensor, gain: Tensor, passes: int = 12) -> None:
        """Regression of points that germinations gain, each network by itself.

        Widths, weight decay, passes and the falling rate were chosen by the error on an eighth of the episodes.
        """
        self.mean, self.scale = x.mean(0), x.std(0).clamp(min=1e-3)
        z = (x - self.mean) / self.scale
        for network in self.networks:
            regress(network, network, z, blueprint, gain, weight_decay=0.3, passes=passes, last=1e-3)


def labels(chunk: int) -> dict[str, Tensor]:
    """Random episodes of the training environment; see `fork_gains.collect`."""
    return fork_gains.collect(config_of(TRAINED_ON), 0, chunk)


def germinations(path: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of a chunk: features [m, F], blueprint [m] and gain [m] in points."""
    config = config_of(TRAINED_ON)
    kinds, of = len(config.blueprints), fork_gains.layout(config)
    seen, kind, gain = [], [], []
    found = torch.load(path, weights_only=True)
    for first in range(0, len(found["x"]), 512):
        rows = slice(first, first + 512)
        graph = fork_gains.graphs(found, of, rows)
        slots = graph.x["slot"].shape[1]
        actions, gains = found["actions"][rows] - 1, 100 * found["gains"][rows]
        number, place = (actions < slots * kinds).nonzero(as_tuple=True)
        chosen = actions[number, place]
        seen.append(features(graph)[number, chosen // kinds])
        kind.append(chosen % kinds)
        gain.append(gains[number, place])
    return torch.cat(seen), torch.cat(kind), torch.cat(gain)


def fit(paths: list[str], few: int) -> dict[str, Any]:
    """The scorers: `neural` is fitted to the chunks in `paths`, `linear` and `shallow` to the first `few` of them.

    Returns:
        `linear`, weights [blueprints, F], and the states of `neural` and `shallow`; all predict points.
    """
    kinds = len(config_of(TRAINED_ON).blueprints)
    chunks = [germinations(path) for path in paths]
    first, every = (tuple(map(torch.cat, zip(*own, strict=True))) for own in (chunks[:few], chunks))
    torch.manual_seed(0)
    scorer = Neural(every[0].shape[1], kinds)
    scorer.fit(*every)
    return {
        "linear": ridge(*first, kinds),
        "shallow": shallow(*first, kinds).state_dict(),
        "neural": scorer.state_dict(),
    }


class Scorer(Linear):
    """The greedy scorer of what germinations gain, by any function of the features of their slots.

    Args:
        knobs: its knobs.
        score: [N, slots, F] -> [N, slots, blueprints], of the blueprints of TRAINED_ON.
        config: of the environment it is to act in; a blueprint that `score` does not know is never chosen there.
    """

    def __init__(self, knobs: LinearKnobs, score: Callable[[Tensor], Tensor], config: EnvConfig):
        super().__init__(knobs, torch.zeros(1, 1), baselines.BaselinesConfig().ramp)
        known = list(config_of(TRAINED_ON).blueprints)
        order = [known.index(kind) if kind in known else len(known) for kind in config.blueprints]
        self._score, self._order = score, torch.tensor(order)

    @torch.no_grad()
    def score(self, graph: GraphBatch) -> Tensor:
        scores = torch.nn.functional.pad(self._score(features(graph)), (0, 1), value=-torch.inf)
        return scores[:, :, self._order]


def _scorer(name: str, fitted: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """What `fit` has fitted by this name."""
    weights = fitted["linear"]
    if name == "linear":
        return lambda seen: seen @ weights.T
    kinds, inputs = weights.shape
    scorer = Shallow(torch.zeros(inputs), torch.ones(inputs), kinds) if name == "shallow" else Neural(inputs, kinds)
    scorer.load_state_dict(fitted[name])
    return scorer


# ---- playing --------------------------------------------------------------------------------------------------------


@cache
def _fitted(path: str) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def controller_of(name: str, config: EnvConfig, knobs: dict[str, Any], source: str) -> Controller:
    """A controller of the study.

    Args:
        name: of a baseline, one of SCORERS, "lookahead", "oracle", or VARIANT/SEED.
        config: of the environment it is to act in.
        knobs: of a baseline or a look-ahead.
        source: the file of the fitted scorers, or the run directory of a policy.
    """
    if "/" in name:
        return TamiyoController(load_policy(source), 0, deterministic=True)
    if name == "lookahead":
        return LookAhead(**knobs)
    if name == "oracle":  # of one germination at the third epoch, by validation; it knows the host's own future
        return LookAhead(future=True, first=3, every=1 << 30)
    if name in SCORERS:
        return Scorer(LinearKnobs(**knobs), _scorer(name, _fitted(source)), config)
    given = baselines.BaselinesConfig()
    for key, value in knobs.items():
        setattr(getattr(given, name), key, value)
    return baselines.make(name, given, "none", list(config.blueprints), 0)


def played(
    of: str, split: str, first: int, count: int, name: str, knobs: dict[str, Any], source: str
) -> dict[str, Tensor]:
    """Episodes of a controller on the instances first ... first + count of a set: ACCOUNTS, each [count]."""
    config = config_of(of)
    rows = range(first, first + count)
    if name == "static":
        return static(of, split, rows, source)
    found = play(controller_of(name, config, knobs, source), config, rows, seed_of(of), "cpu", split=split)
    return {account: torch.from_numpy(np.asarray(found[account])) for account in ACCOUNTS}


def static(of: str, split: str, rows: range, source: str) -> dict[str, Tensor]:
    """Networks that start as wide as makes them as large as the policy in `source` grows the host, and never grow.

    They have the host's defects, data and data order, and where they are as wide as the host they are the host. What
    they have more costs the same rent.
    """
    config, seed = config_of(of), seed_of(of)
    grown = play(TamiyoController(load_policy(source), 0, True), config, rows, seed, "cpu", split=split)
    env = GrowthEnv(config, len(rows), split=split, autoreset=False)
    env.reset(seed * 1_000_003 + torch.arange(rows.start, rows.stop))
    p = env.population
    wanted = torch.from_numpy(grown["params_ratio"]) * p.host_parameters()
    spec = population_spec(config)
    room = type(spec.host)(**{**vars(spec.host), "width": 2 * spec.host.width})
    wide = Population(PopulationSpec(**{**vars(spec), "host": room, "measured": False}), len(rows))
    context, widths = p.context.rows(torch.arange(len(rows))), torch.arange(1, room.width + 1)
    context.width = torch.ones_like(context.width)
    sizes = []
    for width in widths.tolist():
        wide.context.put(torch.arange(len(rows)), context)
        wide.context.width[:] = width
        sizes.append(wide.host_parameters())
    context.width = widths[(torch.stack(sizes, dim=1) - wanted[:, None]).abs().argmin(1)]
    wide.reset(torch.arange(len(rows)), context)
    meter = Meter(wide, config.epochs)
    for _ in range(config.epochs):
        meter.train_epoch()
    lost, everyone = wide.diverged(), torch.arange(len(rows))
    validation, test = (meter.accuracy(everyone, split).masked_fill(lost, 0.0) for split in PARTS)
    ratio, wider = wide.host_parameters() / p.host_parameters(), context.width != p.context.width
    twin = env.twin_accuracies()
    zero = torch.zeros(len(rows))
    return {
        "points": (100 * (test - twin[1]) - RENT * (ratio - 1)) * wider,
        "return": (validation - twin[0] - RENT / 100 * (ratio - 1)) * wider,
        "kind": torch.from_numpy(grown["kind"]),
        "label_noise": torch.from_numpy(grown["label_noise"]),
        "params_ratio": ratio,
        "flops_ratio": wide.host_flops() / p.host_flops() - 1,
        "germinated": zero,
        "culled": zero,
        "waited": zero + config.epochs,
    }
