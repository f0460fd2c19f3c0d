"""Convolutions over the tokens: dense neighbours, or neighbours further apart."""

from typing import ClassVar

from torch import Tensor

from esper.growth.blueprints.registry import Blueprint, ParameterSpec, Site, register
from esper.growth.convolution import Convolution, convolution

KERNEL = 3


@register("conv")
class Conv(Blueprint):
    """`relu(conv(h) + b) V`: a 3-tap convolution along each axis of the grid, then a projection."""

    mixes_tokens = True
    dilation: ClassVar[int] = 1

    def _convolution(self, site: Site) -> Convolution:
        return convolution(site.grid, KERNEL, self.dilation, site.causal)

    def parameters(self, site: Site) -> dict[str, ParameterSpec]:
        width, taps = site.width, self._convolution(site).taps
        return {
            "k": ParameterSpec((taps, width, width), fan_in=taps * width),
            "b": ParameterSpec((1, width), fan_in=taps * width),
            "v": ParameterSpec((width, width), fan_in=width, output=True),
        }

    def delta(self, p: dict[str, Tensor], x: Tensor, units: Tensor, site: Site) -> Tensor:
        return (self._convolution(site)(x, p["k"]) + p["b"]).relu() @ p["v"]

    def flops(self, site: Site) -> int:
        return (self._convolution(site).taps + 1) * site.width**2 * site.tokens


@register("dilated_conv")
class DilatedConv(Conv):
    """As `conv` with taps two tokens apart: a wider view at the same cost (Yu and Koltun, arXiv 1511.07122)."""

    dilation = 2
