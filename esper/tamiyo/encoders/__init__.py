"""Backends of the encoder: ways to compute one function of one set of parameters.

`pyg` is the reference; `dense` is for many small graphs, `native` the same for CPUs in C++; `segment` is for large
graphs; `auto` chooses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor

from esper.graph import GraphBatch, Layout
from esper.graph.schema import Relation
from esper.runtime.errors import ConfigError
from esper.tamiyo.encoders.parameters import Parameters

log = logging.getLogger(__name__)

BACKENDS = ("pyg", "segment", "dense", "native")
MOST_CELLS = 1 << 14
"""Possible edges of a graph up to which `auto` pads them."""

Forward = Callable[[Parameters, GraphBatch], dict[str, Tensor]]
OfTensors = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


@cache
def backend(name: str) -> Forward:
    """The backend called `name`; PyG is only imported where it is asked for.

    Raises:
        ConfigError: no such backend.
    """
    return _module(name).forward


def of_tensors(encoder: Parameters, name: str, layout: Layout, device: str) -> OfTensors | None:
    """See Encoder.of_tensors.

    Raises:
        ConfigError: the backend cannot run here; the message says why.
    """
    counts, relations = tuple(layout.counts.items()), tuple(relation for relation, _, _ in layout.relations)
    module = _module(_checked(name, device, counts, relations))
    return module.of_tensors(encoder, layout) if hasattr(module, "of_tensors") else None


def forward(encoder: Parameters, name: str, graph: GraphBatch) -> dict[str, Tensor]:
    """The embeddings of `graph` by the backend `name`, or the one that is chosen for it.

    Raises:
        ConfigError: the backend cannot run here; the message says why.
    """
    counts = tuple((node, x.shape[1]) for node, x in graph.x.items())
    return backend(_checked(name, graph.device.type, counts, graph.relations))(encoder, graph)


def _module(name: str) -> Any:
    if name not in BACKENDS:
        raise ConfigError(f"policy.backend={name}: no such backend; choose one of auto, {', '.join(BACKENDS)}")
    return import_module(f"{__name__}.{name}")


def _checked(name: str, device: str, counts: tuple[tuple[str, int], ...], relations: tuple[Relation, ...]) -> str:
    if name == "auto":
        return chosen(device, counts, relations)
    if name == "native" and (reason := _native_fails(device)) is not None:
        raise ConfigError(f"policy.backend=native: {reason}; use auto")
    return name


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
