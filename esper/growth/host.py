"""The stacked host: a stem, stages with a slot behind each, and a linear head. State lives in the population."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from esper.growth.blueprints import ParameterSpec, Site
from esper.growth.conditions import Activations
from esper.growth.convolution import convolution

Graft = Callable[[int, Tensor, Tensor], Tensor]
"""`graft(slot, h, source) -> h` adds the seeds that live in a slot; `source` is the input of its stage."""

KERNEL = 3


@dataclass(frozen=True)
class HostSpec:
    """Up to `stages` stages of up to `width` ReLU units behind a linear ReLU stem; slot k sits behind stage k.

    A stage is linear for data of one token, else a 3-tap convolution along each axis of the tokens' grid. The head
    reads the mean over tokens, or each token by itself.

    Attributes:
        inputs: features of a token.
        classes: outputs of the head.
        width: units of the widest host.
        stages: stages of the deepest host, which is the number of slots.
        grid, causal: how the tokens lie, see Data.
        per_token: a label for each token, not for each sample.
    """

    inputs: int
    classes: int
    width: int
    stages: int
    grid: tuple[int, ...] = (1,)
    causal: bool = False
    per_token: bool = False

    @property
    def site(self) -> Site:
        return self.site_of(self.width)

    def site_of(self, width: int) -> Site:
        return Site(width, self.grid, self.causal)

    @property
    def layers(self) -> int:
        """Stem, stages and head."""
        return self.stages + 2

    @property
    def taps(self) -> int:
        return convolution(self.grid, KERNEL, causal=self.causal).taps if self.site.tokens > 1 else 1

    def parameters(self, width: int) -> list[ParameterSpec]:
        """Weight and bias [1, out] of each layer in turn; weights are [in, out], or [taps, in, out]."""
        specs = [ParameterSpec((self.inputs, width), "he", fan_in=self.inputs)]
        specs += [ParameterSpec((1, width), fan_in=self.inputs)]
        fan_in = self.taps * width
        shape = (width, width) if self.taps == 1 else (self.taps, width, width)
        for _ in range(self.stages):
            specs += [ParameterSpec(shape, "he", fan_in=fan_in), ParameterSpec((1, width), fan_in=fan_in)]
        return [
            *specs,
            ParameterSpec((width, self.classes), fan_in=width),
            ParameterSpec((1, self.classes), fan_in=width),
        ]

    def fans(self, width: int) -> list[tuple[int, int]]:
        """(units in, units out) of every layer."""
        return [(self.inputs, width)] + [(width, width)] * self.stages + [(width, self.classes)]

    def flops(self, width: int) -> list[int]:
        """Multiply-adds of every layer for one sample, forward."""
        tokens = self.site.tokens
        head = width * self.classes * (tokens if self.per_token else 1)
        return [tokens * self.inputs * width] + [tokens * self.taps * width**2] * self.stages + [head]


class _Activate(torch.autograd.Function):
    """`units * (clamp(z, low, high) + leak * what that cut off)`.

    By hand, since the derivative is one mask that the forward pass has at hand already.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, low: Tensor, high: Tensor, leak: Tensor | None, units: Tensor) -> Tensor:
        h, slope = activate(z, low, high, leak, units)
        ctx.save_for_backward(slope)
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None, None, None, None


def _equal(a: Tensor, b: Tensor) -> Tensor:
    return torch.eq(a, b, out=torch.empty_like(a))


def activate(
    z: Tensor, low: Tensor, high: Tensor, leak: Tensor | None, units: Tensor, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """A stage's output [M, rows, width] and its derivative, that on the first `rows` rows only (None: on all).

    z is [M, rows, width], the settings are [M, 1, 1], units [M, 1, width].
    """
    # Written with the kernels that are fast where one operand is broadcast: clamp, eq and where are 5 times slower.
    clamped = torch.maximum(torch.minimum(z, high), low)
    slope = _equal(clamped[:, :rows], z[:, :rows])
    if leak is not None:
        clamped = torch.lerp(clamped, z, leak)
        slope.mul_(1 - leak).add_(leak)
    return clamped.mul_(units), slope.mul_(units)


@dataclass
class Trace:
    """What a forward pass leaves for the statistics, stage by stage, each [M, rows, width]."""

    outputs: list[Tensor]  # of the stages, before their slots
    sources: list[Tensor]  # their inputs
    slopes: list[Tensor]  # derivatives of their activations [M, slopes, width]; only without gradients


def forward(
    spec: HostSpec,
    parameters: list[Tensor],
    x: Tensor,
    at: Activations,
    gain: Tensor | None,
    graft: Graft,
    slopes: int | None = None,
) -> tuple[Tensor, Trace]:
    """Logits of M hosts, each on its own batch.

    Args:
        spec: the common architecture.
        parameters: as `HostSpec.parameters`, each [M, *shape].
        x: [M, batch, tokens, inputs].
        at: of the M hosts.
        gain: [M, inputs, 1], a factor on each input feature, or None.
        graft: adds the seeds of a slot.
        slopes: rows on which the trace keeps derivatives, where no gradient is taken; None for all.

    Returns:
        logits [M, batch, classes], or [M, batch * tokens, classes] for labels per token; and the trace.
    """
    trace = Trace([], [], [])
    hosts, batch = x.shape[:2]
    stem = parameters[0] if gain is None else parameters[0] * gain
    h = torch.baddbmm(parameters[1], x.flatten(1, 2), stem).relu()
    training = torch.is_grad_enabled()
    for stage in range(spec.stages):
        source = h
        low, high, leak, units, shift, skip = at.stage(stage)
        weight, bias = parameters[2 * stage + 2], parameters[2 * stage + 3]
        if shift is not None:
            bias = bias + shift
        if spec.taps == 1:
            z = torch.baddbmm(bias, source, weight)
        else:
            z = convolution(spec.grid, KERNEL, causal=spec.causal)(source, weight) + bias
        if training:
            h = _Activate.apply(z, low, high, leak, units)
        else:
            h, slope = activate(z, low, high, leak, units, slopes)
            trace.slopes.append(slope)
        trace.sources.append(source)
        trace.outputs.append(h)
        h = graft(stage, h if skip is None else torch.addcmul(h, skip, source), source)
    if not spec.per_token and spec.site.tokens > 1:
        h = h.view(hosts, batch, -1, spec.width).mean(2)
    return torch.baddbmm(parameters[-1], h, parameters[-2]), trace


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """[N, rows] in nats from logits [N, rows, classes]."""
    # With the classes in the middle the softmax is vectorised over the batch: 3 to 6 times faster for few classes.
    return F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
