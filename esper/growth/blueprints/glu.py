"""Gated linear unit."""

import torch
from torch import Tensor

from esper.growth.blueprints.registry import Blueprint, ParameterSpec, register

EXPANSION = 2


@register("glu")
class GLU(Blueprint):
    """`W3 ((W1 h + b1) * sigmoid(W2 h + b2)) + b3` with a hidden layer of twice the width
    (Dauphin et al., arXiv 1612.08083)."""

    gated = True

    def parameters(self, width: int) -> dict[str, ParameterSpec]:
        hidden = EXPANSION * width
        return {
            "w1": ParameterSpec((width, hidden), fan_in=width),
            "b1": ParameterSpec((1, hidden), fan_in=width),
            "w2": ParameterSpec((width, hidden), fan_in=width),
            "b2": ParameterSpec((1, hidden), fan_in=width),
            "w3": ParameterSpec((hidden, width), fan_in=hidden),
            "b3": ParameterSpec((1, width), fan_in=hidden),
        }

    def delta(self, p: dict[str, Tensor], h: Tensor) -> Tensor:
        gate = torch.baddbmm(p["b2"], h, p["w2"]).sigmoid()
        return torch.baddbmm(p["b3"], torch.baddbmm(p["b1"], h, p["w1"]) * gate, p["w3"])

    def flops(self, width: int) -> int:
        return 3 * EXPANSION * width * width
