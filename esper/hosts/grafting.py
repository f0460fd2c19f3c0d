"""Seeds in modules: blocks of the same blueprints as in populations, added behind a submodule by a forward hook."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esper.growth.blueprints import Blueprint, Site
from esper.growth.parameters import drawn
from esper.hosts.anatomy import Place, Slot


class _Beside(torch.autograd.Function):
    """h, with the gradient of `h + delta`: a seed that learns beside its host (a straight-through gradient)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, delta: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0]


class Seed(nn.Module):
    """A block of a blueprint; its parameters have a dimension of 1 in front, as a stack of one seed.

    Args:
        blueprint: what it computes.
        slot, site: where it lives.
        key: int64 [], of its initial values.
        zero_output: it starts with an output of 0.
    """

    def __init__(self, blueprint: Blueprint, slot: Slot, site: Site, key: Tensor, zero_output: bool = False):
        super().__init__()
        self.blueprint, self.slot, self.site = blueprint, slot, site
        specs = blueprint.parameters(site)
        values = drawn(list(specs.values()), key, zero_output)
        self.weights = nn.ParameterDict(dict(zip(specs, values, strict=True)))
        self.units: Tensor
        self.register_buffer("units", torch.ones(1, 1, site.width), persistent=False)

    def forward(self, output: Tensor, source: Tensor) -> Tensor:
        """What it adds to its stage's output, from that and the stage's input."""
        x = source if self.blueprint.reads_source else output
        site = self.slot.site(output.shape)
        weights: dict[str, Tensor] = dict(self.weights.items())
        delta = self.blueprint.delta(weights, self.slot.rows(x)[None], self.units, site)
        return self.slot.unrows(delta[0], output).to(output.dtype)  # autocast may have another one here


class Graft:
    """The hook behind a slot's stage: adds the seed that lives there, and keeps what statistics need.

    Args:
        stage: the submodule.
        place: of the slot.

    Attributes:
        seed: or None.
        alpha: float32 [], how much of the seed is added.
        beside: the seed learns beside the host, whatever alpha is.
        seen: what the stage took and gave at its last call.
        learnt: what new units would have read when it was last trained, and the gradient of the loss with respect to
            what it gave.
    """

    def __init__(self, stage: nn.Module, place: Place):
        self.place = place
        self.seed: Seed | None = None
        self.alpha = torch.zeros(())
        self.active = self.beside = False
        self.seen: tuple[Tensor, Tensor] | None = None
        self.learnt: tuple[Tensor, Tensor] | None = None
        # Compiled modules call it as it is, so that none is compiled anew when seeds come and go.
        self._handle = stage.register_forward_hook(torch.compiler.disable(self._hook))

    def remove(self) -> None:
        """Takes the hook, and with it the seed, out of the module."""
        self._handle.remove()

    def set(self, alpha: float, beside: bool) -> None:
        """How the seed is added from now on."""
        self.active, self.beside = alpha > 0, beside
        self.alpha.fill_(alpha)

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        source = args[0].detach()
        self.seen = source, output.detach()
        training = torch.is_grad_enabled()
        if training and output.requires_grad:
            # New units around the stage; where that has other tokens than its input, new units behind it.
            read = source if self.place.around else output.detach()
            output.register_hook(lambda gradient: self._keep(read, gradient))
        if self.seed is None:
            return None
        if self.active:
            return output + self.alpha * self.seed(output, args[0])
        if self.beside and training:
            return _Beside.apply(output, self.seed(output.detach(), source))
        return None

    def _keep(self, read: Tensor, gradient: Tensor) -> None:
        self.learnt = read, gradient.detach()
