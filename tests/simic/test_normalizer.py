"""The running mean and standard deviation of returns, against NumPy over all returns at once."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from esper.simic.gae import gae
from esper.simic.learner import Simic
from esper.simic.rollout import ReturnNormalizer, Rollout
from esper.tamiyo.actor import Actor
from esper.tamiyo.policy import Tamiyo


def learned(*parts: torch.Tensor) -> ReturnNormalizer:
    normalizer = ReturnNormalizer()
    for part in parts:
        normalizer.learn(part)
    return normalizer


def test_by_hand() -> None:
    normalizer = learned(torch.tensor([1.0, 3.0]), torch.tensor([[8.0]]))
    # mean 4, variance (9 + 1 + 16) / 3 = 26/3
    std = math.sqrt(26 / 3)
    assert normalizer.normalized(torch.tensor([4.0, 8.0])).tolist() == pytest.approx([0.0, 4 / std])
    assert normalizer.restored(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([4.0, 4 + std])


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_it_is_that_of_all_returns_joined(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [offset + k + (k + 1) * torch.randn(7 * k + 3, 4, generator=generator) for k in range(6)]
    every = np.concatenate([part.numpy().astype(np.float64).ravel() for part in parts])
    normalizer = learned(*parts)
    zero, one = normalizer.restored(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    assert zero == pytest.approx(every.mean(), rel=1e-6)
    assert one - zero == pytest.approx(every.std(), rel=1e-5)


def test_before_any_return_it_changes_nothing() -> None:
    values = torch.tensor([-2.0, 0.5])
    assert ReturnNormalizer().normalized(values).tolist() == pytest.approx([-2.0, 0.5])
    assert ReturnNormalizer().restored(values).tolist() == pytest.approx([-2.0, 0.5])


def test_equal_returns_stay_finite() -> None:
    assert learned(torch.full((9,), 3.0)).normalized(torch.tensor([3.0])).tolist() == [0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_returns_that_are_not_finite_leave_no_mark(bad: float) -> None:
    fine = torch.tensor([1.0, 3.0, 8.0])
    normalizer = learned(fine, torch.tensor([2.0, bad]))
    assert torch.equal(normalizer.normalized(fine), learned(fine).normalized(fine))


def test_it_can_be_saved_and_restored() -> None:
    one, other = learned(torch.tensor([1.0, 3.0])), learned(torch.tensor([100.0]))
    state = one.state_dict()
    other.load_state_dict(state)
    for normalizer in (one, other):
        normalizer.learn(torch.tensor([8.0]))
    assert torch.equal(one.state_dict()["moments"], other.state_dict()["moments"])
    assert not torch.equal(state["moments"], one.state_dict()["moments"])


# ---- in training -----------------------------------------------------------------------------------------------------


def test_advantages_are_of_restored_values_and_the_critic_learns_normalised_returns(
    make_policy: Callable[..., Tamiyo], make_learner: Callable[..., Simic], collect: Callable[..., Any]
) -> None:
    learner = make_learner(normalize_returns=True, gamma=0.9, gae_lambda=0.8)
    assert learner.normalizer is not None
    learner.normalizer.learn(torch.tensor([10.0, 14.0]))  # mean 12, standard deviation 2
    rollout, last = collect(Actor(make_policy()))
    rollout.truncated[2, 1], rollout.final_values[2, 1] = True, 0.5
    plain = rollout.values.clone()
    learner.finish(rollout, last)
    values, final = 2 * plain + 12, torch.full((10, 4), 2 * 0.5 + 12)
    advantages, returns = gae(
        rollout.rewards, values, rollout.terminated, rollout.truncated, final, 2 * last + 12, 0.9, 0.8
    )
    torch.testing.assert_close(rollout.advantages, advantages, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rollout.returns, returns, atol=1e-5, rtol=1e-5)
    # By the time that the critic reads them the returns count themselves: the scale is that of all 42.
    every = np.concatenate([[10.0, 14.0], returns.numpy().astype(np.float64).ravel()])
    (batch,) = rollout.minibatches(1, torch.Generator())
    wanted = batch.targets.returns.sort().values
    expected = np.sort((returns.numpy().ravel() - every.mean()) / every.std())
    np.testing.assert_allclose(wanted.numpy(), expected, atol=1e-4)
    # The critic's own values stay as it gave them: that is what a clipped value is measured from.
    assert torch.equal(batch.targets.values.sort().values, plain.flatten().sort().values)
    residual = (returns - values).double().var() / returns.double().var()
    assert rollout.explained_variance() == pytest.approx(float(1 - residual), abs=1e-6)


def test_a_restored_learner_has_the_scale_of_returns(
    make_learner: Callable[..., Simic], collected: Callable[..., Rollout]
) -> None:
    learner, resumed = make_learner(normalize_returns=True), make_learner(5, normalize_returns=True)
    learner.update(collected(learner), 0.0)
    resumed.load_state_dict(copy.deepcopy(learner.state_dict()))
    for _ in range(2):
        metrics = [each.update(collected(each), 0.1) for each in (learner, resumed)]
        assert metrics[0] == metrics[1]


def test_it_can_be_left_out(make_learner: Callable[..., Simic], collected: Callable[..., Rollout]) -> None:
    learner = make_learner(gamma=0.99, gae_lambda=0.95, normalize_returns=False)
    assert learner.normalizer is None
    assert torch.equal(collected(learner).returns, collected().returns)
    assert learner.state_dict()["normalizer"] == {}
