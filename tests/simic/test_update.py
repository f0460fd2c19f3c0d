"""The PPO loss against arithmetic by hand and in NumPy, and one optimiser step on real data."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper.graph import GraphBatch
from esper.runtime.errors import ConfigError
from esper.simic.config import PPOConfig
from esper.simic.rollout import Minibatch, Rollout
from esper.simic.update import Loss, UpdateStep, ppo_loss
from esper.tamiyo.distribution import MaskedCategorical
from esper.tamiyo.policy import Tamiyo

METRICS = {
    "loss", "policy_gradient_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction", "grad_norm",
}  # fmt: skip


def stub(logits: Tensor, values: Tensor, mask: Tensor | None = None) -> Any:
    """A policy that returns these numbers whatever the graph."""
    legal = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
    return SimpleNamespace(evaluate=lambda graph: (MaskedCategorical(logits, legal), values))


def minibatch(actions: list[int], log_probs: Tensor, advantages: list[float], returns: list[float]) -> Minibatch:
    count = len(actions)
    return Minibatch(
        None, torch.tensor(actions), log_probs, torch.zeros(count), torch.tensor(advantages), torch.tensor(returns)
    )  # type: ignore[arg-type]


# ---- by hand ---------------------------------------------------------------------------------------------------------

RATIOS = [1.0, 1.5, 1.5, 0.5, 0.5, 1.1]
ADVANTAGES = [2.0, 2.0, -2.0, 2.0, -2.0, 3.0]


def hand_case(normalize: bool = False) -> tuple[Tensor, Loss]:
    """Six transitions with a policy of (1/2, 1/4, 1/4), action 0, and old probabilities that make those ratios."""
    logits = torch.tensor([[2.0, 1.0, 1.0]]).log().repeat(6, 1).requires_grad_()
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    batch = minibatch([0] * 6, (0.5 / torch.tensor(RATIOS)).log(), ADVANTAGES, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    config = PPOConfig(clip=0.2, entropy_coef=0.1, value_coef=0.25, normalize_advantages=normalize)
    return logits, ppo_loss(stub(logits, values), batch, config)


def test_the_loss_by_hand() -> None:
    _, loss = hand_case()
    # min(r A, clip(r) A): 2, min(3, 2.4) = 2.4, min(-3, -2.4) = -3, min(1, 1.6) = 1, min(-1, -1.6) = -1.6, 3.3.
    # Their sum is 4.1.
    assert loss.policy_gradient.item() == pytest.approx(-4.1 / 6)
    # errors -1, 0, 1, 2, 3, 4: squares add up to 31
    assert loss.value.item() == pytest.approx(0.5 * 31 / 6)
    # ln(2)/2 + 2 ln(4)/4 = 1.5 ln 2
    assert loss.entropy.item() == pytest.approx(1.5 * math.log(2))
    assert loss.total.item() == pytest.approx(-4.1 / 6 + 0.25 * 0.5 * 31 / 6 - 0.1 * 1.5 * math.log(2))


def test_what_is_logged_by_hand() -> None:
    _, loss = hand_case()
    # sum of (r - 1) = 0 + .5 + .5 - .5 - .5 + .1 = .1; sum of ln r = 2 ln 1.5 + 2 ln .5 + ln 1.1
    log_sum = 2 * math.log(1.5) + 2 * math.log(0.5) + math.log(1.1)
    assert loss.approx_kl.item() == pytest.approx((0.1 - log_sum) / 6, rel=1e-4)
    assert loss.clip_fraction.item() == pytest.approx(4 / 6)
    assert not loss.approx_kl.requires_grad
    assert not loss.clip_fraction.requires_grad


def test_only_unclipped_transitions_move_the_policy() -> None:
    logits, loss = hand_case()
    (gradient,) = torch.autograd.grad(loss.policy_gradient, logits)
    # Where the clipped term is the smaller one, rows 1 and 4, the surrogate is constant. Elsewhere the derivative with
    # respect to the logit of the chosen action is -A r (1 - p) / 6 with p = 1/2.
    expected = [-a * r * 0.5 / 6 for a, r in zip(ADVANTAGES, RATIOS, strict=True)]
    expected[1] = expected[4] = 0.0
    assert gradient[:, 0].tolist() == pytest.approx(expected)
    assert gradient[:, 1].tolist() == pytest.approx([-value / 2 for value in expected])


def test_normalised_advantages_by_hand() -> None:
    _, loss = hand_case(normalize=True)
    # mean 5/6, mean square (4 * 5 + 9) / 6 = 29/6, so variance 29/6 - 25/36 = 149/36
    std = math.sqrt(149) / 6
    total = 0.0
    for ratio, advantage in zip(RATIOS, ADVANTAGES, strict=True):
        a = (advantage - 5 / 6) / std
        total += min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
    assert loss.policy_gradient.item() == pytest.approx(-total / 6, rel=1e-5)


def test_equal_advantages_are_normalised_to_nothing() -> None:
    logits = torch.zeros(3, 2, requires_grad=True)
    batch = minibatch([0, 1, 0], torch.full((3,), 0.5).log(), [4.0, 4.0, 4.0], [0.0, 0.0, 0.0])
    loss = ppo_loss(stub(logits, torch.zeros(3)), batch, PPOConfig())
    assert loss.policy_gradient.item() == 0
    loss.total.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_batch_is_not_changed_by_normalising() -> None:
    batch = minibatch([0, 1], torch.tensor([0.5, 0.5]).log(), [1.0, 3.0], [0.0, 0.0])
    ppo_loss(stub(torch.zeros(2, 2), torch.zeros(2)), batch, PPOConfig())
    assert batch.advantages.tolist() == [1.0, 3.0]


# ---- in NumPy --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), normalize=st.booleans(), clip=st.sampled_from([0.05, 0.2, 0.5]))
def test_the_loss_in_numpy(seed: int, normalize: bool, clip: float) -> None:
    rng = np.random.default_rng(seed)
    count, size = 12, 5
    logits, values, returns, advantages = (rng.normal(size=s) for s in ((count, size), count, count, count))
    mask = rng.random((count, size)) < 0.6
    mask[:, 0] = True
    actions = np.array([rng.choice(np.flatnonzero(row)) for row in mask])

    exp = np.where(mask, np.exp(logits), 0.0)
    probs = exp / exp.sum(1, keepdims=True)
    chosen = probs[np.arange(count), actions]
    old = chosen * np.exp(0.3 * rng.normal(size=count))
    ratio = chosen / old
    a = (advantages - advantages.mean()) / (advantages.std() + 1e-8) if normalize else advantages
    policy_gradient = -np.minimum(ratio * a, np.clip(ratio, 1 - clip, 1 + clip) * a).mean()
    value = 0.5 * ((values - returns) ** 2).mean()
    entropy = -np.where(mask, probs * np.log(np.where(mask, probs, 1.0)), 0.0).sum(1).mean()

    config = PPOConfig(clip=clip, entropy_coef=0.07, value_coef=0.4, normalize_advantages=normalize)
    as_float = [torch.tensor(t, dtype=torch.float32) for t in (logits, values, np.log(old), advantages, returns)]
    batch = minibatch(actions.tolist(), as_float[2], as_float[3].tolist(), as_float[4].tolist())
    loss = ppo_loss(stub(as_float[0], as_float[1], torch.from_numpy(mask)), batch, config)
    expected = {
        "policy_gradient": policy_gradient,
        "value": value,
        "entropy": entropy,
        "total": policy_gradient + 0.4 * value - 0.07 * entropy,
        "approx_kl": (ratio - 1 - np.log(ratio)).mean(),
        "clip_fraction": (np.abs(ratio - 1) > clip).mean(),
    }
    for name, number in expected.items():
        assert getattr(loss, name).item() == pytest.approx(number, abs=1e-5), name


# ---- on real data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(collected: Callable[[], Rollout]) -> Minibatch:
    return next(collected().minibatches(2, torch.Generator().manual_seed(0)))


def step_of(policy: Tamiyo, **settings: Any) -> UpdateStep:
    config = PPOConfig(**settings)
    return UpdateStep(policy, torch.optim.SGD(policy.parameters(), config.lr), config)


def total_norm(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))


def test_before_the_first_step_the_ratio_is_1(
    make_policy: Callable[..., Tamiyo], collected: Callable[[], Rollout]
) -> None:
    for minibatch in collected().minibatches(3, torch.Generator().manual_seed(0)):
        loss = ppo_loss(make_policy(), minibatch, PPOConfig())
        assert abs(loss.approx_kl.item()) < 1e-6
        assert loss.clip_fraction.item() == 0
        distribution, values = make_policy().evaluate(minibatch.graph)
        torch.testing.assert_close(distribution.log_prob(minibatch.actions), minibatch.log_probs, atol=1e-6, rtol=0)
        torch.testing.assert_close(values, minibatch.values, atol=1e-5, rtol=1e-5)


def test_illegal_actions_get_no_gradient(
    make_policy: Callable[..., Tamiyo], batch: Minibatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy()
    seen: list[Tensor] = []
    forward = policy.forward

    def spied(graph: GraphBatch) -> tuple[Tensor, Tensor]:
        logits, values = forward(graph)
        logits.retain_grad()
        seen.append(logits)
        return logits, values

    monkeypatch.setattr(policy, "forward", spied)
    ppo_loss(policy, batch, PPOConfig(entropy_coef=0.1)).total.backward()
    (logits,) = seen
    assert logits.grad is not None
    assert (logits.grad[~batch.graph.action_mask] == 0).all()
    several = batch.graph.action_mask.sum(1) > 1
    assert (logits.grad[several] != 0).any(1).all()


def test_the_metrics_are_detached_scalars_of_the_loss(make_policy: Callable[..., Tamiyo], batch: Minibatch) -> None:
    policy = make_policy()
    loss = ppo_loss(policy, batch, PPOConfig())
    metrics = step_of(policy)(batch)
    assert metrics.keys() == METRICS
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    expected = {
        "loss": loss.total, "policy_gradient_loss": loss.policy_gradient, "value_loss": loss.value,
        "entropy_loss": -loss.entropy, "approx_kl": loss.approx_kl, "clip_fraction": loss.clip_fraction,
    }  # fmt: skip
    for name, value in expected.items():
        assert torch.equal(metrics[name], value.detach()), name


def test_the_gradient_is_clipped_and_its_own_norm_reported(
    make_policy: Callable[..., Tamiyo], batch: Minibatch
) -> None:
    policy = make_policy()
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    free = torch.autograd.grad(
        ppo_loss(policy, batch, PPOConfig()).total, list(policy.parameters()), materialize_grads=True
    )
    norm = total_norm(list(free))
    assert norm > 0.1
    metrics = step_of(policy, max_grad_norm=0.05, lr=1.0)(batch)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    # SGD with a rate of 1 moves by the clipped gradient itself: the free one scaled to a norm of 0.05.
    moved = [old - new.detach() for old, new in zip(before, policy.parameters(), strict=True)]
    assert total_norm(moved) == pytest.approx(0.05, rel=1e-3)
    for got, gradient in zip(moved, free, strict=True):
        torch.testing.assert_close(got, gradient * 0.05 / norm, atol=1e-6, rtol=1e-3)


def test_a_small_gradient_is_not_clipped(make_policy: Callable[..., Tamiyo], batch: Minibatch) -> None:
    policy = make_policy()
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    metrics = step_of(policy, max_grad_norm=1e6, lr=0.5)(batch)
    moved = [old - new.detach() for old, new in zip(before, policy.parameters(), strict=True)]
    assert total_norm(moved) == pytest.approx(0.5 * float(metrics["grad_norm"]), rel=1e-3)


def test_gradients_do_not_pile_up(make_policy: Callable[..., Tamiyo], batch: Minibatch) -> None:
    step = step_of(make_policy(), lr=1e-12)  # the policy stays where it is
    first, second = step(batch), step(batch)
    assert float(second["grad_norm"]) == pytest.approx(float(first["grad_norm"]), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_small_step_lowers_the_loss(
    make_policy: Callable[..., Tamiyo], collected: Callable[[], Rollout], seed: int
) -> None:
    policy = make_policy()
    batch = next(collected().minibatches(2, torch.Generator().manual_seed(seed)))
    config = PPOConfig(max_grad_norm=1e6, lr=1e-4)
    before = ppo_loss(policy, batch, config)
    metrics = UpdateStep(policy, torch.optim.SGD(policy.parameters(), config.lr), config)(batch)
    after = ppo_loss(policy, batch, config)
    # To first order the loss falls by lr * |gradient|^2.
    expected = config.lr * float(metrics["grad_norm"]) ** 2
    assert (before.total - after.total).item() == pytest.approx(expected, rel=0.2)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"lr": 0.0}, "ppo.lr=0"),
        ({"lr": math.nan}, "ppo.lr=nan"),
        ({"minibatches": 0}, "ppo.minibatches=0"),
        ({"num_steps": -1}, "ppo.num_steps=-1"),
        ({"epochs": 0}, "ppo.epochs=0"),
        ({"clip": 0.0}, "ppo.clip=0"),
        ({"max_grad_norm": 0.0}, "ppo.max_grad_norm=0"),
        ({"gamma": 1.01}, "ppo.gamma=1.01"),
        ({"gae_lambda": -0.1}, "ppo.gae_lambda=-0.1"),
        ({"entropy_coef": -1.0}, "ppo.entropy_coef=-1"),
        ({"value_coef": -1.0}, "ppo.value_coef=-1"),
        ({"target_kl": 0.0}, "ppo.target_kl=0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(settings: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        PPOConfig(**settings).validate()


def test_settings_on_the_edge_pass() -> None:
    PPOConfig(gamma=0.0, gae_lambda=1.0, entropy_coef=0.0, value_coef=0.0, target_kl=0.01).validate()
    PPOConfig().validate()
