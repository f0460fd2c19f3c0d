"""One process of several that update a policy together: python replica.py OUT SETTINGS; see test_distributed.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from envs.config import load_config
from envs.growth_env import GrowthEnv
from esper.runtime.distributed import launched
from esper.simic.config import PPOConfig
from esper.simic.learner import Simic
from esper.simic.rollout import Rollout
from esper.tamiyo.actor import Actor
from esper.tamiyo.policy import PolicyConfig, Tamiyo

STEPS = 10


def main(out: str, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    world, hosts = launched(), settings["hosts"]
    world.connect(60.0)
    small = {"training": {"steps_per_epoch": 2, "batch_size": 16}, "host": {"width": [4, 6], "stages": [4, 6]}}
    env = GrowthEnv(load_config("segment", epochs=6, **small, reward={"shaping": 1.0}), hosts)
    torch.manual_seed(0)
    policy = Tamiyo(PolicyConfig(hidden=[8, 8, 8, 8], heads=2))
    for parameter in policy.parameters():  # a policy that is sure of nothing would hide what is summed wrongly
        parameter.data += 0.3 * torch.randn(parameter.shape)
    config = PPOConfig(**settings["ppo"])
    learner, actor = Simic(policy, config, 0, settings["precision"], world=world), Actor(policy, 0)
    own = torch.tensor([*world.share(hosts)], dtype=torch.int64)
    metrics: list[dict[str, float]] = []
    graph = env.reset(torch.arange(hosts))
    for _ in range(settings["updates"]):
        rollout = Rollout(STEPS, len(own), world=world)
        for _ in range(STEPS):  # of all hosts in every process, which keeps its own part
            decision = actor(graph)
            following, *outcome, _ = env.step(decision.actions.clone())
            if len(own):
                parts = (part[own] for part in (*decision, *outcome))
                rollout.add(graph[own], *parts)
            graph = following
        learner.finish(rollout, actor.value(graph)[own])
        metrics.append(learner.update(rollout, 0.0))
    state = {"policy": policy.state_dict(), "normalizer": learner.normalizer.state_dict() if learner.normalizer else {}}
    torch.save({**state, "metrics": metrics, "scale": learner.scaler.scale}, Path(out) / f"{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
