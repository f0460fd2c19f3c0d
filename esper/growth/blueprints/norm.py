"""Layer normalisation as a block: it replaces what the slot carries by its normalised form."""

from torch import Tensor

from esper.growth.blueprints.registry import Blueprint, ParameterSpec, register

EPSILON = 1e-5


@register("norm")
class Norm(Blueprint):
    """`gain * normalise(h) + bias - h`, so that at alpha = 1 the slot passes on the normalised signal
    (layer normalisation, Ba et al., arXiv 1607.06450)."""

    residual = False

    def parameters(self, width: int) -> dict[str, ParameterSpec]:
        return {"gain": ParameterSpec((1, width), init="ones"), "bias": ParameterSpec((1, width), init="zeros")}

    def delta(self, p: dict[str, Tensor], h: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
        return p["gain"] * (centred * scale) + p["bias"] - h

    def flops(self, width: int) -> int:
        return 4 * width
