"""Low-rank linear correction: the cheapest block that mixes units."""

from esper.growth.blueprints.operations import Linear
from esper.growth.blueprints.registry import Blueprint, ParameterSpec, Site, register

RANK = 2


@register("low_rank")
class LowRank(Blueprint):
    """`V (U h)` of rank 2, as in low-rank adaptation (Hu et al., arXiv 2106.09685)."""

    program = (Linear(0, "u"), Linear(1, "v"))

    def parameters(self, site: Site) -> dict[str, ParameterSpec]:
        return {
            "u": ParameterSpec((site.width, RANK), fan_in=site.width),
            "v": ParameterSpec((RANK, site.width), fan_in=RANK, output=True),
        }

    def flops(self, site: Site) -> int:
        return 2 * RANK * site.width * site.tokens
