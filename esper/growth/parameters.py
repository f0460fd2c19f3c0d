"""Flat storage of stacked parameters: where each starts, which entries a narrower network has, how it is viewed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from esper.runtime import seeding


@dataclass(frozen=True)
class ParameterSpec:
    """Shape of one parameter, and how it starts.

    `uniform`: U(-1/sqrt(fan_in), 1/sqrt(fan_in)) with fan_in = `fan_in` or the last dimension, as torch.nn.Linear;
    `he`: sqrt(6) times as wide, which keeps the scale of a ReLU network's signal (He et al., arXiv 1502.01852).
    `output` marks what a seed's output is linear in: it starts at 0 when seeds are to start at 0.
    """

    shape: tuple[int, ...]
    init: Literal["uniform", "he", "zeros", "ones"] = "uniform"
    fan_in: int | None = None
    output: bool = False

    @property
    def size(self) -> int:
        size = 1
        for extent in self.shape:
            size *= extent
        return size

    def bound(self, zero_output: bool) -> float:
        """Of the uniform distribution that it is drawn from; 0 where it is not drawn."""
        if self.init not in ("uniform", "he") or (zero_output and self.output):
            return 0.0
        return ((6 if self.init == "he" else 1) / (self.fan_in or self.shape[-1])) ** 0.5


def drawn(specs: list[ParameterSpec], key: Tensor, zero_output: bool = False) -> list[Tensor]:
    """Initial values, each [1, *shape], for one key []: those of a ParameterTable of this width."""
    parts = (2 * seeding.uniform(key, sum(spec.size for spec in specs)) - 1).split([spec.size for spec in specs])
    return [
        (part * spec.bound(zero_output) + float(spec.init == "ones")).view(1, *spec.shape)
        for part, spec in zip(parts, specs, strict=True)
    ]


class ParameterTable:
    """The parameters of one kind of network at every width up to `widest`, stored in the layout of the widest.

    A narrower network owns the leading entries of each dimension; the others are 0 and stay so, since nothing flows
    through them.

    Args:
        specs: width -> the specs; the same number, each of the same rank, for every width.
        widest: the width of the storage.
    """

    def __init__(self, specs: Callable[[int], list[ParameterSpec]], widest: int, zero_output: bool = False):
        self.specs = specs(widest)
        self.size = sum(spec.size for spec in self.specs)
        self.sizes = [spec.size for spec in self.specs]
        tables: list[list[Tensor]] = [[], [], []]
        for width in range(widest + 1):
            rows: list[list[Tensor]] = [[], [], []]
            for spec, full in zip(specs(max(width, 1)), self.specs, strict=True):
                inside = torch.zeros(full.shape)
                inside[tuple(slice(extent) for extent in spec.shape)] = float(width > 0)
                rows[0].append(inside.flatten())
                rows[1].append(inside.flatten() * spec.bound(zero_output))
                rows[2].append(inside.flatten() * float(spec.init == "ones"))
            for table, row in zip(tables, rows, strict=True):
                table.append(torch.cat(row))
        self.owned, self._scale, self._offset = (torch.stack(table) for table in tables)  # [widest + 1, P]
        self.count = self.owned.sum(1)  # float32 [widest + 1]

    def to(self, device: torch.device | str) -> ParameterTable:
        for name in ("owned", "_scale", "_offset", "count"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def initial(self, key: Tensor, width: Tensor) -> Tensor:
        """[m, P] initial values for the keys [m] at the widths [m]."""
        draws = 2 * seeding.uniform(key, self.size) - 1
        return draws * self._scale[width] + self._offset[width]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Splits [M, P] into one [M, *shape] view per parameter."""
        parts = flat.split(self.sizes, dim=1)
        return [part.view(-1, *spec.shape) for part, spec in zip(parts, self.specs, strict=True)]
