"""Two-layer perceptron: the plain way to add capacity."""

from esper.growth.blueprints.operations import Linear, Relu
from esper.growth.blueprints.registry import Blueprint, ParameterSpec, Site, register

EXPANSION = 2


@register("mlp")
class MLP(Blueprint):
    """`W2 relu(W1 h + b1) + b2` with a hidden layer of twice the width."""

    program = (Linear(0, "w1", "b1"), Relu(1), Linear(2, "w2", "b2"))

    def parameters(self, site: Site) -> dict[str, ParameterSpec]:
        width, hidden = site.width, EXPANSION * site.width
        return {
            "w1": ParameterSpec((width, hidden), fan_in=width),
            "b1": ParameterSpec((1, hidden), fan_in=width),
            "w2": ParameterSpec((hidden, width), fan_in=hidden, output=True),
            "b2": ParameterSpec((1, width), fan_in=hidden, output=True),
        }

    def flops(self, site: Site) -> int:
        return 2 * EXPANSION * site.width**2 * site.tokens
