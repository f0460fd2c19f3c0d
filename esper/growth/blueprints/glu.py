"""Gated linear unit."""

import torch
from torch import Tensor
from torch.nn import functional

from esper.growth.blueprints.registry import Blueprint, ParameterSpec, register

EXPANSION = 2


_LANES = 64


def _sigmoid(x: Tensor) -> Tensor:
    """Sigmoid whose value for one element does not depend on how many others stand beside it.

    Elementwise kernels compute the last elements, those that do not fill a SIMD vector, with another exponential, so
    that the last host of a batch would round differently from the others.
    """
    count = x.numel()
    return functional.pad(x.flatten(), (0, -count % _LANES)).sigmoid()[:count].view_as(x)


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
        gate = _sigmoid(torch.baddbmm(p["b2"], h, p["w2"]))
        return torch.baddbmm(p["b3"], torch.baddbmm(p["b1"], h, p["w1"]) * gate, p["w3"])

    def flops(self, width: int) -> int:
        return 3 * EXPANSION * width * width
