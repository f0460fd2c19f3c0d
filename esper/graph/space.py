"""The padded Gymnasium Dict space of a GraphBatch, and the way from one to the other."""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces

from esper.graph.batch import GraphBatch

BOUND = 10.0
"""Features and attributes are clipped to [-BOUND, BOUND]."""


def space_of(batch: GraphBatch) -> spaces.Dict:
    """The space of one graph with the sizes of `batch`.

    Keys are those of `GraphBatch.to_dict`: features and attributes are Boxes, masks are MultiBinary, node indices are
    integer Boxes.
    """
    members: dict[str, spaces.Space] = {}
    for key, value in batch.to_dict().items():
        shape = tuple(value.shape[1:])
        kind, _, name = key.partition("__")
        if value.dtype == torch.bool:
            members[key] = spaces.MultiBinary(shape if len(shape) > 1 else shape[0])
        elif kind in ("source", "target"):
            node = name.split("__")[0 if kind == "source" else 2]
            # Gymnasium warns of a Box with one value, which a type of one node would have.
            members[key] = spaces.Box(0, max(batch.x[node].shape[1] - 1, 1), shape, np.int64)
        else:
            members[key] = spaces.Box(-BOUND, BOUND, shape, np.float32)
    return spaces.Dict(members)


def to_numpy(batch: GraphBatch) -> dict[str, np.ndarray]:
    """The batch as fresh NumPy arrays that fit `space_of` (batched); masks become int8."""
    arrays = {key: value.cpu().numpy() for key, value in batch.to_dict().items()}
    return {key: value.astype(np.int8 if value.dtype == np.bool_ else value.dtype) for key, value in arrays.items()}


def from_numpy(observation: dict[str, np.ndarray]) -> GraphBatch:
    """Inverse of `to_numpy`."""
    return GraphBatch.from_dict({key: torch.from_numpy(np.asarray(value)) for key, value in observation.items()})
