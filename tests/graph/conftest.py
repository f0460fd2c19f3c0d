"""Real observations for the tests of graphs."""

import pytest
import torch

from envs.config import load_config
from envs.growth_env import GrowthEnv
from esper.graph import GraphBatch


@pytest.fixture(scope="session")
def observations() -> list[GraphBatch]:
    """Every observation of one episode of three hosts that act at random, the first one included."""
    env = GrowthEnv(load_config("segment", epochs=8, training={"steps_per_epoch": 2}), 3)
    generator = torch.Generator().manual_seed(0)
    graphs = [env.reset(torch.arange(3))]
    for _ in range(8):
        actions = torch.multinomial(graphs[-1].action_mask.float(), 1, generator=generator).squeeze(1)
        graphs.append(env.step(actions)[0])
    return graphs
