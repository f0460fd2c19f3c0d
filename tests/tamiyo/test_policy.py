"""Tamiyo on real hosts: its symmetries, the numbering of its logits, its start, and where its gradient goes."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from envs.growth_env import GrowthEnv
from esper.graph import GraphBatch
from esper.graph.schema import SCHEMA
from esper.growth.actions import RAMPS, WAIT, ActionLayout, Verb
from esper.runtime.errors import ConfigError
from esper.tamiyo.encoder import masked_mean
from esper.tamiyo.encoders.pyg import parameters
from esper.tamiyo.policy import PolicyConfig, Tamiyo

Observe = Callable[..., GraphBatch]
Policies = Callable[..., Tamiyo]


def layout_of(graph: GraphBatch) -> ActionLayout:
    return ActionLayout(graph.x["slot"].shape[1], graph.x["blueprint"].shape[1])


def numbers(small: ActionLayout, large: ActionLayout) -> Tensor:
    """Number in `large` of every action of `small`."""
    rows = zip(*(column.tolist() for column in small.table()), strict=True)
    return torch.tensor([large.index(Verb(verb), slot, choice) for verb, slot, choice in rows])


def renumbered(layout: ActionLayout, slots: Tensor, blueprints: Tensor) -> Tensor:
    """Old number of every new action, where new slot j is old slot slots[j], and so for blueprints."""
    old = []
    for verb, slot, choice in zip(*(column.tolist() for column in layout.table()), strict=True):
        if verb == Verb.GERMINATE:
            choice = int(blueprints[choice])
        old.append(layout.index(Verb(verb), int(slots[slot]) if verb != Verb.WAIT else 0, choice))
    return torch.tensor(old)


def assert_close(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


# ---- symmetries ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_batch_is_its_graphs_one_by_one(small_policy: Policies, observe: Observe) -> None:
    policy, graph = small_policy(), observe(4)
    logits, values = policy(graph)
    for b in range(4):
        assert_close(policy(graph[b]), (logits[b : b + 1], values[b : b + 1]))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["pyg", "segment", "dense", "native"])
def test_a_batch_is_its_graphs_one_by_one_under_every_backend_and_head(
    randomise: Callable[..., Tamiyo], make_env: Callable[..., GrowthEnv], scrambled: Callable[..., GraphBatch],
    backend: str,
) -> None:  # fmt: skip
    # Hosts of different depths, whose slots are anywhere in their lifecycles.
    graph = scrambled(make_env(37, host={"width": [4, 8], "stages": [2, 5]}), 0)
    policy = randomise(Tamiyo(PolicyConfig(hidden=[8, 8, 12, 12], heads=2, backend=backend)))
    together = policy.predict(graph)
    alone = zip(*(policy.predict(graph[b]) for b in range(37)), strict=True)
    for whole, parts in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_order_of_graphs_does_not_matter(small_policy: Policies, observe: Observe) -> None:
    policy, graph = small_policy(), observe(4)
    logits, values = policy(graph)
    order = torch.tensor([2, 0, 3, 1])
    assert_close(policy(graph[order]), (logits[order], values[order]))


@torch.no_grad()
def test_the_order_of_edges_does_not_matter(
    small_policy: Policies, observe: Observe, shuffle_edges: Callable[..., GraphBatch]
) -> None:
    policy, graph = small_policy(), observe()
    assert_close(policy(shuffle_edges(graph)), policy(graph))


@pytest.fixture(scope="module")
def two_hosts(observe: Observe) -> GraphBatch:
    return observe(2)


@torch.no_grad()
@settings(deadline=None, max_examples=20)
@given(extra=st.fixed_dictionaries({node: st.integers(0, 3) for node in SCHEMA.nodes}), edges=st.integers(0, 6))
def test_padding_does_not_matter(
    small_policy: Policies, two_hosts: GraphBatch, pad: Callable[..., GraphBatch], extra: dict[str, int], edges: int
) -> None:
    policy, graph = small_policy(), two_hosts
    padded = pad(graph, extra, edges)
    logits, values = policy(padded)
    assert logits.shape[1] == layout_of(padded).size
    same = numbers(layout_of(graph), layout_of(padded))
    assert_close((logits[:, same], values), policy(graph))


@torch.no_grad()
def test_hosts_of_two_sizes_in_one_batch(small_policy: Policies, observe: Observe) -> None:
    policy = small_policy()
    two = [observe(1), observe(1, host={"width": [4, 4], "stages": [6, 6]}, blueprints=["glu", "mlp"])]
    datas = [data for graph in two for data in graph.to_hetero_data()]
    for data in datas:
        data.action_mask = torch.ones(ActionLayout(6, 4).size, dtype=torch.bool)
    together = GraphBatch.from_hetero_data(datas)
    logits, values = policy(together)
    for b, graph in enumerate(two):
        same = numbers(layout_of(graph), layout_of(together))
        assert_close((logits[b : b + 1, same], values[b : b + 1]), policy(graph))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_permuted_blueprints_have_permuted_logits(
    small_policy: Policies, observe: Observe, permute_nodes: Callable[..., GraphBatch], seed: int
) -> None:
    policy, graph = small_policy(seed), observe(blueprints=["mlp", "glu", "norm"])
    layout = layout_of(graph)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    logits, values = policy(graph)
    after = policy(permute_nodes(graph, "blueprint", order))
    assert_close(after, (logits[:, renumbered(layout, torch.arange(4), order)], values))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_permuted_slots_have_permuted_logits(
    small_policy: Policies, observe: Observe, permute_nodes: Callable[..., GraphBatch], seed: int
) -> None:
    policy, graph = small_policy(seed), observe(blueprints=["mlp", "glu", "norm"])
    layout = layout_of(graph)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    logits, values = policy(graph)
    after = policy(permute_nodes(graph, "slot", order))
    assert_close(after, (logits[:, renumbered(layout, order, torch.arange(3))], values))


@torch.no_grad()
def test_slots_and_blueprints_are_told_apart(small_policy: Policies, observe: Observe) -> None:
    # The permutation tests would pass with equal logits everywhere.
    logits, values = small_policy()(observe())
    assert (logits.sort(1).values.diff(dim=1) > 1e-6).all()
    assert values.unique().numel() == 3


# ---- sizes and numbering ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("stages", "blueprints"),
    [
        (4, ["mlp"]),
        (6, ["mlp", "norm"]),
        (2, ["mlp", "glu", "low_rank", "norm"]),
        (1, ["glu"]),
    ],
)
def test_one_set_of_weights_runs_on_any_host(
    small_policy: Policies, observe: Observe, stages: int, blueprints: list[str]
) -> None:
    graph = observe(2, host={"width": [4, 6], "stages": [stages, stages]}, blueprints=blueprints)
    logits, values = small_policy()(graph)
    assert logits.shape == (2, 1 + stages * (len(blueprints) + len(RAMPS) + 2)) == graph.action_mask.shape
    assert values.shape == (2,)
    assert logits.isfinite().all()
    assert values.isfinite().all()


@torch.no_grad()
def test_a_batch_of_no_graphs_has_no_decisions(small_policy: Policies, observe: Observe) -> None:
    graph = observe(2)
    logits, values = small_policy()(graph[0:0])
    assert logits.shape == (0, layout_of(graph).size)
    assert values.shape == (0,)


@torch.no_grad()
def test_a_host_may_have_no_blueprint_to_offer(small_policy: Policies, random_graph: Callable[..., GraphBatch]) -> None:
    sizes = {**dict.fromkeys(SCHEMA.nodes, 2), "blueprint": 0}
    logits, _ = small_policy()(random_graph(3, sizes))
    assert logits.shape == (3, 1 + 2 * (len(RAMPS) + 2))
    assert logits.isfinite().all()


@torch.no_grad()
def test_each_head_writes_to_its_own_actions(small_policy: Policies, observe: Observe) -> None:
    policy, graph = small_policy(), observe(2, blueprints=["mlp", "glu"])
    biases = {"wait": [1.0], "germinate": [2.0], "tend": [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]}
    for name, bias in biases.items():
        getattr(policy, name).weight.zero_()
        getattr(policy, name).bias.copy_(torch.tensor(bias))
    logits, _ = policy(graph)
    layout = layout_of(graph)
    assert logits[0, WAIT] == 1
    for slot in range(4):
        assert all(logits[0, layout.index(Verb.GERMINATE, slot, k)] == 2 for k in range(2))
        assert [float(logits[0, layout.index(Verb.BLEND, slot, r)]) for r in range(4)] == [3, 4, 5, 6]
        assert logits[0, layout.index(Verb.FOSSILIZE, slot)] == 7
        assert logits[0, layout.index(Verb.CULL, slot)] == 8


@torch.no_grad()
def test_the_heads_by_hand(small_policy: Policies, observe: Observe) -> None:
    policy, graph = small_policy(), observe(2)
    x = policy.encoder(graph)
    g = policy.from_global(x["global"][:, 0])
    gelu = torch.nn.functional.gelu
    logits, values = policy(graph)
    layout = layout_of(graph)
    for b in range(2):
        assert torch.allclose(logits[b, WAIT], policy.wait(gelu(g[b])), atol=1e-5)
        for s in range(4):
            slot = policy.from_slot(x["slot"][b, s]) + g[b]
            tend = [layout.index(Verb.BLEND, s, r) for r in range(4)]
            tend += [layout.index(Verb.FOSSILIZE, s), layout.index(Verb.CULL, s)]
            assert torch.allclose(logits[b, tend], policy.tend(gelu(slot)), atol=1e-5)
            for k in range(4):
                pair = slot + policy.from_blueprint(x["blueprint"][b, k])
                number = layout.index(Verb.GERMINATE, s, k)
                assert torch.allclose(logits[b, number], policy.germinate(gelu(pair)), atol=1e-5)
    pooled = torch.cat([x["global"][:, 0], masked_mean(x["slot"], graph.node_mask["slot"])], dim=1)
    assert torch.allclose(values, policy.value(pooled)[:, 0], atol=1e-5)


@torch.no_grad()
def test_evaluate_masks_what_is_illegal(small_policy: Policies, observe: Observe) -> None:
    policy, graph = small_policy(), observe()
    distribution, values = policy.evaluate(graph)
    logits, expected = policy(graph)
    assert torch.equal(values, expected)
    assert torch.equal(distribution.probs > 0, graph.action_mask)
    for row, mask, probs in zip(logits, graph.action_mask, distribution.probs, strict=True):
        torch.testing.assert_close(probs[mask], row[mask].softmax(0))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_fp32_under_autocast(small_policy: Policies, observe: Observe, dtype: torch.dtype) -> None:
    policy, graph = small_policy(), observe()
    expected = policy.predict(graph)
    policy.autocast = dtype
    outputs = policy.predict(graph)
    assert [output.dtype for output in outputs] == [torch.float32] * 3
    assert not torch.equal(outputs[0], expected[0])  # it does run in another type
    torch.testing.assert_close(outputs, expected, atol=0.1, rtol=0.1)


# ---- the untrained policy --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("seed", range(5))
def test_the_untrained_policy_is_near_uniform(observe: Observe, seed: int) -> None:
    torch.manual_seed(seed)
    policy = Tamiyo(PolicyConfig())
    for steps in (0, 6):
        graph = observe(4, steps)
        probs = policy.evaluate(graph)[0].probs
        for row, mask in zip(probs, graph.action_mask, strict=True):
            assert row[mask].max() / row[mask].min() < 1.2


def test_initial_weights_follow_the_global_seed() -> None:
    policies = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        policies.append(Tamiyo(PolicyConfig(hidden=[8, 8, 8, 8], heads=2)).state_dict())
    assert all(torch.equal(policies[0][key], policies[1][key]) for key in policies[0])
    assert any(not torch.equal(policies[0][key], policies[2][key]) for key in policies[0])


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(policy: Tamiyo, graph: GraphBatch) -> dict[str, Tensor | None]:
    """Of a random linear loss over all logits, values and auxiliary predictions."""
    generator = torch.Generator().manual_seed(4)
    outputs = policy.predict(graph)
    torch.stack([(out * torch.randn(out.shape, generator=generator)).sum() for out in outputs]).sum().backward()
    return per_relation(policy, lambda parameter: parameter.grad)


def per_relation(policy: Tamiyo, value: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor | None]:
    """A value of every parameter, where relations share one under the names of PyG for each of them."""
    shadow = copy.deepcopy(policy)
    for own, other in zip(shadow.parameters(), policy.parameters(), strict=True):
        found = value(other)
        own.data = torch.zeros_like(other) if found is None else found
    heads = {name: parameter.data for name, parameter in shadow.named_parameters() if not name.startswith("encoder.")}
    return heads | {f"encoder.{name}": view.detach() for name, view in parameters(shadow.encoder).items()}


def test_every_parameter_has_a_gradient(small_policy: Policies, random_graph: Callable[..., GraphBatch]) -> None:
    # Three nodes of every type, so that every attention has something to choose from. No exceptions.
    graph = random_graph(4, dict.fromkeys(SCHEMA.nodes, 3), 0.7)
    without = [name for name, grad in gradients(small_policy(), graph).items() if grad is None or not grad.any()]
    assert without == []


@pytest.mark.parametrize("output", range(3), ids=["logits", "values", "auxiliary"])
def test_each_output_alone_teaches_the_encoder(
    small_policy: Policies, random_graph: Callable[..., GraphBatch], output: int
) -> None:
    policy = small_policy()
    loss = policy.predict(random_graph(4, dict.fromkeys(SCHEMA.nodes, 3), 0.7))[output]
    assert loss is not None
    (loss * torch.randn(loss.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    taught = {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
    heads = {name for name in dict(policy.named_parameters()) if not name.startswith("encoder.")}
    critic = {name for name in heads if name.startswith("value.")}
    auxiliary = {name for name in heads if name.startswith("contribution.")}
    assert taught & heads == (heads - critic - auxiliary, critic, auxiliary)[output]
    for node in SCHEMA.nodes:
        grad = policy.encoder.inputs[node][0].weight.grad
        assert grad is not None, node
        assert grad.any(), node


def test_on_a_real_host_only_attention_over_single_edges_has_none(small_policy: Policies, observe: Observe) -> None:
    graph = observe(4, 6)
    single = [
        "___".join(relation)
        for relation, edges in graph.edges.items()
        if all(row[there].unique().numel() == there.sum() for row, there in zip(edges.target, edges.mask, strict=True))
    ]
    assert "layer___feeds___activation" in single
    # A softmax over one edge is 1: what goes into the score alone is not used there.
    scoring = ("att_src", "att_dst", "att_edge", "lin_dst.weight", "lin_edge.weight")
    for name, grad in gradients(small_policy(), graph).items():
        if not any(f"<{relation}>" in name for relation in single) or not name.endswith(scoring):
            assert grad is not None, name
            assert grad.any(), name


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (PolicyConfig(hidden=[8, 8, 8]), "policy.hidden"),
        (PolicyConfig(hidden=[8, 0, 8, 8]), "policy.hidden"),
        (PolicyConfig(heads=0), "policy.heads=0"),
        (PolicyConfig(hidden=[8, 8, 8, 6], heads=4), "policy.heads=4"),
        (PolicyConfig(hidden=[8, 8, 6, 8], heads=4), "policy.heads=4"),
    ],
    ids=str,
)
def test_a_bad_size_is_refused_by_name(config: PolicyConfig, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        config.validate()


def test_heads_need_not_divide_the_sage_widths() -> None:
    config = PolicyConfig(hidden=[6, 5, 8, 4], heads=4)
    config.validate()
    Tamiyo(config)
