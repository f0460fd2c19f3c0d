import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from esper.growth.conditions import Condition
from esper.growth.host import Trace
from esper.growth.lifecycle import Stage
from esper.growth.statistics import HISTORY, Statistics, activation_statistics, growth_gradient, statistics_samples

MLP, GLU, LOW_RANK, NORM = range(4)
DEAD, OFF, MEAN, STD, RANK = range(5)
TASKS = ["mlp", "grid", "causal"]


def slow_statistics(h, slope):
    """One host, one stage: outputs and derivatives [samples, width]."""
    samples, width = h.shape
    dead = sum(all(slope[i, u] == 0 for i in range(samples)) for u in range(width)) / width
    off = sum(slope[i, u] == 0 for i in range(samples) for u in range(width)) / (samples * width)
    mean = h.sum() / (samples * width)
    std = math.sqrt(((h - mean) ** 2).sum() / (samples * width))
    eigenvalues = np.linalg.eigvalsh(np.cov(h.T, bias=True).reshape(width, width))
    rank = eigenvalues.sum() ** 2 / max((eigenvalues**2).sum(), 1e-12) / width
    return torch.tensor([dead, off, mean, std, rank], dtype=torch.float64)


def measured(h, slope=None, width=None):
    """activation_statistics of h [n, S, samples, W]."""
    slope = (h > 0).float() if slope is None else slope
    trace = Trace(list(h.unbind(1)), [], list(slope.unbind(1)))
    return activation_statistics(trace, torch.full((len(h),), h.shape[3]) if width is None else width)


@pytest.mark.parametrize("seed", range(4))
def test_activation_statistics_against_a_loop(seed):
    g = torch.Generator().manual_seed(seed)
    h = (torch.randn(3, 2, 17, 5, generator=g) @ torch.randn(5, 5, generator=g) + 0.2).relu()
    h[0, 1, :, 2] = 0  # a dead unit
    h[2, 0, :, 1:] = 0  # all dead but one
    h[1, 0, 3:, 4] = 0  # mostly off, but not dead
    slope = (h > 0).float()
    slope[1, 1] = slope[1, 1].clamp(min=0.01)  # a leak is no zero
    widths = torch.tensor([5, 4, 2])
    h, slope = (v * (torch.arange(5) < widths[:, None])[:, None, None] for v in (h, slope))
    got = measured(h, slope, widths)
    for n, w in enumerate(widths.tolist()):
        for s in range(2):
            expected = slow_statistics(h[n, s, :, :w].double().numpy(), slope[n, s, :, :w].numpy())
            torch.testing.assert_close(got[n, s].double(), expected, rtol=1e-5, atol=1e-6)
    assert got[0, 1, DEAD] > 0.19


def test_only_the_first_rows_are_measured():
    """Those whose derivatives the trace has."""
    h = torch.randn(1, 1, 200, 3).relu()
    slope = (h > 0).float()
    assert torch.equal(measured(h, slope[:, :, :128]), measured(h[:, :, :128]))
    assert not torch.equal(measured(h), measured(h[:, :, :128]))
    assert [statistics_samples(tokens) for tokens in (1, 3, 4, 20)] == [128, 128, 128, 25]


def test_isotropic_activations_have_rank_one_per_unit():
    # All 16 corners of a cube: every unit is 1 or 3 independently of the others, so the covariance is the identity.
    corners = torch.cartesian_prod(*[torch.tensor([1.0, 3.0])] * 4)
    assert float(measured(corners[None, None])[0, 0, RANK]) == pytest.approx(1, abs=1e-6)


def test_activations_along_one_line_have_one_rank_in_all():
    h = 5 + torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.5, 2.0, 0.1])
    assert float(measured(h[None, None])[0, 0, RANK]) == pytest.approx(1 / 4, abs=1e-5)


def test_all_dead_layers_are_finite():
    assert measured(torch.zeros(1, 1, 6, 3)).tolist() == [[[1.0, 1.0, 0.0, 0.0, 0.0]]]


def test_growth_gradient_by_hand():
    source, signal = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [-1.0, 2.0]]])
    # source^T signal = [[1 - 3, 6], [2, 0]]
    assert float(growth_gradient([source, source], [signal, 2 * signal])[0, 0]) == pytest.approx(44**0.5)
    assert float(growth_gradient([source, source], [signal, 2 * signal])[0, 1]) == pytest.approx(2 * 44**0.5)


# ---- the record ---------------------------------------------------------------------------------------------------


def empty(hosts=3):
    return Statistics.empty(hosts, 4, 2, 4)


def test_empty_shapes_and_types():
    s = empty()
    assert s.history.shape == (3, HISTORY)
    assert s.layer_weight_rms.shape == (3, 4)  # stem, two stages, head
    assert s.growth_gradient.shape == s.activation_backward_rms.shape == (3, 2)
    assert s.activations.shape == (3, 2, 5)
    assert s.contribution.shape == (3, 2)
    assert s.fared.shape == (3, 4)
    assert s.train_loss.shape == (3,)
    kinds = {k: v.dtype for k, v in vars(s).items()}
    assert {k for k, v in kinds.items() if v == torch.bool} == {"contribution_known", "fared_known"}
    assert {k for k, v in kinds.items() if v == torch.int64} == {"history_length", "contribution_age"}
    assert all((v == 0).all() for v in vars(s).values())


def test_reset_forgets_only_its_hosts():
    s = empty()
    for value in vars(s).values():
        value.fill_(1)
    s.reset(torch.tensor([2, 0]))
    for value in vars(s).values():
        assert (value[[0, 2]] == 0).all()
        assert (value[1] == 1).all()


def test_history_keeps_the_newest_first():
    s, blueprint = empty(), torch.full((3, 2), -1)
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0):
        s.record_validation(torch.tensor([2, 0]), torch.tensor([loss, 10 * loss]), blueprint[:2])
    assert s.history[2].tolist() == [5.0, 4.0, 3.0, 2.0]
    assert s.history[0].tolist() == [50.0, 40.0, 30.0, 20.0]
    assert s.history[1].tolist() == [0.0] * 4
    assert s.history_length.tolist() == [5, 0, 5]


def test_how_a_blueprint_fares_is_averaged_over_its_seeds():
    s, blueprint = empty(), torch.full((3, 2), -1)
    blueprint[0], blueprint[1, 1] = GLU, NORM
    s.germination_loss[0] = torch.tensor([2.0, 1.5])
    s.germination_loss[1, 1] = 1.0
    s.record_validation(torch.tensor([0, 1, 2]), torch.tensor([1.0, 1.25, 3.0]), blueprint)
    # host 0: ((1 - 2) + (1 - 1.5)) / 2 = -0.75; host 1: 1.25 - 1 = 0.25
    assert s.fared.tolist() == [[0, -0.75, 0, 0], [0, 0, 0, 0.25], [0, 0, 0, 0]]
    assert s.fared_known.tolist() == [[False, True, False, False], [False, False, False, True], [False] * 4]
    # Host 0 loses one of its seeds: the other counts alone. Host 1 loses its only one: the last value stays.
    blueprint[0, 0] = blueprint[1, 1] = -1
    s.record_validation(torch.tensor([0, 1, 2]), torch.tensor([1.0, 9.0, 3.0]), blueprint)
    assert s.fared.tolist() == [[0, -0.5, 0, 0], [0, 0, 0, 0.25], [0, 0, 0, 0]]
    assert s.fared_known[1].tolist() == [False, False, False, True]


def test_germination_notes_the_loss_and_forgets_the_old_contribution():
    s = empty()
    s.contribution_known[:] = True
    s.germination_loss[:] = 7.0
    where = torch.tensor([[True, False], [False, False], [False, True]])
    s.germinated(where, torch.tensor([1.0, 2.0, 3.0]))
    assert s.germination_loss.tolist() == [[1.0, 7.0], [7.0, 7.0], [7.0, 3.0]]
    assert torch.equal(s.contribution_known, ~where)


def test_contributions_age_and_die_with_their_seed():
    s = empty(1)
    s.contribution_known[:] = True
    s.contribution_age[:] = torch.tensor([2, 0])
    s.age_contributions(torch.tensor([[Stage.HOLDING, Stage.EMBARGOED]]))
    assert s.contribution_age.tolist() == [[3, 1]]
    assert s.contribution_known.tolist() == [[True, False]]


def test_a_revised_loss_replaces_the_newest():
    s = empty()
    s.history[:] = torch.tensor([1.0, 2, 3, 4])
    s.contribution_known[:] = True
    stage = torch.tensor([[Stage.HOLDING, Stage.EMBARGOED]] * 3)
    s.revise_validation(torch.tensor([2]), torch.tensor([9.0]), stage)
    assert s.history.tolist() == [[1, 2, 3, 4], [1, 2, 3, 4], [9, 2, 3, 4]]
    assert s.contribution_known.tolist() == [[True, True], [True, True], [True, False]]


# ---- what an epoch measures ---------------------------------------------------------------------------------------

KEYS = [21, 22, 23, 24, 25, 26]


def rms(values):
    values = [float(v) for v in values]
    return math.sqrt(sum(v * v for v in values) / len(values))


def adopt(optimiser, module, mean, square, steps, full):
    """Gives an optimiser the population's moments."""
    for w, m, v in zip(module.parameters(), *(full(value) for value in (mean, square)), strict=True):
        optimiser.state[w] = {"step": torch.tensor(float(steps)), "exp_avg": m, "exp_avg_sq": v}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("grown_for", [0, 4])
def test_measurements_against_a_host_by_itself(toy, task, grown_for):
    p = toy.population(KEYS, task, mixed=True, width=6)
    toy.walk(p, KEYS, grown_for)
    toy.act(p, KEYS)
    slow = []
    for k in range(6):
        one = toy.SlowHost(p, k)
        one.sync()
        # Take over Adam's state, so that this epoch can be told alone.
        wide = lambda flat, one=one: [toy.cut(flat, one.wide, one.shapes(one.width))[i] for i in one.kept]  # noqa: E731
        adopt(one.optimiser, one.body, p.exp_avg[k], p.exp_avg_sq[k], p.steps[k], wide)
        for slot, seed in one.seeds.items():
            b = int(p.lifecycle.blueprint[k, slot])
            cut = lambda flat, one=one, seed=seed: toy.cut(flat, seed.shapes(6), seed.shapes(one.width))  # noqa: E731
            moments = p.seed_exp_avg[b][k, slot], p.seed_exp_avg_sq[b][k, slot]
            adopt(one.optimisers[slot], seed, *moments, p.seed_steps[k, slot], cut)
        one.epoch()
        slow.append(one)
    p.train_epoch()
    for k, one in enumerate(slow):
        assert_measured(p, k, one)


def assert_measured(p, k, one):
    """The statistics of host k are those of the epoch that `one` has done by itself."""
    s, steps = p.statistics, int(p.steps[k])
    rate, updates = one.optimiser.param_groups[0]["lr"], []
    spikes = (p.context.strike_epoch[k] == p.epoch[k] - 1) & (p.context.strike[k] == Condition.SATURATED)
    rate = 4 * rate if spikes.any() else rate
    for number in range(one.depth + 2):
        layer = number if number <= one.depth else p.spec.stages + 1
        weights, means, squares = [], [], []
        for w in (one.body[2 * number], one.body[2 * number + 1]):
            state = one.optimiser.state[w]
            weights += w.detach().flatten().tolist()
            means += (state["exp_avg"].double() / (1 - 0.9**steps)).flatten().tolist()
            squares += (state["exp_avg_sq"].double() / (1 - 0.999**steps)).flatten().tolist()
        gradient = math.sqrt(sum(squares) / len(squares))
        epsilon = 1e-8 / math.sqrt(1 - 0.999**steps)  # which stands outside of the bias correction
        update = [rate * m / (math.sqrt(v) + epsilon) for m, v in zip(means, squares, strict=True)]
        updates += update
        expected = [rms(weights), gradient, rms(means) / (gradient + 1e-12), rms(update)]
        names = ("weight_rms", "gradient_rms", "signal_to_noise", "update_rms")
        got = [float(getattr(s, f"layer_{name}")[k, layer]) for name in names]
        assert got == pytest.approx(expected, rel=2e-3, abs=1e-7)
    assert float(s.update_rms[k]) == pytest.approx(rms(updates), rel=2e-3)
    assert float(s.train_loss[k]) == pytest.approx(one.loss, rel=1e-5)
    for slot, (source, signal) in enumerate(zip(one.sources, one.signals, strict=True)):
        assert float(s.activation_backward_rms[k, slot]) == pytest.approx(rms(signal.flatten()), rel=2e-3, abs=1e-8)
        growth = (source.flatten(0, 1).T @ signal.flatten(0, 1)).detach().norm()
        assert float(s.growth_gradient[k, slot]) == pytest.approx(float(growth), rel=2e-3, abs=1e-7)
    for slot in range(3):
        expected = 0.0
        if slot in one.seeds:
            seed, taken = one.seeds[slot], int(p.seed_steps[k, slot])
            squares = torch.cat([one.optimisers[slot].state[w]["exp_avg_sq"].flatten() for w in seed.parameters()])
            expected = math.sqrt(float(squares.double().mean()) / (1 - 0.999**taken))
        assert float(s.seed_gradient_rms[k, slot]) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("task", TASKS)
def test_growth_gradient_is_that_of_a_map_around_the_stage(toy, task):
    """A linear map from each stage's input to its output that starts at 0."""
    p = toy.population(KEYS, task, mixed=True, width=6, steps=1)
    hosts = [k for k in range(6) if p.context.depth[k] > 1]
    for k in hosts:
        toy.hold(p, k, 1, "mlp")  # which reads what the map adds to
    slow = []
    for k in hosts:
        one = toy.SlowHost(p, k)
        one.sync()
        one.around = [torch.zeros(one.width, one.width, requires_grad=True) for _ in range(one.depth)]
        batch = p._epoch_order()[k, 0]
        logits, _ = one.forward(p.data.train_x[p.subset[k, batch]], one.alphas(1), 0)
        F.cross_entropy(logits, p.labels[k, batch].flatten()).backward()
        slow.append(one)
    p.train_epoch()
    for k, one in zip(hosts, slow, strict=True):
        expected = [float(around.grad.norm()) for around in one.around]
        assert p.statistics.growth_gradient[k, : one.depth].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-8)
        assert max(expected) > 0


def test_the_update_is_that_of_the_last_step(toy):
    p = toy.population(KEYS[:2], steps=1)
    for _ in range(3):
        before = p.theta.clone()
        p.train_epoch()
        moved = (p.theta - before).double()
        torch.testing.assert_close(p.statistics.update_rms.double(), moved.square().mean(1).sqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("task", TASKS)
def test_activations_are_measured_before_the_slot_on_validation(toy, task):
    p = toy.population(KEYS, task, data=toy.data(task, validation=150), mixed=True, width=6)
    tokens = torch.Size(p.spec.grid).numel()
    rows = 128 * min(tokens, 4) // tokens * tokens  # whole samples
    toy.walk(p, KEYS, 4)
    toy.act(p, KEYS)
    alphas = [toy.SlowHost(p, k).alphas(ahead=1) for k in range(6)]
    p.train_epoch()
    for k in range(6):
        one = toy.SlowHost(p, k)
        one.sync()
        _, seen = one.forward(p.data.validation_x, alphas[k], 5)
        for slot in range(one.depth):
            h, z = seen["outputs"][slot], seen["z"][slot]
            (slope,) = torch.autograd.grad(h.sum(), z, retain_graph=True)
            expected = slow_statistics(*(v.detach().flatten(0, 1)[:rows].double().numpy() for v in (h, slope)))
            torch.testing.assert_close(p.statistics.activations[k, slot].double(), expected, rtol=2e-4, atol=2e-5)


def test_a_fresh_episode_has_only_its_first_validation(toy):
    p = toy.population(KEYS)
    s = p.statistics
    assert s.history_length.tolist() == [1] * 6
    for k in range(6):
        assert float(s.history[k, 0]) == pytest.approx(toy.SlowHost(p, k).validation_loss([0.0] * 3), rel=1e-5)
    assert (s.activations[:, :, STD] > 0).all()
    assert not s.contribution_known.any()
    assert not s.fared_known.any()
