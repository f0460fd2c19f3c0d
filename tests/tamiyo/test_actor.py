"""The actor: seeded, always on the policy's present weights, and harmless to the update."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from esper.graph import GraphBatch
from esper.simic.rollout import Rollout
from esper.tamiyo.actor import Actor
from esper.tamiyo.policy import Tamiyo

Policies = Callable[..., Tamiyo]


@pytest.fixture(scope="module")
def graph(observe: Callable[..., GraphBatch]) -> GraphBatch:
    return observe(6, 3)


def draws(actor: Actor, graph: GraphBatch, calls: int = 5) -> Tensor:
    return torch.stack([actor(graph).actions for _ in range(calls)])


# ---- seeds -----------------------------------------------------------------------------------------------------------


def test_the_seed_fixes_the_actions(small_policy: Policies, graph: GraphBatch) -> None:
    policy = small_policy()
    one, two, other = (draws(Actor(policy, seed), graph) for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_each_call_draws_anew(small_policy: Policies, graph: GraphBatch) -> None:
    assert len(draws(Actor(small_policy(), 0), graph).unique(dim=0)) > 1


def test_the_generator_can_be_saved_and_restored(small_policy: Policies, graph: GraphBatch) -> None:
    actor = Actor(small_policy(), 0)
    actor(graph)
    state = actor.generator.get_state()
    expected = draws(actor, graph)
    resumed = Actor(small_policy(), 99)
    resumed.generator.set_state(state)
    assert torch.equal(draws(resumed, graph), expected)


def test_the_global_generator_is_neither_read_nor_moved(small_policy: Policies, graph: GraphBatch) -> None:
    policy = small_policy()
    torch.manual_seed(1)
    expected = draws(Actor(policy, 0), graph)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(draws(Actor(policy, 0), graph), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_warming_up_changes_no_decision(small_policy: Policies, graph: GraphBatch) -> None:
    policy = small_policy()
    cold, warm = Actor(policy, 0), Actor(policy, 0)
    warm.warm_up(graph)
    assert torch.equal(draws(warm, graph), draws(cold, graph))


# ---- what it returns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
def test_log_probs_and_values_are_exactly_the_policys(
    small_policy: Policies, graph: GraphBatch, deterministic: bool
) -> None:
    policy = small_policy()
    decision = Actor(policy, 0, deterministic)(graph)
    distribution, values = policy.evaluate(graph)
    assert torch.equal(decision.log_probs, distribution.log_prob(decision.actions.clone()))
    assert torch.equal(decision.values, values)
    assert (decision.actions.dtype, decision.log_probs.dtype) == (torch.int64, torch.float32)
    assert decision.actions.shape == decision.log_probs.shape == decision.values.shape == (6,)


def test_value_is_that_of_the_decision(small_policy: Policies, graph: GraphBatch) -> None:
    actor = Actor(small_policy(), 0)
    assert torch.equal(actor.value(graph), actor(graph).values)


def test_deterministic_takes_the_most_probable_legal_action(small_policy: Policies, graph: GraphBatch) -> None:
    policy = small_policy(2, scale=1.0)
    with torch.no_grad():
        logits, _ = policy(graph)
    expected = logits.masked_fill(~graph.action_mask, -1e9).argmax(1)
    assert len(expected.unique()) > 2
    # Were everything legal, another action would win somewhere; so the mask is at work here.
    assert not torch.equal(expected, logits.argmax(1))
    for seed in (0, 1):
        assert torch.equal(Actor(policy, seed, deterministic=True)(graph).actions, expected)


def test_samples_follow_the_policy(small_policy: Policies, graph: GraphBatch) -> None:
    policy = small_policy(scale=0.6)
    many = graph[[0] * 2000]
    actions = torch.cat([Actor(policy, seed)(many).actions for seed in range(5)])
    with torch.no_grad():
        probs = policy.evaluate(graph[0])[0].probs[0]
    frequency = torch.bincount(actions, minlength=len(probs)) / len(actions)
    # 10,000 draws: a standard deviation of at most 0.005
    torch.testing.assert_close(frequency, probs, atol=0.02, rtol=0)
    assert probs.max() > 2 * probs[graph.action_mask[0]].min()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_illegal_actions_are_never_drawn_in_a_million_draws(
    small_policy: Policies, graph: GraphBatch, dtype: torch.dtype | None
) -> None:
    policy = small_policy()
    policy.autocast = dtype
    with torch.no_grad():  # what is illegal has by far the largest logit
        policy.wait.bias.fill_(-40.0)
        policy.germinate.bias.fill_(40.0)
    legal = graph.action_mask.clone()
    legal[:, 1:] &= torch.rand(legal[:, 1:].shape, generator=torch.Generator().manual_seed(0)) < 0.3
    legal[0, 1:] = False  # only WAIT
    legal[1, -1] = False  # the last one cannot be drawn by a number just below 1
    actor, counts = Actor(policy, 0), torch.zeros(legal.shape)
    distribution, values = actor.policy.evaluate(graph.with_actions(legal))
    log_probs = distribution.log_probs.detach()
    actor._run = lambda _: (log_probs.repeat(34_000, 1), values.detach().repeat(34_000))  # type: ignore[method-assign]
    for _ in range(5):
        actions = actor(graph).actions.view(34_000, 6)
        counts += torch.stack([torch.bincount(column, minlength=legal.shape[1]) for column in actions.T])
    assert counts.sum() > 1e6
    assert not counts[~legal].any()
    assert counts[0, 0] == 5 * 34_000


# ---- stale weights ---------------------------------------------------------------------------------------------------


def test_the_actor_follows_an_optimiser_step(small_policy: Policies, graph: GraphBatch) -> None:
    policy = small_policy()
    actor = Actor(policy, 0)
    actor.warm_up(graph)
    before = actor(graph).values.clone()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    policy(graph)[1].sum().backward()
    optimizer.step()
    after = actor(graph).values
    assert not torch.equal(after, before)
    assert torch.equal(after, policy(graph)[1])


def test_the_actor_follows_load_state_dict(small_policy: Policies, graph: GraphBatch) -> None:
    policy, other = small_policy(0), small_policy(1)
    actor = Actor(policy, 0, deterministic=True)
    actor(graph)
    policy.load_state_dict(other.state_dict())
    expected = Actor(other, 0, deterministic=True)(graph)
    for got, want in zip(actor(graph), expected, strict=True):
        assert torch.equal(got, want)


# ---- inference tensors -----------------------------------------------------------------------------------------------


def test_decisions_are_inference_tensors_without_gradient(small_policy: Policies, graph: GraphBatch) -> None:
    decision = Actor(small_policy(), 0)(graph)
    assert all(part.is_inference() and not part.requires_grad for part in decision)


def test_a_rollout_of_decisions_can_be_backpropagated_through(small_policy: Policies, graph: GraphBatch) -> None:
    policy = small_policy()
    actor = Actor(policy, 0)
    rollout = Rollout(2, 6)
    for _ in range(2):
        cut = torch.ones(6, dtype=torch.bool)
        rollout.add(graph, *actor(graph), torch.ones(6), ~cut, cut, actor.value(graph))
    rollout.finish(actor.value(graph), 0.9, 0.9)
    assert not any(value.is_inference() for value in vars(rollout).values() if isinstance(value, Tensor))
    for batch in rollout.minibatches(2, torch.Generator().manual_seed(0)):
        actions, log_probs, old_values, advantages, returns, *_ = parts = batch.targets
        assert not any(part.is_inference() or part.requires_grad for part in [*parts, *batch.graph.to_dict().values()])
        distribution, values = policy.evaluate(batch.graph)
        # Each factor is saved for the backward pass, which autograd refuses for an inference tensor.
        ratio = (distribution.log_prob(actions) - log_probs).exp()
        (ratio * advantages + (values - returns).square() + values * old_values).sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in policy.parameters())


# ---- times -----------------------------------------------------------------------------------------------------------


def test_every_call_has_a_latency_and_the_warm_up_is_apart(small_policy: Policies, graph: GraphBatch) -> None:
    actor = Actor(small_policy(), 0)
    assert actor.guard.warm_ms == 0
    actor.warm_up(graph)
    assert actor.guard.warm_ms > 0
    assert len(actor.latencies_ms) == 0
    draws(actor, graph, 3)
    assert len(actor.latencies_ms) == 3
    assert all(latency > 0 for latency in actor.latencies_ms)
