import pytest
import torch

from esper.growth.state import Context, Data

KEYS = [11, 12, 13, 14, 15, 16, 17, 18]
MLP, GLU, LOW_RANK, NORM = range(4)


def close(a, b, rtol=1e-4, atol=2e-6):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def noisy(toy, noise, size=300):
    p = toy.population([1] * len(noise), toy.data(train=3000, classes=5), steps=2)
    n = len(noise)
    p.reset(
        torch.arange(n),
        Context(torch.arange(n) + 40, torch.full((n,), 0.005), torch.full((n,), size), torch.tensor(noise)),
    )
    return p


def test_label_noise_redraws_its_share(toy):
    p = noisy(toy, [0.0, 0.3, 1.0])
    clean = p.data.train_y[p.subset]
    assert torch.equal(p.labels[0], clean[0])
    for host, noise in ((1, 0.3), (2, 1.0)):
        share = noise * 4 / 5  # a redrawn label is the old one once in 5 times
        changed = (p.labels[host] != clean[host]).double().mean()
        assert abs(changed - share) < 4 * (share * (1 - share) / 3000) ** 0.5
    counts = torch.bincount(p.labels[2], minlength=5).double()
    assert ((counts - 600) ** 2 / 600).sum() < 24  # chi-square with 4 degrees: p = 1e-4


def test_labels_do_not_change_during_an_episode(toy):
    p = noisy(toy, [0.5])
    before = p.labels.clone(), p.subset.clone()
    p.train_epoch()
    assert torch.equal(p.labels, before[0])
    assert torch.equal(p.subset, before[1])


def test_subset_is_a_permutation_of_the_pool(toy):
    p = noisy(toy, [0.0, 0.3])
    assert torch.equal(p.subset.sort(1).values, torch.arange(3000).expand(2, -1))


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


def poisoned(data, **parts):
    """The data with some tensors replaced."""
    return Data(**{**vars(data), **parts})


def test_training_stays_within_the_host_s_samples(toy):
    clean = toy.population([11])
    size = int(clean.context.train_size)
    x = clean.data.train_x.clone()
    x[clean.subset[0, size:]] = float("nan")
    p = toy.population([11], poisoned(clean.data, train_x=x))
    toy.walk(clean, [11], 5)
    toy.walk(p, [11], 5)
    assert toy.differences(clean.state_dict(), p.state_dict()) == []


def test_the_last_of_the_host_s_samples_is_used(toy):
    clean = toy.population([11], steps=8)
    size = int(clean.context.train_size)
    x = clean.data.train_x.clone()
    x[clean.subset[0, size - 1]] = float("nan")
    p = toy.population([11], poisoned(clean.data, train_x=x), steps=8)
    p.train_epoch()
    assert p.theta.isnan().any()


def test_the_test_split_has_no_influence(toy):
    data = toy.data()
    wrong = poisoned(data, test_x=torch.full_like(data.test_x, float("nan")), test_y=torch.full_like(data.test_y, 7))
    a, b = toy.population(KEYS[:3], data), toy.population(KEYS[:3], wrong)
    for p in (a, b):
        toy.walk(p, KEYS[:3], 8)
        p.remove_unfinished(torch.ones(3, dtype=torch.bool))
    assert toy.differences(a.state_dict(), b.state_dict()) == []


def test_the_validation_split_does_not_train(toy):
    data = toy.data()
    other = poisoned(data, validation_x=data.validation_x * 3 + 1, validation_y=(data.validation_y + 1) % 3)
    a, b = toy.population(KEYS[:3], data), toy.population(KEYS[:3], other)
    for p in (a, b):
        toy.walk(p, KEYS[:3], 8)
    measured = ("/validation_loss", "/statistics/")
    assert all(name.startswith(measured) for name in toy.differences(a.state_dict(), b.state_dict()))
    assert not torch.isclose(a.validation_loss, b.validation_loss).any()


def test_test_accuracy_by_hand(toy):
    p = toy.population(KEYS[:3])
    for host, kind in ((0, MLP), (2, NORM)):
        toy.hold(p, host, 1, kind)
    p.train_epoch()
    expected = []
    for k in (2, 0):
        slow = toy.SlowHost(p, k)
        slow.sync()
        with torch.no_grad():
            right = slow.forward(p.data.test_x, slow.alphas(ahead=0))[0].argmax(1) == p.data.test_y
        expected.append(float(right.float().mean()))
    assert p.test_accuracy(torch.tensor([2, 0])).tolist() == pytest.approx(expected)


def test_unknown_blueprint(toy):
    from esper.growth.host import HostSpec
    from esper.growth.lifecycle import LifecycleSpec
    from esper.growth.population import Population
    from esper.growth.state import TrainingSpec

    with pytest.raises(KeyError, match=r"conv9.*available"):
        Population(HostSpec(5, 3, 4, 3), ["conv9"], toy.data(), TrainingSpec(), LifecycleSpec(), 1)
