"""Real rollouts and small learners for the tests of Simic."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from envs.config import load_config
from envs.growth_env import GrowthEnv
from esper.graph import GraphBatch
from esper.runtime.compiled import CompileGuard
from esper.simic.config import PPOConfig
from esper.simic.learner import Simic
from esper.simic.rollout import Rollout
from esper.tamiyo.actor import Actor
from esper.tamiyo.policy import PolicyConfig, Tamiyo

SMALL = {"training": {"steps_per_epoch": 2, "batch_size": 16}, "host": {"width": [4, 6], "stages": [4, 6]}}


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., Tamiyo]:
    """`make_policy(seed, backend)`: a small Tamiyo with random weights everywhere, biases and gains included."""

    def make(seed: int = 0, backend: str = "auto") -> Tamiyo:
        policy = Tamiyo(PolicyConfig(hidden=[8, 8, 8, 8], heads=2, backend=backend))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return policy

    return make


@pytest.fixture(scope="session")
def make_learner(make_policy: Callable[..., Tamiyo]) -> Callable[..., Simic]:
    """`make_learner(seed, precision, guard, policy, **settings)`: a learner, on a policy that does not depend on `seed`
    where none is given."""

    def make(
        seed: int = 0,
        precision: str = "fp32",
        guard: CompileGuard | None = None,
        policy: Tamiyo | None = None,
        **settings: Any,
    ) -> Simic:
        config = PPOConfig(**{"epochs": 2, "minibatches": 2, **settings})
        return Simic(policy or make_policy(), config, seed, precision, guard)

    return make


@pytest.fixture(scope="session")
def observations() -> GraphBatch:
    """Eight observations from the middle of episodes."""
    env = GrowthEnv(load_config("segment", **SMALL), 8)
    generator = torch.Generator().manual_seed(0)
    graph = env.reset(torch.arange(8))
    for _ in range(3):
        graph = env.step(torch.multinomial(graph.action_mask.float(), 1, generator=generator).squeeze(1))[0]
    return graph


@pytest.fixture(scope="session")
def collect() -> Callable[[Actor], tuple[Rollout, Tensor]]:
    """`collect(actor)`: ten steps of four hosts, with episodes of six epochs, and V of what follows them."""

    def run(actor: Actor) -> tuple[Rollout, Tensor]:
        config = load_config("segment", epochs=6, **SMALL, reward={"shaping": 1.0})
        env = GrowthEnv(config, 4)
        graph, rollout = env.reset(torch.arange(4)), Rollout(10, 4)
        actor.warm_up(graph)
        for _ in range(10):
            decision = actor(graph)
            following, *outcome, _ = env.step(decision.actions.clone())
            rollout.add(graph, *decision, *outcome)
            graph = following
        return rollout, actor.value(graph)

    return run


@pytest.fixture(scope="session")
def collected(make_policy: Callable[..., Tamiyo], collect: Callable[..., Any]) -> Callable[..., Rollout]:
    """`collected(learner)`: a fresh copy of ten steps of four hosts, acted by `make_policy()`; finished by the learner
    where one is given."""
    original, last = collect(Actor(make_policy(), 0))

    def copied(learner: Simic | None = None) -> Rollout:
        rollout = copy.deepcopy(original)
        if learner is None:
            rollout.finish(last, 0.99, 0.95)
        else:
            learner.finish(rollout, last)
        return rollout

    return copied


@pytest.fixture(scope="session")
def pair(make_policy: Callable[..., Tamiyo], make_learner: Callable[..., Simic]) -> Callable[..., tuple[Actor, Simic]]:
    """`pair(precision, compiled, backend)`: an actor and a learner of one policy, `make_policy()` at each call. They
    are compiled once in a session, since that takes long."""

    @cache
    def made(precision: str, compiled: bool, backend: str) -> tuple[Actor, Simic, Any]:
        policy, why_not = make_policy(backend=backend), None if compiled else "not asked for"
        guards = [CompileGuard(name, why_not) for name in ("actor", "update step")]
        learner = make_learner(0, precision, guards[1], policy, auxiliary_coef=0.1)
        return Actor(policy, 0, guard=guards[0]), learner, copy.deepcopy(learner.state_dict())

    def fresh(precision: str = "fp32", compiled: bool = False, backend: str = "auto") -> tuple[Actor, Simic]:
        actor, learner, state = made(precision, compiled, backend)
        learner.load_state_dict(copy.deepcopy(state))
        actor.generator.manual_seed(0)
        return actor, learner

    return fresh
