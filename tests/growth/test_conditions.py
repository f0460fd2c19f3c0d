import math

import pytest
import torch

from esper.growth.conditions import (
    DECOYS,
    DEFECTS,
    NEVER,
    STRIKES,
    Condition,
    activations,
    initial_scale,
    kept_at_start,
)

INF = math.inf
HALFWAY = {  # low, high, leak, shift at a severity of 1/2
    Condition.HEALTHY: (0, INF, 0, 0),
    Condition.CHOKE: (0, INF, 0, 0),
    Condition.SATURATED: (-0.02, 0.02, 0.01, 0),
    Condition.DYING: (0, INF, 0, -4.5),
    Condition.LARGE_INIT: (0, INF, 0, 0),
    Condition.SMALL_INIT: (0, INF, 0, 0),
    Condition.HALF: (0, INF, 0, 0),
    Condition.HARDTANH: (-1, 1, 0, 0),
    Condition.SPARSE: (0, INF, 0, 0),
    Condition.LINEAR: (-INF, INF, 0, 0),
}
TASKS = ["mlp", "grid", "causal"]


def close(a, b, rtol=1e-4, atol=2e-6):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def one(kind, severity=0.5, width=6, depth=1):
    condition, severities = torch.full((1, 2), int(kind)), torch.full((1, 2), float(severity))
    return activations(condition, severities, torch.tensor([width]), torch.tensor([depth]), 8)


def test_every_condition_is_healthy_a_defect_or_a_decoy():
    assert sorted([Condition.HEALTHY, *DEFECTS, *DECOYS]) == list(Condition)
    assert set(STRIKES) <= set(DEFECTS)
    assert not {Condition.LARGE_INIT, Condition.SMALL_INIT} & set(STRIKES)  # these are over by then


@pytest.mark.parametrize("kind", Condition, ids=lambda c: c.name)
def test_settings_by_hand(kind):
    at = one(kind)
    got = [float(getattr(at, name)[0, 0]) for name in ("low", "high", "leak", "shift")]
    assert got == pytest.approx(HALFWAY[kind])
    assert at.used[0] == (kind == Condition.SATURATED, kind == Condition.DYING, False)


@pytest.mark.parametrize(
    ("kind", "mild", "bad"),
    [(Condition.SATURATED, 0.03, 0.01), (Condition.DYING, -3.0, -6.0)],
    ids=lambda x: getattr(x, "name", None),
)
def test_severity_goes_from_mild_to_bad(kind, mild, bad):
    name = "high" if kind == Condition.SATURATED else "shift"
    values = [float(getattr(one(kind, s), name)[0, 0]) for s in (0.0, 0.25, 1.0)]
    assert values == pytest.approx([mild, mild + (bad - mild) / 4, bad])


@pytest.mark.parametrize(
    ("kind", "severity", "width", "left"),
    [
        (Condition.CHOKE, 0.0, 6, 4),
        (Condition.CHOKE, 0.32, 6, 4),
        (Condition.CHOKE, 0.34, 6, 3),
        (Condition.CHOKE, 0.65, 6, 3),
        (Condition.CHOKE, 0.67, 6, 2),
        (Condition.CHOKE, 0.99, 6, 2),
        (Condition.CHOKE, 0.0, 3, 3),  # no more than there are
        (Condition.HALF, 0.0, 6, 3),
        (Condition.HALF, 0.9, 5, 3),
        (Condition.HEALTHY, 0.5, 6, 6),
        (Condition.LINEAR, 0.5, 8, 8),
        (Condition.SATURATED, 0.5, 5, 5),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_units_that_are_left(kind, severity, width, left):
    assert one(kind, severity, width).units[0, 0].tolist() == [1.0] * left + [0.0] * (8 - left)


def test_a_missing_stage_passes_its_input_on():
    at = one(Condition.CHOKE, depth=1)
    assert at.skip.tolist() == [[0.0, 1.0]]
    assert not at.units[0, 1].any()
    assert at.used == [(False, False, False), (False, False, True)]
    assert at.stage(0).skip is None
    assert at.stage(1).skip.tolist() == [[[1.0]]]


def test_what_nobody_has_is_left_out_stage_by_stage():
    condition = torch.tensor([[0, Condition.SATURATED], [Condition.DYING, 0]])
    at = activations(condition, torch.zeros(2, 2), torch.tensor([3, 4]), torch.tensor([2, 2]), 4)
    assert at.used == [(False, True, False), (True, False, False)]
    first, second = at.stage(0), at.stage(1)
    assert first.leak is second.shift is first.skip is second.skip is None
    assert first.shift.flatten().tolist() == [0, -3]
    assert second.leak.flatten().tolist() == pytest.approx([0.01, 0])
    assert first.units.shape == (2, 1, 4)
    mixed = activations(condition, torch.zeros(2, 2), torch.tensor([3, 4]), torch.tensor([2, 1]), 4)
    assert mixed.used == [(False, True, False), (True, False, True)]
    assert mixed.stage(1).skip.flatten().tolist() == [0, 1]
    doubled = at.map(lambda value: 2 * value)
    assert torch.equal(doubled.units, 2 * at.units)
    assert torch.equal(doubled.skip, 2 * at.skip)
    assert doubled.used == at.used


@pytest.mark.parametrize("kind", Condition, ids=lambda c: c.name)
def test_initial_scale_by_hand(kind):
    severity = torch.tensor([[0.0, 0.5]])
    expected = {Condition.LARGE_INIT: [6.0, 11.0], Condition.SMALL_INIT: [0.05, 0.03]}.get(kind, [1.0, 1.0])
    close(initial_scale(torch.full((1, 2), int(kind)), severity), torch.tensor([expected]))


def test_sparse_keeps_two_fifths():
    draws = torch.linspace(0, 0.999, 1000)
    kept = kept_at_start(torch.full((1000,), int(Condition.SPARSE)), draws)
    assert int(kept.sum()) == pytest.approx(400, abs=2)
    assert kept_at_start(torch.zeros(1000), draws).all()


# ---- hosts in a condition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", Condition, ids=lambda c: c.name)
def test_a_host_in_a_condition_is_the_one_in_plain_torch(toy, task, kind):
    context = toy.context([11, 12], 6, 3)
    toy.condition(context, 0, 1, kind, 0.4)
    toy.condition(context, 0, 2, kind, 0.9)
    toy.condition(context, 1, 0, kind, 0.0)
    p = toy.population([11, 12], task, width=6, context=context)
    toy.hold(p, 0, 1, "bypass")
    slow = [toy.SlowHost(p, k) for k in range(2)]
    for _ in range(2):
        for host in slow:
            host.epoch()
        p.train_epoch()
    for k, host in enumerate(slow):
        close(p.theta[k], host.flat(), atol=5e-5)
        close(float(p.statistics.train_loss[k]), host.loss, rtol=1e-4)
        close(float(p.validation_loss[k]), host.validation_loss([0, 1 - k, 0]), rtol=1e-4)


def started(toy, kind, task="mlp"):
    """The layers of a host whose second stage starts in a condition, and of a healthy one with the same key."""
    layers = []
    for condition in (kind, Condition.HEALTHY):
        context = toy.condition(toy.context([11], 8, 3), 0, 1, condition, 0.5)
        p = toy.population([11], task, width=8, context=context)
        layers.append([value[0] for value in p.table.views(p.theta)])
    return layers


@pytest.mark.parametrize("task", ["mlp", "grid"])
@pytest.mark.parametrize("kind", Condition, ids=lambda c: c.name)
def test_how_a_host_in_a_condition_starts(toy, kind, task):
    odd, healthy = started(toy, kind, task)
    for number, (a, b) in enumerate(zip(odd, healthy, strict=True)):
        if number != 4:  # the second stage's weight; its bias is number 5
            assert torch.equal(a, b)
    a, b = odd[4], healthy[4]
    if kind == Condition.SPARSE:
        share = float((a == 0).float().mean())
        assert abs(share - 0.6) < 4 * (0.6 * 0.4 / a.numel()) ** 0.5
        assert torch.equal(a[a != 0], b[a != 0])
    else:
        close(a, b * {Condition.LARGE_INIT: 11.0, Condition.SMALL_INIT: 0.03}.get(kind, 1.0), rtol=1e-6)


# ---- strikes ------------------------------------------------------------------------------------------------------


def test_the_condition_of_each_epoch(toy):
    context = toy.condition(toy.context([11, 12]), 0, 1, Condition.HALF, 0.25)
    toy.strike(context, 0, 1, Condition.CHOKE, 3, 0.75)
    p = toy.population([11, 12], context=context)
    for epoch, expected in ((0, (6, 0.25)), (2, (6, 0.25)), (3, (1, 0.75)), (9, (1, 0.75))):
        condition, severity = p.conditions(p.context, torch.tensor([epoch, epoch]))
        assert (int(condition[0, 1]), float(severity[0, 1])) == expected
        condition[0, 1] = 0
        assert not condition.any()


@pytest.mark.parametrize("kind", STRIKES, ids=lambda c: c.name)
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_strike_changes_training_from_its_epoch_on(toy, kind, epoch):
    calm = toy.population([11], width=6)
    struck = toy.population([11], width=6, context=toy.strike(toy.context([11], 6), 0, 1, kind, epoch))
    for number in range(5):
        if number == epoch:
            # The evaluation before shows the host as it is now.
            assert not torch.equal(calm.validation_loss, struck.validation_loss)
        calm.train_epoch()
        struck.train_epoch()
        assert torch.equal(calm.theta, struck.theta) == (number < epoch)
        assert torch.equal(calm.validation_loss, struck.validation_loss) == (number + 1 < epoch)


@pytest.mark.parametrize("task", TASKS)
def test_a_struck_host_is_the_one_in_plain_torch(toy, task):
    context = toy.context([11, 12, 13], 6, 3)
    for row, kind in enumerate(STRIKES):
        toy.condition(context, row, 0, Condition.HARDTANH)
        toy.strike(context, row, 0, kind, 1, 0.9)
        toy.strike(context, row, 2, kind, 2, 0.1)
    p = toy.population([11, 12, 13], task, width=6, context=context)
    slow = [toy.SlowHost(p, k) for k in range(3)]
    for _ in range(4):
        for host in slow:
            host.epoch()
        p.train_epoch()
        for k, host in enumerate(slow):
            close(p.theta[k], host.flat(), atol=1e-4)
            close(float(p.validation_loss[k]), host.validation_loss([0, 0, 0]), rtol=1e-4)


def test_never_is_beyond_every_horizon():
    assert torch.tensor(NEVER).dtype == torch.int64
    assert NEVER > 1 << 31
