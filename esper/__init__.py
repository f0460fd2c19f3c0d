"""Esper: a learned controller that grows neural networks while they train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from esper.graph import GraphBatch as GraphBatch
    from esper.growing import Budget as Budget
    from esper.growing import Slot as Slot
    from esper.growing import grow as grow
    from esper.growing import regrow as regrow
    from esper.tamiyo.loading import load_policy as load_policy

# Found on first use: torch and PyG take seconds to import, and most users of a part need only that part.
_HOME = {
    "GraphBatch": "esper.graph",
    "load_policy": "esper.tamiyo.loading",
    **dict.fromkeys(("Budget", "Slot", "grow", "regrow"), "esper.growing"),
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("esper")
    raise AttributeError(f"module 'esper' has no attribute {name!r}")
