"""Controllers that hardly look: never, random, schedules, and the plateau rule."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from envs.growth_env import GrowthEnv
from esper.graph import GraphBatch
from esper.growth.actions import RAMPS, WAIT, ActionLayout, Verb
from esper.growth.lifecycle import Stage
from esper.tamiyo.baselines import simple
from esper.tamiyo.baselines.base import blend_waiting

Envs = Callable[..., GrowthEnv]
LAYOUT = ActionLayout(4, 5)  # of `make_env`: bypass, low_rank, widen, mlp, norm
MLP = 3
MANUAL = {"auto_blend": None}  # blending has to be asked for


def germinate(slot: int, blueprint: int = MLP) -> int:
    return LAYOUT.index(Verb.GERMINATE, slot, blueprint)


def play(env: GrowthEnv, controller: Any, seed: int = 0) -> tuple[list[list[int]], dict]:
    """One episode of every host: the actions [epochs][N], all found legal, and the accounts."""
    graph = env.reset(torch.arange(env.num_envs) + seed)
    controller.begin(env.num_envs)
    taken = []
    for _ in range(env.config.epochs):
        actions = controller.act(graph)
        assert graph.action_mask.gather(1, actions[:, None]).all()
        taken.append(actions.tolist())
        graph, _, _, _, info = env.step(actions)
    return taken, info["episodes"]


@pytest.fixture(scope="module")
def fresh(make_env: Envs) -> GraphBatch:
    """The first observation of two hosts: all slots empty."""
    return make_env(2).reset(torch.arange(2))


def without(graph: GraphBatch, host: int, *actions: int) -> GraphBatch:
    """The graph with those actions of a host illegal."""
    mask = graph.action_mask.clone()
    mask[host, list(actions)] = False
    return graph.with_actions(mask)


# ---- never and random ------------------------------------------------------------------------------------------------


def test_never_waits_and_returns_exactly_0(make_env: Envs) -> None:
    actions, episodes = play(make_env(3, epochs=6), simple.Never())
    assert actions == [[WAIT] * 3] * 6
    assert episodes["return"].tolist() == [0, 0, 0]
    assert episodes["waited"].tolist() == [6, 6, 6]


def test_random_follows_its_seed(make_env: Envs) -> None:
    env = make_env(3, epochs=8)
    one, two, other = (play(env, simple.Random(seed))[0] for seed in (1, 1, 2))
    assert one == two
    assert one != other


def test_random_is_uniform_over_the_legal_actions(fresh: GraphBatch) -> None:
    graph = fresh[[0] * 21_000]
    legal = graph.action_mask[0]
    assert int(legal.sum()) == 21  # WAIT, and five blueprints in each of four slots
    counts = torch.bincount(simple.Random(0).act(graph), minlength=len(legal))
    assert not counts[~legal].any()
    # A mean of 1000 with a standard deviation of 31
    assert (counts[legal] - 1000).abs().max() < 160


def test_random_does_not_repeat_itself_in_the_next_batch_of_episodes(make_env: Envs) -> None:
    # trainers.evaluation plays 64 episodes at a time and calls `begin` before each batch. Legality depends on the
    # actions alone here, so with the same draws episode i + 64 is played exactly as episode i.
    env = make_env(3, epochs=8)
    controller = simple.Random(1)
    assert play(env, controller, seed=0)[0] != play(env, controller, seed=3)[0]


# ---- blending --------------------------------------------------------------------------------------------------------


def test_the_first_waiting_slot_is_blended(make_env: Envs) -> None:
    env = make_env(1, lifecycle=MANUAL)
    env.reset(torch.arange(1))
    for slot in (2, 1):
        graph = env.step(torch.tensor([germinate(slot)]))[0]
    for slot in (1, 2):
        action = blend_waiting(graph, 5)
        assert action.tolist() == [LAYOUT.index(Verb.BLEND, slot, RAMPS.index(5))]
        graph = env.step(action)[0]
    assert blend_waiting(graph, 5).tolist() == [WAIT]


# ---- all_at_start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "blueprint"), [(4, 1), (6, 0)])
def test_all_at_start_fills_every_slot_as_fast_as_it_can(make_env: Envs, stages: int, blueprint: int) -> None:
    env = make_env(3, epochs=stages + 2, host={"width": [4, 4], "stages": [stages, stages]}, lifecycle=MANUAL)
    controller = simple.AllAtStart(simple.AllAtStartKnobs(), blueprint, ramp=3)
    graph = env.reset(torch.arange(3))
    controller.begin(3)
    for slot in range(stages):
        actions = controller.act(graph)
        # A seed of the epoch before could be blended; an empty slot comes first.
        assert actions.tolist() == [env.layout.index(Verb.GERMINATE, slot, blueprint)] * 3
        graph = env.step(actions)[0]
    lifecycle = env.population.lifecycle
    assert (lifecycle.stage == Stage.TRAINING).all()
    assert (lifecycle.blueprint == blueprint).all()


def test_all_at_start_fills_the_slots_that_a_host_has(make_env: Envs) -> None:
    env = make_env(6, epochs=8, host={"width": [4, 4], "stages": [2, 4]}, lifecycle={"auto_blend": 1})
    _, episodes = play(env, simple.AllAtStart(simple.AllAtStartKnobs(), MLP, 3))
    assert len(episodes["germinated"].unique()) > 1
    env.reset(torch.arange(6))
    assert torch.equal(episodes["germinated"], env.population.context.depth)


@pytest.mark.parametrize("ramp", RAMPS)
def test_all_at_start_blends_by_itself_where_nothing_else_does(make_env: Envs, ramp: int) -> None:
    env = make_env(2, epochs=8 + ramp, lifecycle=MANUAL)
    actions, episodes = play(env, simple.AllAtStart(simple.AllAtStartKnobs(), MLP, ramp))
    # Four slots are filled in turn, then blended in turn, then it waits.
    expected = [germinate(slot) for slot in range(4)]
    expected += [LAYOUT.index(Verb.BLEND, slot, RAMPS.index(ramp)) for slot in range(4)]
    assert actions == [[action] * 2 for action in expected + [WAIT] * ramp]
    assert episodes["params_ratio"].min() > 1  # the last ramp ends with the episode, and what is HOLDING is kept


# ---- periodic and best_fixed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "every"), [(0, 1), (3, 6), (2, 3), (5, 20)])
def test_periodic_germinates_in_the_next_free_slot_every_few_epochs(make_env: Envs, first: int, every: int) -> None:
    env = make_env(2, epochs=16, lifecycle={"auto_blend": 1})
    actions, _ = play(env, simple.Periodic(simple.PeriodicKnobs(first=first, every=every), 4, 3))
    when = list(range(first, 16, every))[:4]
    expected = [germinate(when.index(epoch), 4) if epoch in when else WAIT for epoch in range(16)]
    assert actions == [[action] * 2 for action in expected]


def test_periodic_blends_in_between(make_env: Envs) -> None:
    env = make_env(1, epochs=8, lifecycle=MANUAL)
    actions, _ = play(env, simple.Periodic(simple.PeriodicKnobs(first=1, every=3), MLP, 3))
    blend = [LAYOUT.index(Verb.BLEND, slot, RAMPS.index(3)) for slot in range(3)]
    assert [row[0] for row in actions] == [
        WAIT,
        germinate(0),
        blend[0],
        WAIT,
        germinate(1),
        blend[1],
        WAIT,
        germinate(2),
    ]


@pytest.mark.parametrize(("slot", "epoch"), [(0, 3), (2, 0), (3, 5)])
def test_best_fixed_does_one_thing_once(make_env: Envs, slot: int, epoch: int) -> None:
    env = make_env(2, epochs=8, lifecycle={"auto_blend": 1})
    actions, _ = play(env, simple.BestFixed(simple.BestFixedKnobs(slot=slot, epoch=epoch), 2, 3))
    expected = [germinate(slot, 2) if now == epoch else WAIT for now in range(8)]
    assert actions == [[action] * 2 for action in expected]


def test_best_fixed_does_nothing_in_a_host_without_the_slot(make_env: Envs) -> None:
    env = make_env(8, epochs=4, host={"width": [4, 4], "stages": [2, 4]})
    actions, episodes = play(env, simple.BestFixed(simple.BestFixedKnobs(slot=3, epoch=1), MLP, 3))
    env.reset(torch.arange(8))
    deep = env.population.context.depth == 4
    assert deep.any()
    assert not deep.all()
    assert torch.equal(episodes["germinated"] == 1, deep)
    # A slot that no host has is the last one.
    env = make_env(2, epochs=2)
    actions, _ = play(env, simple.BestFixed(simple.BestFixedKnobs(slot=9, epoch=0), MLP, 3))
    assert actions[0] == [germinate(3)] * 2


# ---- plateau ---------------------------------------------------------------------------------------------------------


def plateau(blueprint: int = MLP, **knobs: Any) -> simple.Plateau:
    made = simple.Plateau(simple.PlateauKnobs(**{"slope": -0.02, "patience": 3, **knobs}), blueprint, 3)
    made.begin(2)
    return made


@pytest.fixture(scope="module")
def with_slope(fresh: GraphBatch, edited: Any) -> Callable[..., GraphBatch]:
    """`with_slope((slope, known), (slope, known))`: of the two hosts, as the observation has it."""

    def make(*features: tuple[float, float], graph: GraphBatch = fresh) -> GraphBatch:
        slopes, known = zip(*features, strict=True)
        changes = {("global", "slope"): [[s] for s in slopes], ("global", "slope_known"): [[k] for k in known]}
        return edited(graph, changes)

    return make


FLAT = ((0.0, 1.0), (0.0, 1.0))


@pytest.mark.parametrize(
    ("feature", "known", "grows"),
    [
        # The feature is ten times the slope; the threshold is a slope of -0.02.
        (-0.30, 1.0, False),  # -0.030: still falling
        (-0.21, 1.0, False),  # -0.021
        (-0.19, 1.0, True),  # -0.019: has stopped
        (0.00, 1.0, True),
        (0.50, 1.0, True),  # getting worse
        (0.00, 0.0, False),  # not known yet
    ],
)
def test_plateau_reads_the_slope(with_slope: Any, feature: float, known: float, grows: bool) -> None:
    actions = plateau(2).act(with_slope((feature, known), (-9.0, 1.0)))
    assert actions.tolist() == [germinate(0, 2) if grows else WAIT, WAIT]


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.1])
def test_the_slope_knob_is_the_threshold(with_slope: Any, slope: float) -> None:
    below, above = 10 * slope - 0.01, 10 * slope + 0.01
    assert plateau(slope=slope).act(with_slope((below, 1.0), (above, 1.0))).tolist() == [WAIT, germinate(0)]


def test_plateau_takes_the_first_free_slot(fresh: GraphBatch, with_slope: Any) -> None:
    taken = without(fresh, 0, *(germinate(slot, kind) for slot in (0, 1) for kind in range(5)))
    assert plateau().act(with_slope(*FLAT, graph=taken)).tolist() == [germinate(2), germinate(0)]


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_lets_patience_epochs_pass_between_two_germinations(with_slope: Any, patience: int) -> None:
    controller = plateau(patience=patience)
    grew = [bool(controller.act(with_slope(*FLAT))[0] != WAIT) for _ in range(9)]
    # patience 3: grows in epochs 0, 4 and 8, with three epochs in between
    assert grew == [epoch % (patience + 1) == 0 for epoch in range(9)]


def test_plateau_is_patient_with_each_host_apart(with_slope: Any) -> None:
    controller = plateau()
    slopes = [((0.0, 1.0), (-9.0, 1.0)), FLAT, FLAT]
    grew = [(controller.act(with_slope(*slope)) != WAIT).tolist() for slope in slopes]
    assert grew == [[True, False], [False, True], [False, False]]


def test_begin_makes_plateau_impatient_again(with_slope: Any) -> None:
    controller = plateau()
    for _ in range(2):
        controller.begin(2)
        assert (controller.act(with_slope(*FLAT)) != WAIT).all()


def test_a_full_host_does_not_cost_plateau_its_patience(fresh: GraphBatch, with_slope: Any) -> None:
    # Nothing is germinated where no slot is free, so the next free slot is used at once.
    nothing = fresh
    for host in range(2):
        nothing = without(nothing, host, *range(1, LAYOUT.size))
    controller = plateau()
    assert not controller.act(with_slope(*FLAT, graph=nothing)).any()
    assert (controller.act(with_slope(*FLAT)) != WAIT).all()


def test_plateau_in_an_episode_grows_only_when_the_loss_is_flat(make_env: Envs) -> None:
    env = make_env(3, epochs=12, lifecycle=MANUAL, training={"steps_per_epoch": 8, "batch_size": 32})
    controller = plateau(slope=-0.04, patience=2)
    graph = env.reset(torch.arange(3))
    controller.begin(3)
    losses, grew = [env.population.validation_loss.clone()], []
    for _ in range(12):
        actions = controller.act(graph)
        grew.append(LAYOUT.table()[0][actions] == Verb.GERMINATE)
        graph = env.step(actions)[0]
        losses.append(env.population.validation_loss.clone())
    log = torch.stack(losses).log()
    for epoch, grown in enumerate(grew):
        if epoch < 3:
            assert not grown.any()
        else:
            slope = (log[epoch] - log[epoch - 3]) / 3
            assert (slope[grown] > -0.04).all()
    assert torch.stack(grew).any()
    assert not torch.stack(grew[3:6]).all()


def test_plateau_blends_what_waits_for_it(make_env: Envs) -> None:
    env = make_env(2, epochs=14, lifecycle=MANUAL)
    actions, episodes = play(env, plateau(slope=-9.0))
    # The slope is known in epoch 3 for the first time. Then: germinate, blend, wait, wait, and again.
    verbs = [Verb(int(LAYOUT.table()[0][row[0]])) for row in actions]
    assert verbs[:3] == [Verb.WAIT] * 3
    assert verbs[3:11] == [Verb.GERMINATE, Verb.BLEND, Verb.WAIT, Verb.WAIT] * 2
    assert episodes["germinated"].tolist() == [3, 3]
