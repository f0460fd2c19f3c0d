"""GAE against arithmetic by hand, against its definition as a sum, and at the ends of episodes."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper.simic.gae import gae

NO = [False, False, False]


def column(values: list[float]) -> Tensor:
    """[T, 1]"""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def one(
    terminated: list[bool] = NO, truncated: list[bool] = NO, final: float = 0.0, gamma: float = 0.9, lam: float = 0.5
) -> list[float]:
    """Advantages of three steps: rewards 1, 2, 3; values 0.5, 1, 2; V after the last step 4."""
    advantages, returns = gae(
        column([1, 2, 3]), column([0.5, 1, 2]), torch.tensor(terminated)[:, None], torch.tensor(truncated)[:, None],
        column([final] * 3), torch.tensor([4.0], dtype=torch.float64), gamma, lam,
    )  # fmt: skip
    assert torch.equal(returns, advantages + column([0.5, 1, 2]))
    return advantages[:, 0].tolist()


# ---- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        # deltas: 1 + .9 * 1 - .5 = 1.4; 2 + .9 * 2 - 1 = 2.8; 3 + .9 * 4 - 2 = 4.6
        (0.0, [1.4, 2.8, 4.6]),
        # A1 = 2.8 + .9 * 4.6 = 6.94; A0 = 1.4 + .9 * 6.94 = 7.646
        (1.0, [7.646, 6.94, 4.6]),
        # gamma lambda = .855: A1 = 2.8 + .855 * 4.6 = 6.733; A0 = 1.4 + .855 * 6.733 = 7.156715
        (0.95, [7.156715, 6.733, 4.6]),
    ],
)
def test_without_an_end(lam: float, expected: list[float]) -> None:
    assert one(lam=lam) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        # The second delta has no future: 2 - 1 = 1
        (0.0, [1.4, 1.0, 4.6]),
        # A0 = 1.4 + .9 * 1 = 2.3; A1 knows nothing of the last step
        (1.0, [2.3, 1.0, 4.6]),
        # A0 = 1.4 + .855 * 1 = 2.255
        (0.95, [2.255, 1.0, 4.6]),
    ],
)
def test_termination_in_the_middle(lam: float, expected: list[float]) -> None:
    assert one(terminated=[False, True, False], lam=lam) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        # V of the final observation is 7, not the 2 of the next episode's first: 2 + .9 * 7 - 1 = 7.3
        (0.0, [1.4, 7.3, 4.6]),
        # A0 = 1.4 + .9 * 7.3 = 7.97
        (1.0, [7.97, 7.3, 4.6]),
        # A0 = 1.4 + .855 * 7.3 = 7.6415
        (0.95, [7.6415, 7.3, 4.6]),
    ],
)
def test_truncation_in_the_middle(lam: float, expected: list[float]) -> None:
    assert one(truncated=[False, True, False], final=7.0, lam=lam) == pytest.approx(expected)


def test_an_end_at_the_last_step() -> None:
    # terminated: 3 - 2 = 1; truncated with V = 7: 3 + .9 * 7 - 2 = 7.3; V after it, 4, belongs to another episode
    assert one(terminated=[False, False, True])[2] == pytest.approx(1.0)
    assert one(truncated=[False, False, True], final=7.0)[2] == pytest.approx(7.3)


def test_termination_wins_over_truncation() -> None:
    both = [False, True, False]
    assert one(terminated=both, truncated=both, final=7.0) == one(terminated=both)


def test_final_values_are_read_only_where_truncated() -> None:
    # NaN would spread through any arithmetic.
    assert one(final=float("nan")) == one()
    assert one(terminated=[False, True, False], final=float("nan")) == one(terminated=[False, True, False])


# ---- by the definition ----------------------------------------------------------------------------------------------


def random_rollout(seed: int, steps: int = 7, hosts: int = 3, ends: float = 0.4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    kind = torch.rand(steps, hosts, generator=generator)
    return {
        "rewards": torch.randn(steps, hosts, generator=generator, dtype=torch.float64),
        "values": torch.randn(steps, hosts, generator=generator, dtype=torch.float64),
        "terminated": kind < ends / 2,
        "truncated": (kind >= ends / 2) & (kind < ends),
        "final_values": torch.randn(steps, hosts, generator=generator, dtype=torch.float64),
        "last_values": torch.randn(hosts, generator=generator, dtype=torch.float64),
    }


def definition(r: dict[str, Any], gamma: float, lam: float) -> Tensor:
    """Sum over l of (gamma lam)^l delta_{t+l} up to the end of the episode (arXiv 1506.02438, eq. 16)."""
    steps, hosts = r["rewards"].shape
    out = torch.zeros(steps, hosts, dtype=torch.float64)
    for n in range(hosts):
        for t in range(steps):
            for k in range(t, steps):
                if r["terminated"][k, n]:
                    following = 0.0
                elif r["truncated"][k, n]:
                    following = r["final_values"][k, n]
                else:
                    following = r["values"][k + 1, n] if k + 1 < steps else r["last_values"][n]
                delta = r["rewards"][k, n] + gamma * following - r["values"][k, n]
                out[t, n] += (gamma * lam) ** (k - t) * delta
                if r["terminated"][k, n] or r["truncated"][k, n]:
                    break
    return out


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    ends=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_the_definition(seed: int, gamma: float, lam: float, ends: float) -> None:
    rollout = random_rollout(seed, ends=ends)
    advantages, returns = gae(**rollout, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantages, definition(rollout, gamma, lam), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns, advantages + rollout["values"])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_without_discount_and_lambda_it_is_monte_carlo(seed: int) -> None:
    rollout = random_rollout(seed)
    rollout["truncated"][:] = False
    rollout["terminated"][-1] = True
    _, returns = gae(**rollout, gamma=1.0, lam=1.0)
    expected = torch.zeros_like(returns)
    for n in range(returns.shape[1]):
        total = 0.0
        for t in reversed(range(len(returns))):
            total = float(rollout["rewards"][t, n]) + (0.0 if rollout["terminated"][t, n] else total)
            expected[t, n] = total
    torch.testing.assert_close(returns, expected)


# ---- boundaries -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    boundary=st.integers(0, 6),
    truncated=st.booleans(),
    lam=st.sampled_from([0.5, 1.0]),
)
def test_nothing_leaks_over_the_end_of_an_episode(seed: int, boundary: int, truncated: bool, lam: float) -> None:
    rollout = random_rollout(seed, ends=0.2)
    rollout["truncated"][boundary, 0] = truncated
    rollout["terminated"][boundary, 0] = not truncated
    before, _ = gae(**rollout, gamma=0.99, lam=lam)
    for name in ("rewards", "values", "final_values"):
        rollout[name][boundary + 1 :, 0] += 100.0
    rollout["last_values"][0] += 100.0
    after, _ = gae(**rollout, gamma=0.99, lam=lam)
    assert torch.equal(before[: boundary + 1, 0], after[: boundary + 1, 0])
    assert torch.equal(before[:, 1:], after[:, 1:])  # nor over to other environments


def test_inputs_are_left_alone() -> None:
    rollout = random_rollout(0)
    before = {name: value.clone() for name, value in rollout.items()}
    gae(**rollout, gamma=0.9, lam=0.9)
    assert all(torch.equal(rollout[name], value) for name, value in before.items())


# ---- against Stable-Baselines3 ---------------------------------------------------------------------------------------


def hand_made(steps: int) -> dict[str, Tensor]:
    """Two environments that count: the first one terminates every third step, the second one is truncated every fourth.

    V of an observation is what the count says, so that bootstrapping from the wrong observation shows.
    """
    count, rows = torch.zeros(2), []
    for _ in range(steps):
        values, final = 0.3 * count + torch.tensor([1.0, 2.0]), torch.zeros(2)
        rewards = count + torch.tensor([0.5, -0.5])
        count = count + 1
        terminated, truncated = torch.tensor([count[0] == 3, False]), torch.tensor([False, count[1] == 4])
        final[1] = (0.3 * count[1] + 2) * truncated[1]
        rows.append((values, rewards, terminated, truncated, final))
        count = count.masked_fill(terminated | truncated, 0.0)
    names = ("values", "rewards", "terminated", "truncated", "final_values")
    columns = dict(zip(names, map(torch.stack, zip(*rows, strict=True)), strict=True))
    return {**columns, "last_values": 0.3 * count + torch.tensor([1.0, 2.0])}


@pytest.mark.parametrize("steps", [7, 12])  # in the middle of both episodes, and at an end of both
@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 1.0), (1.0, 0.5)])
def test_termination_and_truncation_are_those_of_stable_baselines3(steps: int, gamma: float, lam: float) -> None:
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    spaces = pytest.importorskip("gymnasium").spaces
    made = hand_made(steps)
    assert made["terminated"].any()
    assert made["truncated"].any()
    buffer = buffers.RolloutBuffer(steps, spaces.Discrete(2), spaces.Discrete(2), "cpu", lam, gamma, n_envs=2)
    start = np.ones(2)
    for t in range(steps):
        # As in its `collect_rollouts`: the value of a truncated episode's final observation is part of the reward.
        reward = made["rewards"][t] + gamma * made["final_values"][t] * made["truncated"][t]
        zeros = np.zeros((2, 1))
        buffer.add(zeros, zeros, reward.numpy(), start, made["values"][t], torch.zeros(2))
        start = (made["terminated"] | made["truncated"])[t].numpy().astype(np.float32)
    buffer.compute_returns_and_advantage(made["last_values"], start)
    advantages, returns = gae(**made, gamma=gamma, lam=lam)
    np.testing.assert_allclose(advantages.numpy(), buffer.advantages, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(returns.numpy(), buffer.returns, rtol=1e-5, atol=1e-5)
    # Were the one taken for the other, it would show.
    confused, _ = gae(
        **{**made, "terminated": made["truncated"], "truncated": made["terminated"]}, gamma=gamma, lam=lam
    )
    assert not np.allclose(confused.numpy(), buffer.advantages, atol=1e-2)
