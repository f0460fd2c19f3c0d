"""Layer normalisation as a block: it replaces what the slot carries by its normalised form."""

from esper.growth.blueprints.operations import Normalise
from esper.growth.blueprints.registry import Blueprint, ParameterSpec, Site, register


@register("norm")
class Norm(Blueprint):
    """`gain * normalise(x) + bias - x`, so that at alpha = 1 the slot passes on the normalised signal
    (layer normalisation, Ba et al., arXiv 1607.06450)."""

    residual = False

    program = (Normalise(0, "gain", "bias"),)

    def parameters(self, site: Site) -> dict[str, ParameterSpec]:
        return {
            "gain": ParameterSpec((1, site.width), init="ones"),
            "bias": ParameterSpec((1, site.width), init="zeros"),
        }

    def flops(self, site: Site) -> int:
        return 4 * site.width * site.tokens
