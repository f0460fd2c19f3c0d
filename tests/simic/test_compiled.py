"""The compiled update step: the same as the eager one, one program for all of a run, and safe to lose."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.runtime.precision import LossScaler
from esper.simic.learner import Simic
from esper.simic.rollout import Minibatch, Rollout, Targets, Totals
from esper.tamiyo.actor import Actor

Pair = Callable[..., tuple[Actor, Simic]]
Collected = Callable[..., Rollout]


def weights(learner: Simic) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in learner.policy.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- the same as the eager one ---------------------------------------------------------------------------------------


def after_ten_steps(learner: Simic, rollout: Rollout, optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], Tensor]:
    """Parameters and metrics; the clip and the entropy bonus change after five steps."""
    step, rows = learner.update_step, []
    step.scaler = LossScaler("fp32", optimizer, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for number in range(2):
        step.coefficients.clip.fill_((0.2, 0.05)[number])
        step.coefficients.entropy.fill_((0.003, 0.5)[number])
        rows += [step(batch) for batch in rollout.minibatches(5, generator)]
    return weights(learner), torch.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_compiled_and_eager_updates_agree(pair: Pair, collected: Collected, name: str) -> None:
    results = []
    for compiled in (False, True):
        _, learner = pair("fp32", compiled)
        rollout, scaler = collected(learner), learner.update_step.scaler
        if compiled and not learner.guard.warm:
            learner.update_step.warm_up(next(rollout.minibatches(5, torch.Generator())))
        # Adam divides by the size of a gradient: where that is next to nothing, so is what rounding leaves of it. An
        # eps far above the rounding error keeps such parameters from moving by a whole lr in either direction.
        make: Any = {"SGD": lambda p: torch.optim.SGD(p, 0.05, fused=True),
                     "Adam": lambda p: torch.optim.Adam(p, 1e-3, eps=1e-3, fused=True)}[name]  # fmt: skip
        runs = learner.guard.runs
        try:
            results.append(after_ten_steps(learner, rollout, make(list(learner.policy.parameters()))))
        finally:
            learner.update_step.scaler = scaler
        assert learner.guard.runs - runs == (10 if compiled else 0)
        assert learner.guard.recompiles == 0
    (eager, rows), (got, compiled_rows) = results
    torch.testing.assert_close(compiled_rows, rows, atol=1e-5, rtol=1e-4)
    moved = 0.0
    for a, b, start in zip(eager, got, weights(pair("fp32")[1]), strict=True):
        assert (a - b).abs().max() <= 1e-6 * a.abs().max()
        moved = max(moved, float((a - start).abs().max()))
    assert moved > 1e-3


@pytest.mark.slow
def test_minibatches_of_other_sizes_share_a_program(pair: Pair, collected: Collected) -> None:
    (_, learner), (_, eager) = pair("fp32", True), pair("fp32", False)
    rollout = collected(learner)
    if not learner.guard.warm:
        learner._warm_up(rollout)
    runs = learner.guard.runs
    graph, targets, _ = next(rollout.minibatches(1, torch.Generator().manual_seed(0)))
    # On CPUs Inductor unrolls products with fewer than 33 numbers, such as the gradient of a head 8 wide for 24 graphs,
    # and more graphs are another program. Policies wider than 30 have no such limit.
    for size in (20, 5, 19, 24, 8):
        part = Targets(*(column[:size] for column in targets))
        batch = Minibatch(graph[:size], part, Totals.of(part))
        torch.testing.assert_close(learner.update_step(batch), eager.update_step(batch), atol=1e-4, rtol=1e-3)
    assert (learner.guard.runs - runs, learner.guard.recompiles) == (5, 0)


@pytest.mark.slow
def test_schedules_compile_nothing_anew_and_act(pair: Pair, collected: Collected) -> None:
    _, learner = pair("fp32", True)
    rollout = collected(learner)
    learner.update(rollout, 0.0)
    before = weights(learner)
    metrics = learner.update(rollout, 0.9)
    assert metrics["learning_rate"] == pytest.approx(1e-4)
    assert learner.guard.recompiles == 0
    # Adam moves no parameter by much more than the learning rate in each of the four steps.
    moved = max(float((a - b).abs().max()) for a, b in zip(before, weights(learner), strict=True))
    assert 1e-4 < moved < 4 * 3e-4


@pytest.mark.slow
def test_the_warm_up_changes_nothing(make_learner: Callable[..., Simic], pair: Pair, collected: Collected) -> None:
    _, learner = pair("fp32", True)
    before, generator = weights(learner), learner.generator.get_state()
    learner._warm_up(collected(learner))
    assert equal(weights(learner), before)
    assert all(parameter.grad is None for parameter in learner.policy.parameters())
    assert not learner.optimizer.state
    assert torch.equal(learner.generator.get_state(), generator)
    assert learner.guard.warm_ms > 0


# ---- falling back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "when"), [(1, "at its first run"), (4, "at run time")])
def test_a_failing_compiled_step_is_replaced_by_the_eager_one(
    make_learner: Callable[..., Simic], collected: Collected, failing_guard: Callable[..., Any],
    caplog: pytest.LogCaptureFixture, at: int, when: str,
) -> None:  # fmt: skip
    guard = failing_guard("update step", at)
    broken, eager = make_learner(guard=guard), make_learner()
    with caplog.at_level(logging.WARNING):
        results = [broken.update(collected(), progress) for progress in (0.0, 0.5)]
    assert results == [eager.update(collected(), progress) for progress in (0.0, 0.5)]
    assert equal(weights(broken), weights(eager))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"the compiled update step failed, it runs eagerly from now on (error {when}" in record.getMessage()
    assert "RuntimeError: the compiler is not well" in record.getMessage()
    assert (guard.fallback_total, guard.calls) == (1, at)


def test_a_gradient_of_a_failed_compiled_step_does_not_count_twice(
    make_learner: Callable[..., Simic], collected: Collected, failing_guard: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    broken, eager = make_learner(guard=failing_guard("update step", 1000)), make_learner()
    rollout = collected()
    broken.update_step.warm_up(next(rollout.minibatches(2, torch.Generator())))
    original = broken.update_step._differentiated

    def late(*arguments: Any) -> Any:
        original(*arguments)
        raise RuntimeError("too late")

    monkeypatch.setattr(broken.update_step, "_differentiated", late)
    assert broken.update(copy.deepcopy(rollout), 0.0) == eager.update(rollout, 0.0)
    assert broken.guard.fallback_total == 1


def test_what_the_eager_step_raises_too_is_raised(
    make_learner: Callable[..., Simic], collected: Collected, failing_guard: Callable[..., Any]
) -> None:
    learner = make_learner(guard=failing_guard("update step", 1))
    rollout = collected()
    rollout._targets = rollout._targets._replace(actions=rollout._targets.actions + 1000)  # no such actions
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        learner.update(rollout, 0.0)
    assert learner.guard.fallback_total == 0
    assert learner.guard.enabled
