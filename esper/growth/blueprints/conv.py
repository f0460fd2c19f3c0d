"""Convolutions over the tokens: dense neighbours, or neighbours further apart."""

from esper.growth.blueprints.operations import Convolve, Linear, Relu
from esper.growth.blueprints.registry import Blueprint, ParameterSpec, Site, register


@register("conv")
class Conv(Blueprint):
    """`relu(conv(h) + b) V`: a 3-tap convolution along each axis of the grid, then a projection."""

    mixes_tokens = True
    program = (Convolve(0, "k", "b"), Relu(1), Linear(2, "v"))

    def _taps(self, site: Site) -> int:
        convolve = self.program[0]
        assert isinstance(convolve, Convolve)
        return convolve.convolution(site).taps

    def parameters(self, site: Site) -> dict[str, ParameterSpec]:
        width, taps = site.width, self._taps(site)
        return {
            "k": ParameterSpec((taps, width, width), fan_in=taps * width),
            "b": ParameterSpec((1, width), fan_in=taps * width),
            "v": ParameterSpec((width, width), fan_in=width, output=True),
        }

    def flops(self, site: Site) -> int:
        return (self._taps(site) + 1) * site.width**2 * site.tokens


@register("dilated_conv")
class DilatedConv(Conv):
    """As `conv` with taps two tokens apart: a wider view at the same cost (Yu and Koltun, arXiv 1511.07122)."""

    program = (Convolve(0, "k", "b", dilation=2), Relu(1), Linear(2, "v"))
