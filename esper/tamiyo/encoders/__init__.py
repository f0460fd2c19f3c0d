"""Backends of the encoder: ways to compute one function of one set of parameters.

`pyg` is the reference; `dense` is for many small graphs, `native` the same for CPUs in C++; `segment` is for large
graphs; `auto` chooses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module

from torch import Tensor

from esper.graph import GraphBatch
from esper.graph.schema import Relation
from esper.runtime.errors import ConfigError
from esper.tamiyo.encoders.parameters import Parameters

log = logging.getLogger(__name__)

BACKENDS = ("pyg", "segment", "dense", "native")
MOST_CELLS = 1 << 14
"""Possible edges of a graph up to which `auto` pads them."""

Forward = Callable[[Parameters, GraphBatch], dict[str, Tensor]]


@cache
def backend(name: str) -> Forward:
    """The backend called `name`; PyG is only imported where it is asked for.

    Raises:
        ConfigError: no such backend.
    """
    if name not in BACKENDS:
        raise ConfigError(f"policy.backend={name}: no such backend; choose one of auto, {', '.join(BACKENDS)}")
    return import_module(f"{__name__}.{name}").forward


def forward(encoder: Parameters, name: str, graph: GraphBatch) -> dict[str, Tensor]:
    """The embeddings of `graph` by the backend `name`, or the one that is chosen for it.

    Raises:
        ConfigError: the backend cannot run here; the message says why.
    """
    if name == "auto":
        counts = tuple((node, x.shape[1]) for node, x in graph.x.items())
        name = chosen(graph.device.type, counts, graph.relations)
    elif name == "native":
        reason = _native_fails(graph.device.type)
        if reason is not None:
            raise ConfigError(f"policy.backend=native: {reason}; use auto")
    return backend(name)(encoder, graph)


@cache
def chosen(device: str, counts: tuple[tuple[str, int], ...], relations: tuple[Relation, ...]) -> str:
    """What "auto" takes for graphs with `counts` nodes of each type; decided and logged once for each."""
    nodes = dict(counts)
    cells = sum(nodes[source] * nodes[target] for source, _, target in relations)
    if cells > MOST_CELLS:
        name, reason = "segment", f"{cells:,} possible edges"
    elif (failure := _native_fails(device)) is None:
        name, reason = "native", f"{cells:,} possible edges, on a CPU"
    else:
        name, reason = "dense", f"{cells:,} possible edges; not native: {failure}"
    log.info("encoder backend %s (%s)", name, reason)
    return name


def _native_fails(device: str) -> str | None:
    if device != "cpu":
        return f"it runs on CPUs only, not on {device}"
    from esper.tamiyo.encoders import native

    return native.unavailable()
