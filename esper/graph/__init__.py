"""Graphs: the schema, the batch, and its Gymnasium space. Nothing here knows what a host or a policy is."""

from esper.graph.batch import Edges, GraphBatch, Packed
from esper.graph.layout import Layout

__all__ = ["Edges", "GraphBatch", "Layout", "Packed"]
