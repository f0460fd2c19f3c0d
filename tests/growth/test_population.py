import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esper.growth.epoch import EpochRun
from esper.growth.lifecycle import Event, Stage
from esper.growth.state import Context

MLP, GLU, LOW_RANK, NORM = range(4)
KEYS = [11, 12, 13, 14, 15, 16, 17, 18]
GRADIENT = 10.0  # Adam's first moment after one step is (1 - 0.9) * gradient


def close(a, b, rtol=1e-4, atol=2e-6):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ---- neighbours ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight(toy):
    """Eight hosts after 16 epochs of random actions, with the stages and blueprints that were seen on the way."""
    p, seen = toy.population(KEYS), set()
    for _ in range(16):
        toy.act(p, KEYS)
        seen |= set(zip(p.lifecycle.stage.flatten().tolist(), p.lifecycle.blueprint.flatten().tolist(), strict=True))
        p.train_epoch()
    return p, seen


def test_the_random_walk_meets_every_stage_with_every_blueprint(eight):
    seen = {(Stage(stage).name, kind) for stage, kind in eight[1]}
    assert {(s, b) for s in ("TRAINING", "BLENDING", "HOLDING") for b in range(4)} <= seen
    assert {stage for stage, _ in seen} == {stage.name for stage in Stage}


@pytest.mark.parametrize("members", [[0], [3], [7], [4, 0, 6], [7, 2, 5]], ids=str)
def test_a_host_is_bitwise_the_same_beside_any_neighbours(toy, eight, members):
    keys = [KEYS[k] for k in members]
    p = toy.population(keys)
    toy.walk(p, keys, 16)
    for row, k in enumerate(members):
        assert toy.differences(p.state_dict(), eight[0].state_dict(), (row, k)) == []


def test_a_lone_glu_is_bitwise_the_same_with_an_odd_batch(toy):
    # 5 x 7 x 6 and 1 x 7 x 6 values do not fill whole SIMD vectors: other elements fall into the scalar tail.
    together, alone = toy.population(KEYS[:5], width=3, batch=7), toy.population(KEYS[:1], width=3, batch=7)
    for p in (together, alone):
        for host in range(p.hosts):
            toy.hold(p, host, 0, GLU)
        for _ in range(4):
            p.train_epoch()
    assert toy.differences(alone.state_dict(), together.state_dict(), (0, 0)) == []


def test_layer_statistics_are_bitwise_the_same_alone_with_many_inputs(toy):
    data = toy.data(inputs=64, classes=10)
    together, alone = toy.population(KEYS, data, width=5), toy.population(KEYS[:1], data, width=5)
    for p in (together, alone):
        p.train_epoch()
    assert toy.differences(vars(alone.statistics), vars(together.statistics), (0, 0)) == []


def test_train_loss_is_bitwise_the_same_alone_with_many_steps(toy):
    together = toy.population(KEYS, steps=10)
    together.train_epoch()
    for row, key in enumerate(KEYS):
        alone = toy.population([key], steps=10)
        alone.train_epoch()
        assert torch.equal(alone.statistics.train_loss[0], together.statistics.train_loss[row])


def test_training_needs_no_gradient_mode_of_the_caller(toy):
    usual, without = toy.population(KEYS[:2]), toy.population(KEYS[:2])
    toy.walk(usual, KEYS[:2], 4)
    with torch.no_grad():
        toy.walk(without, KEYS[:2], 4)
    assert toy.differences(usual.state_dict(), without.state_dict()) == []


def test_unobserved_hosts_train_as_observed_ones(toy, eight):
    p = toy.population(KEYS, observed=3)
    toy.walk(p, KEYS, 16)
    state, full = p.state_dict(), eight[0].state_dict()
    statistics, all_statistics = state.pop("statistics"), full.pop("statistics")
    assert toy.differences(state, full) == []
    assert toy.differences(statistics, {k: v[:3] for k, v in all_statistics.items()}) == []


def test_reset_of_some_hosts_leaves_the_others_and_starts_afresh(toy):
    p = toy.population(KEYS[:4])
    toy.walk(p, KEYS[:4], 8)
    before = p.state_dict()
    p.reset(torch.tensor([2, 0]), toy.context([31, 32]))
    fresh = toy.population([31, 32])
    for host in (1, 3):
        assert toy.differences(before, p.state_dict(), (host, host)) == []
    for _ in range(6):
        toy.act(p, [32, 12, 31, 14], "again")
        toy.act(fresh, [31, 32], "again")
        p.train_epoch()
        fresh.train_epoch()
    ignored = ("/seed_theta", "/seed_exp_avg", "/seed_steps")  # rows of dead seeds keep what they had
    for host, row in ((2, 0), (0, 1)):
        different = toy.differences(p.state_dict(), fresh.state_dict(), (host, row))
        assert [name for name in different if not name.startswith(ignored)] == []


def test_two_keys_differ_in_everything_drawn(toy):
    p = toy.population([1, 1])
    p.reset(torch.arange(2), Context(torch.tensor([5, 6]), *(torch.stack([v, v]) for v in one_context())))
    assert not torch.isclose(p.theta[0], p.theta[1]).any()
    assert (p.subset[0] != p.subset[1]).float().mean() > 0.8
    assert not torch.equal(p._epoch_order()[0], p._epoch_order()[1])
    changed = p.labels != p.data.train_y[p.subset]
    original = torch.zeros_like(changed).scatter(1, p.subset, changed)
    assert not torch.equal(original[0], original[1])


def one_context():
    return torch.tensor(0.005), torch.tensor(40), torch.tensor(0.5)


# ---- an independent reference -------------------------------------------------------------------------------------


def test_ungrown_hosts_are_those_of_torch_optim_adam(toy):
    p = toy.population(KEYS[:3])
    nets, optimisers = [], []
    for k in range(3):
        parts = toy.SlowHost(p, k).body
        layers = [m for part in parts[:-1] for m in (part, nn.ReLU())]
        nets.append(nn.Sequential(*layers, parts[-1]))
        optimisers.append(torch.optim.Adam(nets[k].parameters(), lr=float(p.context.learning_rate[k])))
    for _ in range(4):
        order, losses = p._epoch_order(), torch.zeros(3)
        for k, (net, optimiser) in enumerate(zip(nets, optimisers, strict=True)):
            for batch in order[k]:
                loss = F.cross_entropy(net(p.data.train_x[p.subset[k][batch]]), p.labels[k][batch])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses[k] += loss.detach() / len(order[k])
        p.train_epoch()
        close(p.statistics.train_loss, losses, rtol=1e-5)
    for k, (net, optimiser) in enumerate(zip(nets, optimisers, strict=True)):
        close(p.theta[k], toy.SlowHost.flat(net), rtol=1e-5)
        close(p.exp_avg[k], toy.SlowHost.flat(net, lambda w, o=optimiser: o.state[w]["exp_avg"]), atol=1e-6)
        close(p.exp_avg_sq[k], toy.SlowHost.flat(net, lambda w, o=optimiser: o.state[w]["exp_avg_sq"]), atol=1e-8)
        with torch.no_grad():
            close(p.validation_loss[k], F.cross_entropy(net(p.data.validation_x), p.data.validation_y), rtol=1e-5)


def assert_same_as_slow(p, slow, host):
    close(p.theta[host], slow.flat(slow.body))
    for slot, seed in slow.seeds.items():
        kind = int(p.lifecycle.blueprint[host, slot])
        close(p.seed_theta[kind][host, slot], slow.flat(seed))
    close(float(p.statistics.train_loss[host]), slow.loss, rtol=1e-5)
    close(float(p.validation_loss[host]), slow.validation_loss(slow.alphas(ahead=0)), rtol=1e-5)


@pytest.mark.parametrize("tag", [1, 2])
def test_grown_hosts_are_those_of_a_loop_over_hosts(toy, tag):
    keys = KEYS[:5]
    p = toy.population(keys)
    slow = [toy.SlowHost(p, k) for k in range(5)]
    for _ in range(9):
        toy.act(p, keys, tag)
        alphas = [one.alphas(ahead=1) for one in slow]
        for one in slow:
            one.epoch()
        p.train_epoch()
        for host, one in enumerate(slow):
            close(p.lifecycle.alpha[host], torch.tensor(alphas[host]))
            # Adam blows up the rounding of gradients near 0, but a wrong step would show in the third decimal.
            close(p.theta[host], one.flat(one.body), atol=5e-5)
            for slot, seed in one.seeds.items():
                kind = int(p.lifecycle.blueprint[host, slot])
                close(p.seed_theta[kind][host, slot], one.flat(seed), atol=5e-5)
            close(float(p.statistics.train_loss[host]), one.loss, rtol=1e-5)
            close(float(p.validation_loss[host]), one.validation_loss(alphas[host]), rtol=1e-5)


def test_a_holding_mlp_trains_as_in_torch(toy):
    p = toy.population(KEYS[:2], steps=20)
    toy.hold(p, 0, 1, MLP)
    slow = toy.SlowHost(p, 0)
    slow.epoch()
    p.train_epoch()
    assert_same_as_slow(p, slow, 0)


@pytest.mark.parametrize("kind", [MLP, GLU, LOW_RANK, NORM])
def test_a_blended_seed_adds_alpha_times_delta_and_learns(toy, kind):
    p = toy.population(KEYS[:2], steps=1)
    toy.hold(p, 0, 1, kind)
    # Back into BLENDING, with 1 of 5 epochs behind it: alpha is 2/5 in the coming epoch.
    for name, value in (("stage", Stage.BLENDING), ("ramp", 5), ("epochs", 1), ("alpha", 0.2)):
        getattr(p.lifecycle, name)[0, 1] = value
    batch = p._epoch_order()[0, 0]
    x, y = p.data.train_x[p.subset[0, batch]], p.labels[0, batch]
    host = toy.SlowHost(p, 0)
    seed = host.seed_from(kind, p.seed_theta[kind][0, 1])
    h = host.body[1](host.body[0](x).relu()).relu()
    loss = F.cross_entropy(host.body[3](host.body[2](h + 0.4 * seed(h)).relu()), y)
    loss.backward()
    p.train_epoch()
    close(p.statistics.train_loss[0], loss.detach())
    close(p.seed_exp_avg[kind][0, 1] * GRADIENT, host.flat(seed, lambda w: w.grad))
    close(p.exp_avg[0] * GRADIENT, host.flat(host.body, lambda w: w.grad))
    assert p.seed_exp_avg[kind][0, 1].abs().max() > 0
    with torch.no_grad():
        after = toy.SlowHost(p, 0)
        seed = after.seed_from(kind, p.seed_theta[kind][0, 1])
        h = after.body[1](after.body[0](p.data.validation_x).relu()).relu()
        logits = after.body[3](after.body[2](h + 0.4 * seed(h)).relu())
        close(p.validation_loss[0], F.cross_entropy(logits, p.data.validation_y))


# ---- TRAINING -----------------------------------------------------------------------------------------------------


def twins(toy, count, **kwargs):
    p = toy.population([11] * count, **kwargs)
    assert toy.differences(p.state_dict(), p.state_dict(), (0, count - 1)) == []
    return p


def test_seeds_in_training_leave_the_host_bitwise_alone(toy):
    p = twins(toy, 6)
    for kind in range(4):
        toy.plant(p, kind, kind % 3, kind)
    for slot, kind in enumerate((GLU, NORM, MLP)):
        toy.plant(p, 4, slot, kind)
    start = [seed.clone() for seed in p.seed_theta]
    for _ in range(3):
        p.train_epoch()
        for host in range(5):
            for name in ("theta", "exp_avg", "exp_avg_sq", "validation_loss"):
                assert torch.equal(getattr(p, name)[host], getattr(p, name)[5])
            assert torch.equal(p.statistics.train_loss[host], p.statistics.train_loss[5])
    for kind in range(4):
        moved = p.seed_theta[kind][kind, kind % 3] != start[kind][kind, kind % 3]
        assert moved.float().mean() > 0.5


@pytest.mark.parametrize("kind", [MLP, GLU, LOW_RANK, NORM])
def test_gradient_of_a_seed_in_training_is_the_straight_through_one(toy, kind):
    # Twin with the seed fully there in slot 2, so that the signal has to come back through another seed.
    p = toy.population([11], steps=1)
    toy.hold(p, 0, 2, MLP)
    toy.plant(p, 0, 1, kind)
    g = torch.Generator().manual_seed(kind)
    p.seed_theta[kind][0, 1] += 0.3 * torch.randn(p.seed_theta[kind][0, 1].shape, generator=g)
    host = toy.SlowHost(p, 0)
    later = host.seed_from(MLP, p.seed_theta[MLP][0, 2])
    seed = host.seed_from(kind, p.seed_theta[kind][0, 1])
    batch = p._epoch_order()[0, 0]
    x, y = p.data.train_x[p.subset[0, batch]], p.labels[0, batch]
    h = host.body[1](host.body[0](x).relu()).relu().detach()
    delta = seed(h)
    grafted = h + (delta - delta.detach())
    h2 = host.body[2](grafted).relu()
    F.cross_entropy(host.body[3](h2 + later(h2)), y).backward()
    p.train_epoch()
    close(p.seed_exp_avg[kind][0, 1] * GRADIENT, host.flat(seed, lambda w: w.grad))
    assert p.seed_exp_avg[kind][0, 1].abs().max() > 0


# ---- absent and culled seeds --------------------------------------------------------------------------------------


def test_absent_seeds_cost_nothing_and_have_no_influence(toy):
    p, clean = toy.population(KEYS[:2]), toy.population(KEYS[:2])
    for kind in range(4):
        for state in (p.seed_theta, p.seed_exp_avg, p.seed_exp_avg_sq):
            state[kind].fill_(float("nan"))
    run = EpochRun(p)
    assert run.groups == []
    assert run.theta.numel() == p.theta.numel()
    toy.plant(p, 1, 0, LOW_RANK)
    toy.plant(clean, 1, 0, LOW_RANK)
    # The vector that Adam runs over: two hosts and one seed of 4*2 + 2*4 parameters.
    assert EpochRun(p).theta.numel() == p.theta.numel() + 16
    for _ in range(3):
        p.train_epoch()
        clean.train_epoch()
    poisoned_rows = ("/seed_theta", "/seed_exp_avg")
    different = toy.differences(p.state_dict(), clean.state_dict())
    assert [name for name in different if not name.startswith(poisoned_rows)] == []
    assert torch.equal(p.seed_theta[LOW_RANK][1, 0], clean.seed_theta[LOW_RANK][1, 0])


def test_a_seed_in_training_takes_no_part_in_evaluation(toy):
    p = twins(toy, 2)
    for host in range(2):
        toy.hold(p, host, 2, NORM)
        p.seed_theta[NORM][host, 2] = torch.linspace(0.5, 2, 8)
    toy.plant(p, 0, 1, MLP)
    p.seed_theta[MLP][0, 1] = float("nan")  # which 0 * delta would not hide
    p._evaluate(torch.arange(2))
    assert torch.equal(p.validation_loss[0], p.validation_loss[1])
    assert torch.equal(p.statistics.contribution[0], p.statistics.contribution[1])


def test_a_seed_culled_out_of_training_leaves_no_trace_but_its_flops(toy):
    p = twins(toy, 3)
    toy.plant(p, 0, 1, MLP)
    p.train_epoch()
    p.train_epoch()
    p.lifecycle.fire(Event.CULL, toy.at(p, 0, 1))
    for _ in range(3):
        p.train_epoch()
    for name in ("theta", "exp_avg", "exp_avg_sq", "validation_loss"):
        assert torch.equal(getattr(p, name)[0], getattr(p, name)[2])
    # two epochs of an mlp at width 4: 2 * (4*8 + 8*4)
    assert p.extra_flops.tolist() == [128.0, 0.0, 0.0]


def test_a_culled_blended_seed_stops_counting_in_loss_and_compute(toy):
    p = toy.population([11])
    toy.hold(p, 0, 1, MLP)
    p.train_epoch()
    p.lifecycle.fire(Event.CULL, toy.at(p, 0, 1))
    slow = toy.SlowHost(p, 0)
    assert abs(float(p.validation_loss) - slow.validation_loss([0, 0, 0])) > 1e-3  # it mattered
    p.seed_theta[MLP].fill_(float("nan"))
    p.train_epoch()
    close(float(p.validation_loss), toy.SlowHost(p, 0).validation_loss([0, 0, 0]))
    assert p.extra_flops.tolist() == [64.0]


def test_flops_are_charged_for_every_live_stage_and_stay_charged(toy):
    p = toy.population(KEYS[:4])
    cost = [4 * 8 + 8 * 4, 3 * 4 * 8, 4 * 2 + 2 * 4, 4 * 4]  # mlp, glu, low_rank, norm at width 4
    expected = [0.0] * 4
    for _ in range(12):
        toy.act(p, KEYS[:4], "flops")
        for host in range(4):
            for slot in range(3):
                stage = Stage(int(p.lifecycle.stage[host, slot]))
                if stage in (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED):
                    expected[host] += cost[int(p.lifecycle.blueprint[host, slot])]
        p.train_epoch()
        assert p.extra_flops.tolist() == expected
    assert min(expected) > 0


def test_seed_parameters_by_hand(toy):
    p = toy.population(KEYS[:2])
    toy.plant(p, 0, 0, GLU)
    toy.plant(p, 0, 2, NORM)
    toy.plant(p, 1, 1, MLP)
    everywhere = torch.ones(2, 3, dtype=torch.bool)
    # glu 6*16 + 5*4 = 116, norm 8, mlp 4*16 + 3*4 = 76; a dormant slot in the mask counts nothing
    live = p.lifecycle.blueprint >= 0
    assert p.seed_parameters(live & everywhere).tolist() == [124.0, 76.0]
    assert p.seed_parameters(live & toy.at(p, 0, 2)).tolist() == [8.0, 0.0]


def test_a_second_seed_in_a_slot_starts_afresh(toy):
    p = toy.population([11])
    toy.plant(p, 0, 1, MLP)
    first = p.seed_theta[MLP][0, 1].clone()
    p.train_epoch()
    p.lifecycle.fire(Event.CULL, toy.at(p, 0, 1))
    p.train_epoch()
    p.train_epoch()
    toy.plant(p, 0, 1, MLP)
    assert not torch.isclose(p.seed_theta[MLP][0, 1], first).any()
    assert int(p.seed_steps[0, 1]) == 0
    assert (p.seed_exp_avg[MLP][0, 1] == 0).all()
    assert (p.seed_exp_avg_sq[MLP][0, 1] == 0).all()


def test_seeds_start_differently_in_each_slot_and_host(toy):
    p = toy.population(KEYS[:2])
    for host in range(2):
        for slot in range(3):
            toy.plant(p, host, slot, MLP)
    rows = p.seed_theta[MLP].flatten(0, 1)
    assert len(rows[:, 0].unique()) == 6


def test_germinating_in_a_live_slot_changes_nothing(toy):
    p = toy.population(KEYS[:2])
    toy.plant(p, 0, 1, MLP)
    p.train_epoch()
    before = p.state_dict()
    with pytest.raises(ValueError, match="GERMINATE is not legal in stage TRAINING"):
        p.germinate(torch.ones(2, 3, dtype=torch.bool), torch.full((2, 3), GLU))
    assert toy.differences(before, p.state_dict()) == []


def test_remove_unfinished_keeps_only_what_is_finished(toy):
    p = toy.population([11, 11, 12])
    for host in range(3):
        toy.hold(p, host, 0, MLP)
        toy.hold(p, host, 1, GLU)
        p.lifecycle.stage[host, 1] = Stage.BLENDING
        p.lifecycle.ramp[host, 1] = 8
    toy.plant(p, 1, 2, NORM)
    p.train_epoch()
    before = p.state_dict()
    p.remove_unfinished(torch.tensor([False, True, False]))
    hs, bl, em = Stage.HOLDING, Stage.BLENDING, Stage.EMBARGOED
    assert p.lifecycle.stage.tolist() == [[hs, bl, Stage.DORMANT], [hs, em, em], [hs, bl, Stage.DORMANT]]
    for host in (0, 2):
        assert toy.differences(before, p.state_dict(), (host, host)) == []
    slow = toy.SlowHost(p, 1)
    slow.sync()
    assert list(slow.seeds) == [0]
    close(float(p.validation_loss[1]), slow.validation_loss([1.0, 0, 0]))
    assert abs(float(p.validation_loss[1] - before["validation_loss"][1])) > 1e-4


# ---- contributions ------------------------------------------------------------------------------------------------


def test_contributions_are_the_loss_without_minus_the_loss(toy):
    keys = KEYS[:5]
    p, checked = toy.population(keys), 0
    for _ in range(10):
        toy.act(p, keys, "contribution")
        slow = [toy.SlowHost(p, k) for k in range(5)]
        alphas = [one.alphas(ahead=1) for one in slow]
        p.train_epoch()
        for host, alpha in enumerate(alphas):
            one = toy.SlowHost(p, host)
            one.sync()
            known = [a > 0 for a in alpha]
            assert p.statistics.contribution_known[host].tolist() == known
            for slot in range(3):
                if known[slot]:
                    without = [0.0 if s == slot else a for s, a in enumerate(alpha)]
                    expected = one.validation_loss(without) - one.validation_loss(alpha)
                    close(float(p.statistics.contribution[host, slot]), expected, atol=3e-6)
                    assert int(p.statistics.contribution_age[host, slot]) == 0
                    checked += sum(known) > 1  # with another seed there, which has to stay as it is
    assert checked > 5
