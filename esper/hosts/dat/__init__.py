"""The Dual Aggregation Transformer (Chen et al., arXiv 2308.03364), a host for image super-resolution.

`build` makes it from a preset, `compile_regions` compiles its blocks, `Captured` is its CUDA graph.
"""

from __future__ import annotations

from typing import Any

from esper.hosts.dat.network import DAT
from esper.hosts.dat.programs import Captured, compile_regions
from esper.hosts.dat.spec import PRESETS, DATSpec, spec_of

__all__ = ["DAT", "PRESETS", "Captured", "DATSpec", "build", "compile_regions", "spec_of"]


def build(name: str, scale: int = 4, *, attention: str | None = None, **changes: Any) -> DAT:
    """A network with random weights.

    Args:
        name: one of PRESETS.
        scale: factor from the input's height and width to the output's.
        attention: a backend of `esper.attention`; by default as `esper.attention.select` says.
        changes: other fields of DATSpec.

    Raises:
        ConfigError: there is no such preset, field or backend, or the network cannot be built; says what can.
    """
    return DAT(spec_of(name, scale, **changes), attention)
