import math

import numpy as np
import pytest
import torch

from esper.growth.host import HostSpec
from esper.growth.lifecycle import Lifecycle, Stage
from esper.growth.statistics import HISTORY, Statistics, activation_statistics

MLP, GLU, LOW_RANK, NORM = range(4)
DEAD, OFF, MEAN, STD, RANK = range(5)


def slow_statistics(h):
    """One host, one layer: h [samples, width]."""
    samples, width = h.shape
    dead = sum(all(h[i, u] <= 0 for i in range(samples)) for u in range(width)) / width
    off = sum(h[i, u] <= 0 for i in range(samples) for u in range(width)) / (samples * width)
    mean = h.sum() / (samples * width)
    std = math.sqrt(((h - mean) ** 2).sum() / (samples * width))
    eigenvalues = np.linalg.eigvalsh(np.cov(h.T, bias=True).reshape(width, width))
    rank = eigenvalues.sum() ** 2 / max((eigenvalues**2).sum(), 1e-12) / width
    return [dead, off, mean, std, rank]


@pytest.mark.parametrize("seed", range(4))
def test_activation_statistics_against_a_loop(seed):
    g = torch.Generator().manual_seed(seed)
    h = (torch.randn(3, 2, 17, 5, generator=g) @ torch.randn(5, 5, generator=g) + 0.2).relu()
    h[0, 1, :, 2] = 0  # a dead unit
    h[2, 0, :, 1:] = 0  # all dead but one
    h[1, 0, 3:, 4] = 0  # mostly off, but not dead
    got = activation_statistics(h)
    for n in range(3):
        for s in range(2):
            expected = torch.tensor(slow_statistics(h[n, s].double().numpy()))
            torch.testing.assert_close(got[n, s].double(), expected, rtol=1e-5, atol=1e-6)
    assert got[0, 1, DEAD] >= 0.2


def test_isotropic_activations_have_rank_one_per_unit():
    # All 16 corners of a cube: every unit is 1 or 3 independently of the others, so the covariance is the identity.
    corners = torch.cartesian_prod(*[torch.tensor([1.0, 3.0])] * 4)
    assert float(activation_statistics(corners[None, None])[0, 0, RANK]) == pytest.approx(1, abs=1e-6)


def test_activations_along_one_line_have_one_rank_in_all():
    h = 5 + torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.5, 2.0, 0.1])
    assert float(activation_statistics(h[None, None])[0, 0, RANK]) == pytest.approx(1 / 4, abs=1e-5)


def test_all_dead_layers_are_finite():
    assert activation_statistics(torch.zeros(1, 1, 6, 3)).tolist() == [[[1.0, 1.0, 0.0, 0.0, 0.0]]]


# ---- the record ---------------------------------------------------------------------------------------------------


def empty(hosts=3):
    return Statistics.empty(hosts, HostSpec(5, 3, 4, 2), 4)


def test_empty_shapes_and_types():
    s = empty()
    assert s.history.shape == (3, HISTORY)
    assert s.layer_weight_rms.shape == (3, 3)
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
    s, life = empty(), Lifecycle.dormant(3, 2)
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0):
        s.record_validation(torch.tensor([2, 0]), torch.tensor([loss, 10 * loss]), life)
    assert s.history[2].tolist() == [5.0, 4.0, 3.0, 2.0]
    assert s.history[0].tolist() == [50.0, 40.0, 30.0, 20.0]
    assert s.history[1].tolist() == [0.0] * 4
    assert s.history_length.tolist() == [5, 0, 5]


def test_how_a_blueprint_fares_is_averaged_over_its_seeds():
    s, life = empty(), Lifecycle.dormant(3, 2)
    life.stage[0] = torch.tensor([Stage.HOLDING, Stage.TRAINING])
    life.blueprint[0] = torch.tensor([GLU, GLU])
    life.stage[1, 1], life.blueprint[1, 1] = Stage.FOSSILIZED, NORM
    s.germination_loss[0] = torch.tensor([2.0, 1.5])
    s.germination_loss[1, 1] = 1.0
    s.record_validation(torch.tensor([0, 1, 2]), torch.tensor([1.0, 1.25, 3.0]), life)
    # host 0: ((1 - 2) + (1 - 1.5)) / 2 = -0.75; host 1: 1.25 - 1 = 0.25
    assert s.fared.tolist() == [[0, -0.75, 0, 0], [0, 0, 0, 0.25], [0, 0, 0, 0]]
    assert s.fared_known.tolist() == [[False, True, False, False], [False, False, False, True], [False] * 4]
    # Host 0 loses one of its seeds: the other counts alone. Host 1 loses its only one: the last value stays.
    for host, slot in ((0, 0), (1, 1)):
        life.stage[host, slot], life.blueprint[host, slot] = Stage.EMBARGOED, -1
    s.record_validation(torch.tensor([0, 1, 2]), torch.tensor([1.0, 9.0, 3.0]), life)
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


# ---- what an epoch measures ---------------------------------------------------------------------------------------

KEYS = [21, 22, 23, 24]


def rms(values):
    values = [float(v) for v in values]
    return math.sqrt(sum(v * v for v in values) / len(values))


@pytest.mark.parametrize("grown_for", [0, 5])
def test_measurements_against_a_host_by_itself(toy, grown_for):
    p = toy.population(KEYS, observed=3)
    toy.walk(p, KEYS, grown_for)
    toy.act(p, KEYS)
    slow = []
    for k in range(4):
        one = toy.SlowHost(p, k)
        one.sync()
        # Take over Adam's state, so that this epoch can be told alone.
        states = [(one.optimiser, one.body, p.exp_avg[k], p.exp_avg_sq[k], p.steps[k])]
        for slot, seed in one.seeds.items():
            b = int(p.lifecycle.blueprint[k, slot])
            moments = p.seed_exp_avg[b][k, slot], p.seed_exp_avg_sq[b][k, slot]
            states.append((one.optimisers[slot], seed, *moments, p.seed_steps[k, slot]))
        for optimiser, module, mean, square, steps in states:
            at = 0
            for w in module.parameters():
                cut = slice(at, at + w.numel())

                def shape(t, w=w):
                    return t.view(w.shape[1], w.shape[0]).T if w.ndim == 2 else t

                optimiser.state[w] = {
                    "step": torch.tensor(float(steps)),
                    "exp_avg": shape(mean[cut].clone()).contiguous(),
                    "exp_avg_sq": shape(square[cut].clone()).contiguous(),
                }
                at += w.numel()
        one.epoch()
        slow.append(one)
    p.train_epoch()
    s, rate = p.statistics, p.context.learning_rate
    for k, one in enumerate(slow[:3]):
        steps = int(p.steps[k])
        updates = []
        for number, layer in enumerate(one.body):
            weights, means, squares = [], [], []
            for w in layer.parameters():
                state = one.optimiser.state[w]
                weights += w.detach().flatten().tolist()
                means += (state["exp_avg"].double() / (1 - 0.9**steps)).flatten().tolist()
                squares += (state["exp_avg_sq"].double() / (1 - 0.999**steps)).flatten().tolist()
            gradient = math.sqrt(sum(squares) / len(squares))
            update = [float(rate[k]) * m / (math.sqrt(v) + 1e-8) for m, v in zip(means, squares, strict=True)]
            updates += update
            assert float(s.layer_weight_rms[k, number]) == pytest.approx(rms(weights), rel=1e-4)
            assert float(s.layer_gradient_rms[k, number]) == pytest.approx(gradient, rel=1e-4)
            assert float(s.layer_signal_to_noise[k, number]) == pytest.approx(rms(means) / gradient, rel=1e-3)
            assert float(s.layer_update_rms[k, number]) == pytest.approx(rms(update), rel=1e-3)
        for slot, signal in enumerate(one.signals):
            assert float(s.activation_backward_rms[k, slot]) == pytest.approx(rms(signal.flatten()), rel=1e-3)
        assert float(s.update_rms[k]) == pytest.approx(rms(updates), rel=1e-3)
        assert float(s.train_loss[k]) == pytest.approx(one.loss, rel=1e-5)
        for slot in range(3):
            expected = 0.0
            if slot in one.seeds:
                seed, taken = one.seeds[slot], int(p.seed_steps[k, slot])
                squares = torch.cat([one.optimisers[slot].state[w]["exp_avg_sq"].flatten() for w in seed.parameters()])
                expected = math.sqrt(float(squares.double().mean()) / (1 - 0.999**taken))
            assert float(s.seed_gradient_rms[k, slot]) == pytest.approx(expected, rel=1e-3)


def test_the_update_is_that_of_the_last_step(toy):
    p = toy.population(KEYS[:2], steps=1)
    for _ in range(3):
        before = p.theta.clone()
        p.train_epoch()
        moved = (p.theta - before).double()
        torch.testing.assert_close(p.statistics.update_rms.double(), moved.square().mean(1).sqrt(), rtol=1e-4, atol=0)


def test_activations_are_measured_before_the_slot_on_validation(toy):
    p = toy.population(KEYS)
    toy.walk(p, KEYS, 5)
    toy.act(p, KEYS)
    alphas = [toy.SlowHost(p, k).alphas(ahead=1) for k in range(4)]
    p.train_epoch()
    for k in range(4):
        one = toy.SlowHost(p, k)
        one.sync()
        _, inputs, _ = one.forward(p.data.validation_x, alphas[k])
        for slot in range(3):
            expected = torch.tensor(slow_statistics(inputs[slot].detach().double().numpy()))
            torch.testing.assert_close(p.statistics.activations[k, slot].double(), expected, rtol=1e-4, atol=1e-5)


def test_a_fresh_episode_has_only_its_first_validation(toy):
    p = toy.population(KEYS)
    s = p.statistics
    assert s.history_length.tolist() == [1] * 4
    for k in range(4):
        assert float(s.history[k, 0]) == pytest.approx(toy.SlowHost(p, k).validation_loss([0.0] * 3), rel=1e-5)
    assert (s.activations[:, :, STD] > 0).all()
    assert not s.contribution_known.any()
    assert not s.fared_known.any()
