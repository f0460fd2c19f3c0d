"""A small network that makes images larger: a Dual Aggregation Transformer adds to a bicubic enlargement."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.hosts.anatomy import Slot
from esper.hosts.dat import DATSpec, spec_of
from esper.hosts.dat.network import DAT

TINY = spec_of("tiny", 2, img_size=32)


def slots(spec: DATSpec) -> list[Slot]:
    """Of a SuperResolver: behind every block, whose images are [B, H, W, C]."""
    groups = enumerate(spec.depth)
    return [Slot(f"dat.layers.{group}.blocks.{block}") for group, depth in groups for block in range(depth)]


class SuperResolver(nn.Module):
    """The residual of an enlargement is easier to learn than the image (Kim et al., arXiv 1511.04587). It starts as the
    bicubic enlargement alone.

    Args:
        spec: of the transformer.
        attention: a backend of `esper.attention`; by default as `esper.attention.select` says.
    """

    def __init__(self, spec: DATSpec, attention: str | None = None):
        super().__init__()
        self.scale = spec.scale
        self.dat = DAT(spec, attention)
        last = [module for module in self.dat.modules() if isinstance(module, nn.Conv2d)][-1]
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)

    @classmethod
    def tiny(cls, scale: int = 2) -> SuperResolver:
        """Of about 0.4 million parameters: two groups of two blocks."""
        return cls(replace(TINY, scale=scale).check())

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, scale H, scale W] from [B, 3, H, W] between 0 and 1."""
        large = F.interpolate(x, scale_factor=self.scale, mode="bicubic", antialias=True)
        return large + self.dat(x) - self.dat.mean.to(x.dtype)

    def restored(self, x: Tensor) -> Tensor:
        """The forward pass without gradients in eval mode, between 0 and 1."""
        training = self.training
        try:
            with torch.no_grad():
                return self.eval()(x).clamp(0, 1)
        finally:
            self.train(training)
