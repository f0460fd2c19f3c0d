"""Computes the reward references of tasks and writes envs/references.json.

    python scripts/references.py [TASK ...] [--instances 256]

For each task, over the instances that its environment draws by default: the mean final validation loss of the ungrown
host, and of a healthy host with layers twice as wide on the same data. Up to a minute each.
"""

import argparse
import json
from pathlib import Path

import torch

import envs
from envs import tasks
from envs.config import EnvConfig, load_config
from envs.growth_env import draw_context, population_spec
from esper.growth.population import Population
from esper.growth.state import PopulationSpec
from esper.runtime import seeding

WIDER = 2
FILE = Path(envs.__file__).parent / "references.json"


def final_loss(config: EnvConfig, large: bool, instances: int) -> float:
    """Mean validation loss in nats after an episode without growth."""
    spec = population_spec(config)
    everyone = torch.arange(instances)
    context, _ = draw_context(config, seeding.fold(everyone, 0))
    if large:
        host = type(spec.host)(**{**vars(spec.host), "width": WIDER * spec.host.width})
        spec = PopulationSpec(**{**vars(spec), "host": host})
        context.width = torch.full_like(context.width, host.width)
        context.condition = context.strike = torch.zeros_like(context.condition)
    population = Population(PopulationSpec(**{**vars(spec), "measured": False}), instances)
    population.reset(everyone, context)
    for epoch in range(config.epochs):
        population.train_epoch(evaluate=epoch == config.epochs - 1)
    # A host that has diverged counts as one that has learnt nothing.
    worst = torch.tensor(float(spec.host.classes)).log() * 2
    return round(float(population.validation_loss.nan_to_num(nan=float(worst)).clamp(max=worst).mean()), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=tasks.available())
    parser.add_argument("--instances", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.tasks:
        config = load_config(name)
        found = {"static": final_loss(config, False, arguments.instances)}
        found |= {"large": final_loss(config, True, arguments.instances), "instances": arguments.instances}
        stored = json.loads(FILE.read_text()) if FILE.exists() else {}
        stored[config.task] = found
        FILE.write_text(json.dumps(stored, indent=2) + "\n")
        print(name, found, flush=True)


if __name__ == "__main__":
    main()
