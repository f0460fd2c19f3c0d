"""Networks that have grown: seeds as parts of ordinary modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from esper.growth import blueprints
from esper.growth.blueprints import Site
from esper.hosts.anatomy import Slot
from esper.hosts.grafting import Seed
from esper.runtime.errors import ConfigError

Plan = list[dict[str, Any]]
"""What has grown where, one plain dictionary for each seed; fits into JSON."""


class Grown(nn.Module):
    """A submodule and the seed that is added to its output. Other attributes are the submodule's.

    Args:
        stage: the submodule.
        seed: what lives behind it.
    """

    def __init__(self, stage: nn.Module, seed: Seed):
        super().__init__()
        self.stage, self.seed = stage, seed

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the submodule gives, and the seed's share."""
        output = self.stage(x, *args, **kwargs)
        return output + self.seed(output, x)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_modules", {}) or name == "stage":
            return super().__getattr__(name)
        return getattr(self.stage, name)


def bake(model: nn.Module, name: str, seed: Seed) -> None:
    """Puts a Grown in the place of the submodule `name`, wherever it is found."""
    stage = model.get_submodule(name)
    grown = Grown(stage, seed).train(stage.training)
    for parent in list(model.modules()):
        for child, module in list(parent.named_children()):
            if module is stage:
                parent.add_module(child, grown)


def entry(seed: Seed) -> dict[str, Any]:
    """A seed as it is written in a plan."""
    slot, site = seed.slot, seed.site
    return {
        "slot": slot.name,
        "channels": slot.channels,
        "causal": slot.causal,
        "blueprint": seed.blueprint.name,
        "width": site.width,
        "grid": list(site.grid),
    }


def regrow(model: nn.Module, plan: Iterable[dict[str, Any]]) -> nn.Module:
    """Gives a fresh module the seeds of one that has grown, so that it can load its `state_dict()`.

    Args:
        model: as it was before it grew; it is changed.
        plan: `Growth.plan` of the one that has grown.

    Returns:
        The model.

    Raises:
        ConfigError: a slot is not there.
    """
    for row in plan:
        if row["slot"] not in dict(model.named_modules()):
            raise ConfigError(f"plan: {row['slot']} is no submodule; give a model as it was before it grew")
        slot = Slot(row["slot"], row["channels"], row["causal"])
        site = Site(row["width"], tuple(row["grid"]), row["causal"])
        seed = Seed(blueprints.get(row["blueprint"]), slot, site, torch.tensor(0))
        bake(model, slot.name, seed.to(next(model.parameters()).device))
    return model
