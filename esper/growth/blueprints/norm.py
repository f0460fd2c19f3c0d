"""Layer normalisation as a block: it replaces what the slot carries by its normalised form."""

import torch
from torch import Tensor

from esper.growth.blueprints.registry import Blueprint, ParameterSpec, Site, register

EPSILON = 1e-5


@register("norm")
class Norm(Blueprint):
    """`gain * normalise(x) + bias - x`, so that at alpha = 1 the slot passes on the normalised signal
    (layer normalisation, Ba et al., arXiv 1607.06450)."""

    residual = False

    def parameters(self, site: Site) -> dict[str, ParameterSpec]:
        return {
            "gain": ParameterSpec((1, site.width), init="ones"),
            "bias": ParameterSpec((1, site.width), init="zeros"),
        }

    def delta(self, p: dict[str, Tensor], x: Tensor, units: Tensor, site: Site) -> Tensor:
        # Means over the units that the host has, as products.
        share = (units / units.sum(-1, keepdim=True)).transpose(1, 2)
        centred = x - torch.bmm(x, share)
        scale = (torch.bmm(centred.square(), share) + EPSILON).rsqrt()
        return p["gain"] * (centred * scale) + p["bias"] - x

    def flops(self, site: Site) -> int:
        return 4 * site.width * site.tokens
