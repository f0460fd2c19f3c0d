import pytest
import torch

from envs.config import load_config
from envs.growth_env import GrowthEnv
from esper.graph.schema import SCHEMA
from esper.tamiyo.encoders.parameters import GatLayer
from esper.tamiyo.policy import PolicyConfig, Tamiyo
from trainers import gaze


def policy(**given):
    torch.manual_seed(0)
    return Tamiyo(PolicyConfig(hidden=[8, 8, 8, 8], heads=2, **given))


@pytest.fixture(scope="module")
def graphs():
    env = GrowthEnv(load_config("segment", epochs=3), 4)
    graph = env.reset()
    return [graph, env.step(torch.zeros(4, dtype=torch.int64))[0]]


def test_sharpness_by_hand():
    # target 0 hears two alike, target 1 one of four alone, target 2 has a single source
    alpha = torch.tensor([[0.5], [0.5], [1.0], [0.0], [0.0], [0.0], [1.0]])
    target = torch.tensor([0, 0, 1, 1, 1, 1, 2])
    assert gaze._sharpness(alpha, target).tolist() == [[0.0], [1.0]]


def test_equal_scores_have_no_focus(graphs):
    tamiyo = policy()
    with torch.no_grad():
        for layer in tamiyo.encoder.layers:
            if isinstance(layer, GatLayer):
                for score in (layer.att_source, layer.att_target, layer.att_edge):
                    score.zero_()
    found = gaze.focus(tamiyo, graphs)
    assert found
    for by_layer in found.values():
        for sharp in by_layer.values():
            assert sharp.abs().max() < 1e-6


def test_strong_scores_choose_one(graphs):
    tamiyo = policy()
    state = torch.get_rng_state()
    mild = gaze.focus(tamiyo, graphs)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for layer in tamiyo.encoder.layers:
            if isinstance(layer, GatLayer):
                layer.att_source.mul_(1e4)
    strong = gaze.focus(tamiyo, graphs)
    relation = ("layer", "informs", "global")
    assert set(mild[relation]) == {2, 3}  # the two GAT layers
    assert mild[relation][2].shape == (2,)
    assert (mild[relation][2] < 0.5).all()
    assert (strong[relation][2] > 0.9).all()


def test_relations_with_one_source_and_targets_that_are_not_computed_are_left_out(graphs):
    found = gaze.focus(policy(), graphs)
    assert set(found) <= set(SCHEMA.relations)
    assert ("blueprint", "fits", "slot") in found
    for (source, _, target), by_layer in found.items():
        assert source != "global"  # of which there is one
        computed = {2, 3} if target in ("global", "slot", "blueprint") else {2}  # the last layer: what heads read
        assert set(by_layer) == computed


def test_edge_attributes_that_are_not_read_do_not_count(graphs):
    # the same parameters, but for one that scores attributes far too strongly
    blind, seeing = policy(edge_attributes=False), policy()
    with torch.no_grad():
        for tamiyo in (blind, seeing):
            for layer in tamiyo.encoder.layers:
                if isinstance(layer, GatLayer):
                    layer.att_edge.mul_(1e4)
    relation = ("blueprint", "fits", "slot")
    assert gaze.focus(seeing, graphs)[relation][2].min() > gaze.focus(blind, graphs)[relation][2].max()


def test_which_policies_attend():
    assert gaze.attends(policy())
    assert not gaze.attends(policy(convolutions=["sage"] * 4))
    assert not gaze.attends(policy(encoder="pooled"))
