"""The operations that blueprints are made of, each as stacked tensors; the native engine has its own form of each.

An operation reads registers, tensors [m, rows, units] with rows = batch * tokens, and gives one. Register 0 is what the
seed reads, and operation i of a program writes register i + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.growth.blueprints.exponential import sigmoid, softmax
from esper.growth.blueprints.site import Site
from esper.growth.convolution import Convolution, convolution

KERNEL = 3
EPSILON = 1e-5


@dataclass(frozen=True)
class Linear:
    """`x W + b` of each token."""

    source: int
    weight: str
    bias: str | None = None

    def __call__(self, registers: list[Tensor], p: dict[str, Tensor], units: Tensor, site: Site) -> Tensor:
        x, weight = registers[self.source], p[self.weight]
        return torch.bmm(x, weight) if self.bias is None else torch.baddbmm(p[self.bias], x, weight)


@dataclass(frozen=True)
class Convolve:
    """A convolution over the tokens' grid with KERNEL taps along each axis; the weight is [taps, in, out]."""

    source: int
    weight: str
    bias: str
    dilation: int = 1

    def convolution(self, site: Site) -> Convolution:
        """On the grid of `site`."""
        return convolution(site.grid, KERNEL, self.dilation, site.causal)

    def __call__(self, registers: list[Tensor], p: dict[str, Tensor], units: Tensor, site: Site) -> Tensor:
        return self.convolution(site)(registers[self.source], p[self.weight]) + p[self.bias]


@dataclass(frozen=True)
class Relu:
    """`max(x, 0)`."""

    source: int

    def __call__(self, registers: list[Tensor], p: dict[str, Tensor], units: Tensor, site: Site) -> Tensor:
        return registers[self.source].relu()


@dataclass(frozen=True)
class Gate:
    """`value * sigmoid(gate)`."""

    value: int
    gate: int

    def __call__(self, registers: list[Tensor], p: dict[str, Tensor], units: Tensor, site: Site) -> Tensor:
        return registers[self.value] * sigmoid(registers[self.gate])


@dataclass(frozen=True)
class Normalise:
    """`gain * normalised(x) + bias - x`, normalised over the units that a host has."""

    source: int
    gain: str
    bias: str

    def __call__(self, registers: list[Tensor], p: dict[str, Tensor], units: Tensor, site: Site) -> Tensor:
        x = registers[self.source]
        # Means over the units that the host has, as products.
        share = (units / units.sum(-1, keepdim=True)).transpose(1, 2)
        centred = x - torch.bmm(x, share)
        scale = (torch.bmm(centred.square(), share) + EPSILON).rsqrt()
        return p[self.gain] * (centred * scale) + p[self.bias] - x


@dataclass(frozen=True)
class Attend:
    """`softmax(Q K^T / sqrt(width) + position) V` of each sample's tokens (Vaswani et al., arXiv 1706.03762).

    `position` [1, 2 * tokens - 1] is a bias per distance in reading order, since hosts have no other positions.
    """

    query: int
    key: int
    value: int
    position: str

    def __call__(self, registers: list[Tensor], p: dict[str, Tensor], units: Tensor, site: Site) -> Tensor:
        q, k, v = (registers[i] for i in (self.query, self.key, self.value))
        m, rows, width = q.shape
        tokens = site.tokens
        q, k, v = (x.view(-1, tokens, width) for x in (q, k, v))
        # Hosts of lesser width have fewer units to sum over; padding adds 0.
        scale = units.sum(-1, keepdim=True).rsqrt()[:, None]
        scores = torch.bmm(q, k.transpose(1, 2)).view(m, -1, tokens, tokens) * scale
        distance = torch.arange(tokens, device=q.device)
        distance = distance[None, :] - distance[:, None]  # [query, key]
        scores = scores + p[self.position][:, :, distance + tokens - 1]
        if site.causal:
            scores = scores.masked_fill(distance > 0, -torch.inf)
        return torch.bmm(softmax(scores).view(-1, tokens, tokens), v).view(m, rows, width)


Operation = Linear | Convolve | Relu | Gate | Normalise | Attend
