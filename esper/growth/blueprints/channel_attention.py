"""A gate for each channel that sees the whole image."""

import torch
from torch import Tensor

from esper.growth.blueprints.exponential import sigmoid
from esper.growth.blueprints.registry import Blueprint, ParameterSpec, Site, register

REDUCTION = 4


@register("channel_attention")
class ChannelAttention(Blueprint):
    """`(x * sigmoid(W2 relu(W1 mean(x) + b1) + b2)) W` with the mean over a sample's tokens.

    The channel attention of RCAN (Zhang et al., arXiv 1807.02758), which is squeeze and excitation (Hu et al., arXiv
    1709.01507), with a hidden layer of a quarter of the width, and a projection, so that a seed can start at 0.
    """

    mixes_tokens = True
    gated = True

    def fits(self, site: Site) -> bool:
        """The mean sees later tokens, too."""
        return super().fits(site) and not site.causal

    def _hidden(self, site: Site) -> int:
        return max(site.width // REDUCTION, 1)

    def parameters(self, site: Site) -> dict[str, ParameterSpec]:
        width, hidden = site.width, self._hidden(site)
        return {
            "w1": ParameterSpec((width, hidden), fan_in=width),
            "b1": ParameterSpec((1, hidden), fan_in=width),
            "w2": ParameterSpec((hidden, width), fan_in=hidden),
            "b2": ParameterSpec((1, width), fan_in=hidden),
            "w": ParameterSpec((width, width), fan_in=width, output=True),
        }

    def delta(self, p: dict[str, Tensor], x: Tensor, units: Tensor, site: Site) -> Tensor:
        samples = x.view(len(x), -1, site.tokens, x.shape[2])
        hidden = torch.baddbmm(p["b1"], samples.mean(2), p["w1"]).relu()
        gate = sigmoid(torch.baddbmm(p["b2"], hidden, p["w2"]))  # [m, batch, width]; 1/2 on padding, where x is 0
        return torch.bmm((samples * gate[:, :, None]).view(x.shape), p["w"])

    def flops(self, site: Site) -> int:
        # Of each token: a sum, a product with the gate, and the projection.
        return (site.width + 2) * site.width * site.tokens + 2 * site.width * self._hidden(site)
