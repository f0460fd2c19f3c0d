"""A multilayer perceptron on the features of nodes and their means: what there is to compare message passing with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.graph import GraphBatch, Layout
from esper.tamiyo.encoder import Encode, masked_mean
from esper.tamiyo.encoders.parameters import Parameters, Shape, orthogonal_, typed_inputs, typed_skips

GLOBAL = "global"


class PooledEncoder(nn.Module):
    """Node embeddings of a GraphBatch that know nothing of its edges (Deep Sets, arXiv 1703.06114).

    Each node type has layers of its own: the input layer of the graph encoder and a perceptron of two layers, the first
    as wide as needed for as many parameters as the graph encoder of the same shape has, to half a unit. To both layers
    of a node of type GLOBAL also go the means over the nodes of every other type. It is plain PyTorch on all devices
    and has no backends.

    Args:
        shape: of that graph encoder; only the first and the last width are those of layers here.
    """

    def __init__(self, shape: Shape):
        super().__init__()
        self.read = shape.read
        nodes, width, out = shape.schema.nodes, shape.hidden[0], shape.hidden[-1]
        # A global node reads as many values for each of its own as there are types.
        values = {node: len(nodes) if node == GLOBAL else 1 for node in nodes}
        self.inputs = typed_inputs(shape)
        self.skips = nn.ModuleDict(
            {node: nn.Identity() if width == out else orthogonal_(nn.Linear(width, out)) for node in self.read}
        )
        with torch.device("meta"):
            graph = Parameters(shape, typed_inputs(shape), typed_skips(shape))
        unit = sum(values[node] * width + 1 for node in nodes) + sum(values[node] * out for node in self.read)
        inner = max(1, round((_size(graph) - _size(self) - out * len(self.read)) / unit))
        self.first = nn.ModuleDict({node: orthogonal_(nn.Linear(values[node] * width, inner)) for node in nodes})
        self.second = nn.ModuleDict({node: orthogonal_(nn.Linear(values[node] * inner, out)) for node in self.read})

    def forward(self, graph: GraphBatch) -> dict[str, Tensor]:
        """Embeddings [B, n, hidden[-1]] of the node types in `read`; those of padded nodes mean nothing."""
        return self.of_nodes(graph.x, graph.node_mask)

    def of_tensors(self, layout: Layout) -> Encode:
        """`forward` for graphs of one layout as a function that torch.compile takes whole."""
        places = layout.nodes  # torch.compile does not take the lock of a property that is not yet cached

        def function(x: Tensor, attr: Tensor, mask: Tensor, node_mask: Tensor) -> dict[str, Tensor]:
            features = {node: x[:, places[node], :count] for node, _, count in layout.types}
            return self.of_nodes(features, {node: node_mask[:, place] for node, place in places.items()})

        return function

    def of_nodes(self, x: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """`forward` from the features [B, n, F] and masks [B, n] of each node type."""
        # In the order of the schema, in which the means are joined; that of x may be another.
        h = {node: layer(x[node]) for node, layer in self.inputs.items()}
        inner = {node: F.gelu(self.first[node](value)) for node, value in _joined(h, masks).items()}
        joined = _joined(inner, masks)
        return {node: self.skips[node](h[node]) + F.gelu(self.second[node](joined[node])) for node in self.read}


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _joined(h: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """`h` [B, n, D] of each type, with the means of all other types behind what a global node has."""
    if GLOBAL not in h:
        return h
    own = h[GLOBAL]
    means = (masked_mean(value, masks[node])[:, None] for node, value in h.items() if node != GLOBAL)
    return {**h, GLOBAL: torch.cat([own, *(mean.expand(-1, own.shape[1], -1) for mean in means)], 2)}
