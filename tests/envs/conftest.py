from __future__ import annotations

import copy
import random
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from envs import twins
from envs.adapter import AdaptedEnv
from envs.config import EnvConfig, load_config
from envs.growth_env import GrowthEnv
from envs.reward import Reference
from esper.graph import GraphBatch
from esper.growth.actions import Verb

REFERENCE = Reference(static=1.4, large=0.9)  # the stored ones are measured anew now and then
WEIGHTS = (2, 4, 4, 1, 1)  # WAIT, GERMINATE, BLEND, FOSSILIZE, CULL: so that many seeds live long


class Play:
    """Short episodes of small hosts on the packaged environments, and agents for them."""

    REFERENCE = REFERENCE
    SHORT: ClassVar[dict[str, Any]] = {
        "epochs": 6,
        "host": {"width": [4, 6], "stages": [2, 3]},
        "training": {"steps_per_epoch": 3, "batch_size": 16},
    }

    _known: ClassVar[dict[str, EnvConfig]] = {}  # reading one takes as long as several epochs

    @classmethod
    def config(cls, name: str = "segment", contexts: str | None = None, **overrides: Any) -> EnvConfig:
        given = {**cls.SHORT, **overrides}
        given["reward"] = {"measure": "loss", "flops": 0.05, **given.get("reward", {})}
        key = repr((name, contexts, given))
        if key not in cls._known:
            cls._known[key] = load_config(name, contexts, **given)
        return copy.deepcopy(cls._known[key])

    @classmethod
    def env(
        cls, num_envs: int, seed: int | None = 0, name: str = "segment", split: str = "train", autoreset: bool = True,
        **overrides: Any,
    ) -> GrowthEnv:  # fmt: skip
        env = GrowthEnv(cls.config(name, **overrides), num_envs, split, autoreset)
        env.reference = REFERENCE
        if seed is not None:
            env.reset(torch.arange(num_envs) + seed)
        return env

    @staticmethod
    def choose(env: GrowthEnv, tags: list[Any]) -> Tensor:
        """A random legal action of each environment, drawn from its tag and its epoch only."""
        mask, verbs, actions = env.action_mask(), env.layout.table()[0].tolist(), []
        for k, tag in enumerate(tags):
            dice = random.Random(f"{tag} {int(env.population.epoch[k])}")
            legal = mask[k].nonzero().flatten().tolist()
            verb = dice.choice([v for v in sorted({verbs[a] for a in legal}) for _ in range(WEIGHTS[v])])
            actions.append(dice.choice([a for a in legal if verbs[a] == verb]))
        return torch.tensor(actions)

    @classmethod
    def run(cls, env: GrowthEnv, steps: int, tags: list[Any]) -> list[tuple]:
        """(graph, reward, terminated, info) of each step of the random agent."""
        out = []
        for _ in range(steps):
            graph, reward, terminated, _, info = env.step(cls.choose(env, tags))
            out.append((graph, reward, terminated, info))
        return out

    @staticmethod
    def script(env: GrowthEnv, *moves: tuple) -> list[tuple]:
        """Plays (verb, slot, choice) in every environment, then WAIT until the end."""
        out = []
        for step in range(env.config.epochs):
            move = moves[step] if step < len(moves) else (Verb.WAIT,)
            graph, reward, terminated, _, info = env.step(torch.full((env.num_envs,), env.layout.index(*move)))
            out.append((graph, reward, terminated, info))
        return out

    @staticmethod
    def same_graph(a: Any, b: Any, rows: tuple[int, int] | None = None) -> list[str]:
        """Keys in which two graphs (or one row of each) differ bitwise."""
        left, right = a.to_dict(), b.to_dict()
        assert left.keys() == right.keys()
        pick = (lambda t, row: t) if rows is None else (lambda t, row: t[row])
        rows = rows or (0, 0)
        return [k for k in left if not torch.equal(pick(left[k], rows[0]), pick(right[k], rows[1]))]


@pytest.fixture(scope="session")
def play() -> type[Play]:
    return Play


@pytest.fixture
def no_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """No twin is remembered from other tests."""
    monkeypatch.setattr(twins, "_SHARED", {})


def played(env: AdaptedEnv, graph: GraphBatch, steps: int, seed: int) -> tuple[list[Tensor], GraphBatch]:
    """All that it shows under random legal actions, and the last graph."""
    dice, out = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        actions = torch.multinomial(graph.action_mask.float(), 1, generator=dice).squeeze(1)
        graph, reward, terminated, truncated, info = env.step(actions)
        out += [*graph.to_dict().values(), reward, terminated, truncated]
        if info:
            out += [*info["final_graph"].to_dict().values(), *info["episodes"].values()]
    return out, graph
