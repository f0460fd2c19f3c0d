"""Flat storage of stacked parameters: where it starts and how it is viewed."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.growth.blueprints import ParameterSpec
from esper.runtime import seeding


def views(specs: list[ParameterSpec], flat: Tensor) -> list[Tensor]:
    """Splits [M, P] into one [M, *shape] view per parameter."""
    parts = flat.split([spec.size for spec in specs], dim=1)
    return [part.view(-1, *spec.shape) for part, spec in zip(parts, specs, strict=True)]


def initial(specs: list[ParameterSpec], key: Tensor) -> Tensor:
    """[m, P] initial values for the keys [m]."""
    draws = seeding.uniform(key, sum(spec.size for spec in specs)).split([spec.size for spec in specs], dim=1)
    values = []
    for spec, draw in zip(specs, draws, strict=True):
        bound = (spec.fan_in or spec.shape[-1]) ** -0.5
        values.append({"uniform": (2 * draw - 1) * bound, "zeros": draw * 0, "ones": draw * 0 + 1}[spec.init])
    return torch.cat(values, dim=1)
