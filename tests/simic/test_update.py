"""The PPO loss against arithmetic by hand and in NumPy, and one optimiser step on real data."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper.runtime.compiled import CompileGuard
from esper.runtime.errors import ConfigError
from esper.runtime.precision import LossScaler
from esper.simic.config import PPOConfig
from esper.simic.rollout import Minibatch, Rollout, Targets, Totals
from esper.simic.update import METRICS, Coefficients, UpdateStep, ppo_loss
from esper.tamiyo.distribution import MaskedCategorical
from esper.tamiyo.policy import Tamiyo

Loss = tuple[Tensor, dict[str, Tensor]]


def loss_of(
    logits: Tensor,
    values: Tensor,
    targets: Targets,
    config: PPOConfig,
    mask: Tensor | None = None,
    predictions: Tensor | None = None,
) -> Loss:
    """The loss where a policy returns these numbers, and its metrics by name."""
    legal = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
    coefficients = Coefficients(torch.tensor(config.clip), torch.tensor(config.entropy_coef))
    distribution = MaskedCategorical(logits, legal)
    total, metrics = ppo_loss(distribution, values, predictions, targets, Totals.of(targets), coefficients, config)
    assert not metrics.requires_grad
    return total, dict(zip(METRICS, metrics, strict=True))


def policy_loss(policy: Tamiyo, batch: Minibatch, config: PPOConfig) -> Loss:
    logits, values, predictions = policy.predict(batch.graph)
    return loss_of(logits, values, batch.targets, config, batch.graph.action_mask, predictions)


def targets_of(
    actions: list[int],
    log_probs: Tensor,
    advantages: list[float],
    returns: list[float],
    values: list[float] | None = None,
    auxiliary: list[list[float]] | None = None,
    known: list[list[bool]] | None = None,
) -> Targets:
    count = len(actions)
    return Targets(
        torch.tensor(actions), log_probs, torch.tensor(values or [0.0] * count), torch.tensor(advantages),
        torch.tensor(returns), torch.tensor(auxiliary or [[]] * count), torch.tensor(known or [[]] * count).bool(),
    )  # fmt: skip


# ---- by hand ---------------------------------------------------------------------------------------------------------

RATIOS = [1.0, 1.5, 1.5, 0.5, 0.5, 1.1]
ADVANTAGES = [2.0, 2.0, -2.0, 2.0, -2.0, 3.0]


def hand_case(**settings: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Six transitions with a policy of (1/2, 1/4, 1/4), action 0, and old probabilities that make those ratios: the
    logits, the loss and its metrics."""
    logits = torch.tensor([[2.0, 1.0, 1.0]]).log().repeat(6, 1).requires_grad_()
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    targets = targets_of([0] * 6, (0.5 / torch.tensor(RATIOS)).log(), ADVANTAGES, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    config = PPOConfig(
        **{"clip": 0.2, "entropy_coef": 0.1, "value_coef": 0.25, "normalize_advantages": False, **settings}
    )
    total, metrics = loss_of(logits, values, targets, config)
    return logits, total, {name: float(value) for name, value in metrics.items()}


def test_the_loss_by_hand() -> None:
    _, total, metrics = hand_case()
    # min(r A, clip(r) A): 2, min(3, 2.4) = 2.4, min(-3, -2.4) = -3, min(1, 1.6) = 1, min(-1, -1.6) = -1.6, 3.3.
    # Their sum is 4.1.
    assert metrics["policy_gradient_loss"] == pytest.approx(-4.1 / 6)
    # errors -1, 0, 1, 2, 3, 4: squares add up to 31
    assert metrics["value_loss"] == pytest.approx(0.5 * 31 / 6)
    # ln(2)/2 + 2 ln(4)/4 = 1.5 ln 2
    assert metrics["entropy_loss"] == pytest.approx(-1.5 * math.log(2))
    assert total.item() == pytest.approx(-4.1 / 6 + 0.25 * 0.5 * 31 / 6 - 0.1 * 1.5 * math.log(2))
    assert metrics["loss"] == total.item()
    assert metrics["auxiliary_loss"] == 0


def test_what_is_logged_by_hand() -> None:
    _, _, metrics = hand_case()
    # sum of (r - 1) = 0 + .5 + .5 - .5 - .5 + .1 = .1; sum of ln r = 2 ln 1.5 + 2 ln .5 + ln 1.1
    log_sum = 2 * math.log(1.5) + 2 * math.log(0.5) + math.log(1.1)
    assert metrics["approx_kl"] == pytest.approx((0.1 - log_sum) / 6, rel=1e-4)
    assert metrics["clip_fraction"] == pytest.approx(4 / 6)


def test_only_unclipped_transitions_move_the_policy() -> None:
    logits, loss, _ = hand_case(entropy_coef=0.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    # Where the clipped term is the smaller one, rows 1 and 4, the surrogate is constant. Elsewhere the derivative with
    # respect to the logit of the chosen action is -A r (1 - p) / 6 with p = 1/2.
    expected = [-a * r * 0.5 / 6 for a, r in zip(ADVANTAGES, RATIOS, strict=True)]
    expected[1] = expected[4] = 0.0
    assert gradient[:, 0].tolist() == pytest.approx(expected)
    assert gradient[:, 1].tolist() == pytest.approx([-value / 2 for value in expected])


def test_normalised_advantages_by_hand() -> None:
    _, _, metrics = hand_case(normalize_advantages=True)
    # mean 5/6, mean square (4 * 5 + 9) / 6 = 29/6, so variance 29/6 - 25/36 = 149/36
    std = math.sqrt(149) / 6
    total = 0.0
    for ratio, advantage in zip(RATIOS, ADVANTAGES, strict=True):
        a = (advantage - 5 / 6) / std
        total += min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
    assert metrics["policy_gradient_loss"] == pytest.approx(-total / 6, rel=1e-5)


def test_equal_advantages_are_normalised_to_nothing() -> None:
    logits = torch.zeros(3, 2, requires_grad=True)
    targets = targets_of([0, 1, 0], torch.full((3,), 0.5).log(), [4.0, 4.0, 4.0], [0.0, 0.0, 0.0])
    loss, metrics = loss_of(logits, torch.zeros(3), targets, PPOConfig())
    assert metrics["policy_gradient_loss"] == 0
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_batch_is_not_changed_by_normalising() -> None:
    targets = targets_of([0, 1], torch.tensor([0.5, 0.5]).log(), [1.0, 3.0], [0.0, 0.0])
    loss_of(torch.zeros(2, 2), torch.zeros(2), targets, PPOConfig())
    assert targets.advantages.tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("value", "error", "slope"),
    [
        # The old value is 1, the return 3, the value may move by 0.5.
        (1.2, 1.8**2, -1.8),  # within: (1.2 - 3)^2, and its slope
        (2.0, 1.5**2, 0.0),  # clipped at 1.5, which is further from 3: (1.5 - 3)^2, and nothing pulls any more
        (0.0, 9.0, -3.0),  # clipped at 0.5, but 0 itself is the larger error: (0 - 3)^2
        (4.0, 1.5**2, 0.0),  # clipped at 1.5 again, with an error above that of 4 itself
        (7.0, 16.0, 4.0),  # beyond it: (7 - 3)^2
    ],
)
def test_a_clipped_value_by_hand(value: float, error: float, slope: float) -> None:
    values = torch.tensor([value], requires_grad=True)
    targets = targets_of([0], torch.zeros(1), [0.0], [3.0], values=[1.0])
    config = PPOConfig(value_clip=0.5, value_coef=1.0, entropy_coef=0.0)
    loss, metrics = loss_of(torch.zeros(1, 1), values, targets, config)
    assert metrics["value_loss"] == pytest.approx(0.5 * error)
    assert torch.autograd.grad(loss, values)[0].item() == pytest.approx(slope)


def test_the_auxiliary_error_by_hand() -> None:
    predictions = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    targets = targets_of(
        [0, 0], torch.zeros(2), [0.0, 0.0], [0.0, 0.0],
        auxiliary=[[0.0, 5.0], [1.0, 9.0]], known=[[True, False], [True, False]],
    )  # fmt: skip
    config = PPOConfig(auxiliary_coef=0.5, entropy_coef=0.0)
    loss, metrics = loss_of(torch.zeros(2, 1), torch.zeros(2), targets, config, predictions=predictions)
    # The first column is known: (1 + 4) / 2, and its slopes 2 (p - t) / 2, weighted by 0.5.
    assert metrics["auxiliary_loss"] == 2.5
    assert loss.item() == 1.25
    assert torch.autograd.grad(loss, predictions)[0].tolist() == [[0.5, 0.0], [1.0, 0.0]]


def test_the_auxiliary_error_of_nothing_known_is_0() -> None:
    predictions = torch.ones(2, 2, requires_grad=True)
    targets = targets_of(
        [0, 0], torch.zeros(2), [0.0, 0.0], [0.0, 0.0],
        auxiliary=[[5.0, 5.0]] * 2, known=[[False, False]] * 2,
    )  # fmt: skip
    loss, metrics = loss_of(
        torch.zeros(2, 1), torch.zeros(2), targets, PPOConfig(auxiliary_coef=1.0), predictions=predictions
    )
    assert metrics["auxiliary_loss"] == 0
    assert not torch.autograd.grad(loss, predictions)[0].any()


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
    targets = targets_of(actions.tolist(), as_float[2], as_float[3].tolist(), as_float[4].tolist())
    _, metrics = loss_of(as_float[0], as_float[1], targets, config, torch.from_numpy(mask))
    expected = {
        "policy_gradient_loss": policy_gradient,
        "value_loss": value,
        "entropy_loss": -entropy,
        "loss": policy_gradient + 0.4 * value - 0.07 * entropy,
        "approx_kl": (ratio - 1 - np.log(ratio)).mean(),
        "clip_fraction": (np.abs(ratio - 1) > clip).mean(),
    }
    for name, number in expected.items():
        assert metrics[name].item() == pytest.approx(number, abs=1e-5), name


# ---- on real data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(collected: Callable[[], Rollout]) -> Minibatch:
    return next(collected().minibatches(2, torch.Generator().manual_seed(0)))


def step_of(policy: Tamiyo, **settings: Any) -> UpdateStep:
    config = PPOConfig(**settings)
    optimizer = torch.optim.SGD(policy.parameters(), config.lr, fused=True)
    scaler = LossScaler("fp32", optimizer, torch.device("cpu"))
    return UpdateStep(policy, scaler, config, CompileGuard("update step", "not asked for"))


def total_norm(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))


def test_before_the_first_step_the_ratio_is_1(
    make_policy: Callable[..., Tamiyo], collected: Callable[[], Rollout]
) -> None:
    for minibatch in collected().minibatches(3, torch.Generator().manual_seed(0)):
        _, metrics = policy_loss(make_policy(), minibatch, PPOConfig())
        assert abs(metrics["approx_kl"].item()) < 1e-6
        assert metrics["clip_fraction"].item() == 0
        distribution, values = make_policy().evaluate(minibatch.graph)
        actions, log_probs, old_values = minibatch.targets[:3]
        torch.testing.assert_close(distribution.log_prob(actions), log_probs, atol=1e-6, rtol=0)
        torch.testing.assert_close(values, old_values, atol=1e-5, rtol=1e-5)


def test_illegal_actions_get_no_gradient(make_policy: Callable[..., Tamiyo], batch: Minibatch) -> None:
    policy, mask = make_policy(), batch.graph.action_mask
    logits, values = (output.detach().requires_grad_() for output in policy(batch.graph))
    loss_of(logits, values, batch.targets, PPOConfig(entropy_coef=0.1), mask)[0].backward()
    assert logits.grad is not None
    assert (logits.grad[~mask] == 0).all()
    assert (logits.grad[mask.sum(1) > 1] != 0).any(1).all()


def test_a_step_returns_the_metrics_of_its_loss(make_policy: Callable[..., Tamiyo], batch: Minibatch) -> None:
    policy = make_policy()
    total, metrics = policy_loss(policy, batch, PPOConfig())
    row = step_of(policy)(batch)
    assert (row.shape, row.dtype, row.requires_grad) == ((len(METRICS) + 2,), torch.float32, False)
    for name, got in zip(METRICS, row, strict=False):
        assert torch.equal(got, metrics[name]), name
    assert row[0] == total.detach()
    assert row[-2] > 0
    assert row[-1] == 0


def test_the_gradient_is_clipped_and_its_own_norm_reported(
    make_policy: Callable[..., Tamiyo], batch: Minibatch
) -> None:
    policy = make_policy()
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    total, _ = policy_loss(policy, batch, PPOConfig())
    free = torch.autograd.grad(total, list(policy.parameters()), materialize_grads=True)
    norm = total_norm(list(free))
    assert norm > 0.1
    row = step_of(policy, max_grad_norm=0.05, lr=1.0)(batch)
    assert float(row[-2]) == pytest.approx(norm, rel=1e-4)
    # SGD with a rate of 1 moves by the clipped gradient itself: the free one scaled to a norm of 0.05.
    moved = [old - new.detach() for old, new in zip(before, policy.parameters(), strict=True)]
    assert total_norm(moved) == pytest.approx(0.05, rel=1e-3)
    for got, gradient in zip(moved, free, strict=True):
        torch.testing.assert_close(got, gradient * 0.05 / norm, atol=1e-6, rtol=1e-3)


def test_a_small_gradient_is_not_clipped(make_policy: Callable[..., Tamiyo], batch: Minibatch) -> None:
    policy = make_policy()
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    row = step_of(policy, max_grad_norm=1e6, lr=0.5)(batch)
    moved = [old - new.detach() for old, new in zip(before, policy.parameters(), strict=True)]
    assert total_norm(moved) == pytest.approx(0.5 * float(row[-2]), rel=1e-3)


def test_gradients_do_not_pile_up(make_policy: Callable[..., Tamiyo], batch: Minibatch) -> None:
    step = step_of(make_policy(), lr=1e-12)  # the policy stays where it is
    first, second = step(batch), step(batch)
    assert float(second[-2]) == pytest.approx(float(first[-2]), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_small_step_lowers_the_loss(
    make_policy: Callable[..., Tamiyo], collected: Callable[[], Rollout], seed: int
) -> None:
    policy = make_policy()
    batch = next(collected().minibatches(2, torch.Generator().manual_seed(seed)))
    config = PPOConfig(max_grad_norm=1e6, lr=1e-4)
    before, _ = policy_loss(policy, batch, config)
    row = step_of(policy, max_grad_norm=1e6, lr=1e-4)(batch)
    after, _ = policy_loss(policy, batch, config)
    # To first order the loss falls by lr * |gradient|^2.
    assert (before - after).item() == pytest.approx(config.lr * float(row[-2]) ** 2, rel=0.2)


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
        ({"value_clip": 0.0}, "ppo.value_clip=0"),
        ({"clip_final": -0.1}, "ppo.clip_final=-0.1"),
        ({"entropy_final": -1.0}, "ppo.entropy_final=-1"),
        ({"auxiliary_coef": -1.0}, "ppo.auxiliary_coef=-1"),
        ({"critic_first": -0.1}, "ppo.critic_first=-0.1"),
        ({"critic_first": 1.0}, "ppo.critic_first=1"),
        ({"desired_kl": 0.0}, "ppo.desired_kl=0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(settings: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        PPOConfig(**settings).validate()


def test_an_unknown_schedule_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"ppo\.lr_schedule=cosine: choose one of linear, adaptive, constant"):
        PPOConfig(lr_schedule="cosine").validate()


def test_settings_on_the_edge_pass() -> None:
    PPOConfig(gamma=0.0, gae_lambda=1.0, entropy_coef=0.0, value_coef=0.0, target_kl=0.01).validate()
    PPOConfig(entropy_final=0.0, clip_final=0.01, value_clip=0.01, lr_schedule="adaptive").validate()
    PPOConfig().validate()
