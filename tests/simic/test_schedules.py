"""What changes while training goes on: clip, entropy bonus and learning rate; each by hand."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from esper.simic.learner import Simic
from esper.simic.rollout import Minibatch, Rollout
from esper.simic.update import METRICS

Learners = Callable[..., Simic]
Collected = Callable[..., Rollout]


def give_kl(learner: Simic, *passes: float) -> list[float]:
    """Makes the learner's update step report these mean KLs, one for each pass of two minibatches, and do nothing;
    returns a list of the learning rates that it sees."""
    rates: list[float] = []
    step = learner.update_step

    class Step:
        coefficients, warm_up = step.coefficients, step.warm_up

        def __call__(self, batch: Minibatch) -> torch.Tensor:
            number = len(rates)
            rates.append(float(learner.optimizer.param_groups[0]["lr"]))
            row = torch.zeros(len(METRICS) + 2)
            # The mean of both is that of the pass.
            row[METRICS.index("approx_kl")] = passes[number // 2] * (0.5, 1.5)[number % 2]
            return row

    learner.update_step = Step()  # type: ignore[assignment]
    return rates


# ---- clip and entropy bonus ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "progress", "clip", "entropy"),
    [
        ({}, 0.75, 0.2, 0.01),
        ({"clip_final": 0.1}, 0.0, 0.2, 0.01),
        ({"clip_final": 0.1}, 0.5, 0.15, 0.01),
        ({"clip_final": 0.1}, 1.0, 0.1, 0.01),
        ({"entropy_final": 0.0}, 0.25, 0.2, 0.0075),
        ({"entropy_final": 0.05, "clip_final": 0.4}, 0.5, 0.3, 0.03),
    ],
)
def test_clip_and_entropy_bonus_move_linearly(
    make_learner: Learners, collected: Collected, settings: dict[str, float], progress: float, clip: float,
    entropy: float,
) -> None:  # fmt: skip
    learner = make_learner(clip=0.2, entropy_coef=0.01, **settings)
    for _ in range(2):  # functions of progress alone
        learner.update(collected(), progress)
        coefficients = learner.update_step.coefficients
        assert [float(value) for value in coefficients] == pytest.approx([clip, entropy])


def test_the_loss_uses_what_the_schedules_give(make_learner: Learners, collected: Collected) -> None:
    # At the end of its schedule a learner is one that has had those settings from the start.
    settings: dict[str, Any] = {"lr": 0.01, "lr_schedule": "constant"}
    moving = make_learner(clip=0.2, entropy_coef=0.01, clip_final=0.01, entropy_final=0.5, **settings)
    fixed = make_learner(clip=0.01, entropy_coef=0.5, **settings)
    other = make_learner(clip=0.2, entropy_coef=0.5, **settings)
    metrics = [learner.update(collected(), 1.0) for learner in (moving, fixed, other)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)
    assert metrics[0]["clip_fraction"] > metrics[2]["clip_fraction"]


# ---- the adaptive learning rate --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (0.004, 1.5),  # below half of 0.01
        (0.006, 1.0),
        (0.019, 1.0),
        (0.021, 1 / 1.5),  # above twice 0.01
    ],
)
def test_the_adaptive_rate_follows_the_kl_of_each_pass(
    make_learner: Learners, collected: Collected, kl: float, factor: float
) -> None:
    learner = make_learner(lr=0.001, lr_schedule="adaptive", desired_kl=0.01, epochs=3)
    rates = give_kl(learner, kl, kl, kl)
    metrics = learner.update(collected(), 0.9)  # progress does not matter
    expected = [0.001 * factor**k for k in (0, 0, 1, 1, 2, 2)]
    assert rates == pytest.approx(expected)
    assert metrics["learning_rate"] == pytest.approx(0.001 * factor**3)
    # The next update goes on from there.
    again = give_kl(learner, 0.01, 0.01, 0.01)
    learner.update(collected(), 0.95)
    assert again == pytest.approx([0.001 * factor**3] * 6)


@pytest.mark.parametrize(("lr", "kl", "bound"), [(8e-3, 0.0, 1e-2), (1.2e-6, 1.0, 1e-6)])
def test_the_adaptive_rate_has_bounds(
    make_learner: Learners, collected: Collected, lr: float, kl: float, bound: float
) -> None:
    learner = make_learner(lr=lr, lr_schedule="adaptive", epochs=2)
    give_kl(learner, kl, kl)
    assert learner.update(collected(), 0.0)["learning_rate"] == pytest.approx(bound)


def test_a_kl_that_is_no_number_leaves_the_adaptive_rate(make_learner: Learners, collected: Collected) -> None:
    learner = make_learner(lr=0.001, lr_schedule="adaptive", epochs=2)
    give_kl(learner, float("nan"), float("nan"))
    assert learner.update(collected(), 0.0)["learning_rate"] == pytest.approx(0.001)


def test_the_adaptive_rate_keeps_the_kl_of_real_updates_near_the_desired_one(
    make_learner: Learners, collected: Collected
) -> None:
    rates = {}
    for lr in (1e-5, 9e-3):
        learner = make_learner(lr=lr, lr_schedule="adaptive", desired_kl=0.003, epochs=4)
        rates[lr] = [learner.update(collected(), 0.0)["learning_rate"] for _ in range(3)]
    assert rates[1e-5][-1] > 1e-4
    assert rates[9e-3][-1] < 6e-3


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "adaptive"])
def test_a_restored_optimizer_reads_the_rate_that_the_schedule_writes(
    make_learner: Learners, collected: Collected, schedule: str
) -> None:
    settings: dict[str, Any] = {"lr": 1e-3, "lr_schedule": schedule, "desired_kl": 1e-9}
    learner = make_learner(1, **settings)
    learner.update(collected(), 0.2)
    state = copy.deepcopy(learner.state_dict())
    resumed = make_learner(2, **{**settings, "lr": 0.5})
    resumed.config.lr = 1e-3
    own = resumed.optimizer.param_groups[0]["lr"]
    resumed.load_state_dict(state)
    assert resumed.optimizer.param_groups[0]["lr"] is own
    assert own is not state["optimizer"]["param_groups"][0]["lr"]
    assert torch.equal(own, learner.optimizer.param_groups[0]["lr"])
    metrics = [each.update(collected(), 0.6) for each in (learner, resumed)]
    assert metrics[0] == metrics[1]
    # 1e-3 * 0.4; or four passes, each above twice the desired KL
    expected = 4e-4 if schedule == "linear" else 1e-3 / 1.5**4
    assert metrics[1]["learning_rate"] == pytest.approx(expected)
    for a, b in zip(learner.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(a, b)
