"""Policies over graphs of any schema: what they are built for, and what must not change their output."""

import math

import pytest
import torch

from esper.graph import GraphBatch
from esper.graph.interface import DISCRETE, GROWTH, NODE, Interface
from esper.graph.ragged import Graph, pack
from esper.graph.schema import SCHEMA, GraphSchema
from esper.tamiyo.policies import DiscretePolicy, NodePolicy, make_policy
from esper.tamiyo.policy import PolicyConfig, Tamiyo

RUNS, BACK = ("job", "runs_on", "machine"), ("machine", "rev_runs_on", "job")
PAIR = GraphSchema({"job": ("f0", "f1"), "machine": ("f0",)}, {RUNS: ("a0",), BACK: ("a0",)})
ALONE = GraphSchema({"one": ("f0", "f1", "f2")}, {("one", "itself", "one"): ("presence",)})
BACKENDS = ("pyg", "segment", "dense", "native")


def config(backend: str = "auto") -> PolicyConfig:
    return PolicyConfig(hidden=[8, 8, 8, 8], heads=2, backend=backend)


def problem(jobs: int, machines: int, order: torch.Tensor | None = None) -> Graph:
    draw = torch.Generator().manual_seed(jobs * 100 + machines)
    x, y = torch.randn(jobs, 2, generator=draw), torch.randn(machines, 1, generator=draw)
    source = torch.arange(jobs).repeat_interleave(2)
    target = torch.randint(machines, (2 * jobs,), generator=draw)
    attr = torch.randn(2 * jobs, 1, generator=draw)
    if order is not None:
        x, source = x[order], order.argsort()[source]
    return Graph({"job": x, "machine": y}, {RUNS: (source, target, attr), BACK: (target, source, attr)})


def batch(*graphs: Graph, room=None) -> GraphBatch:
    packed = pack(PAIR, list(graphs), room)
    return GraphBatch.of(packed, packed.node_mask[:, packed.layout.nodes["job"]])


def alone(x: torch.Tensor) -> GraphBatch:
    everyone = torch.zeros(1, dtype=torch.int64)
    edges = {("one", "itself", "one"): (everyone, everyone, torch.ones(1, 1))}
    packed = pack(ALONE, [Graph({"one": row[None]}, edges) for row in x])
    return GraphBatch.of(packed, torch.ones(len(x), 4, dtype=torch.bool))


def shaken(policy):
    """With logits that are far from 0."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return policy


def test_the_interface_chooses_the_policy():
    for interface, kind in (
        (Interface(ALONE, DISCRETE, 4), DiscretePolicy),
        (Interface(PAIR, NODE, node="job"), NodePolicy),
        (Interface(SCHEMA, GROWTH), Tamiyo),
    ):
        assert type(make_policy(config(), interface)) is kind
        assert Interface.of_state(interface.state()) == interface
        assert Interface.of_state(interface.state()).schema.hash == interface.schema.hash


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_of_one_node(backend):
    policy = shaken(DiscretePolicy(config(backend), ALONE, 4))
    reference = DiscretePolicy(config("pyg"), ALONE, 4)
    reference.load_state_dict(policy.state_dict())
    graph = alone(torch.randn(5, 3))
    logits, values = policy(graph)
    assert logits.shape == (5, 4)
    assert values.shape == (5,)
    torch.testing.assert_close((logits, values), reference(graph), rtol=1e-4, atol=1e-5)
    (logits.sum() + values.sum()).backward()
    assert policy.encoder.inputs["one"][0].weight.grad.abs().sum() > 0
    # every graph by itself: no normalisation over the batch
    torch.testing.assert_close(policy(graph[2])[0], logits[2:3], rtol=1e-4, atol=1e-5)


def test_untrained_policies_are_nearly_uniform():
    for policy, graph in (
        (DiscretePolicy(config(), ALONE, 4), alone(torch.randn(3, 3))),
        (NodePolicy(config(), PAIR, "job"), batch(problem(4, 2), problem(3, 3))),
    ):
        distribution, values = policy.evaluate(graph)
        uniform = torch.tensor([math.log(int(mask.sum())) for mask in graph.action_mask])
        torch.testing.assert_close(distribution.entropy(), uniform, atol=1e-3, rtol=0)
        assert values.abs().max() > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_node_logits_go_with_the_nodes(backend):
    policy = shaken(NodePolicy(config(backend), PAIR, "job"))
    order = torch.tensor([3, 0, 4, 1, 2])
    logits, value = policy(batch(problem(5, 3)))
    permuted, same = policy(batch(problem(5, 3, order)))
    assert logits[0, :5].std() > 1e-2
    torch.testing.assert_close(permuted[0, :5], logits[0, :5][order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [lambda c: NodePolicy(c, PAIR, "job"), lambda c: DiscretePolicy(c, PAIR, 3)])
def test_padding_and_company_do_not_matter(backend, make):
    policy = shaken(make(config(backend)))
    own = policy(batch(problem(3, 2)))
    large = batch(problem(9, 5), problem(3, 2))
    logits, values = policy(large)
    width = min(own[0].shape[1], 3)
    torch.testing.assert_close(logits[1, :width], own[0][0, :width], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values[1:], own[1], rtol=1e-4, atol=1e-5)
    # what stands in padding is never read
    spoiled = pack(PAIR, [problem(9, 5), problem(3, 2)])
    spoiled.x[~spoiled.node_mask] = 7.0
    again = policy(GraphBatch.of(spoiled, large.action_mask))
    torch.testing.assert_close(again[0][1, :width], logits[1, :width], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again[1], values, rtol=1e-4, atol=1e-5)


def test_illegal_and_padded_nodes_are_never_chosen():
    policy = shaken(NodePolicy(config(), PAIR, "job"))
    graph = batch(problem(3, 2))
    graph = graph.with_actions(torch.tensor([[True, False, True, False]]))
    distribution, _ = policy.evaluate(graph)
    assert (distribution.probs[0] > 0).tolist() == [True, False, True, False]


def test_no_node_to_choose_is_no_obstacle_to_a_value():
    empty = Graph(
        {"job": torch.zeros(0, 2), "machine": torch.ones(1, 1)},
        {relation: (torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0, 1)) for relation in (RUNS, BACK)},
    )
    _, value = NodePolicy(config(), PAIR, "job")(batch(empty))
    assert value.isfinite().all()
