import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esper.growth.host import HostSpec, _Activate, activate, cross_entropy

KEYS = [11, 12, 13, 14, 15, 16, 17, 18]
TASKS = ["mlp", "grid", "sequence", "causal", "gathered"]
WIDTH = 6


def close(a, b, rtol=1e-4, atol=2e-6):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ---- sizes --------------------------------------------------------------------------------------------------------


def test_counts_by_hand():
    spec = HostSpec(5, 3, 4, 2)
    # 5 -> 4 -> 4 -> 4 -> 3
    assert spec.fans(4) == [(5, 4), (4, 4), (4, 4), (4, 3)]
    assert spec.flops(4) == [20, 16, 16, 12]
    assert [p.size for p in spec.parameters(4)] == [20, 4, 16, 4, 16, 4, 12, 3]
    assert (spec.layers, spec.taps) == (4, 1)


def test_counts_of_convolutions_by_hand():
    spec = HostSpec(2, 3, 4, 1, grid=(3, 5))
    # 15 tokens, 9 taps; the head reads their mean once
    assert spec.flops(4) == [15 * 2 * 4, 15 * 9 * 16, 12]
    assert [p.size for p in spec.parameters(4)] == [8, 4, 144, 4, 12, 3]
    spec = HostSpec(2, 3, 4, 1, grid=(7,), causal=True, per_token=True)
    assert spec.flops(4) == [7 * 2 * 4, 7 * 3 * 16, 7 * 12]
    assert [p.size for p in spec.parameters(4)] == [8, 4, 48, 4, 12, 3]


def modules(spec, width, depth):
    """The layers of a host in torch.nn."""
    stage = {1: nn.Conv1d, 2: nn.Conv2d}[len(spec.grid)]
    stages = [nn.Linear(width, width) if spec.site.tokens == 1 else stage(width, width, 3) for _ in range(depth)]
    return nn.ModuleList([nn.Linear(spec.inputs, width), *stages, nn.Linear(width, spec.classes)])


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_sizes_of_lesser_hosts_are_those_of_their_own_modules(toy, task):
    p = toy.population(KEYS, task, mixed=True, width=WIDTH)
    for k in range(8):
        width, depth = int(p.context.width[k]), int(p.context.depth[k])
        layers = modules(p.spec, width, depth)
        assert float(p.host_parameters()[k]) == size(layers)
        assert p.layer_exists()[k].tolist() == [True] * (depth + 1) + [False] * (3 - depth) + [True]
        present = p.layer_sizes[width][p.layer_exists()[k]].tolist()
        assert present == [size(layer) for layer in layers]
        assert float(p.host_flops()[k]) == float(toy.exact(p, k).host_flops())


@pytest.mark.parametrize("task", ["mlp", "causal"])
def test_seeds_of_narrower_hosts_have_the_size_of_their_own_modules(toy, task):
    p = toy.population(KEYS, task, mixed=True, width=WIDTH)
    for kind, name in enumerate(toy.fitting(task)):
        for k in range(8):
            width = int(p.context.width[k])
            own = size(toy.Seed(name, width, p.spec.grid, p.spec.causal))
            assert int(p.seed_sizes[width, kind]) == own
            assert float(p.seed_tables[kind].count[width]) == own
            assert float(p.seed_flops[width, kind]) == p.catalogue[kind].flops(p.spec.site_of(width))


# ---- room ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(toy):
    """Hosts of many sizes in a population with room for more, after some epochs of growth; by task."""
    made = {}

    def of(task):
        if task not in made:
            p = toy.population(KEYS, task, mixed=True, width=WIDTH, stages=3)
            p.context.width.clamp_(max=WIDTH - 1)  # so that even the widest has padding
            p.context.seeds[:] = 99
            p.reset(torch.arange(8), p.context.rows(torch.arange(8)))
            toy.walk(p, KEYS, 7, task)
            made[task] = p
        return made[task]

    return of


@pytest.mark.parametrize("task", TASKS)
def test_padding_stays_exactly_zero(toy, grown, task):
    p = grown(task)
    owned = p.table.owned[p.context.width] * p.layer_exists()[:, p.layer]
    for value in (p.theta, p.exp_avg, p.exp_avg_sq):
        assert (value[owned == 0] == 0).all()
    assert (owned == 0).any(1).all()
    assert (p.theta[owned == 1] != 0).float().mean() > 0.9
    lived = 0
    for kind in range(len(toy.CATALOGUE)):
        if p.fits[kind]:
            outside = p.seed_tables[kind].owned[p.context.width] == 0
            for value in (p.seed_theta[kind], p.seed_exp_avg[kind], p.seed_exp_avg_sq[kind]):
                assert (value.transpose(1, 2)[outside] == 0).all()
            lived += int((p.seed_exp_avg_sq[kind] != 0).any(2).sum())
    assert lived > 10


@pytest.mark.parametrize("task", TASKS)
def test_room_does_not_change_what_a_host_computes(toy, grown, task):
    p = grown(task)
    p = p.fork(torch.arange(8), future=True, measured=True)
    exact = [toy.exact(p, k) for k in range(8)]
    for k, q in enumerate(exact):
        close(q.accuracy(torch.arange(1), "test")[0], p.accuracy(torch.tensor([k]), "test")[0])
    for one in (p, *exact):
        one.train_epoch()
    for k, q in enumerate(exact):
        again = toy.exact(p, k)
        close(q.theta, again.theta, atol=1e-4)
        close(q.validation_loss, again.validation_loss, atol=1e-5)
        close(q.statistics.train_loss, again.statistics.train_loss, atol=1e-5)
        assert torch.equal(q.extra_flops, again.extra_flops)
        for kind in range(len(toy.CATALOGUE)):
            close(q.seed_theta[kind], again.seed_theta[kind], atol=1e-4)


# ---- activations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leak", [None, 0.0, 0.01])
def test_activate_and_its_derivative(leak):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(3, 5, 4, generator=g, dtype=torch.float64).requires_grad_()
    low = torch.tensor([0.0, -0.5, -torch.inf]).double()[:, None, None]
    high = torch.tensor([torch.inf, 0.4, torch.inf]).double()[:, None, None]
    units = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).double()[:, None]
    leaks = None if leak is None else torch.full((3, 1, 1), leak).double()
    h, slope = activate(z.detach(), low, high, leaks, units)
    expected = torch.stack([z[0].relu(), F.hardtanh(z[1], -0.5, 0.4), z[2]])
    expected = (expected + (leak or 0.0) * (z - expected)) * units
    close(h, expected.detach())
    (gradient,) = torch.autograd.grad(expected.sum(), z)
    close(slope, gradient)
    same, fewer = activate(z.detach(), low, high, leaks, units, 2)
    assert torch.equal(same, h)
    assert torch.equal(fewer, slope[:, :2])
    assert torch.equal(_Activate.apply(z, low, high, leaks, units).detach(), h)
    assert torch.autograd.gradcheck(lambda v: _Activate.apply(v, low, high, leaks, units), (z,))


def test_cross_entropy_is_that_of_torch():
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(3, 7, 5, generator=g), torch.randint(5, (3, 7), generator=g)
    expected = torch.stack([F.cross_entropy(logits[n], y[n], reduction="none") for n in range(3)])
    close(cross_entropy(logits, y), expected)
