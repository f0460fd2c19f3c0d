"""Self-attention over the tokens."""

import torch
from torch import Tensor

from esper.growth.blueprints.exponential import softmax
from esper.growth.blueprints.registry import Blueprint, ParameterSpec, Site, register


@register("attention")
class Attention(Blueprint):
    """`softmax(Q K^T / sqrt(width) + position) V W` with one head (Vaswani et al., arXiv 1706.03762).

    `position` is a learned bias per distance in reading order, since hosts have no other positions.
    """

    mixes_tokens = True
    gated = True

    def parameters(self, site: Site) -> dict[str, ParameterSpec]:
        width = site.width
        projection = ParameterSpec((width, width), fan_in=width)
        return {
            "q": projection,
            "k": projection,
            "v": projection,
            "w": ParameterSpec((width, width), fan_in=width, output=True),
            "position": ParameterSpec((1, 2 * site.tokens - 1), init="zeros"),
        }

    def delta(self, p: dict[str, Tensor], x: Tensor, units: Tensor, site: Site) -> Tensor:
        m, rows, width = x.shape
        tokens = site.tokens
        q, k, v = (torch.bmm(x, p[name]).view(-1, tokens, width) for name in "qkv")
        # Hosts of lesser width have fewer units to sum over; padding adds 0.
        scale = units.sum(-1, keepdim=True).rsqrt()[:, None]
        scores = torch.bmm(q, k.transpose(1, 2)).view(m, -1, tokens, tokens) * scale
        distance = torch.arange(tokens, device=q.device)
        distance = distance[None, :] - distance[:, None]  # [query, key]
        scores = scores + p["position"][:, :, distance + tokens - 1]
        if site.causal:
            scores = scores.masked_fill(distance > 0, -torch.inf)
        mixed = torch.bmm(softmax(scores).view(-1, tokens, tokens), v).view(m, rows, width)
        return torch.bmm(mixed, p["w"])

    def flops(self, site: Site) -> int:
        return 4 * site.width**2 * site.tokens + 2 * site.width * site.tokens**2
