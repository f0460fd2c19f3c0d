import pytest
import torch

from esper.graph.schema import SCHEMA
from esper.graph.space import BOUND
from esper.growth.lifecycle import Stage
from esper.growth.observation import Observer

HORIZON = 12
KEYS = [51, 52, 53, 54, 55]


def grown(toy, **kwargs):
    return toy.population(KEYS, "causal", mixed=True, width=5, steps=3, **kwargs)


def test_sizes_are_those_of_the_schema(toy):
    graph = Observer(grown(toy), HORIZON)()
    assert list(graph.x) == list(SCHEMA.nodes)
    assert {node: x.shape[2] for node, x in graph.x.items()} == {n: len(f) for n, f in SCHEMA.nodes.items()}
    assert list(graph.edges) == list(SCHEMA.relations)
    for relation, edges in graph.edges.items():
        assert edges.attr.shape[2] == len(SCHEMA.relations[relation])
    assert {node: x.shape[1] for node, x in graph.x.items()} == {
        "global": 1, "layer": 5, "activation": 3, "parameter": 1, "slot": 3, "blueprint": 9
    }  # fmt: skip


def test_the_action_mask_is_the_layout_s(toy):
    p = grown(toy)
    toy.walk(p, KEYS, 5)
    mask = Observer(p, HORIZON)().action_mask
    assert torch.equal(mask, toy.layout(p).mask(p))
    assert not (mask == mask[0]).all()


def test_absent_features_are_zero(toy):
    p = grown(toy)
    observer = Observer(p, HORIZON)
    for _ in range(5):
        for value in vars(p.statistics).values():
            if value.is_floating_point():
                value += 0.1  # nothing is hidden by a zero that happens to be there
        graph = observer()
        for node, names in SCHEMA.nodes.items():
            for name in names:
                if f"{name}_known" in names:
                    known = graph.x[node][..., SCHEMA.feature(node, f"{name}_known")]
                    value = graph.x[node][..., SCHEMA.feature(node, name)]
                    assert set(known.unique().tolist()) <= {0.0, 1.0}
                    assert (value[known == 0] == 0).all(), name
        toy.act(p, KEYS)
        p.train_epoch()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.0])
def test_features_stay_within_bounds(toy, poison):
    p = grown(toy)
    toy.walk(p, KEYS, 4)
    p.lifecycle.stage[0] = Stage.HOLDING
    for value in vars(p.statistics).values():
        if value.is_floating_point():
            value.fill_(poison)
        elif value.dtype == torch.bool:
            value.fill_(True)
    p.validation_loss.fill_(poison)
    graph = Observer(p, HORIZON)()
    for value in graph.to_dict().values():
        assert value.isfinite().all()
    for node, x in graph.x.items():
        assert x.abs().max() <= BOUND
        assert not x[~graph.node_mask[node]].any()
    for edges in graph.edges.values():
        assert edges.attr.abs().max() <= BOUND
        assert not edges.attr[~edges.mask].any()
    assert not graph.node_mask["slot"].all()


def test_a_diverged_host_is_still_observed_in_bounds(toy):
    p = grown(toy)
    p.theta[1] = float("nan")
    p.theta[2] *= 1e20
    toy.walk(p, KEYS, 3)
    for x in Observer(p, HORIZON)().x.values():
        assert x.isfinite().all()
        assert x.abs().max() <= BOUND


def test_a_graph_outlives_its_population_s_next_epoch(toy):
    p = grown(toy)
    toy.walk(p, KEYS, 2)
    graph = Observer(p, HORIZON)()
    before = {k: v.clone() for k, v in graph.to_dict().items()}
    toy.walk(p, KEYS, 3)
    p.reset(torch.arange(5), toy.context([1, 2, 3, 4, 5]))
    assert all(torch.equal(before[k], v) for k, v in graph.to_dict().items())


def test_removed_seeds_leave_a_consistent_graph(toy):
    p = toy.population(KEYS)
    for host in range(5):
        toy.plant(p, host, 1, host % 4)
        p.lifecycle.blend(toy.at(p, host, 1), 8)
    for _ in range(4):
        p.train_epoch()
    p.remove_unfinished(torch.tensor([True, False, True, False, True]))
    graph = Observer(p, HORIZON)()
    slot, known = graph.x["slot"], SCHEMA.feature("slot", "contribution_known")
    assert slot[[1, 3], 1, known].tolist() == [1.0, 1.0]
    # The seeds of hosts 0, 2 and 4 are gone, and their losses were evaluated anew.
    loss = graph.x["global"][:, 0, SCHEMA.feature("global", "log_validation_loss")]
    torch.testing.assert_close(loss, p.validation_loss.log())
    assert slot[[0, 2, 4], 1, known].tolist() == [0.0, 0.0, 0.0]
