"""The encoder without message passing: by hand, what it must not see, and what must not change its output."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.graph import Edges, GraphBatch
from esper.graph.ragged import Graph, pack
from esper.graph.schema import SCHEMA, GraphSchema
from esper.tamiyo.encoder import Encoder
from esper.tamiyo.encoders.parameters import CONVOLUTIONS, Shape
from esper.tamiyo.policies import DiscretePolicy, NodePolicy
from esper.tamiyo.policy import PolicyConfig, Tamiyo
from esper.tamiyo.pooled import PooledEncoder

READ = ("global", "slot", "blueprint")
SIZES = {"global": 1, "layer": 3, "activation": 2, "parameter": 1, "slot": 4, "blueprint": 3}
HIDDEN = (8, 8, 12, 12)


@pytest.fixture
def encoder(randomise: Callable[..., Any]) -> PooledEncoder:
    return randomise(PooledEncoder(Shape(SCHEMA, HIDDEN, 2, READ)))


@pytest.fixture
def policy(randomise: Callable[..., Any]) -> Tamiyo:
    return randomise(Tamiyo(config()))


@pytest.fixture
def graph(random_graph: Callable[..., GraphBatch]) -> GraphBatch:
    return random_graph(4, SIZES)


def config(**given: Any) -> PolicyConfig:
    return PolicyConfig(hidden=[*HIDDEN], heads=2, encoder="pooled", **given)


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for node in READ:
        torch.testing.assert_close(one[node], other[node], atol=1e-5, rtol=1e-5)


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- what it is ------------------------------------------------------------------------------------------------------


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer.weight @ x + layer.bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def by_hand(encoder: PooledEncoder, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The embeddings of one graph without padding, node by node."""
    h: dict[str, list[Tensor]] = {}
    for node, rows in x.items():
        layer, _, norm = encoder.inputs[node]
        h[node] = [norm(gelu(linear(layer, row))) for row in rows]

    def seen(values: dict[str, list[Tensor]], node: str, number: int) -> Tensor:
        means = [sum(values[other]) / len(values[other]) for other in SCHEMA.nodes if other != "global"]
        return torch.cat([values[node][number], *(means if node == "global" else [])])

    inner = {n: [gelu(linear(encoder.first[n], seen(h, n, i))) for i in range(len(rows))] for n, rows in h.items()}
    return {
        node: torch.stack(
            [
                linear(encoder.skips[node], h[node][i]) + gelu(linear(encoder.second[node], seen(inner, node, i)))
                for i in range(len(h[node]))
            ]
        )
        for node in READ
    }


@torch.no_grad()
def test_the_encoder_by_hand(encoder: PooledEncoder, graph: GraphBatch) -> None:
    out = encoder(graph)
    assert out.keys() == {*READ}
    for b in range(4):
        expected = by_hand(encoder, {node: value[b] for node, value in graph.x.items()})
        assert_close({node: value[b] for node, value in out.items()}, expected)


@pytest.mark.parametrize("hidden", [(64, 64, 64, 64), (256, 256, 128, 128), (16, 16)], ids=str)
@pytest.mark.parametrize("kinds", [CONVOLUTIONS, ("sage",) * 4], ids="-".join)
def test_it_has_as_many_parameters_as_the_graph_encoder(hidden: tuple[int, ...], kinds: tuple[str, ...]) -> None:
    shape = Shape(SCHEMA, hidden, 4, READ, kinds[-len(hidden) :])
    graph = Encoder(SCHEMA, hidden, 4, READ, convolutions=shape.convolutions)
    own, other = (sum(p.numel() for p in module.parameters()) for module in (PooledEncoder(shape), graph))
    assert own == pytest.approx(other, rel=0.02)


@torch.no_grad()
def test_the_backend_does_not_matter(randomise: Callable[..., Any], graph: GraphBatch) -> None:
    outputs = [
        randomise(Tamiyo(config(backend=backend)))(graph) for backend in ("auto", "pyg", "segment", "dense", "native")
    ]
    assert all(same(outputs[0], other) for other in outputs[1:])


# ---- what it sees ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_edges_change_nothing(policy: Tamiyo, graph: GraphBatch, random_graph: Callable[..., GraphBatch]) -> None:
    expected = policy(graph)
    others = random_graph(4, SIZES, 0.2, seed=5).edges
    none = {r: Edges(e.source, e.target, e.attr, torch.zeros_like(e.mask)) for r, e in others.items()}
    for edges in (others, none):
        assert same(policy(GraphBatch(graph.x, graph.node_mask, edges, graph.action_mask)), expected)
    assert same(policy(GraphBatch.of(graph.pack(), graph.action_mask)), expected)


@torch.no_grad()
@pytest.mark.parametrize("node", list(SCHEMA.nodes))
def test_a_node_is_seen_by_itself_and_by_the_global_node(
    encoder: PooledEncoder, policy: Tamiyo, graph: GraphBatch, node: str
) -> None:
    x = {**graph.x, node: graph.x[node].clone()}
    x[node][:, -1] += 1
    changed = GraphBatch(x, graph.node_mask, graph.edges, graph.action_mask)
    before, after = encoder(graph), encoder(changed)
    assert (before["global"] != after["global"]).any(2).all()
    for other in ("slot", "blueprint"):
        rows = (before[other] != after[other]).any(2)
        assert rows[:, -1].all() == (other == node)
        assert not rows[:, :-1].any()
    assert (policy(graph)[0] != policy(changed)[0]).all()  # through from_global


@torch.no_grad()
@pytest.mark.parametrize("node", list(SCHEMA.nodes))
@pytest.mark.parametrize("seed", range(2))
def test_permuted_nodes_have_permuted_embeddings(
    encoder: PooledEncoder, graph: GraphBatch, permute_nodes: Callable[..., GraphBatch], node: str, seed: int
) -> None:
    order = torch.randperm(SIZES[node], generator=torch.Generator().manual_seed(seed))
    before = encoder(graph)
    expected = {other: value[:, order] if other == node else value for other, value in before.items()}
    assert_close(encoder(permute_nodes(graph, node, order)), expected)


@torch.no_grad()
def test_padding_does_not_matter(encoder: PooledEncoder, graph: GraphBatch, pad: Callable[..., GraphBatch]) -> None:
    out = encoder(pad(graph, {node: 2 for node in SIZES if node != "global"}, 3))
    assert_close({node: value[:, : SIZES[node]] for node, value in out.items()}, encoder(graph))


@torch.no_grad()
def test_a_batch_is_its_graphs_one_by_one(policy: Tamiyo, graph: GraphBatch) -> None:
    together, parts = policy.predict(graph), [policy.predict(graph[b]) for b in range(4)]
    for whole, alone in zip(together, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(alone), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_order_of_types_does_not_matter(policy: Tamiyo, graph: GraphBatch) -> None:
    x, mask = (dict(reversed(each.items())) for each in (graph.x, graph.node_mask))
    assert same(policy(GraphBatch(x, mask, graph.edges, graph.action_mask)), policy(graph))


# ---- as a policy -----------------------------------------------------------------------------------------------------


def test_every_parameter_has_a_gradient(policy: Tamiyo, graph: GraphBatch) -> None:
    torch.stack([output.square().sum() for output in policy.predict(graph)]).sum().backward()
    assert [name for name, p in policy.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_there_may_be_no_graphs_and_no_blueprints(policy: Tamiyo, random_graph: Callable[..., GraphBatch]) -> None:
    logits, values = policy(random_graph(3, {**SIZES, "blueprint": 0}))
    assert logits.isfinite().all()
    assert values.isfinite().all()
    assert policy(random_graph(3, SIZES)[0:0])[0].shape[0] == 0


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_the_untrained_policy_is_near_uniform(observe: Callable[..., GraphBatch], seed: int) -> None:
    torch.manual_seed(seed)
    policy, graph = Tamiyo(PolicyConfig(encoder="pooled")), observe(4, 6)
    for row, mask in zip(policy.evaluate(graph)[0].probs, graph.action_mask, strict=True):
        assert row[mask].max() / row[mask].min() < 1.2


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_are_fp32_under_autocast(policy: Tamiyo, graph: GraphBatch, dtype: torch.dtype) -> None:
    expected = policy.predict(graph)
    policy.autocast = dtype
    outputs = policy.predict(graph)
    assert [output.dtype for output in outputs] == [torch.float32] * 3
    assert not torch.equal(outputs[0], expected[0])
    torch.testing.assert_close(outputs, expected, atol=0.2, rtol=0.1)


RUNS = ("job", "runs_on", "machine")
PAIR = GraphSchema({"job": ("f0", "f1"), "machine": ("f0",)}, {RUNS: ("a0",)})


def problem(jobs: int, machines: int) -> Graph:
    draw = torch.Generator().manual_seed(jobs * 100 + machines)
    x, y = torch.randn(jobs, 2, generator=draw), torch.randn(machines, 1, generator=draw)
    source, target = torch.arange(jobs), torch.randint(machines, (jobs,), generator=draw)
    return Graph({"job": x, "machine": y}, {RUNS: (source, target, torch.ones(jobs, 1))})


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda c: NodePolicy(c, PAIR, "job"), lambda c: DiscretePolicy(c, PAIR, 3)])
def test_graphs_without_a_global_node(make: Callable[..., Any], randomise: Callable[..., Any]) -> None:
    policy = randomise(make(config()))
    packs = [pack(PAIR, graphs) for graphs in ([problem(3, 2)], [problem(7, 4), problem(3, 2)])]
    alone, both = (GraphBatch.of(p, p.node_mask[:, p.layout.nodes["job"]]) for p in packs)
    (own, value), (logits, values) = policy(alone), policy(both)
    assert own.std() > 1e-2
    torch.testing.assert_close(logits[1:, :3], own[:, :3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values[1:], value, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_graph_of_global_nodes_alone() -> None:
    schema = GraphSchema({"global": ("f0", "f1")}, {("global", "itself", "global"): ("presence",)})
    here = torch.zeros(1, dtype=torch.int64)
    graph = Graph({"global": torch.randn(1, 2)}, {("global", "itself", "global"): (here, here, torch.ones(1, 1))})
    logits, _ = DiscretePolicy(config(), schema, 4)(GraphBatch.of(pack(schema, [graph]), torch.ones(1, 4).bool()))
    assert logits.isfinite().all()
