import pytest
import torch

from esper.graph.schema import SCHEMA
from esper.growth.topology import nodes, wirings


def pairs(wiring, depth):
    """(source, target) of the real edges of one depth."""
    source, target, mask = (value[depth] for value in wiring)
    return list(zip(source[mask].tolist(), target[mask].tolist(), strict=True))


def test_nodes():
    assert nodes(3, 2) == {"layer": 5, "activation": 3, "parameter": 1, "slot": 3, "blueprint": 2}


def test_a_host_of_one_stage_by_hand():
    # In room for two: layers are the stem 0, the stage 1 and the head 3; the stage 2 is missing.
    w = wirings(2, 2)
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
        assert pairs(w[relation], 1) == expected, relation


def test_a_host_of_two_stages_by_hand():
    w = wirings(2, 1)
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
        assert pairs(w[relation], 2) == expected, relation


@pytest.mark.parametrize(("stages", "blueprints"), [(1, 1), (3, 4), (5, 2)])
def test_every_relation_at_every_depth(stages, blueprints):
    w = wirings(stages, blueprints)
    assert list(w) == list(SCHEMA.relations)
    counts = nodes(stages, blueprints) | {"global": 1}
    for relation, wiring in w.items():
        assert {value.dtype for value in wiring[:2]} == {torch.int64}
        assert wiring.mask.dtype == torch.bool
        for depth in range(stages + 1):
            real = pairs(wiring, depth)
            count = len(real)
            assert wiring.mask[depth].tolist() == [True] * count + [False] * (wiring.mask.shape[1] - count)
            assert not wiring.source[depth, count:].any()
            assert not wiring.target[depth, count:].any()
            assert real == sorted(real, key=lambda pair: pair[::-1])
            assert len(set(real)) == count
            for source, target in real:
                assert source < counts[relation[0]]
                assert target < counts[relation[2]]
                for node, index in ((relation[0], source), (relation[2], target)):
                    if node in ("slot", "activation"):
                        assert index < depth
                    if node == "layer":
                        assert index <= depth or index == stages + 1


def test_room_only_renumbers_the_head():
    roomy, exact = wirings(5, 3), wirings(2, 3)

    def renumbered(node, index):
        return 6 if node == "layer" and index == 3 else index

    for relation in SCHEMA.relations:
        expected = [
            (renumbered(relation[0], source), renumbered(relation[2], target))
            for source, target in pairs(exact[relation], 2)
        ]
        assert sorted(pairs(roomy[relation], 2)) == sorted(expected)


def test_of_takes_each_host_s_depth():
    wiring = wirings(3, 2)["slot", "precedes", "slot"]
    taken = wiring.of(torch.tensor([3, 0, 2]))
    assert taken.mask.sum(1).tolist() == [3, 0, 1]
    assert torch.equal(taken.source[0], wiring.source[3])
