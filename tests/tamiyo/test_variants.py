"""What `policy` may leave out: kinds of layers, edge attributes, message passing; and that by default nothing is."""

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.graph import Edges, GraphBatch, Layout
from esper.graph.schema import SCHEMA
from esper.runtime.compiled import CompileGuard
from esper.runtime.errors import ConfigError
from esper.tamiyo.actor import Actor
from esper.tamiyo.policy import PolicyConfig, Prediction, Tamiyo

SIZES = dict.fromkeys(SCHEMA.nodes, 3)
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "sage": {"convolutions": ["sage"] * 4},
    "gat": {"convolutions": ["gat"] * 4},
    "blind": {"edge_attributes": False},
    "pooled": {"encoder": "pooled"},
}


def config(variant: str, backend: str = "auto") -> PolicyConfig:
    return PolicyConfig(hidden=[8, 8, 12, 12], heads=2, backend=backend, **VARIANTS[variant])


def with_attributes(graph: GraphBatch, change: Callable[[Tensor], Tensor]) -> GraphBatch:
    edges = {r: Edges(e.source, e.target, change(e.attr), e.mask) for r, e in graph.edges.items()}
    return GraphBatch(graph.x, graph.node_mask, edges, graph.action_mask)


def packed(graph: GraphBatch) -> GraphBatch:
    return GraphBatch.of(graph.pack(), graph.action_mask)


def by_tensors(policy: Tamiyo, graph: GraphBatch) -> Prediction:
    p = graph.pack()
    function = policy.of_tensors(p.layout)
    assert function is not None
    return function(p.x, p.attr, p.mask, p.node_mask)


@pytest.fixture
def graph(random_graph: Callable[..., GraphBatch]) -> GraphBatch:
    return random_graph(5, SIZES, 0.7, seed=1)


# ---- the default -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "parameters", "names", "checksum"),
    [
        ([64, 64, 64, 64], 625_610, "e9f4754a883b9add", 783.209428),
        ([256, 256, 128, 128], 7_257_738, "101499596916371b", -5868.650100),
    ],
    ids=str,
)
def test_the_default_is_what_checkpoints_hold(hidden: list[int], parameters: int, names: str, checksum: float) -> None:
    """Names, shapes and initial values were recorded before there were variants."""
    torch.manual_seed(0)
    state = Tamiyo(PolicyConfig(hidden=hidden)).state_dict()
    assert sum(value.numel() for value in state.values()) == parameters
    text = "\n".join(f"{name} {list(value.shape)}" for name, value in state.items())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == names
    values = [value.double().flatten() for value in state.values()]
    weighted = [(v * torch.arange(len(v)).cos()).sum() * place for place, v in enumerate(values, 1)]
    assert float(torch.stack(weighted).sum()) == pytest.approx(checksum, abs=1e-2)


def test_a_configuration_from_before_has_the_defaults() -> None:
    old = {"name": "tamiyo_small", "hidden": [64, 64, 64, 64], "heads": 4, "backend": "auto"}
    assert PolicyConfig(**old) == PolicyConfig()
    assert vars(PolicyConfig(**old)).items() >= {
        "encoder": "graph", "convolutions": ["sage", "sage", "gat", "gat"], "edge_attributes": True
    }.items()  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [("default", 625_610), ("sage", 613_706), ("gat", 640_970), ("blind", 625_610), ("pooled", 625_280)],
)
def test_variants_are_of_one_size(variant: str, parameters: int) -> None:
    policy = Tamiyo(PolicyConfig(**VARIANTS[variant]))
    assert sum(parameter.numel() for parameter in policy.parameters()) == parameters


# ---- kinds of layers -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("variant", "reads"), [("default", True), ("sage", False), ("gat", True)])
def test_only_gat_layers_read_attributes(
    randomise: Callable[..., Tamiyo], graph: GraphBatch, variant: str, reads: bool
) -> None:
    policy = randomise(Tamiyo(config(variant)))
    before, after = policy(graph)[0], policy(with_attributes(graph, torch.neg))[0]
    assert torch.equal(before, after) != reads


@pytest.mark.parametrize("variant", ["sage", "gat"])
def test_every_parameter_of_one_kind_learns(randomise: Callable[..., Tamiyo], graph: GraphBatch, variant: str) -> None:
    policy = randomise(Tamiyo(config(variant)))
    torch.stack([output.square().sum() for output in policy.predict(graph)]).sum().backward()
    assert [name for name, p in policy.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---- no attributes ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", [lambda graph: graph, packed], ids=["lists", "packed"])
@pytest.mark.parametrize("backend", ["auto", "pyg", "segment", "dense", "native"])
def test_a_blind_policy_takes_all_attributes_as_0(
    randomise: Callable[..., Tamiyo], graph: GraphBatch, backend: str, form: Callable[[GraphBatch], GraphBatch]
) -> None:
    blind, seeing = (randomise(Tamiyo(config(variant, backend))) for variant in ("blind", "default"))
    given = form(graph)
    kept = {relation: edges.attr.clone() for relation, edges in given.edges.items()}
    outputs = blind.predict(given)
    for change in (torch.neg, lambda attr: 7 * attr + 1, lambda attr: attr * torch.nan):
        for one, other in zip(blind.predict(form(with_attributes(graph, change))), outputs, strict=True):
            assert torch.equal(one, other)
    zero = seeing.predict(form(with_attributes(graph, torch.zeros_like)))
    torch.testing.assert_close(outputs, zero, atol=1e-6, rtol=1e-6)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(seeing.predict(given), outputs, strict=True))
    assert all(torch.equal(edges.attr, kept[relation]) for relation, edges in given.edges.items())  # not in place


@pytest.mark.parametrize("backend", ["pyg", "segment", "dense", "native"])
def test_what_reads_attributes_has_no_gradient_in_a_blind_policy(
    randomise: Callable[..., Tamiyo], graph: GraphBatch, backend: str
) -> None:
    policy = randomise(Tamiyo(config("blind", backend)))
    torch.stack([output.square().sum() for output in policy.predict(graph)]).sum().backward()
    grads = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert all(grad is not None for grad in grads.values())  # 0, as processes that share gradients need it
    idle = [name for name, grad in grads.items() if not grad.any()]
    assert idle == [f"encoder.layers.{depth}.{name}" for depth in (2, 3) for name in ("edge", "att_edge")]


# ---- as functions of tensors, and compiled ---------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["dense", "native"])
def test_tensors_give_what_graphs_give(
    randomise: Callable[..., Tamiyo], random_graph: Callable[..., GraphBatch], pad: Callable[..., GraphBatch],
    variant: str, backend: str,
) -> None:  # fmt: skip
    policy = randomise(Tamiyo(config(variant, backend)))
    reference = randomise(Tamiyo(config(variant, "pyg")))
    graph = pad(random_graph(5, {**SIZES, "slot": 4, "layer": 2}, 0.7), {"slot": 1, "layer": 2, "activation": 1}, 3)
    torch.testing.assert_close(by_tensors(policy, graph), reference.predict(graph), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["default", "blind"])
def test_other_backends_have_no_such_form(variant: str, graph: GraphBatch) -> None:
    layout = graph.pack().layout
    assert Tamiyo(config(variant, "pyg")).of_tensors(layout) is None
    assert Tamiyo(config(variant, "segment")).of_tensors(layout) is None


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "backend"), [("default", "native"), ("default", "dense"), ("blind", "dense"), ("pooled", "auto")]
)
def test_a_layout_that_nothing_has_read_is_no_obstacle_to_compiling(
    randomise: Callable[..., Tamiyo], graph: GraphBatch, variant: str, backend: str
) -> None:
    policy, p = randomise(Tamiyo(config(variant, backend))), graph.pack()
    function = policy.of_tensors(Layout(p.layout.types, p.layout.relations))
    traced = torch.compile(function, backend="eager", fullgraph=True)
    outputs = traced(p.x, p.attr, p.mask, p.node_mask)
    torch.testing.assert_close(outputs, policy.predict(graph), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sage", "blind", "pooled"])
def test_variants_compile_for_the_actor_and_for_the_update(
    randomise: Callable[..., Tamiyo], graph: GraphBatch, variant: str
) -> None:
    policy, graph = randomise(Tamiyo(config(variant, "native"))), packed(graph)
    actor = Actor(policy, 0, guard=CompileGuard("actor"))
    actor.warm_up(graph)
    with torch.inference_mode():
        log_probs, values = (output.clone() for output in actor._run(graph))
        distribution, expected = policy.evaluate(graph)
    torch.testing.assert_close((log_probs, values), (distribution.log_probs, expected), atol=1e-5, rtol=1e-5)
    assert (actor.guard.fallback_total, actor.guard.enabled, actor.guard.runs > 0) == (0, True, True)

    p, eager = graph.pack(), copy.deepcopy(policy)
    function = torch.compile(policy.of_tensors(p.layout), fullgraph=True)
    for outputs in (function(p.x, p.attr, p.mask, p.node_mask), eager.predict(graph)):
        torch.stack([output.square().sum() for output in outputs]).sum().backward()
    for (name, one), other in zip(policy.named_parameters(), eager.parameters(), strict=True):
        assert one.grad is not None, name
        assert other.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4 * float(other.grad.abs().max()), msg=name)


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"convolutions": ["sage", "gta"]}, r"policy\.convolutions=\[sage, gta\]: .*sage or gat"),
        ({"convolutions": [], "hidden": []}, r"policy\.convolutions=\[\]: .*sage or gat"),
        ({"convolutions": ["sage", "gat"]}, r"policy\.hidden=\[64, 64, 64, 64\]: .*policy\.convolutions=\[sage, gat\]"),
        ({"hidden": [8] * 5}, r"policy\.hidden=\[8, 8, 8, 8, 8\]: .*one width above 0 for each layer"),
        ({"convolutions": ["gat"] * 4, "hidden": [6, 8, 8, 8]}, r"policy\.heads=4: must .*hidden=\[6, 8, 8, 8\]"),
        ({"encoder": "mlp"}, r"policy\.encoder=mlp: .*graph or pooled"),
        ({"encoder": "pooled", "backend": "fast"}, r"policy\.backend=fast: .*choose one of"),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_value_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    for refused in (PolicyConfig(**given).validate, lambda: Tamiyo(PolicyConfig(**given))):
        with pytest.raises(ConfigError, match=message) as error:
            refused()
        assert "\n" not in str(error.value)


def test_heads_need_only_divide_the_widths_that_attend() -> None:
    PolicyConfig(hidden=[7, 7, 7, 7], convolutions=["sage"] * 4).validate()
    PolicyConfig(hidden=[8, 7, 7, 7], convolutions=["gat", "sage", "sage", "sage"]).validate()
