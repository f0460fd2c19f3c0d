"""Two-layer perceptron: the plain way to add capacity."""

import torch
from torch import Tensor

from esper.growth.blueprints.registry import Blueprint, ParameterSpec, Site, register

EXPANSION = 2


@register("mlp")
class MLP(Blueprint):
    """`W2 relu(W1 h + b1) + b2` with a hidden layer of twice the width."""

    def parameters(self, site: Site) -> dict[str, ParameterSpec]:
        width, hidden = site.width, EXPANSION * site.width
        return {
            "w1": ParameterSpec((width, hidden), fan_in=width),
            "b1": ParameterSpec((1, hidden), fan_in=width),
            "w2": ParameterSpec((hidden, width), fan_in=hidden, output=True),
            "b2": ParameterSpec((1, width), fan_in=hidden, output=True),
        }

    def delta(self, p: dict[str, Tensor], x: Tensor, units: Tensor, site: Site) -> Tensor:
        return torch.baddbmm(p["b2"], torch.baddbmm(p["b1"], x, p["w1"]).relu(), p["w2"])

    def flops(self, site: Site) -> int:
        return 2 * EXPANSION * site.width**2 * site.tokens
