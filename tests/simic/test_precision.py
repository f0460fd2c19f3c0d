"""Number formats in training: the actor and the update agree, all is trained, and overflow costs one step."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.simic.learner import Simic
from esper.simic.rollout import Minibatch, Rollout
from esper.simic.update import METRICS
from esper.tamiyo.actor import Actor

Pair = Callable[..., tuple[Actor, Simic]]
Collect = Callable[[Actor], tuple[Rollout, Tensor]]

FORMATS = ["fp32", "bf16", "fp16"]
CHOICES = [False, pytest.param(True, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def first_minibatch(pair: Pair, collect: Collect) -> Callable[..., Minibatch]:
    """`first_minibatch(precision, compiled, backend)`: of what that actor has collected."""

    def make(*choice: Any) -> Minibatch:
        actor, learner = pair(*choice)
        rollout, last = collect(actor)
        learner.finish(rollout, last)
        return next(iter(rollout.minibatches(2, torch.Generator().manual_seed(0))))

    return make


def step_on(learner: Simic, batch: Minibatch) -> dict[str, float]:
    if not learner.guard.warm:
        learner.update_step.warm_up(batch)
    return dict(zip((*METRICS, "grad_norm", "skipped"), learner.update_step(batch).tolist(), strict=True))


def snapshot(learner: Simic) -> list[Tensor]:
    """The parameters, and Adam's moments and steps."""
    states = [state for _, state in sorted(learner.optimizer.state_dict()["state"].items())]
    moments = [value.clone() for state in states for value in state.values()]
    return [parameter.detach().clone() for parameter in learner.policy.parameters()] + moments


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- actor and update agree ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled_update", CHOICES)
@pytest.mark.parametrize("compiled_actor", CHOICES)
@pytest.mark.parametrize("precision", FORMATS)
def test_before_the_first_step_the_ratio_is_1(
    pair: Pair, first_minibatch: Callable[..., Minibatch], precision: str, compiled_actor: bool, compiled_update: bool
) -> None:
    batch = first_minibatch(precision, compiled_actor)
    actor, learner = pair(precision, compiled_actor)[0], pair(precision, compiled_update)[1]
    metrics = step_on(learner, batch)
    # Compiled code adds up in another order, which half precision shows.
    mixed = precision != "fp32" and compiled_actor != compiled_update
    assert abs(metrics["approx_kl"]) < (1e-4 if mixed else 1e-6)
    assert metrics["clip_fraction"] == 0
    assert (actor.guard.runs > 0, learner.guard.runs > 0) == (compiled_actor, compiled_update)


@pytest.mark.parametrize("backend", ["pyg", "segment", "dense"])
@pytest.mark.parametrize("precision", FORMATS)
def test_before_the_first_step_the_ratio_is_1_under_every_backend(
    pair: Pair, first_minibatch: Callable[..., Minibatch], precision: str, backend: str
) -> None:
    # Unlike `native` these run the encoder itself in half precision.
    metrics = step_on(pair(precision, False, backend)[1], first_minibatch(precision, False, backend))
    assert abs(metrics["approx_kl"]) < (1e-6 if precision == "fp32" else 1e-4)
    assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize("precision", FORMATS)
def test_the_actor_and_the_update_run_in_the_format_that_was_asked_for(
    pair: Pair, collect: Collect, precision: str
) -> None:
    (actor, learner), (reference, _) = pair(precision, False, "dense"), pair("fp32", False, "dense")
    graph = collect(reference)[0].graphs[3]
    differs = not torch.equal(actor.value(graph), reference.value(graph))
    assert differs == (precision != "fp32")
    assert learner.policy.predict(graph)[1].detach().equal(actor.value(graph))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["native", "dense"])
@pytest.mark.parametrize("precision", FORMATS)
def test_what_is_compiled_runs_in_the_same_format(pair: Pair, collect: Collect, precision: str, backend: str) -> None:
    actor, learner = pair(precision, False, backend)
    graph = collect(actor)[0].graphs[3]
    packed, policy = graph.pack(), learner.policy
    function = policy.of_tensors(packed.layout)
    assert function is not None
    got, expected = function(packed.x, packed.attr, packed.mask, packed.node_mask), policy.predict(graph)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


# ---- all is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", CHOICES)
@pytest.mark.parametrize("precision", FORMATS)
def test_every_parameter_gets_a_gradient(
    pair: Pair, first_minibatch: Callable[..., Minibatch], precision: str, compiled: bool
) -> None:
    batch = first_minibatch(precision)
    _, learner = pair(precision, compiled)
    metrics = step_on(learner, batch)
    assert metrics["skipped"] == 0
    assert metrics["auxiliary_loss"] > 0
    for name, parameter in learner.policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    grouped = {parameter for group in learner.optimizer.param_groups for parameter in group["params"]}
    assert grouped == set(learner.policy.parameters())


@pytest.mark.parametrize("backend", ["pyg", "segment", "dense", "native"])
def test_half_precision_has_the_gradients_of_fp32(
    pair: Pair, first_minibatch: Callable[..., Minibatch], backend: str
) -> None:
    # fp16 keeps 11 bits and its loss is scaled: without the unscaling it would be 65,536 times as large.
    batch = first_minibatch("fp32", False, backend)
    whole = {}
    for precision in ("fp32", "fp16", "bf16"):
        _, learner = pair(precision, False, backend)
        step_on(learner, batch)
        whole[precision] = torch.cat([p.grad.flatten() for p in learner.policy.parameters() if p.grad is not None])
    for precision, tolerance in (("fp16", 0.02), ("bf16", 0.1)):
        error = (whole[precision] - whole["fp32"]).norm() / whole["fp32"].norm()
        assert error < tolerance, precision


# ---- overflow --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", CHOICES)
def test_one_infinite_gradient_in_fp16_skips_exactly_one_step(
    pair: Pair, first_minibatch: Callable[..., Minibatch], compiled: bool
) -> None:
    batch = first_minibatch("fp16")
    actor, learner = pair("fp16", compiled)
    step_on(learner, batch)
    before, scale = snapshot(learner), learner.scaler.scale
    value = actor.value(batch.graph).clone()
    hook = learner.policy.wait.bias.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    assert step_on(learner, batch)["skipped"] == 1
    assert equal(snapshot(learner), before)
    assert learner.scaler.scale == scale / 2
    assert torch.equal(actor.value(batch.graph), value)
    hook.remove()
    metrics = step_on(learner, batch)
    assert metrics["skipped"] == 0
    assert 0 < metrics["grad_norm"] < torch.inf
    assert learner.scaler.scale == scale / 2
    after = snapshot(learner)
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True) if b.numel() > 1 and b.any())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_infinite_gradient_skips_exactly_one_step_without_a_scale(
    pair: Pair, first_minibatch: Callable[..., Minibatch], precision: str
) -> None:
    batch = first_minibatch(precision)
    _, learner = pair(precision)
    step_on(learner, batch)
    before = snapshot(learner)
    hook = learner.policy.wait.bias.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    assert step_on(learner, batch)["skipped"] == 1
    assert equal(snapshot(learner), before)
    hook.remove()
    assert step_on(learner, batch)["skipped"] == 0
    assert not equal(snapshot(learner), before)
    assert learner.scaler.scale == 1


def test_overflow_while_the_scale_is_found_does_not_end_training(pair: Pair, collect: Collect) -> None:
    actor, learner = pair("fp16")
    rollout, last = collect(actor)
    learner.finish(rollout, last)
    # Gradients near 0.4 overflow at a scale of 2^30, as long as it is above 65,504 / 0.4 or so.
    learner.scaler.scaler.load_state_dict({**learner.scaler.scaler.state_dict(), "scale": 2.0**40})
    for _ in range(8):
        learner.update(rollout, 0.0)
    assert learner.skipped_total > 3
    assert learner.failed is None
    assert learner.update(rollout, 0.0)["skipped"] == 0


# ---- resume ----------------------------------------------------------------------------------------------------------


def test_a_resumed_learner_has_the_scale_and_goes_on_bit_for_bit(
    pair: Pair, make_learner: Callable[..., Simic], collect: Collect
) -> None:
    actor, learner = pair("fp16")
    rollout, last = collect(actor)
    learner.finish(rollout, last)
    hook = learner.policy.wait.bias.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    learner.update(rollout, 0.0)
    hook.remove()
    learner.update(rollout, 0.0)
    state = copy.deepcopy(learner.state_dict())
    resumed = make_learner(7, "fp16", auxiliary_coef=0.1)
    resumed.load_state_dict(state)
    assert resumed.scaler.scale == learner.scaler.scale == 2.0**16 / 16  # four steps were skipped
    assert resumed.skipped_total == 4
    assert resumed.update(rollout, 0.3) == learner.update(rollout, 0.3)
    assert equal(snapshot(resumed), snapshot(learner))
