"""The stacked MLP host: hidden layers with a slot behind each, and a linear head. State lives in the population."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from esper.growth.blueprints import ParameterSpec

Graft = Callable[[int, Tensor], Tensor]
"""`graft(slot, h) -> h` adds the seeds that live in a slot."""


@dataclass(frozen=True)
class HostSpec:
    """An MLP of `stages` hidden layers of `width` ReLU units; slot k sits behind hidden layer k.

    Attributes:
        inputs: features of a sample.
        classes: outputs of the head.
        width: units of each hidden layer.
        stages: number of hidden layers, which is the number of slots.
    """

    inputs: int
    classes: int
    width: int
    stages: int

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(fan-in, fan-out) of every layer, the head last."""
        widths = [self.inputs] + [self.width] * self.stages + [self.classes]
        return list(pairwise(widths))

    def parameters(self) -> list[ParameterSpec]:
        """Weight [in, out] and bias [1, out] of each layer in turn."""
        specs = []
        for fan_in, fan_out in self.layers:
            specs += [ParameterSpec((fan_in, fan_out), fan_in=fan_in), ParameterSpec((1, fan_out), fan_in=fan_in)]
        return specs

    @property
    def parameter_count(self) -> int:
        return sum(spec.size for spec in self.parameters())

    @property
    def flops(self) -> int:
        """Multiply-adds for one sample, forward."""
        return sum(fan_in * fan_out for fan_in, fan_out in self.layers)


def forward(spec: HostSpec, parameters: list[Tensor], x: Tensor, graft: Graft) -> tuple[Tensor, list[Tensor]]:
    """Logits of M hosts, each on its own batch.

    Args:
        spec: the common architecture.
        parameters: as `HostSpec.parameters`, each [M, *shape].
        x: [M, batch, inputs].
        graft: adds the seeds of a slot.

    Returns:
        logits [M, batch, classes], and the ReLU output of every hidden layer before its slot, each [M, batch, width].
    """
    h, activations = x, []
    for stage in range(spec.stages):
        h = torch.baddbmm(parameters[2 * stage + 1], h, parameters[2 * stage]).relu()
        activations.append(h)
        h = graft(stage, h)
    return torch.baddbmm(parameters[-1], h, parameters[-2]), activations


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """[N, batch] in nats from logits [N, batch, classes]."""
    # With the classes in the middle the softmax is vectorised over the batch: 3 to 6 times faster for few classes.
    return F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
