"""Where Tamiyo looks: how sharply each GAT layer's attention chooses among the sources of a relation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esper.graph import GraphBatch
from esper.graph.schema import Relation
from esper.tamiyo.encoder import Encoder
from esper.tamiyo.encoders import pyg
from esper.tamiyo.encoders.parameters import GAT
from esper.tamiyo.policy import GraphPolicy

Focus = dict[Relation, dict[int, Tensor]]
"""relation -> layer -> float64 [heads], from 0, every source alike, to 1, one source alone."""


def attends(policy: GraphPolicy) -> bool:
    """Whether there is attention to look at."""
    return isinstance(policy.encoder, Encoder) and GAT in policy.encoder.shape.convolutions


@torch.no_grad()
def focus(policy: GraphPolicy, graphs: list[GraphBatch]) -> Focus:
    """One minus the entropy of the attention over that of equal weights, in the mean over all targets in `graphs` with
    more than one source; relations that never have one are left out.

    Computed by the reference, PyG's own layers, with the policy's parameters in fp32.

    Args:
        policy: one that `attends`.
        graphs: observations; at least one.
    """
    encoder, device = policy.encoder, next(policy.parameters()).device
    with torch.random.fork_rng(devices=[]):  # what it draws for its parameters is not used
        plain = pyg.PyGEncoder(encoder.shape).to(device)
    plain.load_state_dict({name: value.detach().clone() for name, value in pyg.parameters(encoder).items()})
    sums: dict[tuple[Relation, int], Tensor] = {}
    counts: dict[tuple[Relation, int], int] = {}

    def listen(relation: Relation, depth: int) -> Any:
        def hear(module: torch.nn.Module, given: tuple[Tensor, Any, dict[str, Any]]) -> None:
            edges, _, found = given
            sharp = _sharpness(found["alpha"], edges[1])
            if len(sharp):
                key = relation, depth
                sums[key] = sums.get(key, 0) + sharp.sum(0)
                counts[key] = counts.get(key, 0) + len(sharp)

        return hear

    for depth in filter(encoder.shape.attends, range(len(plain.layers))):
        for relation in encoder.shape.relations(depth):
            layer: Any = plain.layers[depth]
            conv = layer.convs[relation]
            conv.register_propagate_forward_pre_hook(listen(relation, depth))
            if not encoder.edge_attributes:
                conv.lin_edge.weight.zero_()
    for graph in graphs:
        plain(graph.to(device))
    found: Focus = {}
    for (relation, depth), total in sums.items():
        found.setdefault(relation, {})[depth] = (total / counts[relation, depth]).cpu()
    return found


def _sharpness(alpha: Tensor, target: Tensor) -> Tensor:
    """float64 [n, heads], of the n nodes in which more than one of the edges end, whose weights are `alpha`
    [edges, heads] and whose targets are `target` [edges]."""
    alpha, sources = alpha.double(), torch.bincount(target)
    entropy = alpha.new_zeros(len(sources), alpha.shape[1]).index_add_(0, target, torch.special.entr(alpha))
    several = sources > 1
    return 1 - entropy[several] / sources[several, None].double().log()
