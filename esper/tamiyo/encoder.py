"""The heterogeneous graph encoder: typed input layers, two GraphSAGE layers, two GAT layers with edge attributes.

This is PyG's own arithmetic (`HeteroConv` of `SAGEConv` and `GATConv`), the reference for every faster backend.
"""

from __future__ import annotations

import math
import warnings

from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GATConv, HeteroConv, SAGEConv

from esper.graph import GraphBatch
from esper.graph.schema import GraphSchema, Relation

SAGE_LAYERS = 2  # the layers after these are GAT


def orthogonal_(layer: nn.Linear, gain: float = math.sqrt(2)) -> nn.Linear:
    """Orthogonal weight of the given gain and zero bias, in place (Andrychowicz et al., arXiv 2006.05990)."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Encoder(nn.Module):
    """Node embeddings of a GraphBatch.

    GraphSAGE: Hamilton et al., arXiv 1706.02216. GAT: Velickovic et al., arXiv 1710.10903.

    Args:
        schema: node types and relations.
        hidden: widths of the four layers; the first is also the width of the typed input layers.
        heads: attention heads of the GAT layers; must divide their widths.
        read: node types whose final embedding is used; the last layer computes no others.
    """

    def __init__(self, schema: GraphSchema, hidden: list[int], heads: int, read: tuple[str, ...]):
        super().__init__()
        self.read = read
        self.inputs = nn.ModuleDict(
            {
                node: nn.Sequential(orthogonal_(nn.Linear(len(names), hidden[0])), nn.GELU(), nn.LayerNorm(hidden[0]))
                for node, names in schema.nodes.items()
            }
        )
        self.layers = nn.ModuleList()
        self.skips = nn.ModuleList()
        width = hidden[0]
        for depth, out in enumerate(hidden):
            targets = read if depth == len(hidden) - 1 else tuple(schema.nodes)
            convs: dict[Relation, nn.Module] = {}
            for relation, attributes in schema.relations.items():
                if relation[2] not in targets:
                    continue
                if depth < SAGE_LAYERS:
                    convs[relation] = SAGEConv((width, width), out)
                else:
                    convs[relation] = GATConv(
                        (width, width), out // heads, heads, edge_dim=len(attributes), add_self_loops=False
                    )
            with warnings.catch_warnings():
                # PyG warns of node types that a layer does not update; in the last layer that is the intention.
                warnings.filterwarnings("ignore", message="There exist node types")
                self.layers.append(HeteroConv(convs, aggr="mean"))
            same = out == width
            self.skips.append(
                nn.ModuleDict({t: nn.Identity() if same else orthogonal_(nn.Linear(width, out)) for t in targets})
            )
            width = out

    def forward(self, graph: GraphBatch) -> dict[str, Tensor]:
        """Embeddings [B, n, hidden[-1]] of the node types in `read`; those of padded nodes mean nothing."""
        x, index, attr = graph.flatten()
        x = {node: self.inputs[node](value) for node, value in x.items()}
        for depth, (layer, skip) in enumerate(zip(self.layers, self.skips, strict=True)):
            out = layer(x, index) if depth < SAGE_LAYERS else layer(x, index, edge_attr_dict=attr)
            x = {node: skip.get_submodule(node)(x[node]) + F.gelu(value) for node, value in out.items()}
        return {node: x[node].view(*graph.x[node].shape[:2], x[node].shape[-1]) for node in self.read}


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """[B, D], the mean of x [B, n, D] over the nodes of mask [B, n]; 0 where there are none."""
    weight = mask.unsqueeze(-1).to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)
