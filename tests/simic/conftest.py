"""Real rollouts and small learners for the tests of Simic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from envs.config import load_config
from envs.growth_env import GrowthEnv
from esper.graph import GraphBatch
from esper.simic.config import PPOConfig
from esper.simic.learner import Simic
from esper.simic.rollout import Rollout
from esper.tamiyo.actor import Actor
from esper.tamiyo.policy import PolicyConfig, Tamiyo

SMALL = {"training": {"steps_per_epoch": 2, "batch_size": 16}, "host": {"width": [4, 6], "stages": [4, 6]}}


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., Tamiyo]:
    """`make_policy(seed)`: a small Tamiyo with random weights everywhere, biases and gains included."""

    def make(seed: int = 0) -> Tamiyo:
        policy = Tamiyo(PolicyConfig(hidden=[8, 8, 8, 8], heads=2))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return policy

    return make


@pytest.fixture(scope="session")
def make_learner(make_policy: Callable[..., Tamiyo]) -> Callable[..., Simic]:
    """`make_learner(seed, **settings)`: a learner on a policy that does not depend on `seed`."""

    def make(seed: int = 0, **settings: Any) -> Simic:
        return Simic(make_policy(), PPOConfig(**{"epochs": 2, "minibatches": 2, **settings}), seed)

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
def collected(make_policy: Callable[..., Tamiyo]) -> Callable[[], Rollout]:
    """`collected()`: a fresh copy of ten steps of four hosts, with episodes of six epochs, acted by `make_policy()`."""
    config = load_config("segment", epochs=6, **SMALL, reward={"shaping": 1.0})
    env = GrowthEnv(config, 4)
    actor = Actor(make_policy(), 0)
    graph = env.reset(torch.arange(4))
    steps = []
    for _ in range(10):
        decision = actor(graph)
        following, reward, terminated, truncated, _ = env.step(decision.actions.clone())
        steps.append((graph, *decision, reward, terminated, truncated))
        graph = following
    last = actor.value(graph)

    def copy() -> Rollout:
        rollout = Rollout(10, 4)
        for step in steps:
            rollout.add(*step)
        rollout.finish(last, 0.99, 0.95)
        return rollout

    return copy
