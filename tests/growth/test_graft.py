import pytest
import torch
from torch.nn import functional as F

from esper.growth.graft import Grafts
from esper.growth.lifecycle import Event

KEYS = [11, 12, 13, 14, 15]
TASKS = ["mlp", "grid", "causal", "gathered"]
GRADIENT = 10.0  # Adam's first moment after one step is (1 - 0.9) * gradient
HOST = ("theta", "exp_avg", "exp_avg_sq", "validation_loss")
STATISTICS = (
    "train_loss", "layer_gradient_rms", "activations", "activation_backward_rms", "growth_gradient", "update_rms"
)  # fmt: skip


def close(a, b, rtol=1e-4, atol=2e-6):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def copies(toy, count, task, **kwargs):
    """The same host several times."""
    p = toy.population([11] * count, task, **kwargs)
    assert toy.differences(p.state_dict(), p.state_dict(), (0, count - 1)) == []
    return p


def assert_same_host(p, a, b):
    for name in HOST:
        assert torch.equal(getattr(p, name)[a], getattr(p, name)[b]), name
    for name in STATISTICS:
        assert torch.equal(getattr(p.statistics, name)[a], getattr(p.statistics, name)[b]), name


# ---- seeds in TRAINING --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_seeds_in_training_leave_the_host_bitwise_alone(toy, task):
    names = toy.fitting(task)
    n = len(names) + 2
    p = copies(toy, n, task)
    for host, name in enumerate(names):
        toy.plant(p, host, host % 3, name)
    for slot, name in enumerate(("bypass", "norm", "mlp")):
        toy.plant(p, n - 2, slot, name)
    start = [seed.clone() for seed in p.seed_theta]
    for _ in range(3):
        p.train_epoch()
        for host in range(n - 1):
            assert_same_host(p, host, n - 1)
    for host, name in enumerate(names):
        kind = toy.kind(name)
        moved = p.seed_theta[kind][host, host % 3] != start[kind][host, host % 3]
        assert moved.float().mean() > 0.3  # taps beyond the edge of a small grid stay


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("task", ["mlp", "causal"])
def test_a_diverged_seed_in_training_does_not_reach_its_host(toy, task, value):
    names = toy.fitting(task)
    p = copies(toy, len(names) + 1, task)
    for host in range(p.hosts):
        toy.hold(p, host, 0, "mlp")  # scattered by host, so
        p.seed_theta[0][host, 0] = p.seed_theta[0][0, 0]
    for host, name in enumerate(names):
        toy.plant(p, host, 1, name)
        p.seed_theta[toy.kind(name)][host, 1] = value
    for _ in range(2):
        p.train_epoch()
        for host in range(len(names)):
            assert_same_host(p, host, p.hosts - 1)
    assert p.theta.isfinite().all()


def test_seeds_in_training_and_blended_ones_share_a_slot(toy):
    """Blended seeds pass all of the gradient on, whoever is beside them."""
    p = toy.population([11, 12, 13])
    toy.hold(p, 0, 1, "mlp")
    toy.hold(p, 1, 1, "bypass")
    alone = p.fork(torch.arange(2), measured=True)
    p.germinate(toy.at(p, 2, 1), torch.full((3, 3), toy.kind("bypass")))
    for population in (p, alone):
        for _ in range(2):
            population.train_epoch()
    for host in range(2):
        assert toy.differences(p.state_dict(), alone.state_dict(), (host, host)) == []


@pytest.mark.parametrize("task", TASKS)
def test_gradient_of_a_seed_in_training_is_the_straight_through_one(toy, task):
    for name in toy.fitting(task):
        # With a seed that is fully there in slot 2, so that the signal has to come back through another seed.
        kind, p = toy.kind(name), toy.population([11], task, steps=1)
        p.context.width[:] = 3
        p.reset(torch.arange(1), p.context.rows(torch.arange(1)))
        toy.hold(p, 0, 2, "mlp")
        toy.plant(p, 0, 1, name)
        toy.scatter(p, 0, 1, name)
        one = toy.SlowHost(p, 0)
        one.sync()
        seed, batch = one.seeds[1], p._epoch_order()[0, 0]
        x, y = p.data.train_x[p.subset[0, batch]], p.labels[0, batch].flatten()
        _, seen = one.forward(x, [0, 0, 1], 0)
        h, source = seen["outputs"][1].detach(), seen["sources"][1].detach()
        delta = seed(source if name in ("bypass", "widen") else h)
        # The rest of the host by hand, from the slot on; the forward pass is that without the seed.
        stand_in = lambda h, delta=delta: delta - delta.detach()  # noqa: E731
        stand_in.name = "stand-in"
        one.seeds[1] = stand_in
        logits, _ = one.forward(x, [0, 1, 1], 0)
        F.cross_entropy(logits, y).backward()
        p.train_epoch()
        close(p.seed_exp_avg[kind][0, 1] * GRADIENT, one.flat_seed(seed, lambda w: w.grad))
        assert p.seed_exp_avg[kind][0, 1].abs().max() > 0


@pytest.mark.parametrize("task", ["mlp", "causal"])
def test_a_seed_in_training_takes_no_part_in_evaluation(toy, task):
    p = copies(toy, 2, task)
    for host in range(2):
        toy.hold(p, host, 2, "norm")
        p.seed_theta[3][host, 2] = torch.linspace(0.5, 2, 8)
    toy.plant(p, 0, 1, "mlp")
    p.seed_theta[0][0, 1] = float("nan")  # which 0 * delta would not hide
    p._evaluate(torch.arange(2))
    assert torch.equal(p.validation_loss[0], p.validation_loss[1])
    assert torch.equal(p.statistics.contribution[0], p.statistics.contribution[1])
    for split in ("validation", "test"):
        assert float(p.accuracy(torch.tensor([0]), split)) == float(p.accuracy(torch.tensor([1]), split))


def test_a_seed_culled_out_of_training_leaves_no_trace_but_its_flops(toy):
    p = copies(toy, 3, "mlp")
    toy.plant(p, 0, 1, "mlp")
    p.train_epoch()
    p.train_epoch()
    p.lifecycle.fire(Event.CULL, toy.at(p, 0, 1))
    for _ in range(3):
        p.train_epoch()
    for name in HOST:
        assert torch.equal(getattr(p, name)[0], getattr(p, name)[2])
    # two epochs of an mlp at width 4: 2 * (4*8 + 8*4)
    assert p.extra_flops.tolist() == [128.0, 0.0, 0.0]


# ---- what is grouped ----------------------------------------------------------------------------------------------


def crowded(toy):
    """Five hosts with several seeds of one kind, also in one host, of both sides, in no order."""
    p = toy.population(KEYS, "causal", width=5)
    p.context.width[:] = torch.tensor([5, 4, 3, 5, 2])
    p.reset(torch.arange(5), p.context.rows(torch.arange(5)))
    plan = [(4, 0, "mlp"), (0, 2, "mlp"), (0, 0, "mlp"), (2, 0, "widen"), (3, 0, "bypass"), (1, 2, "attention")]
    plan += [(2, 2, "widen"), (1, 0, "widen"), (3, 2, "mlp"), (0, 1, "conv")]
    for host, slot, name in plan:
        toy.hold(p, host, slot, name)
    return p, plan


def test_blocks_hold_the_seeds_of_a_blueprint_slot_by_slot(toy):
    p, _ = crowded(toy)
    grafts = Grafts(p, torch.arange(5), p.lifecycle.blueprint, p.lifecycle.alpha)
    blocks = {p.catalogue[k].name: (h.tolist(), s.tolist(), pieces) for k, h, s, pieces in grafts.blocks}
    assert blocks == {
        "mlp": ([0, 4, 0, 3], [0, 0, 2, 2], [2, 2]),
        "bypass": ([3], [0], [1]),
        "widen": ([1, 2, 2], [0, 0, 2], [2, 1]),
        "conv": ([0], [1], [1]),
        "attention": ([1], [2], [1]),
    }
    rows = grafts.gathered(p.seed_theta)
    assert torch.equal(rows[0][3], p.seed_theta[0][3, 2])


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [4, 0, 0, 2, 3, 1, 0], [3]], ids=str)
def test_a_slot_adds_alpha_times_delta_of_each_row_s_seed(toy, rows):
    p, _ = crowded(toy)
    g = torch.Generator().manual_seed(2)
    hosts = torch.tensor(rows)
    alpha = torch.rand(len(rows), 3, generator=g)
    grafts = Grafts(p, hosts, p.lifecycle.blueprint[hosts], alpha)
    grafts.use_rows(p.seed_theta)
    owned = (torch.arange(5) < p.context.width[hosts][:, None]).float()[:, None]
    h, source = (torch.randn(len(rows), 2 * 5, 5, generator=g) * owned for _ in range(2))
    for slot in range(3):
        got = grafts(slot, h, source)
        for row, host in enumerate(rows):
            one = toy.SlowHost(p, host)
            one.sync()
            expected, w = h[row].clone(), one.width
            if slot in one.seeds:
                fed = source if one.seeds[slot].name in ("bypass", "widen") else h
                delta = one.seeds[slot](fed[row, :, :w].view(2, 5, w)).view(10, w)
                expected[:, :w] += alpha[row, slot] * delta
            close(got[row], expected.detach(), atol=1e-5)


@pytest.mark.parametrize("isolated", [False, True])
def test_what_a_blueprint_writes_to_padding_is_dropped(toy, isolated, monkeypatch):
    p = toy.population([11], width=5)
    p.context.width[:] = 3
    p.reset(torch.arange(1), p.context.rows(torch.arange(1)))
    toy.hold(p, 0, 1, "mlp")
    monkeypatch.setattr(p.catalogue[0], "delta", lambda parameters, x, units, site: 1.0 + x)
    # Beside an isolated row the other kind of arithmetic is used.
    rows, alone = torch.zeros(2, dtype=torch.int64), torch.tensor([[isolated] * 3, [False] * 3])
    grafts = Grafts(p, rows, p.lifecycle.blueprint[rows], 1.0 - alone.float(), alone)
    grafts.use_rows(p.seed_theta)
    h = torch.zeros(2, 8, 5, requires_grad=True)
    added = grafts(1, h, h)
    assert added[1].unique(dim=0).tolist() == [[1, 1, 1, 0, 0]]
    assert added[0].any() != isolated
    (gradient,) = torch.autograd.grad(added[1].sum(), h)
    assert gradient[1].unique(dim=0).tolist() == [[2, 2, 2, 1, 1]]


def test_a_slot_without_seeds_passes_the_very_tensor_on(toy):
    p = toy.population(KEYS)
    grafts = Grafts(p, torch.arange(5), p.lifecycle.blueprint, p.lifecycle.alpha)
    h = torch.randn(5, 8, 4)
    assert grafts.blocks == []
    assert grafts(1, h, h) is h
