from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from envs.config import load_config
from envs.growth_env import GrowthEnv
from esper.growth.actions import Verb

WEIGHTS = (2, 4, 4, 1, 1)  # WAIT, GERMINATE, BLEND, FOSSILIZE, CULL: so that many seeds live long


class Play:
    """Short episodes on the packaged environments, and agents for them."""

    SHORT = {"epochs": 6, "training": {"steps_per_epoch": 4, "batch_size": 32}}  # noqa: RUF012

    @classmethod
    def env(
        cls, num_envs: int, seed: int | None = 0, name: str = "segment", split: str = "train", autoreset: bool = True,
        **overrides: Any,
    ) -> GrowthEnv:  # fmt: skip
        env = GrowthEnv(load_config(name, **{**cls.SHORT, **overrides}), num_envs, split, autoreset)
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
