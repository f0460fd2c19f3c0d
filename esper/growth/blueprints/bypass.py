"""A way around a stage: what repairs a stage that lets too little through."""

from esper.growth.blueprints.operations import Linear
from esper.growth.blueprints.registry import Blueprint, ParameterSpec, Site, register


@register("bypass")
class Bypass(Blueprint):
    """`W x + b` of the stage's input x: a projection shortcut (He et al., arXiv 1512.03385)."""

    reads_source = True
    residual = False

    program = (Linear(0, "w", "b"),)

    def parameters(self, site: Site) -> dict[str, ParameterSpec]:
        width = site.width
        return {
            "w": ParameterSpec((width, width), fan_in=width, output=True),
            "b": ParameterSpec((1, width), fan_in=width, output=True),
        }

    def flops(self, site: Site) -> int:
        return site.width**2 * site.tokens
