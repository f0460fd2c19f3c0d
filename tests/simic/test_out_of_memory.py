"""Memory that does not suffice for a minibatch: its halves give the same step, and nothing else is taken for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from esper.runtime.errors import TrainingError
from esper.simic.learner import Simic
from esper.simic.rollout import Rollout
from esper.tamiyo.policy import GraphPolicy

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    MemoryError(),
]


def scarce(most: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory for `most` graphs at once; returns the sizes of the batches that have been tried."""
    honest, sizes = GraphPolicy.predict, []

    def predict(self: GraphPolicy, graph: Any) -> Any:
        sizes.append(len(graph))
        if len(graph) > most:
            raise error
        return honest(self, graph)

    monkeypatch.setattr(GraphPolicy, "predict", predict)
    return sizes


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("auxiliary", [0.0, 0.1])
def test_halves_give_the_gradients_of_the_whole(
    make_learner: Callable[..., Simic], collected: Callable[..., Rollout], precision: str, auxiliary: float
) -> None:
    learner = make_learner(precision=precision, auxiliary_coef=auxiliary)
    batch = next(collected(learner).minibatches(1, torch.Generator().manual_seed(0)))
    step, policy = learner.update_step, learner.policy

    def gradients(form: Callable[..., Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        metrics = form(batch)
        return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}, metrics

    (whole, metrics), (halves, same_metrics) = gradients(step._eager), gradients(step._in_halves)
    assert whole.keys() == halves.keys()
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for name in whole:
        error = (whole[name] - halves[name]).norm()
        assert error <= tolerance * whole[name].norm() + 1e-7 * learner.scaler.scale, name
    torch.testing.assert_close(metrics, same_metrics, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
def test_minibatches_are_halved_once_and_it_is_said(
    make_learner: Callable[..., Simic],
    collected: Callable[..., Rollout],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    plenty, little = make_learner(), make_learner()
    plenty.update(collected(plenty), 0.0)
    rollout = collected(little)  # 40 transitions in minibatches of 20
    sizes = scarce(10, error, monkeypatch)
    metrics = little.update(rollout, 0.0)
    assert sizes.count(20) == 1  # later minibatches are halved at once
    assert set(sizes) == {20, 10}
    assert [record.message for record in caplog.records if "memory" in record.message] == [
        "out of memory in the update: minibatches are halved from now on, their gradients are added up"
    ]
    assert metrics["skipped"] == 0
    for (name, a), b in zip(plenty.policy.named_parameters(), little.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_halves_that_do_not_fit_either(
    make_learner: Callable[..., Simic], collected: Callable[..., Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner()
    rollout = collected(learner)
    before = [p.clone() for p in learner.policy.parameters()]
    scarce(9, ERRORS[0], monkeypatch)
    with pytest.raises(TrainingError, match=r"out of memory.*raise ppo.minibatches, which is 2"):
        learner.update(rollout, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.parameters(), strict=True))


def test_other_errors_are_raised(
    make_learner: Callable[..., Simic], collected: Callable[..., Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner()
    rollout = collected(learner)
    scarce(9, RuntimeError("shapes do not match"), monkeypatch)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        learner.update(rollout, 0.0)
    assert not learner.update_step.halved


def test_one_transition_cannot_be_halved(make_learner: Callable[..., Simic], collected: Callable[..., Rollout]) -> None:
    learner = make_learner(normalize_advantages=False)
    batch = next(collected(learner).minibatches(40, torch.Generator().manual_seed(0)))
    learner.update_step.halved = True
    assert learner.update_step(batch).isfinite().all()
