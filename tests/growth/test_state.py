"""Sizes, saving and forking."""

import pytest
import torch

from esper.growth.conditions import Condition
from esper.growth.lifecycle import Stage
from esper.growth.population import Population

KEYS = [11, 12, 13, 14]
TASKS = ["mlp", "grid", "causal"]


@pytest.fixture(scope="module")
def halfway(toy):
    p = toy.population(KEYS, "causal", mixed=True)
    toy.walk(p, KEYS, 4)
    return p.state_dict()


# ---- saving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_restored_population_goes_on_bitwise(toy, task):
    whole = toy.population(KEYS, task, mixed=True)
    toy.walk(whole, KEYS, 3)
    state = whole.state_dict()
    toy.walk(whole, KEYS, 5)
    restored = toy.population([1, 2, 3, 4], task)
    toy.walk(restored, [1, 2, 3, 4], 2)
    restored.load_state_dict(state)
    assert toy.differences(restored.state_dict(), state) == []
    toy.walk(restored, KEYS, 5)
    assert toy.differences(whole.state_dict(), restored.state_dict()) == []


def test_state_holds_all_tensors_of_the_population(toy, halfway):
    p = toy.population(KEYS, "causal")
    fixed = {"seed_flops", "seed_sizes", "in_layer", "layer", "layer_sizes", "layer_flops", "fits"}
    changing = {k for k, v in vars(p).items() if isinstance(v, torch.Tensor) and k not in fixed}
    assert changing <= set(halfway)
    for part in ("lifecycle", "context", "statistics"):
        assert set(halfway[part]) == set(vars(getattr(p, part)))


def test_states_are_copies(toy, halfway):
    before = {k: v.clone() for k, v in toy.leaves(halfway).items()}
    p = toy.population(KEYS, "causal")
    p.load_state_dict(halfway)
    toy.walk(p, KEYS, 2)
    p.reset(torch.arange(4), toy.context([5, 6, 7, 8]))
    for value in toy.leaves(p._state()).values():
        value.zero_()
    assert all(torch.equal(before[k], v) for k, v in toy.leaves(halfway).items())
    state = p.state_dict()
    for value in toy.leaves(p._state()).values():
        value.fill_(1)
    assert not any(value.any() for value in toy.leaves(state).values())


def test_a_state_without_one_of_its_keys_is_refused(toy, halfway):
    p = toy.population(KEYS, "causal")
    for name in halfway:
        with pytest.raises(KeyError, match=name):
            p.load_state_dict({k: v for k, v in halfway.items() if k != name})


def test_a_state_without_one_of_its_inner_keys_is_refused(toy, halfway):
    p, accepted = toy.population(KEYS, "causal"), []
    for part in ("lifecycle", "context", "statistics"):
        for name in halfway[part]:
            inner = {k: v for k, v in halfway[part].items() if k != name}
            try:
                p.load_state_dict({**halfway, part: inner})
            except KeyError:
                continue
            accepted.append(f"{part}.{name}")
    assert accepted == []


# ---- forking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_fork_with_its_future_goes_on_like_the_original(toy, task):
    p = toy.population(KEYS, task, mixed=True)
    toy.walk(p, KEYS, 2)
    rows = [3, 1, 3]
    fork = p.fork(torch.tensor(rows), future=True, measured=True)
    bare = p.fork(torch.tensor(rows), future=True)
    assert (fork.hosts, fork.setup.measured, bare.setup.measured) == (3, True, False)
    assert p.setup.measured
    toy.walk(p, KEYS, 6)
    for one in (fork, bare):
        toy.walk(one, [KEYS[r] for r in rows], 6)
    full = p.state_dict()
    for row, host in enumerate(rows):
        assert toy.differences(fork.state_dict(), full, (row, host)) == []
        different = toy.differences(bare.state_dict(), full, (row, host))
        assert all(name.startswith("/statistics") for name in different)


@pytest.mark.parametrize("kind", [Condition.CHOKE, Condition.SATURATED, Condition.DYING], ids=lambda c: c.name)
def test_a_fork_without_its_future_is_not_struck(toy, kind):
    context = toy.strike(toy.context([11]), 0, 1, kind, epoch=3)
    p, calm = toy.population([11], context=context), toy.population([11])
    for _ in range(2):
        p.train_epoch()
        calm.train_epoch()
    fork = p.fork(torch.tensor([0]))
    for _ in range(4):
        fork.train_epoch()
        calm.train_epoch()
        assert torch.equal(fork.theta, calm.theta)
        assert torch.equal(fork.validation_loss, calm.validation_loss)
    assert (p.context.strike_epoch == 3).any()  # the original still is


@pytest.mark.parametrize("kind", [Condition.CHOKE, Condition.SATURATED, Condition.DYING], ids=lambda c: c.name)
def test_what_has_struck_stays_in_a_fork(toy, kind):
    p = toy.population([11], context=toy.strike(toy.context([11]), 0, 1, kind, epoch=3))
    for _ in range(3):
        p.train_epoch()
    for _ in range(3):  # in the epoch that it strikes, and after
        fork = p.fork(torch.tensor([0]))
        p.train_epoch()
        fork.train_epoch()
        assert torch.equal(fork.theta, p.theta)
        assert torch.equal(fork.validation_loss, p.validation_loss)


def test_a_fork_without_its_future_meets_no_new_classes_and_no_new_signs(toy):
    context = toy.context(KEYS)
    context.shift_epoch[:] = torch.tensor([3, 3, 2, 9])
    context.first_classes[:2], context.flipped[2:] = torch.tensor([1, 2]), 0.7
    p = toy.population(KEYS, context=context, data=toy.data(classes=4, train=200))
    p.context.shift_epoch[:] = 50
    late = p.fork(torch.arange(4), future=True)  # the same hosts, whose shift comes after the test
    p.context.shift_epoch[:] = torch.tensor([3, 3, 2, 9])
    for one in (p, late):
        one.train_epoch()
    fork = p.fork(torch.arange(4))
    for _ in range(4):
        fork.train_epoch()
        late.train_epoch()
        for host in range(4):
            assert torch.equal(fork.theta[host], late.theta[host]), host
            assert torch.equal(fork.validation_loss[host], late.validation_loss[host]), host


def test_what_has_shifted_stays_in_a_fork(toy):
    context = toy.context(KEYS)
    context.shift_epoch[:] = 2
    context.first_classes[:2], context.flipped[2:] = torch.tensor([1, 2]), 0.7
    p = toy.population(KEYS, context=context)
    for _ in range(2):
        p.train_epoch()
    for _ in range(2):
        fork = p.fork(torch.arange(4))
        p.train_epoch()
        fork.train_epoch()
        assert torch.equal(fork.theta, p.theta)
        assert torch.equal(fork.validation_loss, p.validation_loss)


def test_forks_share_no_memory(toy):
    p = toy.population(KEYS, mixed=True)
    toy.walk(p, KEYS, 3)
    before = p.state_dict()
    forks = [p.fork(torch.tensor([0, 1, 0]), measured=True), p.fork(torch.arange(4), future=True)]
    for fork in forks:
        keys = [11, 12, 11][: fork.hosts] if fork.hosts == 3 else KEYS
        toy.walk(fork, keys, 2)
        for value in toy.leaves(fork._state()).values():
            value.zero_()
        fork.lifecycle.stage.fill_(Stage.HOLDING)
        assert toy.differences(before, p.state_dict()) == []
    fork = p.fork(torch.tensor([2, 2]))
    theta = fork.theta.clone()
    for value in toy.leaves(p._state()).values():
        value.zero_()
    assert torch.equal(fork.theta, theta)
    fork.theta[0] = 7.0
    assert torch.equal(fork.theta[1], theta[1])


def test_copies_of_one_host_go_their_own_ways(toy):
    p = toy.population(KEYS)
    toy.walk(p, KEYS, 2)
    fork = p.fork(torch.tensor([1, 1]))
    slot = int((fork.lifecycle.stage[0] == Stage.DORMANT).nonzero()[0])
    toy.hold(fork, 0, slot, "mlp")
    fork.train_epoch()
    assert not torch.equal(fork.theta[0], fork.theta[1])
    p.train_epoch()
    assert torch.equal(fork.theta[1], p.theta[1])
    assert fork.germinated.tolist() == [int(p.germinated[1]) + 1, int(p.germinated[1])]


# ---- sizes --------------------------------------------------------------------------------------------------------


def test_seed_costs_by_hand(toy):
    p = toy.population(KEYS[:3])
    p.context.width[2] = 3
    p.reset(torch.arange(3), p.context.rows(torch.arange(3)))
    toy.plant(p, 0, 0, "glu")
    toy.plant(p, 0, 2, "norm")
    toy.plant(p, 1, 1, "mlp")
    toy.plant(p, 2, 1, "mlp")
    # At width 4: glu 6*16 + 5*4 = 116, norm 8, mlp 4*16 + 3*4 = 76; at width 3: mlp 4*9 + 3*3 = 45.
    live = p.lifecycle.blueprint >= 0
    assert p.seed_parameters(live).tolist() == [124.0, 76.0, 45.0]
    assert p.seed_parameters(live & toy.at(p, 0, 2)).tolist() == [8.0, 0.0, 0.0]
    # glu 6*16, norm 4*4, mlp 4*16 and 4*9
    assert p.seed_flops_now(live).tolist() == [112.0, 64.0, 36.0]


def test_host_costs_by_hand(toy):
    context = toy.context(KEYS[:3], 4, 3)
    context.width[:], context.depth[:] = torch.tensor([4, 4, 2]), torch.tensor([3, 1, 2])
    p = toy.population(KEYS[:3], context=context)
    # 5 -> w, depth times w -> w, w -> 3
    assert p.host_parameters().tolist() == [24 + 3 * 20 + 15, 24 + 20 + 15, 12 + 2 * 6 + 9]
    assert p.host_flops().tolist() == [20 + 48 + 12, 20 + 16 + 12, 10 + 8 + 6]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_decisions_stay_on_the_cpu_and_parameters_on_the_device(toy):
    p = Population(toy.spec(), 2, "cuda")
    here = {k.split("/")[1] for k, v in toy.leaves(p._state()).items() if v.device.type == "cpu"}
    assert here == {"epoch", "germinated", "first_size", "lifecycle", "context", "extra_flops"}


def test_an_unknown_blueprint_is_refused(toy):
    spec = toy.spec()
    object.__setattr__(spec, "catalogue", ("mlp", "conv9"))
    with pytest.raises(KeyError, match=r"conv9.*available"):
        Population(spec, 1)
