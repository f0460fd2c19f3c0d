"""Two-layer perceptron: the plain way to add capacity."""

import torch
from torch import Tensor

from esper.growth.blueprints.registry import Blueprint, ParameterSpec, register

EXPANSION = 2


@register("mlp")
class MLP(Blueprint):
    """`W2 relu(W1 h + b1) + b2` with a hidden layer of twice the width."""

    def parameters(self, width: int) -> dict[str, ParameterSpec]:
        hidden = EXPANSION * width
        return {
            "w1": ParameterSpec((width, hidden), fan_in=width),
            "b1": ParameterSpec((1, hidden), fan_in=width),
            "w2": ParameterSpec((hidden, width), fan_in=hidden),
            "b2": ParameterSpec((1, width), fan_in=hidden),
        }

    def delta(self, p: dict[str, Tensor], h: Tensor) -> Tensor:
        return torch.baddbmm(p["b2"], torch.baddbmm(p["b1"], h, p["w1"]).relu(), p["w2"])

    def flops(self, width: int) -> int:
        return 2 * EXPANSION * width * width
