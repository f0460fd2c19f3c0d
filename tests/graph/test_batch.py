"""GraphBatch against PyG and against its own rows, over random graphs of a small schema with awkward sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch, HeteroData

from esper.graph import GraphBatch

FEATURES = {"a": 3, "b": 1, "hub": 2}
ATTRIBUTES = {("a", "to", "a"): 2, ("a", "to", "b"): 1, ("b", "back", "a"): 1, ("hub", "on", "a"): 3}
ACTIONS = 5


def random_graph(sizes: dict[str, int], edges: dict[tuple[str, str, str], int], seed: int) -> HeteroData:
    """A graph with that many nodes and edges; edges in random order, parallel ones possible."""
    generator = torch.Generator().manual_seed(seed)
    graph = HeteroData()
    for node, count in sizes.items():
        graph[node].x = torch.randn(count, FEATURES[node], generator=generator)
    for relation, count in edges.items():
        ends = [sizes[relation[0]], sizes[relation[2]]]
        count = count if min(ends) else 0
        index = [torch.randint(max(end, 1), (count,), generator=generator) for end in ends]
        graph[relation].edge_index = torch.stack(index)
        graph[relation].edge_attr = torch.randn(count, ATTRIBUTES[relation], generator=generator)
    graph.action_mask = torch.rand(ACTIONS, generator=generator) < 0.5
    return graph


@st.composite
def graph_lists(draw: st.DrawFn) -> list[HeteroData]:
    """One to four graphs; a type can be empty, the hub has always one node, many nodes have no edge."""
    return [
        random_graph(
            {"a": draw(st.integers(0, 5)), "b": draw(st.integers(0, 3)), "hub": 1},
            {relation: draw(st.integers(0, 6)) for relation in ATTRIBUTES},
            draw(st.integers(0, 10_000)),
        )
        for _ in range(draw(st.integers(1, 4)))
    ]


def fixed_batch() -> GraphBatch:
    """Five graphs of unequal sizes."""
    sizes = [(1, 0), (4, 2), (2, 3), (5, 1), (3, 2)]
    counts = [(2, 0, 0, 1), (6, 3, 2, 4), (0, 0, 0, 0), (5, 4, 3, 2), (1, 2, 3, 1)]
    return GraphBatch.from_hetero_data(
        [
            random_graph({"a": a, "b": b, "hub": 1}, dict(zip(ATTRIBUTES, count, strict=True)), seed)
            for seed, ((a, b), count) in enumerate(zip(sizes, counts, strict=True))
        ]
    )


def assert_same(one: GraphBatch, other: GraphBatch) -> None:
    left, right = one.to_dict(), other.to_dict()
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert torch.equal(left[key], right[key]), key


def edge_list(index: torch.Tensor, attr: torch.Tensor) -> list[tuple[float, ...]]:
    """The edges as sorted (source, target, attributes...)."""
    return sorted((*ends, *values) for ends, values in zip(index.T.tolist(), attr.tolist(), strict=True))


# ---- flat dictionaries -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(graph_lists())
def test_from_dict_undoes_to_dict(graphs: list[HeteroData]) -> None:
    batch = GraphBatch.from_hetero_data(graphs)
    assert_same(GraphBatch.from_dict(batch.to_dict()), batch)


def test_from_dict_takes_integer_masks() -> None:
    batch = fixed_batch()
    flat = {k: v.to(torch.int8) if v.dtype == torch.bool else v for k, v in batch.to_dict().items()}
    assert_same(GraphBatch.from_dict(flat), batch)


def test_from_dict_does_not_depend_on_the_order_of_keys() -> None:
    batch = fixed_batch()
    restored = GraphBatch.from_dict(dict(reversed(batch.to_dict().items())))
    for key, value in batch.to_dict().items():
        assert torch.equal(restored.to_dict()[key], value), key


def test_flat_keys_and_shapes() -> None:
    flat = fixed_batch().to_dict()
    assert flat["x__a"].shape == (5, 5, 3)  # five graphs, the largest has five nodes, three features
    assert flat["mask__b"].sum(1).tolist() == [0, 2, 3, 1, 2]
    assert flat["source__a__to__b"].shape == flat["target__a__to__b"].shape == flat["valid__a__to__b"].shape == (5, 4)
    assert flat["attr__hub__on__a"].shape == (5, 4, 3)
    assert flat["action_mask"].shape == (5, ACTIONS)
    assert len(flat) == 2 * 3 + 4 * 4 + 1


# ---- PyG -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(graph_lists())
def test_hetero_data_survives_the_round_trip(graphs: list[HeteroData]) -> None:
    for before, after in zip(graphs, GraphBatch.from_hetero_data(graphs).to_hetero_data(), strict=True):
        for node in FEATURES:
            assert torch.equal(before[node].x, after[node].x)
        for relation in ATTRIBUTES:
            assert edge_list(before[relation].edge_index, before[relation].edge_attr) == edge_list(
                after[relation].edge_index, after[relation].edge_attr
            )
        assert torch.equal(before.action_mask, after.action_mask)


@settings(deadline=None, max_examples=50)
@given(graph_lists())
def test_batch_survives_the_round_trip(graphs: list[HeteroData]) -> None:
    batch = GraphBatch.from_hetero_data(graphs)
    assert_same(GraphBatch.from_hetero_data(batch.to_hetero_data()), batch)


def test_real_observations_survive_the_round_trip(observations: list[GraphBatch]) -> None:
    graph = observations[-2]
    for one, other in zip(
        graph.to_hetero_data(), GraphBatch.from_hetero_data(graph.to_hetero_data()).to_hetero_data(), strict=True
    ):
        assert torch.equal(one.action_mask, other.action_mask)
        for node in graph.x:
            assert torch.equal(one[node].x, other[node].x)
        for relation in graph.edges:
            assert edge_list(one[relation].edge_index, one[relation].edge_attr) == edge_list(
                other[relation].edge_index, other[relation].edge_attr
            )


def test_hetero_data_joins_the_same_nodes_wherever_padding_lies(observations: list[GraphBatch]) -> None:
    graph = observations[-2]
    # The last layer of a host of few stages comes behind padding.
    assert graph.node_mask["layer"][1].tolist() == [True, True, True, False, False, True]
    for b, data in enumerate(graph.to_hetero_data()):
        for relation, edges in graph.edges.items():
            mask = edges.mask[b]
            ends = [(relation[0], edges.source[b][mask]), (relation[2], edges.target[b][mask])]
            for (node, padded), compact in zip(ends, data[relation].edge_index, strict=True):
                assert torch.equal(data[node].x[compact], graph.x[node][b][padded])


@settings(deadline=None, max_examples=50)
@given(graph_lists())
def test_edges_are_sorted_by_target_then_source_and_padding_is_zero_behind(graphs: list[HeteroData]) -> None:
    batch = GraphBatch.from_hetero_data(graphs)
    for edges in batch.edges.values():
        for source, target, attr, mask in zip(edges.source, edges.target, edges.attr, edges.mask, strict=True):
            count = int(mask.sum())
            assert mask[:count].all()
            pairs = list(zip(target[:count].tolist(), source[:count].tolist(), strict=True))
            assert pairs == sorted(pairs)
            assert not source[count:].any()
            assert not target[count:].any()
            assert not attr[count:].any()


@settings(deadline=None, max_examples=50)
@given(graph_lists())
def test_flatten_equals_pygs_batch(graphs: list[HeteroData]) -> None:
    batch = GraphBatch.from_hetero_data(graphs)
    reference = Batch.from_data_list(batch.to_hetero_data())
    x, index, attr = batch.flatten()
    real = {node: batch.node_mask[node].flatten() for node in FEATURES}
    position = {node: mask.cumsum(0) - 1 for node, mask in real.items()}  # from padded to PyG's numbering
    for node in FEATURES:
        assert torch.equal(x[node][real[node]], reference[node].x)
    for relation in ATTRIBUTES:
        source, target = index[relation]
        assert real[relation[0]][source].all()
        assert real[relation[2]][target].all()
        compact = torch.stack([position[relation[0]][source], position[relation[2]][target]])
        expected = edge_list(reference[relation].edge_index, reference[relation].edge_attr)
        assert edge_list(compact, attr[relation]) == expected


def test_flatten_offsets_by_the_padded_size() -> None:
    graphs = []
    for count in (1, 3):
        graph = random_graph({"a": count, "b": 2, "hub": 1}, dict.fromkeys(ATTRIBUTES, 0), count)
        graph["a", "to", "b"].edge_index = torch.tensor([[count - 1], [1]])
        graph["a", "to", "b"].edge_attr = torch.tensor([[float(count)]])
        graphs.append(graph)
    _, index, attr = GraphBatch.from_hetero_data(graphs).flatten()
    # Three padded a-nodes and two b-nodes per graph: (0, 1) stays, (2, 1) becomes (3 + 2, 2 + 1).
    assert index["a", "to", "b"].tolist() == [[0, 5], [1, 3]]
    assert attr["a", "to", "b"].tolist() == [[1.0], [3.0]]


# ---- indexing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (2, [2]),
        (-1, [4]),
        (-5, [0]),
        (slice(1, None, 2), [1, 3]),
        (slice(-2, None), [3, 4]),
        (slice(3, 3), []),
        ([3, 0, 0], [3, 0, 0]),
        ([-1], [4]),
        ((1, 4), [1, 4]),
        (torch.tensor([4, 1]), [4, 1]),
        (torch.tensor([True, False, False, True, False]), [0, 3]),
        (torch.zeros(5, dtype=torch.bool), []),
    ],
    ids=str,
)
def test_indexing_takes_those_rows(index: object, rows: list[int]) -> None:
    batch = fixed_batch()
    taken = batch[index]  # type: ignore[index]
    assert len(taken) == len(rows)
    for key, value in batch.to_dict().items():
        expected = [value[row] for row in rows]
        assert taken.to_dict()[key].shape == (len(rows), *value.shape[1:])
        assert all(torch.equal(got, want) for got, want in zip(taken.to_dict()[key], expected, strict=True)), key


def test_an_empty_list_takes_no_graph() -> None:
    assert len(fixed_batch()[[]]) == 0


@pytest.mark.parametrize("index", [5, -6])
def test_an_int_out_of_range_is_refused(index: int) -> None:
    with pytest.raises(IndexError):
        fixed_batch()[index]


def test_cat_puts_batches_one_behind_the_other() -> None:
    batch = fixed_batch()
    assert_same(GraphBatch.cat([batch[3:], batch[:1], batch[1:3]]), batch[[3, 4, 0, 1, 2]])


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_to_moves_every_tensor() -> None:
    batch = fixed_batch().to("meta")
    assert batch.device.type == "meta"
    assert {value.device.type for value in batch.to_dict().values()} == {"meta"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_on_a_device_are_batched_on_it() -> None:
    graphs = [graph.to("cuda") for graph in fixed_batch().to_hetero_data()]
    batch = GraphBatch.from_hetero_data(graphs)
    assert {key: value.device.type for key, value in batch.to_dict().items() if not value.is_cuda} == {}
    assert_same(batch.to("cpu"), fixed_batch())
