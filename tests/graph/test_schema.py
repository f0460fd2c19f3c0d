"""The schema: pinned hash, columns, and that relations and real observations agree with it."""

import pytest

from esper.graph import GraphBatch
from esper.graph.schema import SCHEMA, VERSION, GraphSchema

NODES = {"a": ("x", "y"), "b": ("z",)}
RELATIONS = {("a", "to", "b"): ("p", "q"), ("b", "to", "a"): ("p",)}


def test_the_hash_of_version_2_is_pinned() -> None:
    # A checkpoint carries it. Whoever changes a name or an order on purpose raises VERSION and pins the new value.
    assert (VERSION, SCHEMA.hash) == (2, "dca85d27c27d5b2b")


@pytest.mark.parametrize(
    ("nodes", "relations"),
    [
        ({"a": ("y", "x"), "b": ("z",)}, RELATIONS),
        ({"a": ("x", "w"), "b": ("z",)}, RELATIONS),
        ({"a": ("x",), "b": ("y", "z")}, RELATIONS),
        ({"a": ("xy",), "b": ("z",)}, RELATIONS),
        ({"b": ("z",), "a": ("x", "y")}, RELATIONS),
        ({"c": ("x", "y"), "b": ("z",)}, RELATIONS),
        (NODES, dict(reversed(RELATIONS.items()))),
        (NODES, {("a", "to", "b"): ("q", "p"), ("b", "to", "a"): ("p",)}),
        (NODES, {("a", "on", "b"): ("p", "q"), ("b", "to", "a"): ("p",)}),
        (NODES, {("a", "to", "a"): ("p", "q"), ("b", "to", "a"): ("p",)}),
        (NODES, {("a", "to", "b"): ("p", "q")}),
    ],
    ids=[
        "feature order", "feature name", "feature moved", "features joined", "type order", "type name",
        "relation order", "attribute order", "relation name", "relation end", "relation gone",
    ],
)  # fmt: skip
def test_the_hash_changes_with_any_name_or_order(nodes: dict, relations: dict) -> None:
    assert GraphSchema(nodes, relations).hash != GraphSchema(NODES, RELATIONS).hash


def test_equal_schemas_have_equal_hashes() -> None:
    assert GraphSchema(dict(NODES), dict(RELATIONS)).hash == GraphSchema(NODES, RELATIONS).hash


@pytest.mark.parametrize(
    ("node", "name", "column"),
    [
        # two fractions, train loss and its bit, validation loss, gap and its bit
        ("global", "slope", 7),
        ("global", "slope_known", 8),
        ("global", "seeds_left", 14),  # rate, size, growth, compute, live
        ("global", "priced", 15),
        ("layer", "log_width_in", 7),  # depth, six kinds
        ("slot", "is_dormant", 0),
        ("slot", "alpha", 6),  # six stages
        ("activation", "zero_derivative_fraction", 7),  # six kinds, dead
        ("slot", "log_growth_gradient", 8),  # alpha, epochs
        ("slot", "contribution_known", 13),  # two gradients and their bits, contribution
        ("blueprint", "log_flops", 1),
    ],
)
def test_feature_is_the_column(node: str, name: str, column: int) -> None:
    assert SCHEMA.feature(node, name) == column


def test_an_unknown_feature_is_refused() -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        SCHEMA.feature("global", "alpha")


def test_both_ends_of_every_relation_are_node_types() -> None:
    assert {end for source, _, target in SCHEMA.relations for end in (source, target)} <= SCHEMA.nodes.keys()


def test_the_global_node_exchanges_with_every_other_type() -> None:
    others = SCHEMA.nodes.keys() - {"global"}
    assert {target for source, _, target in SCHEMA.relations if source == "global"} == others
    assert {source for source, _, target in SCHEMA.relations if target == "global"} == others


def test_names_are_unique_and_a_presence_bit_follows_its_feature() -> None:
    for names in SCHEMA.nodes.values():
        assert len(set(names)) == len(names)
        for column, name in enumerate(names):
            if name.endswith("_known"):
                assert names[column - 1] == name.removesuffix("_known")


def test_no_name_breaks_the_flat_keys() -> None:
    # GraphBatch.from_dict splits its keys at the double underscore.
    names = {*SCHEMA.nodes, *(part for relation in SCHEMA.relations for part in relation)}
    assert not [name for name in names if "__" in name or name.startswith("_") or name.endswith("_")]


def test_real_observations_have_the_declared_widths(observations: list[GraphBatch]) -> None:
    graph = observations[-1]
    assert {node: x.shape[2] for node, x in graph.x.items()} == {n: len(names) for n, names in SCHEMA.nodes.items()}
    widths = {relation: edges.attr.shape[2] for relation, edges in graph.edges.items()}
    assert widths == {relation: len(names) for relation, names in SCHEMA.relations.items()}


def test_real_edges_are_sorted_by_target(observations: list[GraphBatch]) -> None:
    for edges in observations[-1].edges.values():
        for target, mask in zip(edges.target, edges.mask, strict=True):
            assert (target[mask].diff() >= 0).all()
        assert not edges.attr[~edges.mask].any()
