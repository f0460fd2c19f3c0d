"""The linear scorer: its features by a slow loop, and that it germinates the largest score."""

import math
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from envs.growth_env import GrowthEnv
from esper.graph import GraphBatch
from esper.graph.schema import SCHEMA
from esper.graph.space import BOUND
from esper.growth.actions import WAIT, ActionLayout, Verb
from esper.tamiyo import baselines
from esper.tamiyo.baselines import BaselinesConfig, linear
from esper.tamiyo.baselines.linear import Linear, LinearKnobs, features

Envs = Callable[..., GrowthEnv]
LAYOUT = ActionLayout(4, 5)
ACTIVATION = ("dead_fraction", "zero_derivative_fraction", "mean", "std", "effective_rank", "log_backward_rms")
LAYER = ("weight_rms", "log_gradient_rms", "log_update_ratio", "gradient_signal_to_noise")
SLOT = ("log_growth_gradient", "alpha", "contribution")


@pytest.fixture(scope="module")
def hosts(make_env: Envs) -> GrowthEnv:
    env = make_env(12)
    env.reset(torch.arange(12))
    return env


def slow(graph: GraphBatch, host: int, slot: int) -> list[float]:
    """The features of one slot from the definition."""

    def at(node: str, index: int, name: str) -> float:
        return float(graph.x[node][host, index, SCHEMA.feature(node, name)])

    slots = int(graph.node_mask["slot"][host].sum())

    def own(s: int) -> list[float]:
        if s >= graph.x["slot"].shape[1] or not graph.node_mask["slot"][host, s]:
            return [0.0] * (len(ACTIVATION) + 1 + len(SLOT) + 2 * len(LAYER))
        values = [at("activation", s, name) for name in ACTIVATION]
        values.append(math.log(max(at("activation", s, "std"), 1e-4)))
        values += [at("slot", s, name) for name in SLOT]
        for name in LAYER:
            values += [at("layer", s + 1, name), at("layer", s + 2, name)]
        return values

    mine, everyone = own(slot), [own(s) for s in range(slots)]
    mean = [sum(column) / slots for column in zip(*everyone, strict=True)]
    depth = at("layer", slot + 1, "depth_fraction")
    whole = [at("global", 0, name) for name in linear._GLOBAL]
    differences = [a - b for a, b in zip(mine, mean, strict=True)]
    to_next = [a - b for a, b in zip(mine, own(slot + 1), strict=True)]
    return [*mine, *differences, *to_next, depth, depth**2, *whole, 1.0]


@pytest.mark.parametrize("seed", range(3))
def test_features_are_the_loop(hosts: GrowthEnv, scrambled: Any, seed: int) -> None:
    graph = scrambled(hosts, seed)
    got = features(graph)
    full = graph.node_mask["slot"].all(1).nonzero().flatten().tolist()
    assert full
    for host in full:
        for slot in range(4):
            torch.testing.assert_close(got[host, slot], torch.tensor(slow(graph, host, slot)), atol=1e-5, rtol=1e-5)


def test_features_of_shallow_hosts_are_the_loop(hosts: GrowthEnv, scrambled: Any) -> None:
    graph = scrambled(hosts, 0)
    for host in range(12):
        for slot in range(int(graph.node_mask["slot"][host].sum())):
            expected = torch.tensor(slow(graph, host, slot))
            torch.testing.assert_close(features(graph)[host, slot], expected, atol=1e-5, rtol=1e-5)


@hypothesis.settings(max_examples=25)
@hypothesis.given(seed=st.integers(0, 10**6))
def test_features_are_bounded_zero_for_missing_slots_and_each_hosts_own(
    hosts: GrowthEnv, scrambled: Any, seed: int
) -> None:
    graph = scrambled(hosts, seed)
    found = features(graph)
    assert found.isfinite().all()
    assert found.abs().max() <= BOUND**2  # a product of two; differences are below
    missing = ~graph.node_mask["slot"]
    assert (found[missing] == 0).all()
    assert (found[~missing][:, -1] == 1).all()
    assert torch.equal(features(graph[3]), found[3:4])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(features(graph[order]), found[order])


# ---- choosing --------------------------------------------------------------------------------------------------------


def scorer(weights: Tensor, hosts: int = 12, **knobs: Any) -> Linear:
    made = Linear(LinearKnobs(**{"first": 0, "every": 1, "threshold": -1e9, **knobs}), weights, 3)
    made.begin(hosts)
    return made


def random_weights(graph: GraphBatch, seed: int) -> Tensor:
    return torch.randn(5, features(graph).shape[2], generator=torch.Generator().manual_seed(seed))


@hypothesis.settings(max_examples=25)
@hypothesis.given(seed=st.integers(0, 10**6), threshold=st.sampled_from([-1e9, 0.0, 10.0, 30.0]))
def test_it_germinates_the_largest_legal_score_above_the_threshold(
    hosts: GrowthEnv, scrambled: Any, seed: int, threshold: float
) -> None:
    graph = scrambled(hosts, seed)
    weights = random_weights(graph, seed)
    found = features(graph)
    actions = scorer(weights, threshold=threshold).act(graph)
    for host in range(12):
        best, chosen = threshold, None
        for slot in range(4):
            for kind in range(5):
                number = LAYOUT.index(Verb.GERMINATE, slot, kind)
                score = float(found[host, slot] @ weights[kind])
                if graph.action_mask[host, number] and score > best:
                    best, chosen = score, number
        if chosen is None:
            assert LAYOUT.table()[0][actions[host]] in (Verb.WAIT, Verb.BLEND)
        else:
            assert int(actions[host]) == chosen


def test_scores_are_features_times_weights(hosts: GrowthEnv, scrambled: Any) -> None:
    graph = scrambled(hosts, 1)
    weights = random_weights(graph, 1)
    expected = torch.einsum("nsf,kf->nsk", features(graph), weights)
    torch.testing.assert_close(scorer(weights).score(graph), expected, atol=1e-4, rtol=1e-4)


def test_the_threshold_must_be_passed(make_env: Envs) -> None:
    graph = make_env(2).reset(torch.arange(2))
    # Every score is the constant, 2, but for blueprint 3, which is worth 3.
    weights = torch.zeros(5, features(graph).shape[2])
    weights[:, -1] = torch.tensor([2.0, 2.0, 2.0, 3.0, 2.0])
    expected = {2.99: LAYOUT.index(Verb.GERMINATE, 0, 3), 3.0: WAIT, 3.01: WAIT}
    for threshold, action in expected.items():
        assert scorer(weights, 2, threshold=threshold).act(graph).tolist() == [action] * 2


def test_decisions_fall_on_every_few_epochs(make_env: Envs) -> None:
    graph = make_env(2).reset(torch.arange(2))
    controller = scorer(random_weights(graph, 0), 2, first=1, every=4)
    assert [bool(controller.act(graph).any()) for _ in range(10)] == [epoch in (1, 5, 9) for epoch in range(10)]


def test_weights_are_found_by_the_name_of_the_blueprint(make_env: Envs, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = make_env(2).reset(torch.arange(2))
    width = features(graph).shape[2]
    rows = {"norm": [4.0] * width, "mlp": [2.0] * width}
    monkeypatch.setattr(baselines, "_stored", lambda: {"here": {"weights": rows, "knobs": {"linear": {"first": 7}}}})
    made = baselines.make("linear", BaselinesConfig(), "here", ["bypass", "mlp", "norm"], 0)
    assert isinstance(made, Linear)
    assert made.weights[1:].tolist() == [[2.0] * width, [4.0] * width]
    assert (made.first, made.every) == (7, LinearKnobs().every)
    # A blueprint that it was not fitted for is never chosen.
    found = features(graph)
    assert (found @ made.weights[0] < -1e8).all()
