"""The learner: schedules, early stop, honest means, exact replay, and that it learns at all."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from envs.config import load_config
from envs.growth_env import GrowthEnv
from esper.graph import GraphBatch
from esper.graph.schema import SCHEMA
from esper.growth.actions import Verb
from esper.simic.config import PPOConfig
from esper.simic.learner import Simic
from esper.simic.rollout import Minibatch, Rollout
from esper.simic.update import METRICS
from esper.tamiyo.actor import Actor
from esper.tamiyo.policy import PolicyConfig, Tamiyo

Learners = Callable[..., Simic]
Collected = Callable[..., Rollout]


class Recorder:
    """An update step that notes what it returns."""

    def __init__(self, learner: Simic):
        self.step, self.seen = learner.update_step, []
        self.coefficients, self.warm_up = self.step.coefficients, self.step.warm_up

    def __call__(self, batch: Minibatch) -> torch.Tensor:
        row = self.step(batch)
        self.seen.append(dict(zip((*METRICS, "grad_norm", "skipped"), row.tolist(), strict=True)))
        return row


def recorded(learner: Simic) -> list[dict[str, float]]:
    """A list into which the learner's update step writes what it returns from now on."""
    learner.update_step = recorder = Recorder(learner)  # type: ignore[assignment]
    return recorder.seen


def weights(learner: Simic) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in learner.policy.parameters()]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- what an update reports ------------------------------------------------------------------------------------------


def test_the_metrics_are_means_over_all_minibatches(make_learner: Learners, collected: Collected) -> None:
    learner = make_learner(lr=0.01, epochs=3, minibatches=4)
    seen = recorded(learner)
    metrics = learner.update(collected(), 0.0)
    assert len(seen) == 12
    for name in (*METRICS, "grad_norm"):
        assert metrics[name] == pytest.approx(sum(step[name] for step in seen) / 12, abs=1e-6), name
    # The last one alone, or the last pass alone, would be something else.
    assert metrics["loss"] != pytest.approx(seen[-1]["loss"], abs=1e-4)
    assert metrics["approx_kl"] != pytest.approx(sum(step["approx_kl"] for step in seen[-4:]) / 4, abs=1e-6)


def test_the_explained_variance_is_the_rollouts(make_learner: Learners, collected: Collected) -> None:
    rollout = collected()
    assert make_learner().update(rollout, 0.0)["explained_variance"] == rollout.explained_variance()


def test_the_metrics_are_plain_finite_numbers(make_learner: Learners, collected: Collected) -> None:
    metrics = make_learner().update(collected(), 0.0)
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())


# ---- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.008), (0.25, 0.006), (0.5, 0.004), (0.999, 0.000008)])
def test_the_learning_rate_falls_linearly(
    make_learner: Learners, collected: Collected, progress: float, expected: float
) -> None:
    learner = make_learner(lr=0.008)
    metrics = learner.update(collected(), progress)
    assert metrics["learning_rate"] == pytest.approx(expected)
    assert [float(group["lr"]) for group in learner.optimizer.param_groups] == [pytest.approx(expected)]


def test_the_learning_rate_starts_anew_from_the_setting(make_learner: Learners, collected: Collected) -> None:
    # Not 0.5 * 0.5 of it: the schedule is a function of progress alone.
    learner = make_learner(lr=0.008)
    learner.update(collected(), 0.5)
    assert learner.update(collected(), 0.5)["learning_rate"] == pytest.approx(0.004)


def test_the_learning_rate_can_stay(make_learner: Learners, collected: Collected) -> None:
    metrics = make_learner(lr=0.008, lr_schedule="constant").update(collected(), 0.75)
    assert metrics["learning_rate"] == pytest.approx(0.008)


def test_the_step_uses_the_annealed_rate(make_learner: Learners, collected: Collected) -> None:
    # Adam's first step is lr * sign(gradient) nearly everywhere, so its size follows the rate.
    moved = []
    for progress in (0.0, 0.75):
        learner = make_learner(lr=1e-3, epochs=1, minibatches=1)
        before = weights(learner)
        learner.update(collected(), progress)
        moved.append(sum(float((a - b).abs().sum()) for a, b in zip(before, weights(learner), strict=True)))
    assert moved[1] / moved[0] == pytest.approx(0.25, rel=0.02)


# ---- early stop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "passes"), [(None, 3), (1e9, 3), (1e-12, 1)])
def test_the_target_kl_ends_an_update_after_a_pass(
    make_learner: Learners, collected: Collected, target: float | None, passes: int
) -> None:
    learner = make_learner(lr=0.02, epochs=3, minibatches=2, target_kl=target)
    seen = recorded(learner)
    learner.update(collected(), 0.0)
    assert len(seen) == 2 * passes


def test_the_target_kl_is_compared_with_the_mean_of_the_last_pass(make_learner: Learners, collected: Collected) -> None:
    settings = {"lr": 0.001, "minibatches": 3}
    free = make_learner(**settings, epochs=3)
    seen = recorded(free)
    free.update(collected(), 0.0)
    means = [sum(step["approx_kl"] for step in seen[k : k + 3]) / 3 for k in range(0, 9, 3)]
    target = (means[1] + means[2]) / 2
    assert means[0] < means[1] < target < means[2]
    # A mean over all passes so far would be below the target after the third one.
    assert sum(means[:3]) / 3 < target
    stopped = make_learner(**settings, epochs=4, target_kl=target)
    taken = recorded(stopped)
    stopped.update(collected(), 0.0)
    assert len(taken) == 9


# ---- errors ----------------------------------------------------------------------------------------------------------


def unmoved(learner: Simic, before: list[torch.Tensor]) -> bool:
    """Whether no step has touched the policy or Adam."""
    return equal(weights(learner), before) and not any(
        state["step"] or state["exp_avg"].any() or state["exp_avg_sq"].any()
        for state in learner.optimizer.state.values()
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_bad_reward_is_skipped_counted_and_after_three_steps_ends_training(
    make_learner: Learners, collected: Collected, bad: float, precision: str
) -> None:
    learner = make_learner(precision=precision, epochs=1, minibatches=2)
    rollout, before = collected(), weights(learner)
    rollout.rewards[3, 1] = bad
    rollout.finish(torch.zeros(4), 0.99, 0.95)
    metrics = learner.update(rollout, 0.0)
    assert metrics["skipped"] == learner.skipped_total == 2
    assert learner.failed is None
    learner.update(rollout, 0.0)
    assert learner.skipped_total == 4
    assert learner.failed is not None
    assert "3 steps in a row" in learner.failed
    assert unmoved(learner, before)


def test_a_bad_advantage_is_skipped(make_learner: Learners, collected: Collected) -> None:
    learner = make_learner(normalize_advantages=False, epochs=1, minibatches=4)
    rollout = collected()
    rollout._targets.advantages[0] = math.nan
    # Only one of the four minibatches has it; the means are those of the other three.
    seen = recorded(learner)
    metrics = learner.update(rollout, 0.0)
    assert metrics["skipped"] == 1
    assert learner.failed is None
    taken = [step for step in seen if not step["skipped"]]
    assert len(taken) == 3
    assert metrics["loss"] == pytest.approx(sum(step["loss"] for step in taken) / 3, rel=1e-5)


def test_three_skipped_steps_with_one_taken_between_do_not_end_training(
    make_learner: Learners, collected: Collected
) -> None:
    learner = make_learner(epochs=1, minibatches=1)
    bad = collected()
    bad._targets.returns[0] = math.nan
    for rollout in (bad, bad, collected(), bad, bad):
        learner.update(rollout, 0.0)
    assert learner.skipped_total == 4
    assert learner.failed is None


def test_steps_skipped_before_a_stop_count_after_it(make_learner: Learners, collected: Collected) -> None:
    first, second = make_learner(epochs=1, minibatches=1), make_learner(epochs=1, minibatches=1)
    bad = collected()
    bad._targets.returns[0] = math.nan
    first.update(bad, 0.0)
    first.update(bad, 0.0)
    second.load_state_dict(first.state_dict())
    assert second.failed is None
    second.update(bad, 0.0)
    assert second.failed is not None
    second.load_state_dict(first.state_dict())
    assert second.failed is None


def test_broken_weights_end_training(make_learner: Learners, collected: Collected) -> None:
    learner = make_learner()
    with torch.no_grad():
        next(learner.policy.parameters())[0, 0] = math.nan
    learner.update(collected(), 0.0)
    assert learner.failed is not None


# ---- replay ----------------------------------------------------------------------------------------------------------


def test_the_seed_fixes_an_update_bit_for_bit(make_learner: Learners, collected: Collected) -> None:
    learners = [make_learner(seed) for seed in (1, 1, 2)]
    metrics = [learner.update(collected(), 0.1) for learner in learners]
    one, two, other = (weights(learner) for learner in learners)
    assert equal(one, two)
    assert metrics[0] == metrics[1]
    assert not equal(one, other)


def test_a_second_update_is_in_another_order(make_learner: Learners, collected: Collected) -> None:
    learner = make_learner(lr=1e-12, epochs=1)
    seen = recorded(learner)
    learner.update(collected(), 0.0)
    learner.update(collected(), 0.0)
    assert seen[0]["loss"] != pytest.approx(seen[2]["loss"], abs=1e-5)


def test_a_restored_learner_goes_on_bit_for_bit(make_learner: Learners, collected: Collected) -> None:
    learner = make_learner(1)
    learner.update(collected(), 0.0)
    state = copy.deepcopy(learner.state_dict())
    resumed = make_learner(2)
    resumed.update(collected(), 0.7)  # whatever it was before must not matter
    resumed.load_state_dict(state)
    expected = [learner.update(collected(), progress) for progress in (0.1, 0.2)]
    assert [resumed.update(collected(), progress) for progress in (0.1, 0.2)] == expected
    assert equal(weights(resumed), weights(learner))


def test_the_state_is_safe_to_load(make_learner: Learners, collected: Collected, tmp_path: Any) -> None:
    learner = make_learner(1)
    learner.update(collected(), 0.0)
    torch.save(learner.state_dict(), tmp_path / "state.pt")
    resumed = make_learner(2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert equal(weights(resumed), weights(learner))
    assert learner.update(collected(), 0.1) == resumed.update(collected(), 0.1)


def test_every_parameter_is_trained(make_learner: Learners, collected: Collected) -> None:
    learner = make_learner(lr=0.01, auxiliary_coef=0.1)
    before = weights(learner)
    learner.update(collected(learner), 0.0)
    moved = {
        name: not torch.equal(old, new)
        for (name, new), old in zip(learner.policy.named_parameters(), before, strict=True)
    }
    # Attention over one edge has nothing to choose from (see tests/tamiyo/test_policy.py); the rest must move.
    still = [name for name, changed in moved.items() if not changed]
    scoring = ("att_src", "att_dst", "att_edge", "lin_dst.weight", "lin_edge.weight")
    assert all(name.endswith(scoring) for name in still)
    # Several edges into each node; what is the same for all of them counts only across the kink of LeakyReLU.
    several = [name for name in still if "fits" in name or "precedes" in name]
    assert not [name for name in several if not name.endswith(("att_dst", "lin_dst.weight"))]


@pytest.mark.parametrize(("progress", "alone"), [(0.0, True), (0.49, True), (0.5, False)])
def test_the_critic_learns_alone_at_first(
    make_learner: Learners, collected: Collected, progress: float, alone: bool
) -> None:
    learner = make_learner(lr=0.01, critic_first=0.5, auxiliary_coef=0.1)
    before = {name: value.clone() for name, value in learner.policy.named_parameters()}
    learner.update(collected(learner), progress)
    moved = {name for name, value in learner.policy.named_parameters() if not torch.equal(value, before[name])}
    assert {name for name in before if name.startswith("value.")} <= moved
    assert all(name.startswith("value.") for name in moved) == alone


# ---- learning --------------------------------------------------------------------------------------------------------


def with_random_blueprints(graph: GraphBatch, generator: torch.Generator) -> tuple[GraphBatch, torch.Tensor]:
    """The graphs with a random `log_flops` of each blueprint, and which blueprint has the largest."""
    x = {**graph.x, "blueprint": graph.x["blueprint"].clone()}
    feature = torch.randn(x["blueprint"].shape[:2], generator=generator)
    x["blueprint"][..., SCHEMA.feature("blueprint", "log_flops")] = feature
    return GraphBatch(x, graph.node_mask, graph.edges, graph.action_mask), feature.argmax(1)


@pytest.mark.slow
def test_a_contextual_bandit_is_learned() -> None:
    """Reward 1 for germinating the blueprint with the largest feature, in any slot; chance is 4 of 21."""
    hosts, steps = 64, 4
    env = GrowthEnv(load_config("segment", contexts="plain", host={"width": [4, 4], "stages": [4, 4]}), 1)
    base = env.reset(torch.arange(1))[[0] * hosts]
    verbs, _, choices = env.layout.table()
    torch.manual_seed(0)
    policy = Tamiyo(PolicyConfig(hidden=[16, 16, 16, 16], heads=2))
    learner = Simic(policy, PPOConfig(lr=0.01, epochs=4, minibatches=4, lr_schedule="constant"), 0)
    actor, generator = Actor(policy, 0), torch.Generator().manual_seed(0)
    over, going_on = torch.ones(hosts, dtype=torch.bool), torch.zeros(hosts, dtype=torch.bool)
    rollout, history = Rollout(steps, hosts), []
    for _ in range(20):
        rollout.clear()
        for _ in range(steps):
            graph, best = with_random_blueprints(base, generator)
            decision = actor(graph)
            right = (verbs[decision.actions] == Verb.GERMINATE) & (choices[decision.actions] == best)
            rollout.add(graph, *decision, right.float(), over, going_on)
        rollout.finish(torch.zeros(hosts), 1.0, 0.95)
        history.append(float(rollout.rewards.mean()))
        learner.update(rollout, 0.0)
        if history[-1] > 0.9:
            break
    assert history[0] < 0.4  # near chance at first
    fresh, best = with_random_blueprints(env.reset(torch.tensor([7]))[[0] * 256], generator)
    actions = Actor(policy, 1)(fresh).actions
    assert ((verbs[actions] == Verb.GERMINATE) & (choices[actions] == best)).float().mean() > 0.8
