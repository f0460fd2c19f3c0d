"""The heterogeneous graph encoder: typed input layers, then GraphSAGE layers and GAT layers with edge attributes.

What is computed is PyG's HeteroConv (mean over relations) of SAGEConv and GATConv. The parameters of all relations of
a layer are stacked; the backends of `esper.tamiyo.encoders` read them in their own ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from esper.graph import GraphBatch, Layout
from esper.graph.schema import GraphSchema
from esper.tamiyo import encoders
from esper.tamiyo.encoders import pyg
from esper.tamiyo.encoders.parameters import CONVOLUTIONS, Parameters, Shape, orthogonal_

__all__ = ["Encode", "Encoder", "masked_mean", "orthogonal_"]

Encode = Callable[[Tensor, Tensor, Tensor, Tensor], dict[str, Tensor]]
"""Embeddings from packed x, attr, mask and node_mask."""


class Encoder(Parameters):
    """Node embeddings of a GraphBatch.

    Args:
        schema, hidden, heads, read, convolutions: see Shape.
        backend: one of `encoders.BACKENDS`, or "auto".
        edge_attributes: whether attributes are read; otherwise all count as 0, under every backend.
    """

    def __init__(
        self,
        schema: GraphSchema,
        hidden: Sequence[int],
        heads: int,
        read: tuple[str, ...],
        backend: str = "auto",
        convolutions: Sequence[str] = CONVOLUTIONS,
        edge_attributes: bool = True,
    ):
        shape = Shape(schema, tuple(hidden), heads, read, tuple(convolutions))
        plain = pyg.PyGEncoder(shape)  # draws what PyG draws
        super().__init__(shape, plain.inputs, plain.skips)
        self.backend, self.edge_attributes = backend, edge_attributes
        with torch.no_grad():
            for name, view in pyg.parameters(self).items():
                view.copy_(plain.get_parameter(name))

    def forward(self, graph: GraphBatch) -> dict[str, Tensor]:
        """Embeddings [B, n, hidden[-1]] of the node types in `read`; those of padded nodes mean nothing."""
        return encoders.forward(self, self.backend, graph if self.edge_attributes else _blinded(graph))

    def of_tensors(self, layout: Layout) -> Encode | None:
        """`forward` for graphs of one layout as a function that torch.compile takes whole; None where the backend has
        no such form."""
        encode = encoders.of_tensors(self, self.backend, layout, next(self.parameters()).device.type)
        if encode is None:
            return None

        def function(x: Tensor, attr: Tensor, mask: Tensor, node_mask: Tensor) -> dict[str, Tensor]:
            return encode(x, attr if self.edge_attributes else torch.zeros_like(attr), mask)

        return function


def _blinded(graph: GraphBatch) -> GraphBatch:
    """The same graphs with 0 for every attribute."""
    if graph.layout is not None:
        packed = graph.pack()
        return GraphBatch.of(replace(packed, attr=torch.zeros_like(packed.attr)), graph.action_mask)
    edges = {relation: replace(edge, attr=torch.zeros_like(edge.attr)) for relation, edge in graph.edges.items()}
    return GraphBatch(graph.x, graph.node_mask, edges, graph.action_mask)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """[B, D], the mean of x [B, n, D] over the nodes of mask [B, n]; 0 where there are none."""
    weight = mask.unsqueeze(-1).to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)
