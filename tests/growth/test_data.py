"""What a host trains on and is asked for: its samples, their order, its labels, and shifts of the task."""

from dataclasses import replace

import pytest
import torch

from esper.growth.context import Context
from esper.growth.data import Data

KEYS = [11, 12, 13, 14, 15, 16, 17, 18]


def test_classes_and_devices(toy):
    data = toy.data("causal", classes=4)
    assert data.classes == 4
    moved = data.to("meta")
    assert {v.device.type for k, v in vars(moved).items() if k.endswith(("_x", "_y"))} == {"meta"}
    assert (moved.grid, moved.causal) == ((5,), True)


def noisy(toy, noise, task="mlp", size=300):
    n = len(noise)
    context = Context.plain(torch.arange(n) + 40, 4, 3)
    context.train_size[:], context.label_noise[:] = size, torch.tensor(noise)
    return toy.population([1] * n, data=toy.data(task, train=3000, classes=5), steps=2, context=context)


@pytest.mark.parametrize(("task", "tokens"), [("mlp", 1), ("causal", 5)])
def test_label_noise_redraws_its_share(toy, task, tokens):
    p, total = noisy(toy, [0.0, 0.3, 1.0], task), 3000 * tokens
    clean = p.data.train_y[p.subset]
    assert torch.equal(p.labels[0], clean[0])
    for host, noise in ((1, 0.3), (2, 1.0)):
        share = noise * 4 / 5  # a redrawn label is the old one once in 5 times
        changed = (p.labels[host] != clean[host]).double().mean()
        assert abs(changed - share) < 4 * (share * (1 - share) / total) ** 0.5
    counts = torch.bincount(p.labels[2].flatten(), minlength=5).double()
    assert ((counts - total / 5) ** 2 / (total / 5)).sum() < 24  # chi-square with 4 degrees: p = 1e-4


def test_labels_do_not_change_during_an_episode(toy):
    p = noisy(toy, [0.5])
    before = p.labels.clone(), p.subset.clone()
    p.train_epoch()
    assert torch.equal(p.labels, before[0])
    assert torch.equal(p.subset, before[1])


def test_subset_is_a_permutation_of_the_pool(toy):
    p = noisy(toy, [0.0, 0.3])
    assert torch.equal(p.subset.sort(1).values, torch.arange(3000).expand(2, -1))


def test_more_samples_than_there_are_is_all_of_them(toy):
    p = noisy(toy, [0.0], size=10_000)
    assert p.context.train_size.tolist() == [3000]


def test_an_epoch_walks_through_the_host_s_own_samples(toy):
    p = toy.population(KEYS[:5], steps=7)  # 56 draws from 20 to 48 samples
    orders = []
    for _ in range(3):
        order = p._epoch_order()
        orders.append(order)
        for host in range(5):
            size = int(p.context.train_size[host])
            flat = order[host].flatten()
            counts = torch.bincount(flat, minlength=size)
            assert len(counts) == size
            assert set(counts.tolist()) <= {56 // size, -(-56 // size)}
            assert torch.equal(flat[: 56 - size], flat[size:56])  # from its start again
        p.train_epoch()
    assert all(not torch.equal(orders[0][k], orders[1][k]) for k in range(5))
    assert all(not torch.equal(orders[1][k], orders[2][k]) for k in range(5))


def test_training_stays_within_the_host_s_samples(toy):
    clean = toy.population([11])
    size = int(clean.context.train_size)
    x = clean.data.train_x.clone()
    x[clean.subset[0, size:]] = float("nan")
    p = toy.population([11], data=replace(clean.data, train_x=x))
    toy.walk(clean, [11], 5)
    toy.walk(p, [11], 5)
    assert toy.differences(clean.state_dict(), p.state_dict()) == []


def test_the_last_of_the_host_s_samples_is_used(toy):
    clean = toy.population([11], steps=8)
    size = int(clean.context.train_size)
    x = clean.data.train_x.clone()
    x[clean.subset[0, size - 1]] = float("nan")
    p = toy.population([11], data=replace(clean.data, train_x=x), steps=8)
    p.train_epoch()
    assert p.theta.isnan().any()


def test_the_test_split_has_no_influence(toy):
    data = toy.data()
    wrong = replace(data, test_x=torch.full_like(data.test_x, float("nan")), test_y=torch.full_like(data.test_y, 7))
    a, b = (toy.population(KEYS[:3], data=d, mixed=True) for d in (data, wrong))
    for p in (a, b):
        toy.walk(p, KEYS[:3], 8)
        p.remove_unfinished(torch.ones(3, dtype=torch.bool))
    assert toy.differences(a.state_dict(), b.state_dict()) == []


def test_the_validation_split_does_not_train(toy):
    data = toy.data()
    other = replace(data, validation_x=data.validation_x * 3 + 1, validation_y=(data.validation_y + 1) % 3)
    a, b = (toy.population(KEYS[:3], data=d) for d in (data, other))
    for p in (a, b):
        toy.walk(p, KEYS[:3], 8)
    measured = ("/validation_loss", "/statistics/")
    assert all(name.startswith(measured) for name in toy.differences(a.state_dict(), b.state_dict()))
    assert not torch.isclose(a.validation_loss, b.validation_loss).any()


# ---- new classes --------------------------------------------------------------------------------------------------


def incremental(toy, keys, first, epoch=2, classes=6, train=200, noise=0.0, **kwargs):
    context = toy.context(keys)
    context.train_size[:], context.label_noise[:] = 150, noise
    context.shift_epoch[:] = torch.as_tensor(epoch)
    context.first_classes[:] = torch.as_tensor(first)
    data = toy.data(train=train, validation=100, classes=classes)
    return toy.population(keys, data=data, context=context, steps=20, **kwargs)


def used(p, host):
    """Positions in `subset` that the coming epoch of a host takes."""
    return set(p._epoch_order()[host].flatten().tolist())


def test_before_a_shift_only_the_first_classes_are_trained_on(toy):
    p = incremental(toy, KEYS, [1, 2, 3, 4, 5, 6, 1, 2])
    assert p.first.sum(1).tolist() == [1, 2, 3, 4, 5, 6, 1, 2]
    for number in range(4):
        for k in range(8):
            own = p.data.train_y[p.subset[k, :150]]
            early = p.first[k, own].nonzero().flatten().tolist()
            expected = early if number < 2 else range(150)
            taken = used(p, k)
            assert taken <= set(expected)
            assert len(taken) == min(160, len(expected))  # 20 steps of 8
        p.train_epoch()


def test_the_first_classes_are_the_host_s_own(toy):
    p = incremental(toy, [key + 100 for key in range(60)], 2)
    counts = p.first.sum(0)
    assert int(counts.sum()) == 120
    assert ((counts - 20).abs() < 16).all()  # a binomial of 60 with 1/3: four standard deviations


def test_a_shift_keeps_the_host_s_samples(toy):
    shifted, plain = incremental(toy, KEYS, 2), incremental(toy, KEYS, 2, epoch=1 << 40)
    for k in range(8):
        assert set(shifted.subset[k, :150].tolist()) == set(plain.subset[k, :150].tolist())
    assert torch.equal(shifted.subset.sort(1).values, torch.arange(200).expand(8, -1))
    assert (shifted.data.train_y[shifted.subset] == shifted.labels).all()


def test_before_a_shift_only_the_first_classes_are_validated(toy):
    p = incremental(toy, KEYS[:4], [1, 2, 3, 6], epoch=[1, 2, 3, 2])
    for number in range(4):
        for k in range(4):
            one = toy.SlowHost(p, k)
            expected = one.validation_loss([0, 0, 0])
            assert float(p.validation_loss[k]) == pytest.approx(expected, rel=1e-5)
            everything = one.validation_loss([0, 0, 0], epoch=3)
            unmet = k < 3 and number < [1, 2, 3][k]
            assert (abs(float(p.validation_loss[k]) - everything) > 1e-4) == unmet
        p.train_epoch()


def test_a_host_in_a_shift_is_the_one_in_plain_torch(toy):
    p = incremental(toy, KEYS[:3], [1, 2, 4], epoch=[1, 2, 3], noise=0.2)
    toy.hold(p, 0, 1, "mlp")
    slow = [toy.SlowHost(p, k) for k in range(3)]
    for _ in range(4):
        for one in slow:
            one.epoch()
        p.train_epoch()
        for k, one in enumerate(slow):
            torch.testing.assert_close(p.theta[k], one.flat(), rtol=1e-4, atol=2e-4)
            expected = one.validation_loss([0, float(k == 0), 0])
            assert float(p.validation_loss[k]) == pytest.approx(expected, rel=1e-4)


def test_contributions_count_only_the_classes_met(toy):
    p = incremental(toy, KEYS[:2], [1, 2], epoch=9)
    for k in range(2):
        toy.hold(p, k, 1, "mlp")
    p.train_epoch()
    for k in range(2):
        one = toy.SlowHost(p, k)
        one.sync()
        expected = one.validation_loss([0, 0, 0], samples=128) - one.validation_loss([0, 1, 0], samples=128)
        assert float(p.statistics.contribution[k, 1]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_host_without_a_shift_is_untouched_by_those_with_one(toy):
    """Whatever its other fields say."""
    keys, never = KEYS[:3], 1 << 40
    plain = toy.population(keys[:1], data=toy.data(train=200, validation=100, classes=6), steps=20)
    alone = incremental(toy, keys[:1], [2], epoch=[never])
    beside = incremental(toy, keys, [2, 2, 3], epoch=[never, 1, 3])
    for p in (alone, beside):
        assert used(p, 0) == set(range(150))
        p.train_epoch()
    assert torch.equal(plain.subset[0], alone.subset[0])
    assert toy.differences(alone.state_dict(), beside.state_dict(), (0, 0)) == []


def test_labels_per_token_know_no_new_classes(toy):
    context = toy.context(KEYS[:2])
    context.shift_epoch[:], context.first_classes[:] = 2, 1
    a, b = toy.population(KEYS[:2], "causal", context=context), toy.population(KEYS[:2], "causal")
    for p in (a, b):
        toy.walk(p, KEYS[:2], 3)
    ignored = ("/first", "/context")
    assert [n for n in toy.differences(a.state_dict(), b.state_dict()) if not n.startswith(ignored)] == []


# ---- flipped signs ------------------------------------------------------------------------------------------------


def flipped(toy, share, epoch, task="mlp", data=None, n=3):
    context = toy.context(KEYS[:n])
    context.shift_epoch[:], context.flipped[:] = epoch, share
    return toy.population(KEYS[:n], task, data=data, context=context)


def test_a_share_of_the_signs_flips(toy):
    p = flipped(toy, 0.3, 2, data=toy.data(inputs=2000))
    assert set(p.signs.unique().tolist()) == {-1.0, 1.0}
    share = (p.signs < 0).double().mean(1)
    assert ((share - 0.3).abs() < 4 * (0.21 / 2000) ** 0.5).all()
    assert not torch.equal(p.signs[0], p.signs[1])
    assert flipped(toy, 0.0, 2).gain() is None
    assert (flipped(toy, 1.0, 2).signs == -1).all()


@pytest.mark.parametrize("task", ["mlp", "grid", "causal"])
def test_flipped_inputs_are_flipped_in_every_split(toy, task):
    """The same as on data with those signs from the shift on, and as without before."""
    data = toy.data(task, inputs=6)
    p, plain = flipped(toy, 0.5, 2, data=data, n=1), toy.population(KEYS[:1], data=data)
    assert len(p.signs.unique()) == 2
    for _ in range(2):
        p.train_epoch()
        plain.train_epoch()
        assert torch.equal(p.theta, plain.theta)
    x = {name: value * p.signs[0] for name, value in vars(p.data).items() if name.endswith("_x")}
    plain.data = Data(**{**vars(plain.data), **x})
    for _ in range(2):
        plain._evaluate(torch.arange(1))
        torch.testing.assert_close(p.validation_loss, plain.validation_loss)
        for split in ("validation", "test"):
            assert torch.equal(p.accuracy(torch.arange(1), split), plain.accuracy(torch.arange(1), split))
        p.train_epoch()
        plain.train_epoch()
        torch.testing.assert_close(p.theta, plain.theta, rtol=1e-4, atol=2e-5)


def test_each_host_shifts_in_its_own_epoch(toy):
    p = flipped(toy, 1.0, torch.tensor([0, 1, 3]))
    for number in range(4):
        signs = p.gain()[:, 0, 0].tolist()
        assert signs == [-1.0 if number >= epoch else 1.0 for epoch in (0, 1, 3)]
        p.train_epoch()
