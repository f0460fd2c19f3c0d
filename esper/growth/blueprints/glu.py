"""Gated linear unit."""

import torch
from torch import Tensor

from esper.growth.blueprints.exponential import sigmoid
from esper.growth.blueprints.registry import Blueprint, ParameterSpec, Site, register

EXPANSION = 2


@register("glu")
class GLU(Blueprint):
    """`W3 ((W1 h + b1) * sigmoid(W2 h + b2)) + b3` with a hidden layer of twice the width
    (Dauphin et al., arXiv 1612.08083)."""

    gated = True

    def parameters(self, site: Site) -> dict[str, ParameterSpec]:
        width, hidden = site.width, EXPANSION * site.width
        return {
            "w1": ParameterSpec((width, hidden), fan_in=width),
            "b1": ParameterSpec((1, hidden), fan_in=width),
            "w2": ParameterSpec((width, hidden), fan_in=width),
            "b2": ParameterSpec((1, hidden), fan_in=width),
            "w3": ParameterSpec((hidden, width), fan_in=hidden, output=True),
            "b3": ParameterSpec((1, width), fan_in=hidden, output=True),
        }

    def delta(self, p: dict[str, Tensor], x: Tensor, units: Tensor, site: Site) -> Tensor:
        gate = sigmoid(torch.baddbmm(p["b2"], x, p["w2"]))
        return torch.baddbmm(p["b3"], torch.baddbmm(p["b1"], x, p["w1"]) * gate, p["w3"])

    def flops(self, site: Site) -> int:
        return 3 * EXPANSION * site.width**2 * site.tokens
