"""Computes the reward references of growth environments and writes envs/references.json.

    python scripts/references.py [NAME ...] [--instances 256]

For each environment: the mean final validation loss of the ungrown host, and of the same host with layers WIDE units
wide, over the same training instances. About 10 seconds each.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

import envs
from envs.config import EnvConfig, load_config
from envs.growth_env import draw_context, host_spec
from envs.tasks import load
from esper.growth.population import Population
from esper.runtime import seeding

WIDE = 32
FILE = Path(envs.__file__).parent / "references.json"


def final_loss(config: EnvConfig, width: int, instances: int) -> float:
    """Mean validation loss in nats after an episode without growth."""
    spec = dataclasses.replace(host_spec(config), width=width)
    population = Population(
        spec, list(config.blueprints), load(config.task), config.training, config.lifecycle, instances, observed=0
    )
    everyone = torch.arange(instances)
    population.reset(everyone, draw_context(config, seeding.fold(everyone, 0)))
    for _ in range(config.epochs):
        population.train_epoch()
    return round(float(population.validation_loss.mean()), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["segment", "digits"])
    parser.add_argument("--instances", type=int, default=256)
    arguments = parser.parse_args()
    stored = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in arguments.names:
        config = load_config(name)
        stored[name] = {
            "static": final_loss(config, config.host.width, arguments.instances),
            "large": final_loss(config, WIDE, arguments.instances),
            "wide": WIDE,
            "instances": arguments.instances,
        }
        print(name, stored[name])
    FILE.write_text(json.dumps(stored, indent=2) + "\n")


if __name__ == "__main__":
    main()
