"""Low-rank linear correction: the cheapest block that mixes units."""

from torch import Tensor

from esper.growth.blueprints.registry import Blueprint, ParameterSpec, register

RANK = 2


@register("low_rank")
class LowRank(Blueprint):
    """`V (U h)` of rank 2, as in low-rank adaptation (Hu et al., arXiv 2106.09685)."""

    def parameters(self, width: int) -> dict[str, ParameterSpec]:
        return {"u": ParameterSpec((width, RANK), fan_in=width), "v": ParameterSpec((RANK, width), fan_in=RANK)}

    def delta(self, p: dict[str, Tensor], h: Tensor) -> Tensor:
        return h @ p["u"] @ p["v"]

    def flops(self, width: int) -> int:
        return 2 * RANK * width
