"""What can be grown by actions and observed as graphs: a population of stacked hosts, or a module."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from esper.growth.blueprints import Blueprint
from esper.growth.context import Context
from esper.growth.lifecycle import Lifecycle, LifecycleSpec
from esper.growth.sizes import Tables
from esper.growth.statistics import Statistics


class Growable(Protocol):
    """N hosts with S slots and K blueprints; tensors are on the CPU, but for statistics and `seed_steps`.

    Attributes:
        hosts: N.
        slots: S.
        catalogue: the K blueprints.
        device: where statistics are.
        context: of the hosts; of it sizes, learning rates, training samples, seeds and whether time is priced are read.
        lifecycle: of every slot.
        lifecycle_spec: its rules.
        statistics: of the last epoch.
        epoch: int64 [N], epochs trained.
        germinated: int64 [N], seeds germinated so far.
        seed_steps: int64 [N, S], optimiser steps that each seed has taken.
        extra_flops: float32 [N], multiply-adds per sample of seeds, summed over epochs.
    """

    hosts: int
    slots: int
    catalogue: list[Blueprint]
    device: torch.device
    context: Context
    lifecycle: Lifecycle
    lifecycle_spec: LifecycleSpec
    statistics: Statistics
    epoch: Tensor
    germinated: Tensor
    seed_steps: Tensor
    extra_flops: Tensor

    def tables(self) -> Tables:
        """What follows from the sizes of hosts."""
        ...

    def moved(self, value: Tensor) -> Tensor:
        """`value` on the device."""
        ...

    def seed_parameters(self, mask: Tensor) -> Tensor:
        """float32 [N], parameters of the seeds in `mask` (bool [N, S])."""
        ...

    def germinable(self) -> Tensor:
        """bool [N, S, K]: where a seed may be germinated as far as the host is concerned."""
        ...

    def germinate(self, where: Tensor, blueprint: Tensor) -> None:
        """Plants seeds in `where` (bool [N, S]) of kind `blueprint` (int64 [N, S])."""
        ...
