"""Backends of the encoder: ways to compute one function of one set of parameters.

`pyg` is the reference; `dense` is for many small graphs; `segment` for large ones; `auto` chooses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from torch import Tensor

from esper.graph import GraphBatch
from esper.runtime.errors import ConfigError

if TYPE_CHECKING:
    from esper.tamiyo.encoder import Encoder

log = logging.getLogger(__name__)

BACKENDS = ("pyg", "segment", "dense", "native")
Forward = Callable[["Encoder", GraphBatch], dict[str, Tensor]]


@cache
def backend(name: str) -> Forward:
    """The backend called `name`; PyG is only imported where it is asked for.

    Raises:
        ConfigError: no such backend.
    """
    if name not in BACKENDS:
        raise ConfigError(f"policy.backend={name}: no such backend; choose one of auto, {', '.join(BACKENDS)}")
    return import_module(f"{__name__}.{name}").forward


def forward(encoder: Encoder, graph: GraphBatch) -> dict[str, Tensor]:
    """The embeddings of `graph` by the encoder's backend."""
    name = chosen(graph) if encoder.backend == "auto" else encoder.backend
    return backend(name)(encoder, graph)


def chosen(graph: GraphBatch) -> str:
    """What "auto" takes for graphs of these sizes: decided and logged once for each."""
    return "dense" if graph._packed is not None else "segment"
