"""Real observations for the tests of graphs."""

import pytest
import torch

from esper.graph import GraphBatch
from esper.growth.actions import ActionLayout
from esper.growth.context import Context
from esper.growth.data import Data
from esper.growth.host import HostSpec
from esper.growth.lifecycle import LifecycleSpec
from esper.growth.observation import Observer
from esper.growth.population import Population
from esper.growth.state import PopulationSpec, TrainingSpec

EPOCHS = 8


@pytest.fixture(scope="session")
def observations() -> list[GraphBatch]:
    """Every observation of one episode of hosts with 4, 2 and 3 stages that act at random, the first one included."""
    generator = torch.Generator().manual_seed(0)

    def split(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(samples, 1, 5, generator=generator)
        return x, torch.randint(3, (samples,), generator=generator)

    spec = PopulationSpec(
        host=HostSpec(inputs=5, classes=3, width=6, stages=4),
        catalogue=("mlp", "glu", "low_rank", "norm"),
        data=Data(*split(60), *split(40), *split(20)),
        training=TrainingSpec(steps_per_epoch=2, batch_size=8),
        lifecycle=LifecycleSpec(),
    )
    population, context = Population(spec, 3), Context.plain(torch.arange(3), 6, 4)
    context.depth[:], context.width[:] = torch.tensor([4, 2, 3]), torch.tensor([4, 6, 5])
    population.reset(torch.arange(3), context)
    observer, layout = Observer(population, EPOCHS), ActionLayout(4, 4)
    graphs = [observer()]
    for _ in range(EPOCHS):
        actions = torch.multinomial(graphs[-1].action_mask.float(), 1, generator=generator).squeeze(1)
        layout.execute(population, actions)
        population.train_epoch()
        graphs.append(observer())
    return graphs
