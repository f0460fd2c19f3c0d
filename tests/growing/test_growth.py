"""`esper.grow` in training loops: what it decides, what becomes of the network and its optimiser, and exact resume."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.growth.lifecycle import LifecycleSpec
from esper.runtime.errors import ConfigError, EsperError
from esper.tamiyo.baselines import usable

WHOLE_LIFE = [("GERMINATE", 1, 3), None, None, ("FOSSILIZE", 1, 0)]  # mlp; blends after an epoch, for one
QUICK = LifecycleSpec(auto_blend=1, auto_ramp=1)


def grown(loop: Any, policy: Any, epochs: int = 7, **settings: Any) -> Any:
    growth = esper.grow(loop.model, policy=policy, epochs=epochs, **{"lifecycle": QUICK, **settings})
    for _ in range(epochs):
        loop.train()
        growth.step(loop.validate, loop.optimizer)
    return growth


def test_the_five_lines(loop: Callable[..., Any]) -> None:
    """As the README has them, with the shipped policy."""
    own = loop()
    growth = esper.grow(own.model, slots="auto", policy="tamiyo_small", budget=esper.Budget(parameters=1.5))
    for _ in range(6):
        own.train()
        growth.step(validation_loss=own.validate(), optimizer=own.optimizer)
    growth.finish()
    report = growth.report()
    assert report.slots == ["1", "3", "5"]
    for decision in report.decisions:
        chances = [chance for _, chance in decision.candidates]
        assert chances == sorted(chances, reverse=True)
        assert 0 < sum(chances) <= 1 + 1e-6
        assert decision.action == decision.candidates[0][0]
        assert decision.value is not None
    assert "grown by tamiyo_small; slots: 1, 3, 5" in str(report)


@pytest.mark.parametrize("name", [name for name in usable("") if name != "random"])
def test_baselines_decide_by_name(loop: Callable[..., Any], name: str) -> None:
    own = loop()
    growth = grown(own, name, epochs=9)
    growth.finish()
    germinated = any("germinate" in decision.action for decision in growth.report().decisions)
    if name not in ("statistic", "gradient_norm", "plateau"):  # which wait for what may not come
        assert germinated == (name != "never")
    assert growth.report().decisions[-1].note == "the last epoch"


def test_a_whole_life_by_hand(loop: Callable[..., Any], scripted: Any) -> None:
    own = loop()
    host = sum(p.numel() for p in own.model.parameters())
    growth = grown(own, scripted(*WHOLE_LIFE))
    steps = growth.report().decisions
    assert [step.action for step in steps] == [
        "germinate mlp in 3",
        "wait",
        "wait",
        "fossilise 3",
        "wait",
        "wait",
        "wait",
    ]
    # What lived in the slot while each epoch's loss was measured: it blends by itself after an epoch, for one.
    assert [step.stages[1] for step in steps] == [0, 2, 3, 3, 4, 4, 4]
    assert [step.alphas[1] for step in steps] == [0, 0, 1, 1, 1, 1, 1]
    assert [step.blueprints[1] for step in steps] == [None] + 6 * ["mlp"]
    before = own.output()
    assert growth.finish() is own.model
    assert torch.equal(own.output(), before)
    now = sum(p.numel() for p in own.model.parameters())
    assert now == steps[-1].parameters > host
    assert growth.report().kept == ["mlp in 3"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in own.model.modules())
    # Its seed goes on learning.
    seed = own.model[3].seed
    weights = [p.clone() for p in seed.parameters()]
    own.train()
    assert not any(torch.equal(a, b) for a, b in zip(weights, seed.parameters(), strict=True))


def test_the_grown_network_is_an_ordinary_module(loop: Callable[..., Any], scripted: Any) -> None:
    own = loop()
    growth = grown(own, scripted(*WHOLE_LIFE))
    with pytest.raises(EsperError, match="call finish first"):
        growth.plan()
    growth.finish()
    right = own.output()
    for other in (copy.deepcopy(own.model), pickle.loads(pickle.dumps(own.model))):
        assert torch.equal(other(own.x[300:]), right)
    exported = torch.export.export(own.model, (own.x[:4],))
    torch.testing.assert_close(exported.module()(own.x[:4]), right_of(own, 4))
    compiled = torch.compile(own.model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(own.x[300:]), right)
    fresh = esper.regrow(loop(seed=5).model, json.loads(json.dumps(growth.plan())))
    fresh.load_state_dict(own.model.state_dict())
    assert torch.equal(fresh.eval()(own.x[300:]), right)
    with pytest.raises(ConfigError, match="plan: 3 is no submodule"):
        esper.regrow(nn.Linear(2, 2), growth.plan())


def right_of(own: Any, count: int) -> torch.Tensor:
    with torch.no_grad():
        return own.model(own.x[:count])


def test_finishing_takes_out_what_is_not_blended_in(loop: Callable[..., Any], scripted: Any) -> None:
    own, alone = loop(), loop()
    script = scripted(None, None, ("GERMINATE", 0, 3), ("GERMINATE", 2, 0))
    growth = grown(own, script, epochs=5, lifecycle=LifecycleSpec(auto_blend=None))
    for _ in range(5):
        alone.train()
    growth.finish()
    report = growth.report()
    assert report.kept == []
    assert report.removed == ["mlp in 1", "bypass in 5"]
    assert list(own.model.state_dict()) == list(alone.model.state_dict())
    assert len(own.optimizer.param_groups[0]["params"]) == len(list(alone.model.parameters()))
    assert "removed, since they were not blended in" in str(report)
    # The seeds learnt on a detached input, so that the host never noticed them ... but for the gradient they changed.
    assert torch.isfinite(own.output()).all()


def test_never_leaves_the_training_as_it_is(loop: Callable[..., Any]) -> None:
    """Hooks, tracing and evaluations change no number, also with dropout."""

    def model() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))

    own, alone = loop(model()), loop(model())
    growth = esper.grow(own.model, policy="never", epochs=4)
    torch.manual_seed(1)
    for _ in range(4):
        own.train()
        growth.step(own.validate(), own.optimizer)
    growth.finish()
    torch.manual_seed(1)
    for _ in range(4):
        alone.train()
    for a, b in zip(own.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- what it may cost ------------------------------------------------------------------------------------------------


def test_the_budget_is_kept(loop: Callable[..., Any]) -> None:
    for budget in (esper.Budget(parameters=1.1), esper.Budget(parameters=None, seeds=2)):
        own = loop()
        host = sum(p.numel() for p in own.model.parameters())
        growth = grown(own, "all_at_start", epochs=8, budget=budget, blueprints=["mlp", "low_rank"])
        growth.finish()
        now = sum(p.numel() for p in own.model.parameters())
        if budget.parameters is None:
            assert len(growth.report().kept) == 2
        else:
            assert now <= 1.1 * host


# ---- optimisers ------------------------------------------------------------------------------------------------------


def test_schedulers_go_on_and_seeds_follow_the_group_of_their_layer(loop: Callable[..., Any], scripted: Any) -> None:
    own = loop()
    slow, fast = list(own.model[:2].parameters()), list(own.model[2:].parameters())
    own.optimizer = torch.optim.AdamW([{"params": slow, "lr": 1e-4}, {"params": fast, "lr": 3e-3}], weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(own.optimizer, 7)
    script = scripted(("GERMINATE", 0, 3), ("GERMINATE", 1, 3))
    growth = esper.grow(own.model, policy=script, budget=esper.Budget(parameters=None), epochs=7, lifecycle=QUICK)
    for _ in range(7):
        own.train()
        growth.step(own.validate, own.optimizer)
        rate = own.optimizer.param_groups[0]["lr"]
        assert float(growth.host.context.learning_rate) == pytest.approx(rate)
        schedule.step()
    assert [len(group["params"]) for group in own.optimizer.param_groups] == [len(slow) + 4, len(fast) + 4]
    growth.finish()
    assert sum(len(group["params"]) for group in own.optimizer.param_groups) == len(list(own.model.parameters()))


@pytest.mark.parametrize("kind", ["sgd", "momentum"])
def test_statistics_without_running_means(loop: Callable[..., Any], scripted: Any, kind: str) -> None:
    """Also where gradients are gone by the time of the step."""
    momentum = 0.9 if kind == "momentum" else 0.0
    own = loop(optimizer=torch.optim.SGD, lr=0.1, momentum=momentum)
    growth = esper.grow(own.model, policy=scripted(("GERMINATE", 1, 3)), epochs=5)
    for _ in range(3):
        own.train()
        own.optimizer.zero_grad()
        growth.step(own.validate, own.optimizer)
    statistics = growth.host.statistics
    for name in ("layer_gradient_rms", "layer_update_rms", "layer_weight_rms"):
        assert (getattr(statistics, name) > 0).all(), name
    assert statistics.seed_gradient_rms[0, 1] > 0


def test_another_optimiser_is_refused(loop: Callable[..., Any]) -> None:
    own = loop()
    growth, second = esper.grow(own.model, policy="never"), esper.grow(own.model, policy="never")
    own.train()
    with pytest.raises(ConfigError, match="optimizer: has none of the model's parameters"):
        second.step(1.0, torch.optim.Adam([nn.Parameter(torch.ones(1))]))
    growth.step(own.validate(), own.optimizer)
    with pytest.raises(ConfigError, match="another one than in the steps before"):
        growth.step(own.validate(), torch.optim.Adam(own.model.parameters()))


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_contributions_are_measured_with_a_function_and_unknown_without(
    loop: Callable[..., Any], scripted: Any
) -> None:
    for measured in (True, False):
        own = loop()
        growth = esper.grow(own.model, policy=scripted(*WHOLE_LIFE[:1]), epochs=7, lifecycle=QUICK)
        for _ in range(4):
            own.train()
            growth.step(own.validate if measured else own.validate(), own.optimizer)
        statistics = growth.host.statistics
        assert statistics.contribution_known[0].tolist() == [False, measured, False]
        if measured:
            loss = own.validate()
            growth.host.grafts[1].set(0.0, False)
            assert float(statistics.contribution[0, 1]) == pytest.approx(own.validate() - loss, abs=1e-6)


def test_other_losses_are_measured_by_what_a_guess_loses(loop: Callable[..., Any]) -> None:
    """Of a loss a thousand times as large, the controller sees the same."""
    seen = []
    for scale in (1.0, 1000.0):
        own = loop()
        growth = esper.grow(
            own.model, epochs=8, trivial_loss=None if scale == 1 else scale * torch.log(torch.tensor(10.0))
        )
        for _ in range(3):
            train = own.train()
            growth.step(scale * own.validate(), own.optimizer, train_loss=scale * train)
        assert growth.report().decisions[0].validation_loss == pytest.approx(scale * 2.3, rel=0.1)
        seen.append(growth._observer().pack().x)
    torch.testing.assert_close(*seen, rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_changes_nothing(loop: Callable[..., Any]) -> None:
    own = loop()
    growth = esper.grow(own.model, policy="all_at_start", epochs=5)
    own.train()
    assert growth.step(float("nan"), own.optimizer).note == "the validation loss is not finite"
    own.train()
    assert "germinate" in growth.step(own.validate(), own.optimizer).action


# ---- use -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "tamyo"}, r"policy=tamyo: no such file .*\(tamiyo_small\); baselines are .*gradmax"),
        ({"epochs": 1}, "epochs=1: must be at least 2"),
        ({"blueprints": ["mpl"]}, r"blueprints=\['mpl'\]: choose auto, or some of attention, bypass"),
        ({"trivial_loss": 0.0}, "trivial_loss=0.0: must be above 0"),
        ({"slots": ["9"]}, "slots: '9' is no submodule"),
    ],
)
def test_what_does_not_fit_is_named(loop: Callable[..., Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        esper.grow(loop().model, **settings)


def test_steps_out_of_order_are_refused(loop: Callable[..., Any]) -> None:
    own = loop()
    growth = esper.grow(own.model, policy="never", epochs=3)
    with pytest.raises(ConfigError, match="has not been called since"):
        growth.step(1.0, own.optimizer)
    with pytest.raises(EsperError, match="nothing to report yet"):
        growth.report()
    for expected in ("", "", "the last epoch", "after the 3 epochs it was told of"):
        own.train()
        assert growth.step(own.validate(), own.optimizer).note == expected
    growth.finish()
    growth.finish()
    with pytest.raises(EsperError, match="growing has finished"):
        growth.step(1.0, own.optimizer)
    untouched = esper.grow(own.model)
    assert untouched.finish() is own.model
    assert untouched.plan() == []


def test_the_chart_is_drawn(loop: Callable[..., Any], scripted: Any, tmp_path: Any) -> None:
    growth = grown(loop(), scripted(*WHOLE_LIFE))
    growth.report().chart(tmp_path / "life.png", "a life")
    assert (tmp_path / "life.png").stat().st_size > 5000


# ---- exact resume ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["tamiyo_small", "probe", "periodic", "random", "script"])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_saved_and_restored_it_goes_on_as_if_nothing_had_happened(
    loop: Callable[..., Any], scripted: Any, policy: str, stop: int, tmp_path: Any
) -> None:
    script = [("GERMINATE", 2, 3), ("GERMINATE", 0, 0), None, ("CULL", 2, 0), None, ("FOSSILIZE", 0, 0)]

    def start() -> tuple[Any, Any]:
        own = loop()
        given = scripted(*script) if policy == "script" else policy
        return own, esper.grow(own.model, policy=given, epochs=8, lifecycle=QUICK)

    def go(own: Any, growth: Any, epochs: int) -> None:
        for _ in range(epochs):
            own.train()
            growth.step(own.validate, own.optimizer)

    one, growth = start()
    go(one, growth, stop)
    saved = {"model": one.model.state_dict(), "growth": growth.state_dict(), "optimizer": one.optimizer.state_dict()}
    torch.save(saved, tmp_path / "saved.pt")
    go(one, growth, 8 - stop)

    other, again = start()
    other.epochs = stop
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    other.model.load_state_dict(saved["model"])
    again.load_state_dict(saved["growth"], other.optimizer)
    other.optimizer.load_state_dict(saved["optimizer"])
    go(other, again, 8 - stop)
    assert growth.report().to_dict() == again.report().to_dict()
    for own, each in ((one, growth), (other, again)):
        each.finish()
        assert len(own.optimizer.param_groups[0]["params"]) == len(list(own.model.parameters()))
    assert torch.equal(one.output(), other.output())
