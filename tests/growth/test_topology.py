import pytest

from esper.graph import Layout
from esper.graph.schema import SCHEMA
from esper.growth.topology import edge_masks, nodes


class Wirings:
    """`wirings[relation, depth]`: (source, target) of the real edges, sorted by target."""

    def __init__(self, stages, blueprints):
        self.layout = Layout.of(SCHEMA, nodes(stages, blueprints))
        self.masks = edge_masks(self.layout)

    def __getitem__(self, at):
        relation, depth = at
        source, target = self.layout.pairs(relation)
        mask = self.layout.of_relation(self.masks[depth][None], relation).flatten()
        return list(zip(source[mask].tolist(), target[mask].tolist(), strict=True))


def test_nodes():
    assert nodes(3, 2) == {"global": 1, "layer": 5, "activation": 3, "parameter": 1, "slot": 3, "blueprint": 2}


def test_a_host_of_one_stage_by_hand():
    # In room for two: layers are the stem 0, the stage 1 and the head 3; the stage 2 is missing.
    w = Wirings(2, 2)
    by_hand = {
        ("layer", "feeds", "layer"): [(0, 1), (1, 3)],
        ("layer", "feeds", "activation"): [(1, 0)],
        ("activation", "feeds", "layer"): [(0, 3)],
        ("parameter", "tunes", "layer"): [(0, 0), (0, 1), (0, 3)],
        ("slot", "reads", "layer"): [(0, 1)],
        ("slot", "writes", "layer"): [(0, 3)],
        ("layer", "hosts", "slot"): [(1, 0), (3, 0)],
        ("slot", "precedes", "slot"): [],
        ("blueprint", "fits", "slot"): [(0, 0), (1, 0)],
        ("slot", "fits", "blueprint"): [(0, 0), (0, 1)],
        ("global", "writes", "layer"): [(0, 0), (0, 1), (0, 3)],
        ("layer", "informs", "global"): [(0, 0), (1, 0), (3, 0)],
        ("global", "writes", "blueprint"): [(0, 0), (0, 1)],
        ("slot", "informs", "global"): [(0, 0)],
    }
    for relation, expected in by_hand.items():
        assert w[relation, 1] == expected, relation


def test_a_host_of_two_stages_by_hand():
    w = Wirings(2, 1)
    by_hand = {
        ("layer", "feeds", "layer"): [(0, 1), (1, 2), (2, 3)],
        ("layer", "feeds", "activation"): [(1, 0), (2, 1)],
        ("activation", "feeds", "layer"): [(0, 2), (1, 3)],
        ("slot", "reads", "layer"): [(0, 1), (1, 2)],
        ("slot", "writes", "layer"): [(0, 2), (1, 3)],
        ("layer", "hosts", "slot"): [(1, 0), (2, 0), (2, 1), (3, 1)],
        ("slot", "precedes", "slot"): [(0, 1)],
        ("blueprint", "fits", "slot"): [(0, 0), (0, 1)],
        ("slot", "fits", "blueprint"): [(0, 0), (1, 0)],
    }
    for relation, expected in by_hand.items():
        assert w[relation, 2] == expected, relation


@pytest.mark.parametrize(("stages", "blueprints"), [(1, 1), (3, 4), (5, 2)])
def test_every_relation_at_every_depth(stages, blueprints):
    w = Wirings(stages, blueprints)
    counts = nodes(stages, blueprints)
    assert w.masks.shape == (stages + 1, w.layout.cells)
    assert int(w.masks.sum()) == sum(len(w[r, depth]) for r in SCHEMA.relations for depth in range(stages + 1))
    for relation in SCHEMA.relations:
        for depth in range(stages + 1):
            real = w[relation, depth]
            assert real == sorted(real, key=lambda pair: pair[::-1])
            assert len(set(real)) == len(real)
            for source, target in real:
                assert source < counts[relation[0]]
                assert target < counts[relation[2]]
                for node, index in ((relation[0], source), (relation[2], target)):
                    if node in ("slot", "activation"):
                        assert index < depth
                    if node == "layer":
                        assert index <= depth or index == stages + 1


def test_room_only_renumbers_the_head():
    roomy, exact = Wirings(5, 3), Wirings(2, 3)

    def renumbered(node, index):
        return 6 if node == "layer" and index == 3 else index

    for relation in SCHEMA.relations:
        expected = [
            (renumbered(relation[0], source), renumbered(relation[2], target)) for source, target in exact[relation, 2]
        ]
        assert sorted(roomy[relation, 2]) == sorted(expected)
