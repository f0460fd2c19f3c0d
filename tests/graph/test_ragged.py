"""Graphs of different sizes, packed and padded."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.graph import GraphBatch, Layout
from esper.graph.ragged import Graph, pack
from esper.graph.schema import GraphSchema

AB, AA = ("a", "to", "b"), ("a", "next", "a")
SCHEMA = GraphSchema({"a": ("f0", "f1"), "b": ("f0",)}, {AB: ("a0",), AA: ("a0", "a1")})


@st.composite
def graphs(draw) -> list[Graph]:
    """Any sizes, none included, and any edges, also several between a pair."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        n, m = draw(st.integers(0, 5)), draw(st.integers(0, 3))
        x = {"a": torch.randn(n, 2), "b": torch.randn(m, 1)}
        edges = {}
        for relation, sources, targets, width in ((AB, n, m, 1), (AA, n, n, 2)):
            count = draw(st.integers(0, 6)) if sources and targets else 0
            pairs = [torch.randint(max(size, 1), (count,)) for size in (sources, targets)]
            edges[relation] = (*pairs, torch.randn(count, width))
        found.append(Graph(x, edges))
    return found


def contents(batch: GraphBatch, k: int) -> tuple:
    """What graph k holds, without padding, in a form that can be compared."""
    nodes = {node: batch.x[node][k][batch.node_mask[node][k]].tolist() for node in batch.x}
    edges = {}
    for relation, each in batch.edges.items():
        mask = each.mask[k]
        columns = each.source[k][mask], each.target[k][mask], each.attr[k][mask]
        edges[relation] = sorted((s, t, *a) for s, t, a in zip(*(c.tolist() for c in columns), strict=True))
    return nodes, edges


def expected(graph: Graph) -> tuple:
    edges = {
        relation: sorted((s, t, *a) for s, t, a in zip(*(column.tolist() for column in columns), strict=True))
        for relation, columns in graph.edges.items()
    }
    return {node: x.tolist() for node, x in graph.x.items()}, edges


def batch(packed) -> GraphBatch:
    return GraphBatch.of(packed, torch.ones(len(packed.x), 2, dtype=torch.bool))


@settings(max_examples=50, deadline=None)
@given(graphs())
def test_packing_and_padding_keep_everything(given):
    packed = pack(SCHEMA, given)
    room = Layout.largest([packed.layout, Layout.of(SCHEMA, {"a": 7, "b": 9})])
    for each in (packed, packed.padded(room), pack(SCHEMA, given, room)):
        assert [contents(batch(each), k) for k in range(len(given))] == [expected(graph) for graph in given]
    assert packed.padded(room).layout == room
    assert packed.padded(packed.layout) is packed


@settings(max_examples=30, deadline=None)
@given(graphs(), graphs())
def test_batches_of_different_room_are_joined(first, second):
    joined = GraphBatch.cat([batch(pack(SCHEMA, first)), batch(pack(SCHEMA, second))])
    assert [contents(joined, k) for k in range(len(joined))] == [expected(graph) for graph in (*first, *second)]


def test_room_is_for_powers_of_two():
    def nodes(count: int) -> int:
        edges = {AB: (torch.zeros(0).long(),) * 2 + (torch.zeros(0, 1),)}
        edges[AA] = (torch.zeros(0).long(),) * 2 + (torch.zeros(0, 2),)
        return pack(SCHEMA, [Graph({"a": torch.zeros(count, 2), "b": torch.zeros(1, 1)}, edges)]).layout.counts["a"]

    assert [nodes(count) for count in (0, 1, 2, 3, 4, 5, 8, 9)] == [1, 1, 2, 4, 4, 8, 8, 16]


def test_action_masks_are_padded_with_what_is_illegal():
    one = Graph({"a": torch.zeros(1, 2), "b": torch.zeros(1, 1)}, {})
    relationless = GraphSchema(SCHEMA.nodes, {AB: ("a0",)})
    edges = {AB: (torch.tensor([0]), torch.tensor([0]), torch.ones(1, 1))}
    packed = pack(relationless, [one._replace(edges=edges)])
    masks = torch.tensor([[True]]), torch.tensor([[True, False, True]])
    joined = GraphBatch.cat([GraphBatch.of(packed, mask) for mask in masks])
    assert joined.action_mask.tolist() == [[True, False, False], [True, False, True]]
