"""The compiled actor: one program for a whole run, never stale, and safe to lose."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from envs.growth_env import GrowthEnv
from esper.graph import GraphBatch
from esper.runtime.compiled import CompileGuard
from esper.tamiyo.actor import Actor
from esper.tamiyo.policy import PolicyConfig, Tamiyo

Policies = Callable[..., Tamiyo]

MIXED = {"epochs": 4, "host": {"width": [4, 8], "stages": [2, 5]}}


@pytest.fixture(scope="module")
def mixed(make_env: Callable[..., GrowthEnv], scrambled: Callable[..., GraphBatch]) -> GraphBatch:
    """64 hosts of all depths and widths, whose slots are anywhere in their lifecycles."""
    return scrambled(make_env(64, **MIXED), 3)


@pytest.fixture(scope="module")
def shared(small_policy: Policies, mixed: GraphBatch) -> Actor:
    actor = Actor(small_policy(), 0, guard=CompileGuard("actor"))
    actor.warm_up(mixed)
    return actor


@pytest.fixture
def compiled(shared: Actor, small_policy: Policies) -> Actor:
    """A compiled actor with the weights of `small_policy()`; compiled once, since that takes long."""
    shared.policy.load_state_dict(small_policy().state_dict())
    shared.generator.manual_seed(0)
    return shared


@torch.inference_mode()
def outputs(actor: Actor, graph: GraphBatch) -> list[Tensor]:
    """Log-probabilities of all actions, and values."""
    return [output.clone() for output in actor._run(graph)]


def assert_eager(actor: Actor, graph: GraphBatch) -> None:
    """The actor gives what its policy gives eagerly, by a compiled program."""
    runs = actor.guard.runs
    got = outputs(actor, graph)
    assert actor.guard.runs == runs + 1
    distribution, values = actor.policy.evaluate(graph)
    torch.testing.assert_close(got, [distribution.log_probs, values], atol=1e-5, rtol=1e-5)


def changed(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether all values differ, and all log-probabilities of legal actions where there is a choice."""
    legal = one[0].isfinite() & (one[0] != 0)
    return bool((one[1] != other[1]).all() and (one[0] != other[0])[legal].all())


# ---- one program -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 5, 31, 33, 64])
def test_batches_of_any_size_share_a_program(compiled: Actor, mixed: GraphBatch, size: int) -> None:
    assert_eager(compiled, mixed[:size])
    assert compiled.guard.recompiles == 0


@pytest.mark.slow
def test_a_single_graph_is_no_program_of_its_own(compiled: Actor, mixed: GraphBatch) -> None:
    runs = compiled.guard.runs
    together = outputs(compiled, mixed)
    alone = outputs(compiled, mixed[7])
    torch.testing.assert_close(alone, [output[7:8] for output in together], atol=1e-5, rtol=1e-5)
    assert (compiled.guard.runs - runs, compiled.guard.recompiles) == (1, 0)


@pytest.mark.slow
def test_64_hosts_that_grow_for_ten_episodes_need_one_program(
    compiled: Actor, make_env: Callable[..., GrowthEnv]
) -> None:
    env, guard = make_env(64, **MIXED), compiled.guard
    graph, runs, calls, shapes, germinated = env.reset(torch.arange(64)), guard.runs, 0, set(), 0.0
    while len(shapes) < 10:
        with torch.no_grad():
            expected = compiled.policy.evaluate(graph)[1]
        decision = compiled(graph)
        torch.testing.assert_close(decision.values, expected, atol=1e-5, rtol=1e-5)
        graph, _, terminated, truncated, info = env.step(decision.actions.clone())
        calls += 1
        if (terminated | truncated).any():
            germinated += float(info["episodes"]["germinated"].sum())
            shapes.add(tuple(graph.x["slot"].sum((1, 2)).tolist()))  # of ten different populations
            compiled.value(info["final_graph"])
            calls += 1
    assert germinated > 100
    assert (guard.runs - runs, guard.recompiles, guard.fallback_total) == (calls, 0, 0)
    assert compiled.guard.enabled


@pytest.mark.slow
def test_what_is_new_after_the_warm_up_runs_eagerly(compiled: Actor, observe: Callable[..., GraphBatch]) -> None:
    # Hosts of another environment: another layout.
    graph, runs = observe(6, 2, host={"width": [4, 4], "stages": [3, 3]}), compiled.guard.runs
    distribution, values = compiled.policy.evaluate(graph)
    torch.testing.assert_close(outputs(compiled, graph), [distribution.log_probs, values], atol=1e-5, rtol=1e-5)
    assert (compiled.guard.runs - runs, compiled.guard.recompiles, compiled.guard.enabled) == (0, 0, True)


# ---- stale weights ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_compiled_actor_follows_an_update(compiled: Actor, mixed: GraphBatch) -> None:
    policy, before = compiled.policy, outputs(compiled, mixed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05, fused=True)
    for _ in range(2):
        distribution, values = policy.evaluate(mixed)
        optimizer.zero_grad()
        (distribution.entropy() + values.square()).mean().backward()
        optimizer.step()
        assert_eager(compiled, mixed)
        after = outputs(compiled, mixed)
        assert changed(before, after)
        before = after


@pytest.mark.slow
def test_the_compiled_actor_follows_load_state_dict(compiled: Actor, small_policy: Policies, mixed: GraphBatch) -> None:
    before = outputs(compiled, mixed)
    compiled.policy.load_state_dict(small_policy(1).state_dict())
    assert changed(before, outputs(compiled, mixed))
    assert_eager(compiled, mixed)
    torch.testing.assert_close(outputs(compiled, mixed), outputs(Actor(small_policy(1)), mixed), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_compiled_actor_follows_a_policy_that_moves(compiled: Actor, mixed: GraphBatch) -> None:
    """`.to()` gives every parameter other memory; an update of that must be seen."""
    before, places = outputs(compiled, mixed), [p.data for p in compiled.policy.parameters()]
    compiled.policy.to(torch.float64)
    compiled.policy.to("cpu", torch.float32)
    assert not {p.data_ptr() for p in compiled.policy.parameters()} & {place.data_ptr() for place in places}
    torch.testing.assert_close(outputs(compiled, mixed), before, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        for parameter in compiled.policy.parameters():
            parameter.mul_(1.5)
    assert changed(before, outputs(compiled, mixed))
    assert_eager(compiled, mixed)


@pytest.mark.slow
def test_a_compiled_actor_elsewhere_has_the_weights_of_the_last_sync(small_policy: Policies, mixed: GraphBatch) -> None:
    learner = small_policy(1)
    actor = Actor(learner, 0, guard=CompileGuard("actor"), device="cpu:0")  # for PyTorch another device than "cpu"
    assert actor.policy is not learner
    actor.warm_up(mixed)
    before = outputs(actor, mixed)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(outputs(actor, mixed), before, atol=0, rtol=0)
    actor.sync()
    assert_eager(actor, mixed)
    assert changed(before, outputs(actor, mixed))
    torch.testing.assert_close(outputs(actor, mixed)[1], learner(mixed)[1].detach(), atol=1e-5, rtol=1e-5)


# ---- what it decides -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_compiled_actor_draws_what_the_eager_one_draws(
    compiled: Actor, small_policy: Policies, mixed: GraphBatch
) -> None:
    eager = Actor(small_policy(), 0)
    got, want = (torch.cat([actor(mixed).actions for _ in range(20)]) for actor in (compiled, eager))
    # Rounding may move a draw that falls between two actions.
    assert (got == want).float().mean() > 0.99
    assert len(torch.stack([compiled(mixed).actions for _ in range(3)]).unique(dim=0)) == 3


@pytest.mark.slow
def test_warming_up_a_compiled_actor_moves_no_generator(compiled: Actor, mixed: GraphBatch) -> None:
    state, of_torch = compiled.generator.get_state(), torch.get_rng_state()
    compiled.warm_up(mixed)
    assert torch.equal(compiled.generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), of_torch)


# ---- falling back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "when"), [(1, "at its first run"), (3, "at run time")])
def test_a_failing_compiled_actor_is_replaced_by_the_eager_one(
    small_policy: Policies, mixed: GraphBatch, failing_guard: Callable[..., Any], caplog: pytest.LogCaptureFixture,
    at: int, when: str,
) -> None:  # fmt: skip
    guard = failing_guard("actor", at)
    broken, eager = Actor(small_policy(), 0, guard=guard), Actor(small_policy(), 0)
    with caplog.at_level(logging.WARNING):
        broken.warm_up(mixed)
        for _ in range(4):
            for got, want in zip(broken(mixed), eager(mixed), strict=True):
                assert torch.equal(got, want)
    (record,) = caplog.records
    assert f"the compiled actor failed, it runs eagerly from now on (error {when}" in record.getMessage()
    assert (guard.fallback_total, guard.calls, guard.enabled) == (1, at, False)


def test_a_backend_without_a_compiled_form_runs_eagerly(mixed: GraphBatch, randomise: Callable[..., Tamiyo]) -> None:
    policy = randomise(Tamiyo(PolicyConfig(hidden=[8, 8, 12, 12], heads=2, backend="pyg")))
    actor = Actor(policy, 0, guard=CompileGuard("actor"))
    actor.warm_up(mixed)
    torch.testing.assert_close(actor(mixed).values, policy(mixed)[1], atol=0, rtol=0)
    assert (actor.guard.runs, actor.guard.fallback_total, actor.guard.warm) == (0, 0, True)


def test_what_the_eager_policy_raises_too_is_raised(
    small_policy: Policies, mixed: GraphBatch, failing_guard: Callable[..., Any]
) -> None:
    actor = Actor(small_policy(), 0, guard=failing_guard("actor", 1))
    with pytest.raises(RuntimeError, match="size of tensor"):
        actor(mixed.with_actions(mixed.action_mask[:, :3]))  # a mask of other actions
    assert (actor.guard.fallback_total, actor.guard.enabled) == (0, True)
