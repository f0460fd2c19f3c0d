"""Gated linear unit."""

from esper.growth.blueprints.operations import Gate, Linear
from esper.growth.blueprints.registry import Blueprint, ParameterSpec, Site, register

EXPANSION = 2


@register("glu")
class GLU(Blueprint):
    """`W3 ((W1 h + b1) * sigmoid(W2 h + b2)) + b3` with a hidden layer of twice the width
    (Dauphin et al., arXiv 1612.08083)."""

    gated = True

    program = (Linear(0, "w1", "b1"), Linear(0, "w2", "b2"), Gate(1, 2), Linear(3, "w3", "b3"))

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

    def flops(self, site: Site) -> int:
        return 3 * EXPANSION * site.width**2 * site.tokens
