"""The parts of a plain host as ordinary modules: convolutions, the blueprints and the activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.growth.conditions import Condition
from esper.growth.host import KERNEL, HostSpec
from esper.runtime.errors import ConfigError

Pair = Callable[[Tensor], Tensor]


# ---- modules ---------------------------------------------------------------------------------------------------------


class Convolve(nn.Module):
    """A convolution of tokens [batch, tokens, units]; the framework's own runs on a view of them."""

    def __init__(self, spec: HostSpec, width: int, dilation: int = 1):
        super().__init__()
        self.grid = spec.grid
        reach = (KERNEL - 1) * dilation
        if len(spec.grid) == 2:
            plane = nn.Conv2d(width, width, KERNEL, padding=reach // 2, dilation=dilation)
            self.inner: nn.Module = plane.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        else:
            self.inner = nn.Conv1d(width, width, KERNEL, padding=0 if spec.causal else reach // 2, dilation=dilation)
        self.before = reach if spec.causal else 0

    def forward(self, h: Tensor) -> Tensor:
        if len(self.grid) == 2:
            return self.inner(h.unflatten(1, self.grid).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        h = h.transpose(1, 2)
        return self.inner(F.pad(h, (self.before, 0)) if self.before else h).transpose(1, 2)


class LowRank(nn.Sequential):
    """Two linear maps without an activation."""

    def __init__(self, width: int, rank: int):
        super().__init__(nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False))


class GLU(nn.Module):
    """Value and gate are one linear map."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.both, self.out = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, h: Tensor) -> Tensor:
        return self.out(F.glu(self.both(h)))


class Norm(nn.LayerNorm):
    """What layer normalisation changes."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) - h


class Attention(nn.Module):
    """One head; queries, keys and values are one linear map."""

    index: Tensor
    hidden: Tensor | None

    def __init__(self, width: int, tokens: int, causal: bool):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.position = nn.Parameter(torch.zeros(2 * tokens - 1))
        at = torch.arange(tokens)
        distance = at[None, :] - at[:, None]
        self.register_buffer("index", distance + tokens - 1)
        self.register_buffer("hidden", distance > 0 if causal else None)

    def forward(self, h: Tensor) -> Tensor:
        bias = self.position[self.index]
        if self.hidden is not None:
            bias = bias.masked_fill(self.hidden, -math.inf)
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))


def linear(weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    return [weight.T] if bias is None else [weight.T, bias[0]]


def kernel_of(weight: Tensor, bias: Tensor, grid: tuple[int, ...]) -> list[Tensor]:
    """From [taps, in, out] to [out, in, *kernel]."""
    return [weight.permute(2, 1, 0).unflatten(2, (KERNEL,) * len(grid)), bias[0]]


class Seed(nn.Module):
    """A seed of the blueprint `name`: the module, and how the engine's parameters are arranged in it."""

    def __init__(self, name: str, spec: HostSpec, width: int):
        super().__init__()
        self.name, self.grid = name, spec.grid
        self.reads_source = name in ("bypass", "widen")
        tokens = spec.site.tokens
        if name == "bypass":
            self.inner: nn.Module = nn.Linear(width, width)
        elif name == "low_rank":
            self.inner = LowRank(width, 2)
        elif name == "mlp":
            self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        elif name == "widen":
            self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width, bias=False))
        elif name == "glu":
            self.inner = GLU(width, 2 * width)
        elif name == "norm":
            self.inner = Norm(width)
        elif name == "attention":
            self.inner = Attention(width, tokens, spec.causal)
        elif name in ("conv", "dilated_conv"):
            convolve = Convolve(spec, width, 2 if name == "dilated_conv" else 1)
            self.inner = nn.Sequential(convolve, nn.ReLU(), nn.Linear(width, width, bias=False))
        else:
            raise ConfigError(f"blueprint {name} has no plain form to compare with; add one to {__name__}")

    def arranged(self, p: list[Tensor]) -> list[Tensor]:
        """The engine's parameters `p` (or what has their shapes) in the order and the shapes of `parameters()`."""
        if self.name in ("bypass", "low_rank", "mlp", "widen"):
            pairs = {"bypass": [p[:2]], "low_rank": [p[:1], p[1:]], "mlp": [p[:2], p[2:]], "widen": [p[:2], p[2:]]}
            return [value for pair in pairs[self.name] for value in linear(*pair)]
        if self.name == "glu":
            return [torch.cat([p[0], p[2]], dim=1).T, torch.cat([p[1][0], p[3][0]]), *linear(*p[4:])]
        if self.name == "norm":
            return [p[0][0], p[1][0]]
        if self.name == "attention":
            return [p[4][0], torch.cat(p[:3], dim=1).T, p[3].T]
        return [*kernel_of(p[0], p[1], self.grid), p[2].T]

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h)


# ---- conditions ------------------------------------------------------------------------------------------------------


class Activation(NamedTuple):
    """A stage's activation in some epoch, and its derivative, both functions of the pre-activation."""

    function: Pair
    slope: Pair


def _relu(z: Tensor) -> Tensor:
    return z.relu()


def _identity(z: Tensor) -> Tensor:
    return z


def activation(condition: Condition, high: float, leak: float, shift: float, units: Tensor) -> Activation:
    """What `condition` makes of a ReLU; `units` [width] marks the units that are left."""
    if condition == Condition.SATURATED:
        return Activation(
            lambda z: torch.lerp(F.hardtanh(z, -high, high), z, leak),
            lambda z: torch.where(z.abs() <= high, 1.0, leak),
        )
    if condition == Condition.HARDTANH:
        return Activation(F.hardtanh, lambda z: (z.abs() <= 1.0).float())
    if condition == Condition.LINEAR:
        return Activation(_identity, torch.ones_like)
    if condition == Condition.DYING:
        return Activation(lambda z: (z + shift).relu(), lambda z: (z + shift >= 0).float())
    if condition in (Condition.CHOKE, Condition.HALF):
        return Activation(lambda z: z.relu() * units, lambda z: (z >= 0) * units)
    return Activation(_relu, lambda z: (z >= 0).float())
