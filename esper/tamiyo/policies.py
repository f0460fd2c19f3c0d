"""Policies for graphs that nobody here declared: an action of the whole graph, or the choice of one node.

Tamiyo, the policy of the growth environments, is in `esper.tamiyo.policy`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper.graph.interface import DISCRETE, NODE, Interface
from esper.graph.schema import GraphSchema
from esper.tamiyo.encoder import masked_mean, orthogonal_
from esper.tamiyo.policy import POLICY_GAIN, VALUE_GAIN, GraphPolicy, PolicyConfig, Tamiyo


class DiscretePolicy(GraphPolicy):
    """One of `count` actions and a value, from the embedding of the whole graph: the means over the nodes of each type.

    Args:
        config: its size.
        schema: of the graphs it reads.
        count: actions.
    """

    def __init__(self, config: PolicyConfig, schema: GraphSchema, count: int):
        super().__init__(config, schema, tuple(schema.nodes))
        width, pooled = config.hidden[-1], config.hidden[-1] * len(schema.nodes)
        self.action = _head(pooled, width, count, POLICY_GAIN)
        self.value = _head(pooled, width, 1, VALUE_GAIN)

    def heads(self, x: dict[str, Tensor], node_mask: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Unmasked action logits [B, count] and values [B]."""
        whole = _pooled(x, node_mask)
        return self.action(whole), self.value(whole).squeeze(-1)


class NodePolicy(GraphPolicy):
    """The index of one node of a type, from the embeddings of each such node and of the whole graph, and a value.

    Args:
        config: its size.
        schema: of the graphs it reads.
        node: type of the nodes that are chosen from.
    """

    def __init__(self, config: PolicyConfig, schema: GraphSchema, node: str):
        super().__init__(config, schema, tuple(schema.nodes))
        self.node = node
        width, pooled = config.hidden[-1], config.hidden[-1] * len(schema.nodes)
        self.from_node = orthogonal_(nn.Linear(width, width))
        self.from_graph = orthogonal_(nn.Linear(pooled, width))
        self.choose = orthogonal_(nn.Linear(width, 1), POLICY_GAIN)
        self.value = _head(pooled, width, 1, VALUE_GAIN)

    def heads(self, x: dict[str, Tensor], node_mask: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One unmasked logit for each node, [B, n], and values [B]."""
        whole = _pooled(x, node_mask)
        joined = self.from_node(x[self.node]) + self.from_graph(whole)[:, None]
        return self.choose(nn.functional.gelu(joined)).squeeze(-1), self.value(whole).squeeze(-1)


def make_policy(config: PolicyConfig, interface: Interface) -> GraphPolicy:
    """A fresh policy of that size for environments with that interface."""
    if interface.actions == DISCRETE:
        return DiscretePolicy(config, interface.schema, interface.count)
    if interface.actions == NODE:
        return NodePolicy(config, interface.schema, interface.node)
    return Tamiyo(config, interface.schema)


def _pooled(x: dict[str, Tensor], node_mask: dict[str, Tensor]) -> Tensor:
    """[B, types * D], the mean embedding of each node type."""
    return torch.cat([masked_mean(x[node], node_mask[node]) for node in x], dim=1)


def _head(inputs: int, width: int, outputs: int, gain: float) -> nn.Sequential:
    return nn.Sequential(orthogonal_(nn.Linear(inputs, width)), nn.GELU(), orthogonal_(nn.Linear(width, outputs), gain))
