"""Hosts whose loss or parameters stop being finite: their episode ends as the worst, and nobody else notices."""

import gymnasium
import numpy as np
import pytest
import torch

from envs import twins
from envs.growth_env import draw_context, population_spec
from envs.lookahead import finish
from envs.points import RENT
from envs.reward import LOWEST
from envs.twins import Twins
from esper.growth.actions import Verb
from esper.growth.population import Population

TAGS = ["a", "b", "c", "d"]
INF, NAN = float("inf"), float("nan")
VICTIM, OTHERS = 1, [0, 2, 3]
SHORT = {"epochs": 4, "training": {"steps_per_epoch": 2, "batch_size": 8}, "host": {"width": [4, 6], "stages": [2, 3]}}


def too_fast(env):
    env.population.context.learning_rate[VICTIM] = 1e30


def parameter(env):
    env.population.theta[VICTIM, -1] = INF


def moment(env):
    env.population.exp_avg[VICTIM] = NAN


def memory(env):
    env.population.memory[VICTIM, 0] = INF


def finite(graph):
    return all(value.isfinite().all() for value in graph.to_dict().values())


ENGINES = [
    (name, engine, blow) for name, engine in (("segment", "native"), ("segment", "stacked"), ("digits_conv", "native"))
    for blow in (too_fast, parameter, moment)
]  # fmt: skip


@pytest.mark.parametrize(("name", "engine", "blow"), [*ENGINES, ("surrogate", "auto", memory)])
def test_a_diverged_host_ends_alone(play, name, engine, blow):
    given = {"epochs": 8, "training": {}} if name == "surrogate" else {"engine": engine}
    before, steps = 3, 9  # over the autoreset of everybody
    plain, hit = (play.env(4, 5, name, reward={"shaping": 0.5}, **given) for _ in range(2))
    expected = play.run(plain, steps, TAGS)
    got = play.run(hit, before, TAGS)
    coming = plain.population.context.key[VICTIM] if plain.population.epoch[VICTIM] < steps else None
    potential, key = float(hit._potential[VICTIM]), int(hit.population.context.key[VICTIM])
    blow(hit)
    got += play.run(hit, steps - before, TAGS)
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        for k in OTHERS:
            assert play.same_graph(one[0], other[0], (k, k)) == [], (number, k)
            assert torch.equal(one[1][k], other[1][k])
            assert one[2][k] == other[2][k]
        assert finite(one[0])
        assert one[1].isfinite().all()
    ended = next(number for number, (_, _, terminated, _) in enumerate(got) if terminated[VICTIM])
    assert ended < hit.config.epochs - 1
    _, reward, terminated, info = got[ended]
    assert terminated.tolist() == [False, True, False, False]
    assert finite(info["final_graph"])
    account = {name: value.tolist() for name, value in info["episodes"].items()}
    assert (account["env"], account["diverged"], account["gain"]) == ([VICTIM], [True], [LOWEST])
    assert account["length"] == [ended + 1]
    assert all(np.isfinite(value).all() for value in account.values())
    total = sum(float(step[1][VICTIM]) for step in got[: ended + 1])
    assert account["return"] == pytest.approx([total])
    assert -1.5 < total <= LOWEST  # the gain less the price of growing; potentials cancel
    if ended == before:
        assert float(reward[VICTIM]) == pytest.approx(total - sum(float(step[1][VICTIM]) for step in got[:ended]))
        assert float(reward[VICTIM]) <= LOWEST - potential + 1e-6
    # The next episode has begun, and is the one that would have come later.
    assert int(hit.population.context.key[VICTIM]) != key
    assert coming is None or int(hit.population.context.key[VICTIM]) == int(coming)
    assert not hit.population.diverged().any()
    for _, _, _, later in got[ended + 1 :]:
        assert not later or not (later["episodes"]["diverged"]).any()


@pytest.mark.parametrize(
    ("name", "state", "at"),
    [
        ("segment", "theta", (VICTIM, 0)), ("segment", "validation_loss", VICTIM),
        ("surrogate", "validation_loss", VICTIM), ("surrogate", "memory", (VICTIM, 2)),
    ],
)  # fmt: skip
def test_what_a_host_diverges_in(play, name, state, at):
    population = play.env(4, 5, name, **({"training": {}} if name == "surrogate" else {})).population
    assert not population.diverged().any()
    getattr(population, state)[at] = NAN
    assert population.diverged().tolist() == [False, True, False, False]
    getattr(population, state)[at] = 1.0
    population.statistics.train_loss[VICTIM] = INF
    assert population.diverged().tolist() == [False, True, False, False]


@pytest.mark.parametrize("engine", ["native", "stacked"])
def test_a_seed_that_is_not_finite_ends_the_episode_once_the_host_runs_on_it(play, engine):
    env = play.env(2, contexts="repair", engine=engine, lifecycle={"auto_blend": None})
    env.step(torch.full((2,), env.layout.index(Verb.GERMINATE, 0, 0)))
    env.population.seed_theta[0][1, 0, -1] = INF
    _, _, terminated, _, _ = env.step(torch.zeros(2, dtype=torch.int64))
    assert not terminated.any()  # it trains beside the host, which knows nothing of it
    _, _, terminated, _, info = env.step(torch.full((2,), env.layout.index(Verb.BLEND, 0, 1)))
    assert terminated.tolist() == [False, True]
    assert info["episodes"]["diverged"].tolist() == [True]
    assert info["episodes"]["germinated"].tolist() == [1]
    # Without the seed the loss would be finite; what counts is how the episode ended.
    assert info["episodes"]["gain"].tolist() == [LOWEST]


def test_without_autoreset_it_is_counted_once(play):
    env, plain = (play.env(3, 5, autoreset=False, contexts="repair") for _ in range(2))
    germinate = torch.full((3,), env.layout.index(Verb.GERMINATE, 0, 0))
    for each in (env, plain):
        each.step(germinate)
    parameter(env)
    out = [env.step(torch.zeros(3, dtype=torch.int64)) for _ in range(5)]
    expected = [plain.step(torch.zeros(3, dtype=torch.int64)) for _ in range(5)]
    assert [step[2].tolist() for step in out] == [[False, True, False], *[[False] * 3] * 3, [True, False, True]]
    assert [step[4]["episodes"]["env"].tolist() for step in out if step[4]] == [[1], [0, 2]]
    assert [step[1][1].item() for step in out[1:]] == [0.0] * 4
    assert all(finite(step[0]) for step in out)
    for name, value in out[-1][4]["episodes"].items():
        assert torch.equal(value, expected[-1][4]["episodes"][name][[0, 2]]), name
    # Nobody is left: the environment stays as it is.
    state, running = env.state_dict(), env.running
    graph, reward, terminated, _, info = env.step(germinate)
    assert not running
    assert play.same_graph(graph, out[-1][0]) == []
    assert (reward.tolist(), terminated.tolist(), info) == ([0.0] * 3, [False] * 3, {})
    assert torch.equal(env.state_dict()["_counts"], state["_counts"])
    env.reset()
    assert env.running


def test_a_restored_environment_knows_who_has_ended(play):
    env = play.env(3, 5, autoreset=False)
    parameter(env)
    env.step(torch.zeros(3, dtype=torch.int64))
    other = play.env(3, 50, autoreset=False)
    other.load_state_dict(env.state_dict())
    for _ in range(5):
        got, expected = other.step(torch.zeros(3, dtype=torch.int64)), env.step(torch.zeros(3, dtype=torch.int64))
        assert play.same_graph(got[0], expected[0]) == []
        assert torch.equal(got[1], expected[1])
    assert got[4]["episodes"]["env"].tolist() == [0, 2]


def test_what_a_finished_host_does_does_not_count(play):
    env = play.env(2, 5, autoreset=False, contexts="repair")
    parameter(env)
    env.step(torch.zeros(2, dtype=torch.int64))
    counts = env._counts.clone()
    illegal = env.layout.index(Verb.CULL, 0)
    env.step(torch.tensor([0, illegal]))
    assert torch.equal(env._counts[1], counts[1])
    assert env._counts[0, Verb.WAIT] == 2


# ---- twins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "growth"])
@pytest.mark.parametrize("lost", [NAN, INF])
def test_a_host_whose_twin_diverged_scores_highest(play, kind, lost):
    env = play.env(2, contexts=kind, autoreset=False, reward={"shaping": 0.5})
    env._twin[0, 3 : env.config.epochs + 1] = lost
    out = play.script(env)
    assert all(reward.isfinite().all() for _, reward, _, _ in out)
    assert out[-1][3]["episodes"]["gain"].tolist() == [1.5, 0.0]
    assert not out[-1][3]["episodes"]["diverged"].any()


def test_a_host_that_diverges_as_its_twin_does_scores_lowest(play):
    env = play.env(2, autoreset=False, contexts="growth")
    env._twin[1, 1:7] = INF
    parameter(env)
    assert env.step(torch.zeros(2, dtype=torch.int64))[1].tolist() == [0.0, LOWEST]


@pytest.mark.parametrize("engine", ["native", "stacked"])
def test_the_losses_of_a_diverged_twin_are_infinite(play, engine):
    config = play.config(engine=engine)
    context, _ = draw_context(config, torch.arange(3))
    fast, _ = draw_context(config, torch.arange(3))
    fast.learning_rate[VICTIM] = 1e30
    made = [Twins(Population, population_spec(config), config.epochs, "cpu") for _ in range(2)]
    plain, hit = made[0](context), made[1](fast)
    assert torch.equal(plain[[0, 2]], hit[[0, 2]])
    losses = hit[VICTIM, : config.epochs + 1]
    assert losses[0].isfinite()
    assert not losses.isnan().any()
    first = int(losses.isinf().nonzero()[0])
    assert losses[first:].isinf().all()
    assert ((hit[:, -2:] >= 0) & (hit[:, -2:] <= 1)).all()


# ---- forks and Gymnasium --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "growth"])
def test_a_fork_that_diverges_at_the_end_is_worth_nothing(play, kind):
    env = play.env(3, contexts=kind)
    fork = env.population.fork(torch.arange(3))
    train_epoch = fork.train_epoch

    def train(evaluate):
        train_epoch(evaluate)
        if fork.epoch[0] == env.config.epochs:
            fork.theta[VICTIM, -1] = INF

    fork.train_epoch = train
    outcome = finish(fork, env.config)
    assert outcome.value[VICTIM] == outcome.test[VICTIM] == 0.0
    assert (outcome.value[[0, 2]] > 5).all()


@pytest.mark.parametrize("kind", ["plain", "growth"])
@pytest.mark.parametrize("engine", ["native", "stacked"])
def test_a_fork_that_diverges_is_worth_nothing(play, kind, engine):
    env = play.env(3, contexts=kind, engine=engine)
    env.step(torch.full((3,), env.layout.index(Verb.GERMINATE, 0, 0)))
    rows = torch.arange(3)
    plain, hit = env.population.fork(rows), env.population.fork(rows)
    hit.theta[VICTIM, -1] = INF
    expected, got = finish(plain, env.config), finish(hit, env.config)
    assert expected.value[VICTIM] > 5
    for name in ("value", "test"):
        before, after = getattr(expected, name), getattr(got, name)
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert after[VICTIM] == -RENT * got.growth[VICTIM]


def test_gymnasium_s_single_environment_ends_early():
    env = gymnasium.make("envs:esper/Segment-v0", reward={"measure": "loss"}, **SHORT)
    env.reset(seed=1)
    env.step(0)
    env.unwrapped.growth.population.theta[0, 0] = NAN
    observation, reward, terminated, truncated, info = env.step(0)
    assert (reward, terminated, truncated, info["diverged"]) == (LOWEST, True, False, 1.0)
    assert env.observation_space.contains(observation)
    observation, _ = env.reset()
    assert env.step(0)[2] is False


def test_gymnasium_s_vector_tells_which_one():
    env = gymnasium.make_vec("envs:esper/Segment-v0", num_envs=3, reward={"measure": "loss"}, **SHORT)
    env.reset(seed=1)
    env.unwrapped.growth.population.theta[VICTIM, 0] = NAN
    observation, reward, terminated, _, info = env.step(np.zeros(3, dtype=np.int64))
    assert (reward.tolist(), terminated.tolist()) == ([0.0, LOWEST, 0.0], [False, True, False])
    assert env.observation_space.contains(observation)
    assert info["_final_info"].tolist() == terminated.tolist()
    assert info["final_info"]["diverged"].tolist() == [0.0, 1.0, 0.0]
    assert env.single_observation_space.contains(info["final_obs"][VICTIM])


def test_accuracy_of_what_is_not_a_number_is_nought(play, monkeypatch):
    monkeypatch.setattr(twins, "_SHARED", {})
    for engine in ("native", "stacked"):
        population = play.env(2, engine=engine).population
        population.theta[0] = NAN
        accuracy = population.accuracy(torch.arange(2), "validation")
        assert accuracy[0] == 0
        assert accuracy[1] > 0


def test_by_accuracy_a_diverged_host_scores_as_if_it_were_always_wrong(play):
    env = play.env(3, autoreset=False, reward={"measure": "accuracy", "flops": 0.0})
    env.step(torch.zeros(3, dtype=torch.int64))
    env.population.theta[VICTIM, 0] = NAN
    _, reward, terminated, _, info = env.step(torch.zeros(3, dtype=torch.int64))
    assert terminated.tolist() == [row == VICTIM for row in range(3)]
    validation, test = env.twin_accuracies()
    assert float(reward[VICTIM]) == pytest.approx(-float(validation[VICTIM]))
    assert float(info["episodes"]["points"][0]) == pytest.approx(-100 * float(test[VICTIM]), rel=1e-5)
    assert float(test[VICTIM]) > 0.1
