"""What stands between an environment and a policy: the graphs that are read, and the actions that are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from esper.graph.schema import GraphSchema

GROWTH, DISCRETE, NODE = "growth", "discrete", "node"


@dataclass(frozen=True)
class Interface:
    """Of an environment, and of the policies that can play it.

    Attributes:
        schema: of the graphs.
        actions: GROWTH (the growth environments' own), DISCRETE (one of `count`, of the whole graph) or NODE (the index
            of one node of type `node`).
        count: number of actions where DISCRETE.
        node: type of the node to choose where NODE.
    """

    schema: GraphSchema
    actions: str
    count: int = 0
    node: str = ""

    def state(self) -> dict[str, Any]:
        """As plain containers, for checkpoints."""
        return {
            "nodes": {node: list(names) for node, names in self.schema.nodes.items()},
            "relations": [[*relation, list(names)] for relation, names in self.schema.relations.items()],
            "actions": self.actions,
            "count": self.count,
            "node": self.node,
        }

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Interface:
        """Inverse of `state`."""
        schema = GraphSchema(
            {node: tuple(names) for node, names in state["nodes"].items()},
            {(source, name, target): tuple(names) for source, name, target, names in state["relations"]},
        )
        return cls(schema, state["actions"], state["count"], state["node"])
