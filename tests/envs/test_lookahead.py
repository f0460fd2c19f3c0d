"""Look-aheads on tiny populations: forks that disturb nothing, futures that are not peeked at, choices by hand."""

from dataclasses import fields, replace

import pytest
import torch

from envs import lookahead
from envs.contexts import KINDS
from envs.growth_env import GrowthEnv, draw_context, population_spec
from envs.lookahead import LookAhead, best, finalists, finish, germinations, redrawn, tried
from envs.points import Meter
from esper.growth.actions import WAIT, ActionLayout, Verb
from esper.growth.conditions import DECOYS, DEFECTS, NEVER, STRIKES, Condition
from esper.growth.context import Context
from esper.growth.lifecycle import is_kept
from esper.growth.observation import Observer
from esper.growth.population import Population
from esper.runtime import seeding

EPOCHS = 6
SEEDS = ["bypass", "mlp"]


class Recorder:
    """A controller that waits, or does one action at one epoch; notes when it was asked."""

    def __init__(self, epoch=0, at=None, action=WAIT):
        self.epoch, self.at, self.action, self.asked = epoch, at, action, []

    def begin(self, hosts):
        pass

    def act(self, graph):
        self.asked.append(self.epoch)
        taken = self.action if self.epoch == self.at else WAIT
        self.epoch += 1
        return torch.full((len(graph),), taken)


@pytest.fixture
def made(play):
    """`made(kind, hosts, epoch, **overrides)`: (population after `epoch` epochs, config)."""

    def make(kind="plain", hosts=4, epoch=0, measured=False, **overrides):
        config = play.config(contexts=kind, **{"epochs": EPOCHS, "blueprints": SEEDS, **overrides})
        spec = replace(population_spec(config), measured=measured)
        population = Population(spec, hosts)
        population.reset(torch.arange(hosts), draw_context(config, seeding.fold(torch.arange(hosts), 3))[0])
        for _ in range(epoch):
            population.train_epoch()
        return population, config

    return make


def layout_of(population):
    return ActionLayout(population.slots, len(population.catalogue))


def accuracy(population, split="validation"):
    return population.accuracy(torch.arange(population.hosts), split)


def plant(population, slot=0, kind=1):
    """Germinates in every host."""
    layout = layout_of(population)
    layout.execute(population, torch.full((population.hosts,), layout.index(Verb.GERMINATE, slot, kind)))


def leaves(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return [leaf for part in (state.values() if isinstance(state, dict) else state) for leaf in leaves(part)]


# ---- finish -------------------------------------------------------------------------------------------------------


def test_points_of_a_host_that_is_left_alone_by_hand(made):
    population, config = made("repair")
    outcome = finish(population.fork(torch.arange(4), future=True), config)
    curve = []
    for _ in range(EPOCHS):
        population.train_epoch()
        curve.append(accuracy(population))
    # The mean of the last three epochs, against the noise of single ones.
    torch.testing.assert_close(outcome.value, 100 * (curve[3] + curve[4] + curve[5]) / 3)
    torch.testing.assert_close(outcome.test, 100 * accuracy(population, "test"))
    assert outcome.growth.tolist() == [0.0] * 4
    assert not torch.equal(outcome.value, 100 * curve[5])


@pytest.mark.parametrize(("epoch", "averaged"), [(4, 2), (5, 1)])
def test_only_epochs_that_are_left_are_averaged(made, epoch, averaged):
    population, config = made(epoch=epoch)
    outcome = finish(population.fork(torch.arange(4), future=True), config)
    curve = []
    for _ in range(EPOCHS - epoch):
        population.train_epoch()
        curve.append(accuracy(population))
    torch.testing.assert_close(outcome.value, 100 * torch.stack(curve[-averaged:]).mean(0))


def test_growth_costs_points(made):
    population, config = made()
    plant(population)
    outcome = finish(population.fork(torch.arange(4), future=True), config)
    for _ in range(EPOCHS):
        population.train_epoch()
    growth = population.seed_parameters(is_kept(population.lifecycle.stage)) / population.host_parameters()
    assert (growth > 0.1).all()
    torch.testing.assert_close(outcome.growth, growth)
    torch.testing.assert_close(outcome.test, 100 * accuracy(population, "test") - 10 * growth)


def test_seeds_that_are_not_finished_are_removed_first(made):
    population, config = made(epoch=4)
    waited = finish(population.fork(torch.arange(4), future=True), config)
    plant(population)  # trains, then starts to blend: too late
    outcome = finish(population.fork(torch.arange(4), future=True), config)
    assert outcome.growth.tolist() == [0.0] * 4
    # A seed that has only just started to blend has not touched its host in the epoch before.
    blended, config = made(epoch=4, lifecycle={"auto_blend": None})
    plant(blended)
    alone = finish(blended.fork(torch.arange(4), future=True), config)
    assert torch.equal(alone.test, waited.test)
    assert torch.equal(alone.value, waited.value)


def test_a_controller_is_asked_before_every_epoch_and_obeyed(made):
    population, config = made(epoch=2, measured=True)
    action = layout_of(population).index(Verb.GERMINATE, 1, 0)
    recorder = Recorder(epoch=2, at=3, action=action)
    outcome = finish(population.fork(torch.arange(4), True, True), config, recorder)
    assert recorder.asked == [2, 3, 4, 5]
    population.train_epoch()
    layout_of(population).execute(population, torch.full((4,), action))
    by_hand = finish(population, config)
    for name in ("value", "test", "growth"):
        torch.testing.assert_close(getattr(outcome, name), getattr(by_hand, name))


def test_a_controller_sees_what_it_sees_in_the_environment(play, made):
    seen = []

    class Looker(Recorder):
        def act(self, graph):
            seen.append(graph)
            return super().act(graph)

    population, config = made("sequential", measured=True)
    observer = Observer(population.fork(torch.arange(4), True, True), config.epochs)
    expected = [observer()]
    for _ in range(EPOCHS - 1):
        observer.population.train_epoch()
        expected.append(observer())
    finish(population, config, Looker())
    for got, want in zip(seen, expected, strict=True):
        assert play.same_graph(got, want) == []


# ---- meter --------------------------------------------------------------------------------------------------------


def hand_accuracies(population, curves, monkeypatch):
    """Accuracies after each epoch as given: {split: [of epoch 1, of epoch 2, ...]}."""
    monkeypatch.setattr(
        population,
        "accuracy",
        lambda hosts, split: torch.full((len(hosts),), curves[split][int(population.epoch[0]) - 1]),
    )


CURVES = {"validation": [0.1, 0.2, 0.4, 0.8], "test": [0.0, 0.1, 0.3, 0.5]}


def priced(made):
    sizes = {"width": [4, 4], "stages": [3, 3]}
    population, config = made("plain", hosts=2, epochs=4, host=sizes, lifecycle={"auto_blend": None})
    population.context.priced[:] = True
    return population, config


def test_the_area_of_ungrown_hosts_is_the_mean(made, monkeypatch):
    population, config = priced(made)
    hand_accuracies(population, CURVES, monkeypatch)
    meter = Meter(population, config.epochs)
    for _ in range(4):
        meter.train_epoch(evaluate=False)
    assert meter.area.tolist() == [pytest.approx([0.375, 0.225])] * 2


def test_the_area_of_grown_hosts_by_hand(made, monkeypatch):
    population, config = priced(made)
    hand_accuracies(population, CURVES, monkeypatch)
    layout = layout_of(population)
    layout.execute(population, torch.tensor([layout.index(Verb.GERMINATE, 0, 1), WAIT]))
    outcome = finish(population, config)
    # Segment: 18 -> 4, three stages of 4, 4 -> 7 are 148 multiply-adds; the MLP of 4 -> 8 -> 4 is 64. An epoch with it
    # costs 0.3581 episodes: two whole ones, then the 0.2838 that are left, then nothing.
    area = 0.3581081 * (0.1 + 0.2) + 0.2837838 * 0.4
    assert outcome.value.tolist() == pytest.approx([100 * area, 37.5], rel=1e-5)
    # The seed has not been blended, so that it is removed and no rent is due.
    area = 0.3581081 * (0.0 + 0.1) + 0.2837838 * 0.3
    assert outcome.test.tolist() == pytest.approx([100 * area, 22.5], rel=1e-5)


def test_a_meter_may_start_later(made, monkeypatch):
    population, config = priced(made)
    hand_accuracies(population, CURVES, monkeypatch)
    population.train_epoch()
    outcome = finish(population, config)
    assert outcome.value.tolist() == pytest.approx([100 * (0.2 + 0.4 + 0.8) / 4] * 2)


def test_hosts_that_are_not_priced_are_scored_by_their_end(made, monkeypatch):
    population, config = priced(made)
    population.context.priced[0] = False
    hand_accuracies(population, CURVES, monkeypatch)
    outcome = finish(population, config)
    assert outcome.value.tolist() == pytest.approx([100 * (0.2 + 0.4 + 0.8) / 3, 37.5])
    assert outcome.test.tolist() == pytest.approx([50.0, 22.5])


# ---- trying -------------------------------------------------------------------------------------------------------


def test_germinations_are_waiting_and_every_legal_one(made):
    population, _ = made("sequential", hosts=3)
    population.context.depth = torch.tensor([2, 3, 3])
    population.context.seeds = torch.tensor([2, 0, 1])
    rows, actions = germinations(population)
    # WAIT is 0; two blueprints in each of two slots are 1 to 4, the third slot has 5 and 6.
    assert rows.tolist() == [0] * 5 + [1] + [2] * 7
    assert actions.tolist() == [*range(5), 0, *range(7)]


@pytest.mark.parametrize("future", ["none", "own", "drawn"])
def test_trying_does_not_disturb_the_host(made, future):
    population, config = made("sequential", epoch=2, measured=True)
    plant(population, 1)
    before = population.state_dict()
    untouched = [leaf.clone() for leaf in leaves(before)]
    rows, actions = germinations(population)
    tried(population, config, rows, actions, future, Recorder)
    after = leaves(population.state_dict())
    assert len(after) == len(untouched)
    assert all(torch.equal(a, b) for a, b in zip(after, untouched, strict=True))


def test_what_is_tried_is_what_would_come(made):
    population, config = made("sequential", hosts=3, epoch=2)
    action = layout_of(population).index(Verb.GERMINATE, 0, 1)
    value = tried(population, config, torch.tensor([0, 0, 2, 2]), torch.tensor([WAIT, action, action, WAIT]), "own")
    for acted in (WAIT, action):
        other = population.fork(torch.arange(3), future=True)
        layout_of(other).execute(other, torch.full((3,), acted))
        outcome = finish(other, config)
        assert outcome.value[0] == value[0 if acted == WAIT else 1]
        assert outcome.value[2] == value[3 if acted == WAIT else 2]
    assert len(set(value.tolist())) > 2


def test_values_do_not_depend_on_what_is_tried_together(made, monkeypatch):
    population, config = made("sequential", hosts=3, epoch=1)
    rows, actions = germinations(population)
    together = tried(population, config, rows, actions, "none")
    monkeypatch.setattr(lookahead, "_BATCH", 5)
    assert torch.equal(tried(population, config, rows, actions, "none"), together)
    monkeypatch.setattr(lookahead, "_BATCH", 384)
    assert torch.equal(tried(population, config, rows[3:4], actions[3:4], "none"), together[3:4])


def test_a_follower_decides_from_the_next_epoch_on(made):
    population, config = made(epoch=2, measured=True)
    made_, layout = [], layout_of(population)
    late = layout.index(Verb.GERMINATE, 1, 1)

    def follower():
        made_.append(Recorder(epoch=3, at=3, action=late))
        return made_[-1]

    early = layout.index(Verb.GERMINATE, 0, 0)
    value = tried(population, config, torch.arange(4), torch.full((4,), early), "own", follower)
    assert [controller.asked for controller in made_] == [[3, 4, 5]]
    layout.execute(population, torch.full((4,), early))
    population.train_epoch()
    layout.execute(population, torch.full((4,), late))
    assert torch.equal(finish(population, config).value, value)


# ---- futures ------------------------------------------------------------------------------------------------------


def struck(population, epoch, slot=0):
    """Every host's stage `slot` chokes at `epoch`."""
    context = population.context
    context.strike[:, slot], context.strike_epoch[:, slot] = Condition.CHOKE, epoch
    context.strike_severity[:, slot] = 0.9


def test_no_future_takes_the_strikes_out(made):
    calm, config = made(epoch=2)
    hit, _ = made(epoch=2)
    struck(hit, 3)
    rows, waits = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    expected = tried(calm, config, rows, waits, "own")
    assert torch.equal(tried(hit, config, rows, waits, "none"), expected)
    assert not torch.equal(tried(hit, config, rows, waits, "own"), expected)
    assert (hit.context.strike_epoch[:, 0] == 3).all()  # the host's own is still to come


def test_a_strike_that_has_come_stays(made):
    hit, config = made(epoch=2)
    struck(hit, 2)
    rows, waits = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    assert torch.equal(tried(hit, config, rows, waits, "none"), tried(hit, config, rows, waits, "own"))


def shifting(made, flipped, epoch=1):
    population, config = made("shift", hosts=12, epoch=0)
    keys, context = torch.arange(12), population.context
    context.flipped = torch.full((12,), flipped)
    context.first_classes[:] = population.spec.classes if flipped else 3
    context.shift_epoch[:] = 3
    population.reset(keys, context.rows(keys))
    for _ in range(epoch):
        population.train_epoch()
    return population, config


def labels_of_the_next_epoch(population):
    order = population._epoch_order().flatten(1)
    index = population.subset.gather(1, order)
    return [set(population.data.train_y[row].tolist()) for row in index]


def test_no_future_takes_the_flip_of_inputs_out(made):
    population, config = shifting(made, 0.5)
    fork = population.fork(torch.arange(12))
    for _ in range(4):
        fork.train_epoch()
        assert (fork.gain() == 1).all()
    own = population.fork(torch.arange(12), future=True)
    for _ in range(4):
        own.train_epoch()
    assert not (own.gain() == 1).all()
    rows, waits = torch.arange(12), torch.zeros(12, dtype=torch.int64)
    assert not torch.equal(
        tried(population, config, rows, waits, "none"), tried(population, config, rows, waits, "own")
    )


def test_no_future_shows_no_class_before_its_time(made):
    population, _ = shifting(made, 0.0)
    met = [set(row.nonzero().flatten().tolist()) for row in population.first]
    assert all(len(classes) == 3 for classes in met)
    assert all(a <= b for a, b in zip(labels_of_the_next_epoch(population), met, strict=True))
    fork, own = population.fork(torch.arange(12)), population.fork(torch.arange(12), future=True)
    for epoch in range(1, EPOCHS):
        assert all(a <= b for a, b in zip(labels_of_the_next_epoch(fork), met, strict=True))
        fork.train_epoch()
        own.train_epoch()
        # Until the shift both are the same.
        assert torch.equal(fork.validation_loss, own.validation_loss) == (epoch + 1 < 3)


def columns(context):
    return {f.name: getattr(context, f.name) for f in fields(Context)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epoch", [0, 9])
def test_a_drawn_future_strikes_healthy_stages_after_now_only(play, kind, epoch):
    config = play.config(contexts="sequential", epochs=24, host={"width": [4, 6], "stages": [3, 5]})
    keys = seeding.fold(torch.arange(400), 8)
    context = draw_context(play.config(contexts=kind, epochs=24, host={"width": [4, 6], "stages": [3, 5]}), keys)[0]
    before = {name: value.clone() for name, value in columns(context).items()}
    now = torch.full((400,), epoch)
    drawn = redrawn(context, config, now, salt=0)
    assert all(torch.equal(value, before[name]) for name, value in columns(context).items())  # the host's is its own
    past = context.strike_epoch <= epoch
    new = (drawn.strike_epoch < NEVER) & ~past
    assert new.any()
    assert (drawn.strike_epoch[new] > epoch).all()
    assert torch.isin(drawn.strike[new], torch.tensor(STRIKES)).all()
    assert not torch.isin(context.condition[new], torch.tensor(DEFECTS)).any()
    assert not new[torch.arange(5) >= context.depth[:, None]].any()
    # What is there now, decoys among it, stays until then.
    for name in ("condition", "severity"):
        assert torch.equal(getattr(drawn, name), getattr(context, name))
    for name in ("strike", "strike_severity", "strike_epoch"):
        assert torch.equal(getattr(drawn, name)[past], getattr(context, name)[past])
    assert (drawn.strike_epoch[~past & ~new] == NEVER).all()
    assert (drawn.shift_epoch[context.shift_epoch > epoch] > 10**6).all()
    others = {"strike", "strike_severity", "strike_epoch", "shift_epoch"}
    assert all(torch.equal(getattr(drawn, name), value) for name, value in before.items() if name not in others)
    if kind in ("repair", "shift"):
        assert torch.isin(context.condition[new], torch.tensor(DECOYS)).any()


def test_futures_differ_and_repeat(play):
    config = play.config(contexts="sequential", epochs=24)
    context = draw_context(config, seeding.fold(torch.arange(100), 8))[0]
    now = torch.zeros(100, dtype=torch.int64)
    one, again, other = (redrawn(context, config, now, salt).strike_epoch for salt in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, context.strike_epoch)  # the host's own future is not among them


def test_values_are_averaged_over_drawn_futures(made, monkeypatch):
    population, config = made("sequential", epoch=1)
    rows, waits = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    salts, honest = [], lookahead.redrawn

    def noted(context, config, epoch, salt):
        salts.append(salt)
        return honest(context, config, epoch, salt)

    monkeypatch.setattr(lookahead, "redrawn", noted)
    mean = tried(population, config, rows, waits, "drawn", futures=3)
    assert salts == [0, 1, 2]
    total = torch.zeros(4)
    for salt in range(3):
        fork = population.fork(rows, future=True)
        fork.context = honest(fork.context, config, fork.epoch, salt)
        total += finish(fork, config).value
    torch.testing.assert_close(mean, total / 3)


# ---- choosing -----------------------------------------------------------------------------------------------------

ROWS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 3, 3])
ACTIONS = torch.tensor([0, 2, 5, 0, 1, 2, 5, 0, 4])
VALUES = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0, 4.5, 6.0, 1.0, 1.5])


@pytest.mark.parametrize(
    ("margin", "expected"),
    [(0.0, [2, 5, WAIT, 4]), (0.9, [2, 5, WAIT, WAIT]), (1.5, [2, WAIT, WAIT, WAIT]), (2.0, [WAIT] * 4)],
)
def test_best_takes_the_largest_value_if_it_gains_more_than_the_margin(margin, expected):
    # Host 2 had nothing to choose from.
    order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0))
    assert best(ROWS, ACTIONS, VALUES, 4, margin).tolist() == expected
    assert best(ROWS[order], ACTIONS[order], VALUES[order], 4, margin).tolist() == expected


def test_best_waits_where_nothing_is_better():
    rows, actions = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    assert best(rows, actions, torch.tensor([2.0, 2.0, 3.0, -1.0]), 2).tolist() == [WAIT, WAIT]


def test_finalists_by_hand():
    rows, actions = finalists(ROWS, ACTIONS, VALUES, 2)
    found = [set(actions[rows == host].tolist()) for host in range(4)]
    assert found == [{0, 2, 5}, {0, 2, 5}, set(), {0, 4}]
    assert len(rows) == 8
    rows, actions = finalists(ROWS, ACTIONS, VALUES, 1)
    assert [set(actions[rows == host].tolist()) for host in range(4)] == [{0, 2}, {0, 5}, set(), {0, 4}]
    assert rows.tolist() == sorted(rows.tolist())


def test_waiting_is_a_finalist_without_taking_a_place():
    rows, actions, values = torch.zeros(4, dtype=torch.int64), torch.arange(4), torch.tensor([9.0, 1.0, 3.0, 2.0])
    assert set(finalists(rows, actions, values, 2)[1].tolist()) == {0, 2, 3}


# ---- in returns ---------------------------------------------------------------------------------------------------


@pytest.fixture
def env(play):
    """An environment of four hosts of any kind of context, three epochs into their episodes."""

    def make(kind="mixture", hosts=4):
        config = play.config(contexts=kind, epochs=8, blueprints=SEEDS)
        made = GrowthEnv(config, hosts, autoreset=False)
        graph = made.reset(torch.arange(hosts))
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            graph = made.step(torch.multinomial(graph.action_mask.float(), 1, generator=generator).squeeze(1))[0]
        return made

    return make


@pytest.mark.parametrize("kind", [*KINDS, "mixture"])
def test_a_fork_with_the_own_future_returns_what_the_environment_does(env, kind):
    made = env(kind)
    rows, actions = germinations(made.population)
    picked = torch.tensor([int((rows == row).nonzero()[-1]) for row in range(4)])
    before = made.state_dict()
    foreseen = made.fork(rows, future=True).played_out(actions)[picked]
    assert all(map(torch.equal, leaves(made.state_dict()), leaves(before)))
    made.step(actions[picked])
    while made.running:
        _, _, _, _, info = made.step(torch.zeros(4, dtype=torch.int64))
    assert torch.equal(info["episodes"]["return"], foreseen)


def test_a_fork_without_the_future_does_not_see_strikes(env):
    made = env("sequential", 16)
    waiting = torch.zeros(16, dtype=torch.int64)
    causal, own = (made.fork(torch.arange(16), future).played_out(waiting) for future in (False, True))
    coming = (made.population.context.strike_epoch >= 3).logical_and(made.population.context.strike_epoch < 8).any(1)
    assert 0 < coming.sum() < 16
    assert torch.equal(causal[~coming], own[~coming])
    assert (causal[coming] != own[coming]).any()


@pytest.mark.parametrize("margin", [0.0, 0.05, 10.0])
def test_the_look_ahead_does_what_returns_most(env, margin):
    made = env("repair", 3)
    controller = LookAhead(margin, future=True, first=0, every=1)
    controller.watch(made)
    controller.begin(3)
    rows, actions = germinations(made.population)
    returns = made.fork(rows, future=True).played_out(actions)
    for row, action in enumerate(controller.act(made._observe()).tolist()):
        mine = rows == row
        waited = returns[mine & (actions == WAIT)].item()
        top = returns[mine].max().item()
        assert action == (actions[mine][returns[mine].argmax()] if top > waited + margin else WAIT)
