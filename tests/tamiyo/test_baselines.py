"""The baseline controllers, in real episodes and on graphs whose features are set by hand."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from envs.growth_env import GrowthEnv
from esper.graph import GraphBatch
from esper.graph.schema import SCHEMA
from esper.growth.actions import RAMPS, WAIT, ActionLayout, Verb
from esper.growth.lifecycle import Stage
from esper.runtime.errors import ConfigError
from esper.tamiyo import baselines
from esper.tamiyo.baselines import AllAtStartConfig, BaselinesConfig, Controller, PlateauConfig

Envs = Callable[..., GrowthEnv]
MANUAL = {"auto_blend": None}  # blending has to be asked for


def verbs_of(env: GrowthEnv, actions: Tensor) -> list[Verb]:
    return [Verb(verb) for verb in env.layout.table()[0][actions].tolist()]


def play(env: GrowthEnv, controller: Controller, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """One episode of every host: the actions [epochs, N], all found legal, and the accounts."""
    graph = env.reset(torch.arange(env.num_envs) + seed)
    controller.begin(env.num_envs)
    taken = []
    for _ in range(env.config.epochs):
        actions = controller.act(graph)
        assert graph.action_mask.gather(1, actions[:, None]).all()
        taken.append(actions)
        graph, _, _, _, info = env.step(actions)
    return torch.stack(taken), info["episodes"]


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lifecycle", [{"auto_blend": 1}, MANUAL], ids=["auto_blend", "manual"])
@pytest.mark.parametrize("name", baselines.NAMES)
def test_a_whole_episode_is_legal(make_env: Envs, name: str, lifecycle: dict) -> None:
    env = make_env(3, epochs=12, lifecycle=lifecycle)
    actions, episodes = play(env, baselines.make(name, BaselinesConfig(), 0))
    assert actions.dtype == torch.int64
    assert episodes["length"].tolist() == [12, 12, 12]


def test_an_unknown_name_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(KeyError) as error:
        baselines.make("best", BaselinesConfig(), 0)
    assert all(name in str(error.value) for name in ("best", *baselines.NAMES))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BaselinesConfig(ramp=4), r"here\.ramp=4"),
        (BaselinesConfig(all_at_start=AllAtStartConfig(blueprint=4)), r"here\.all_at_start\.blueprint=4.*0 to 3"),
        (BaselinesConfig(plateau=PlateauConfig(blueprint=-1)), r"here\.plateau\.blueprint=-1.*0 to 3"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(config: BaselinesConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.validate(4, "here")


def test_good_settings_pass() -> None:
    BaselinesConfig(8, AllAtStartConfig(0), PlateauConfig(3)).validate(4, "here")


@pytest.mark.parametrize("name", ["never", "all_at_start", "plateau"])
def test_actions_are_chosen_on_the_device_of_the_graph(make_env: Envs, name: str) -> None:
    # "meta" stands for any device but the CPU: mixing the two is an error there as well.
    graph = make_env(2).reset(torch.arange(2)).to("meta")
    controller = baselines.make(name, BaselinesConfig(), 0)
    controller.begin(2)
    assert controller.act(graph).device.type == "meta"


# ---- never -----------------------------------------------------------------------------------------------------------


def test_never_returns_exactly_0(make_env: Envs) -> None:
    actions, episodes = play(make_env(3, epochs=6), baselines.make("never", BaselinesConfig(), 0))
    assert not actions.any()
    assert episodes["return"].tolist() == [0, 0, 0]
    assert episodes["waited"].tolist() == [6, 6, 6]


# ---- random ----------------------------------------------------------------------------------------------------------


def test_random_follows_its_seed(make_env: Envs) -> None:
    env = make_env(3, epochs=8)
    one, two, other = (play(env, baselines.make("random", BaselinesConfig(), seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_random_is_uniform_over_the_legal_actions(make_env: Envs) -> None:
    graph = make_env(1).reset(torch.arange(1))[[0] * 17_000]
    legal = graph.action_mask[0]
    assert int(legal.sum()) == 17  # WAIT, and four blueprints in each of four slots
    counts = torch.bincount(baselines.make("random", BaselinesConfig(), 0).act(graph), minlength=len(legal))
    assert not counts[~legal].any()
    # A mean of 1000 with a standard deviation of 31
    assert (counts[legal] - 1000).abs().max() < 160


def test_random_does_not_repeat_itself_in_the_next_batch_of_episodes(make_env: Envs) -> None:
    # trainers.evaluation plays 64 episodes at a time and calls `begin` before each batch. Legality depends on the
    # actions alone, so with the same draws episode i + 64 is played exactly as episode i.
    env = make_env(3, epochs=8)
    controller = baselines.make("random", BaselinesConfig(), 1)
    assert not torch.equal(play(env, controller, seed=0)[0], play(env, controller, seed=3)[0])


# ---- all_at_start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "blueprint"), [(4, 1), (6, 0)])
def test_all_at_start_fills_every_slot_as_fast_as_it_can(make_env: Envs, stages: int, blueprint: int) -> None:
    env = make_env(3, epochs=stages + 2, host={"width": 4, "stages": stages}, lifecycle=MANUAL)
    controller = baselines.make("all_at_start", BaselinesConfig(all_at_start=AllAtStartConfig(blueprint)), 0)
    graph = env.reset(torch.arange(3))
    controller.begin(3)
    for slot in range(stages):
        actions = controller.act(graph)
        # A seed of the epoch before could be blended; an empty slot comes first.
        assert actions.tolist() == [env.layout.index(Verb.GERMINATE, slot, blueprint)] * 3
        graph = env.step(actions)[0]
    lifecycle = env.population.lifecycle
    assert (lifecycle.stage[:3] == Stage.TRAINING).all()
    assert (lifecycle.blueprint[:3] == blueprint).all()


@pytest.mark.parametrize("ramp", RAMPS)
def test_all_at_start_blends_by_itself_where_nothing_else_does(make_env: Envs, ramp: int) -> None:
    env = make_env(2, epochs=8 + ramp, lifecycle=MANUAL)
    actions, episodes = play(env, baselines.make("all_at_start", BaselinesConfig(ramp=ramp), 0))
    # Four slots are filled in turn, then blended in turn, then it waits.
    expected = [env.layout.index(Verb.GERMINATE, slot, 1) for slot in range(4)]
    expected += [env.layout.index(Verb.BLEND, slot, RAMPS.index(ramp)) for slot in range(4)]
    assert actions.T.tolist() == [expected + [WAIT] * ramp] * 2
    assert episodes["params_ratio"].min() > 1  # the last ramp ends with the episode, and what is HOLDING is kept


def test_all_at_start_waits_where_blending_starts_by_itself(make_env: Envs) -> None:
    env = make_env(2, epochs=12, lifecycle={"auto_blend": 1, "auto_ramp": 3})
    actions, episodes = play(env, baselines.make("all_at_start", BaselinesConfig(), 0))
    assert not actions[4:].any()
    assert episodes["germinated"].tolist() == [4, 4]
    assert episodes["culled"].tolist() == [0, 0]


# ---- plateau ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(make_env: Envs) -> GraphBatch:
    """The first observation of two hosts: all slots empty."""
    return make_env(2).reset(torch.arange(2))


def with_slope(graph: GraphBatch, *features: tuple[float, float]) -> GraphBatch:
    """The graph with (slope, slope_known) of each host replaced."""
    values = graph.x["global"].clone()
    for host, (slope, known) in enumerate(features):
        values[host, 0, SCHEMA.feature("global", "slope")] = slope
        values[host, 0, SCHEMA.feature("global", "slope_known")] = known
    return GraphBatch({**graph.x, "global": values}, graph.node_mask, graph.edges, graph.action_mask)


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
def test_plateau_reads_the_slope(fresh: GraphBatch, feature: float, known: float, grows: bool) -> None:
    controller = baselines.make("plateau", BaselinesConfig(plateau=PlateauConfig(2, slope=-0.02)), 0)
    controller.begin(2)
    actions = controller.act(with_slope(fresh, (feature, known), (-9.0, 1.0)))
    germinate = ActionLayout(4, 4).index(Verb.GERMINATE, 0, 2)
    assert actions.tolist() == [germinate if grows else WAIT, WAIT]


def test_plateau_takes_the_first_free_slot(fresh: GraphBatch) -> None:
    layout = ActionLayout(4, 4)
    mask = fresh.action_mask.clone()
    mask[0, [layout.index(Verb.GERMINATE, slot, kind) for slot in (0, 1) for kind in range(4)]] = False
    controller = baselines.make("plateau", BaselinesConfig(), 0)
    controller.begin(2)
    actions = controller.act(replace(with_slope(fresh, (0.0, 1.0), (0.0, 1.0)), action_mask=mask))
    assert actions.tolist() == [layout.index(Verb.GERMINATE, 2, 1), layout.index(Verb.GERMINATE, 0, 1)]


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_lets_patience_epochs_pass_between_two_germinations(fresh: GraphBatch, patience: int) -> None:
    controller = baselines.make("plateau", BaselinesConfig(plateau=PlateauConfig(patience=patience)), 0)
    controller.begin(2)
    flat = with_slope(fresh, (0.0, 1.0), (0.0, 1.0))
    grew = [bool(controller.act(flat)[0] != WAIT) for _ in range(9)]
    # patience 3: grows in epochs 0, 4 and 8, with three epochs in between
    assert grew == [epoch % (patience + 1) == 0 for epoch in range(9)]


def test_plateau_is_patient_with_each_host_apart(fresh: GraphBatch) -> None:
    controller = baselines.make("plateau", BaselinesConfig(), 0)
    controller.begin(2)
    slopes = [((0.0, 1.0), (-9.0, 1.0)), ((0.0, 1.0), (0.0, 1.0)), ((0.0, 1.0), (0.0, 1.0))]
    grew = [(controller.act(with_slope(fresh, *slope)) != WAIT).tolist() for slope in slopes]
    assert grew == [[True, False], [False, True], [False, False]]


def test_begin_makes_plateau_impatient_again(fresh: GraphBatch) -> None:
    controller = baselines.make("plateau", BaselinesConfig(), 0)
    flat = with_slope(fresh, (0.0, 1.0), (0.0, 1.0))
    for _ in range(2):
        controller.begin(2)
        assert (controller.act(flat) != WAIT).all()


def test_a_full_host_does_not_cost_plateau_its_patience(fresh: GraphBatch) -> None:
    # Nothing is germinated where no slot is free, so the next free slot is used at once.
    wait_only = torch.zeros_like(fresh.action_mask)
    wait_only[:, WAIT] = True
    controller = baselines.make("plateau", BaselinesConfig(), 0)
    controller.begin(2)
    flat = with_slope(fresh, (0.0, 1.0), (0.0, 1.0))
    assert not controller.act(replace(flat, action_mask=wait_only)).any()
    assert (controller.act(flat) != WAIT).all()


def test_plateau_in_an_episode_grows_only_when_the_loss_is_flat(make_env: Envs) -> None:
    env = make_env(3, epochs=14, lifecycle=MANUAL, training={"steps_per_epoch": 10})
    controller = baselines.make("plateau", BaselinesConfig(plateau=PlateauConfig(slope=-0.08, patience=2)), 0)
    graph = env.reset(torch.arange(3))
    controller.begin(3)
    losses, grew = [env.population.validation_loss[:3].clone()], []
    for _ in range(14):
        actions = controller.act(graph)
        grew.append(torch.tensor([verb == Verb.GERMINATE for verb in verbs_of(env, actions)]))
        graph = env.step(actions)[0]
        losses.append(env.population.validation_loss[:3].clone())
    log = torch.stack(losses).log()
    for epoch, grown in enumerate(grew):
        if epoch < 3:
            assert not grown.any()
        else:
            slope = (log[epoch] - log[epoch - 3]) / 3
            assert (slope[grown] > -0.08).all()
    assert torch.stack(grew).any(0).all()


def test_plateau_blends_what_waits_for_it(make_env: Envs) -> None:
    env = make_env(2, epochs=14, lifecycle=MANUAL)
    actions, episodes = play(env, baselines.make("plateau", BaselinesConfig(plateau=PlateauConfig(slope=-9.0)), 0))
    # The slope is known in epoch 3 for the first time. Then: germinate, blend, wait, wait, and again.
    verbs = [verbs_of(env, row)[0] for row in actions]
    assert verbs[:3] == [Verb.WAIT] * 3
    assert verbs[3:11] == [Verb.GERMINATE, Verb.BLEND, Verb.WAIT, Verb.WAIT] * 2
    assert episodes["germinated"].tolist() == [3, 3]


# ---- the environment under them --------------------------------------------------------------------------------------


def test_an_episode_can_be_played_under_no_grad(make_env: Envs) -> None:
    env = make_env(2, epochs=2)
    expected = play(env, baselines.make("never", BaselinesConfig(), 0))[1]
    with torch.no_grad():
        episodes = play(env, baselines.make("never", BaselinesConfig(), 0))[1]
    assert torch.equal(episodes["test_accuracy"], expected["test_accuracy"])
