"""Self-attention over the tokens."""

from esper.growth.blueprints.operations import Attend, Linear
from esper.growth.blueprints.registry import Blueprint, ParameterSpec, Site, register


def projections(width: int) -> dict[str, ParameterSpec]:
    """Of queries, keys and values, and of what is attended to."""
    projection = ParameterSpec((width, width), fan_in=width)
    output = ParameterSpec((width, width), fan_in=width, output=True)
    return {"q": projection, "k": projection, "v": projection, "w": output}


@register("attention")
class Attention(Blueprint):
    """`softmax(Q K^T / sqrt(width) + position) V W` with one head (Vaswani et al., arXiv 1706.03762).

    `position` is a learned bias per distance in reading order, since hosts have no other positions.
    """

    mixes_tokens = True
    gated = True

    program = (Linear(0, "q"), Linear(0, "k"), Linear(0, "v"), Attend(1, 2, 3, "position"), Linear(4, "w"))

    def parameters(self, site: Site) -> dict[str, ParameterSpec]:
        return {**projections(site.width), "position": ParameterSpec((1, 2 * site.tokens - 1), init="zeros")}

    def flops(self, site: Site) -> int:
        return 4 * site.width**2 * site.tokens + 2 * site.width * site.tokens**2
