"""The function that is exported, against the policies themselves, and what its description says.

That files do the same in another process is tested with the command, in tests/trainers/test_export.py.
"""

import pytest
import torch

from esper.graph import Edges, GraphBatch
from esper.graph.interface import DISCRETE, GROWTH, NODE, Interface
from esper.graph.schema import SCHEMA
from esper.growth.actions import RAMPS, ActionLayout, Verb
from esper.runtime.errors import ConfigError
from esper.tamiyo import export
from esper.tamiyo.policies import make_policy
from esper.tamiyo.policy import PolicyConfig

SMALL = {"hidden": [16, 16, 24, 16], "heads": 4}


@pytest.mark.parametrize(
    ("config", "interface"),
    [
        ({}, Interface(SCHEMA, GROWTH)),
        ({"edge_attributes": False}, Interface(SCHEMA, GROWTH)),
        ({"encoder": "pooled"}, Interface(SCHEMA, GROWTH)),
        ({"convolutions": ["gat", "gat", "sage", "sage"]}, Interface(SCHEMA, DISCRETE, count=3)),
        ({}, Interface(SCHEMA, NODE, node="slot")),
    ],
    ids=["tamiyo", "blind", "pooled", "discrete", "node"],
)
@torch.no_grad()
def test_it_is_the_policy(observe, randomise, config, interface):
    policy = randomise(make_policy(PolicyConfig(**SMALL | config), interface)).eval()
    graph = observe(5, 4)
    width = {GROWTH: graph.action_mask.shape[1], DISCRETE: 3, NODE: graph.x["slot"].shape[1]}[interface.actions]
    graph = graph.with_actions(graph.action_mask[:, :width])
    inputs = export.inputs_of(graph)
    assert list(inputs) == export.input_names(interface)
    log_probs, actions, values = export.Program(policy, interface)(inputs)
    distribution, expected = policy.evaluate(graph)
    torch.testing.assert_close(log_probs, distribution.log_probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(actions, distribution.mode())
    assert torch.equal(log_probs == -torch.inf, ~graph.action_mask)


def test_the_policy_stays_as_it_is(randomise):
    interface = Interface(SCHEMA, GROWTH)
    policy = make_policy(PolicyConfig(**SMALL), interface).train()
    names = list(policy.state_dict())
    export.Program(policy, interface)
    assert policy.training
    assert list(policy.state_dict()) == names


def test_actions_are_numbered_as_the_description_says():
    layout = ActionLayout(slots=5, blueprints=3)
    actions = export.describe(Interface(SCHEMA, GROWTH), {})["actions"]
    sizes = {"slots": layout.slots, "blueprints": layout.blueprints}
    assert eval(actions["count"], sizes | {}) == layout.size
    assert actions["ramps"] == list(RAMPS)
    for verb, slot, choice in zip(*(column.tolist() for column in layout.table()), strict=True):
        numbers = {"slot": slot, "blueprint": choice, "ramp": choice}
        assert eval(actions["index"][Verb(verb).name], sizes | numbers) == layout.index(Verb(verb), slot, choice)


def test_the_description_names_every_feature():
    described = export.describe(Interface(SCHEMA, GROWTH), {"environment": "digits"})
    assert described["schema_hash"] == SCHEMA.hash
    assert {node: tuple(names) for node, names in described["nodes"].items()} == SCHEMA.nodes
    relations = {tuple(r["name"].split("__")): tuple(r["attributes"]) for r in described["relations"]}
    assert relations == SCHEMA.relations
    assert list(relations) == list(SCHEMA.relations)
    assert described["trained_on"] == {"environment": "digits"}
    assert export.describe(Interface(SCHEMA, DISCRETE, count=4), {})["actions"] == {"kind": "discrete", "count": 4}


def test_dense_relations_have_a_row_for_each_target(observe):
    graph = observe(2, 3)
    inputs = export.inputs_of(graph)
    listed = graph.edges["slot", "reads", "layer"]
    present, attr = inputs["edges__slot__reads__layer"], inputs["attr__slot__reads__layer"]
    assert present.shape == (2, graph.x["layer"].shape[1], graph.x["slot"].shape[1])
    assert int(present.sum()) == int(listed.mask.sum())
    for b, e in listed.mask.nonzero().tolist():
        target, source = int(listed.target[b, e]), int(listed.source[b, e])
        assert present[b, target, source]
        assert torch.equal(attr[b, target, source], listed.attr[b, e])


def test_parallel_edges_have_no_room():
    pair = torch.zeros(1, 2, dtype=torch.int64)
    edges = Edges(pair, pair, torch.ones(1, 2, 1), torch.ones(1, 2, dtype=torch.bool))
    yes = torch.ones(1, 1, dtype=torch.bool)
    graph = GraphBatch({"a": torch.ones(1, 1, 2)}, {"a": yes}, {("a", "to", "a"): edges}, yes)
    with pytest.raises(ConfigError, match="a__to__a: 2 edges join the same nodes"):
        export.inputs_of(graph)


def test_formats(monkeypatch):
    with pytest.raises(ConfigError, match="format=tflite: no such format; choose torch_export or onnx"):
        export.check_format("tflite")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    export.check_format("torch_export")
    with pytest.raises(ConfigError, match=r"format=onnx: onnx and onnxscript not installed; pip install 'esper\[exp"):
        export.check_format("onnx")
