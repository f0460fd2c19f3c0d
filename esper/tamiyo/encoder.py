"""The heterogeneous graph encoder: typed input layers, two GraphSAGE layers, two GAT layers with edge attributes.

What is computed is PyG's HeteroConv (mean over relations) of SAGEConv and GATConv. The parameters of all relations of
a layer are stacked; the backends of `esper.tamiyo.encoders` read them in their own ways.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esper.graph import GraphBatch, Layout
from esper.graph.schema import GraphSchema
from esper.tamiyo import encoders
from esper.tamiyo.encoders import pyg
from esper.tamiyo.encoders.parameters import Parameters, Shape, orthogonal_

__all__ = ["Encoder", "masked_mean", "orthogonal_"]


class Encoder(Parameters):
    """Node embeddings of a GraphBatch.

    Args:
        schema, hidden, heads, read: see Shape.
        backend: one of `encoders.BACKENDS`, or "auto".
    """

    def __init__(
        self, schema: GraphSchema, hidden: list[int], heads: int, read: tuple[str, ...], backend: str = "auto"
    ):
        shape = Shape(schema, tuple(hidden), heads, read)
        plain = pyg.PyGEncoder(shape)  # draws what PyG draws
        super().__init__(shape, plain.inputs, plain.skips)
        self.backend = backend
        with torch.no_grad():
            for name, view in pyg.parameters(self).items():
                view.copy_(plain.get_parameter(name))

    def forward(self, graph: GraphBatch) -> dict[str, Tensor]:
        """Embeddings [B, n, hidden[-1]] of the node types in `read`; those of padded nodes mean nothing."""
        return encoders.forward(self, self.backend, graph)

    def of_tensors(self, layout: Layout) -> encoders.OfTensors | None:
        """`forward` for graphs of one layout as a function of packed x, attr and mask, which torch.compile takes whole;
        None where the backend has no such form."""
        return encoders.of_tensors(self, self.backend, layout, next(self.parameters()).device.type)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """[B, D], the mean of x [B, n, D] over the nodes of mask [B, n]; 0 where there are none."""
    weight = mask.unsqueeze(-1).to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)
