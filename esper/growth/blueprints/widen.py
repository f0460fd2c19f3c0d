"""More units for a stage, in parallel to those it has."""

from esper.growth.blueprints.operations import Linear, Relu
from esper.growth.blueprints.registry import Blueprint, ParameterSpec, Site, register


@register("widen")
class Widen(Blueprint):
    """`V relu(U x + b)` of the stage's input x: as many new units as the stage is wide, written into its output
    (the new neurons of GradMax, Evci et al., arXiv 2201.05125)."""

    reads_source = True
    residual = False
    widens = True

    program = (Linear(0, "u", "b"), Relu(1), Linear(2, "v"))

    def parameters(self, site: Site) -> dict[str, ParameterSpec]:
        width = site.width
        return {
            "u": ParameterSpec((width, width), fan_in=width),
            "b": ParameterSpec((1, width), fan_in=width),
            "v": ParameterSpec((width, width), fan_in=width, output=True),
        }

    def flops(self, site: Site) -> int:
        return 2 * site.width**2 * site.tokens
