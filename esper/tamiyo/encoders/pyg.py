"""The reference: PyG's own HeteroConv of SAGEConv and GATConv, on the parameters of an Encoder."""

from __future__ import annotations

import warnings
from functools import cache

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch_geometric.nn import GATConv, HeteroConv, SAGEConv

from esper.graph import GraphBatch
from esper.graph.schema import Relation
from esper.tamiyo.encoders.parameters import Parameters, Shape, typed_inputs, typed_skips


class PyGEncoder(nn.Module):
    """What an Encoder of `shape` computes, as a PyG user would write it, with parameters of its own."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.inputs = typed_inputs(shape)
        self.skips = typed_skips(shape)
        self.layers = nn.ModuleList()
        for depth, (width, out) in enumerate(shape.widths):
            convs: dict[Relation, nn.Module] = {}
            for relation in shape.relations(depth):
                if shape.attends(depth):
                    attributes = len(shape.schema.relations[relation])
                    convs[relation] = GATConv(
                        (width, width), out // shape.heads, shape.heads, edge_dim=attributes, add_self_loops=False
                    )
                else:
                    convs[relation] = SAGEConv((width, width), out)
            with warnings.catch_warnings():
                # PyG warns of node types that a layer does not update; in the last layer that is the intention.
                warnings.filterwarnings("ignore", message="There exist node types")
                self.layers.append(HeteroConv(convs, aggr="mean"))

    def forward(self, graph: GraphBatch) -> dict[str, Tensor]:
        x, index, attr = graph.flatten()
        x = {node: self.inputs[node](value) for node, value in x.items()}
        for depth, (layer, skip) in enumerate(zip(self.layers, self.skips, strict=True)):
            out = layer(x, index, edge_attr_dict=attr) if self.shape.attends(depth) else layer(x, index)
            x = {node: skip.get_submodule(node)(x[node]) + F.gelu(value) for node, value in out.items()}
        return {node: x[node].view(*graph.x[node].shape[:2], x[node].shape[-1]) for node in self.shape.read}


def parameters(encoder: Parameters) -> dict[str, Tensor]:
    """The encoder's parameters under the names, and in the shapes, of a PyGEncoder: views, through which gradients
    flow."""
    shape = encoder.shape
    named: dict[str, Tensor] = {}
    named |= {name: value for name, value in encoder.named_parameters() if not name.startswith("layers.")}
    for depth, layer in enumerate(encoder.layers):
        for number, relation in enumerate(shape.relations(depth)):
            own = {name: value[number] for name, value in layer.named_parameters()}
            if shape.attends(depth):
                attributes = len(shape.schema.relations[relation])
                found = {
                    "att_src": own["att_source"][None],
                    "att_dst": own["att_target"][None],
                    "att_edge": own["att_edge"][None],
                    "bias": own["bias"],
                    "lin_src.weight": own["source"].T,
                    "lin_dst.weight": own["target"].T,
                    "lin_edge.weight": own["edge"][:attributes].T,
                }
            else:
                found = {
                    "lin_l.weight": own["neighbour"].T,
                    "lin_l.bias": own["bias"],
                    "lin_r.weight": own["root"].T,
                }
            key = "___".join(relation)
            named |= {f"layers.{depth}.convs.<{key}>.{name}": value for name, value in found.items()}
    return named


@cache
def _skeleton(shape: Shape) -> PyGEncoder:
    return PyGEncoder(shape).to("meta")


def forward(encoder: Parameters, graph: GraphBatch) -> dict[str, Tensor]:
    """See Encoder.forward."""
    return functional_call(_skeleton(encoder.shape), parameters(encoder), (graph,))
