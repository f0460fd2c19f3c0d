"""Environments of others are found again by the seed and the actions of their episodes, bit for bit."""

import io
import logging
from pathlib import Path

import pytest
import torch

from envs.adapter_config import GymConfig, HeteroConfig
from envs.gym import GymEnv
from envs.hetero import HeteroEnv
from envs.worker import Misbehaved
from esper.runtime.errors import TrainingError

from .conftest import played

HERE = Path(__file__).parent
ID = "awkward:test/Awkward-v0"
SEEDS = torch.tensor([4, 5, 6])


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.syspath_prepend(str(HERE.parents[1] / "docs" / "examples"))


def gym(id="CartPole-v1", autoreset=True, normalize=True, apart=False, timeout_s=60.0, **kwargs):
    config = GymConfig(id=id, normalize=normalize, kwargs=kwargs, subprocess=apart, timeout_s=timeout_s)
    return GymEnv(config, 3, autoreset=autoreset)


def hetero(autoreset=True):
    config = HeteroConfig(target="scheduling:Scheduling", action_node="job", kwargs={"jobs": [3, 9]})
    return HeteroEnv(config, 3, autoreset=autoreset)


def awkward(**kwargs):
    return gym(ID, **kwargs)


def through_a_file(state):
    """As a checkpoint keeps it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(value):
    if isinstance(value, dict):
        return [leaf for key in value for leaf in leaves(value[key])]
    if isinstance(value, list | tuple):
        return [leaf for each in value for leaf in leaves(each)]
    return [value]


def same(a, b) -> bool:
    left, right = leaves(a), leaves(b)
    assert len(left) == len(right)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(left, right, strict=True))


# CartPole falls after some 20 random steps, a problem has 3 to 9 jobs, and an awkward episode six steps.
@pytest.mark.parametrize("make", [gym, hetero, awkward])
@pytest.mark.parametrize("steps", [0, 1, 6, 40])
def test_it_goes_on_as_if_it_had_never_stopped(make, steps, caplog):
    env = make()
    _, graph = played(env, env.reset(SEEDS), steps, 0)
    state = through_a_file(env.state_dict())
    other = make()
    restored = other.load_state_dict(state)
    assert caplog.text == ""
    assert same(list(restored.to_dict().values()), list(graph.to_dict().values()))
    assert same(other.state_dict(), state)
    assert same(played(other, restored, 40, 1)[0], played(env, graph, 40, 1)[0])
    assert same(other.state_dict(), env.state_dict())
    assert (env._episodes > 1).any()


def test_what_had_ended_stays_ended():
    env = awkward(autoreset=False)
    _, graph = played(env, env.reset(SEEDS), 6, 0)
    other = awkward(autoreset=False)
    restored = other.load_state_dict(env.state_dict())
    assert not other.running
    assert same(list(restored.to_dict().values()), list(graph.to_dict().values()))


def test_before_the_first_reset():
    other = gym()
    other.load_state_dict(gym().state_dict())
    assert other.running
    assert other._episodes.tolist() == [1, 1, 1]


def test_from_one_process_to_many():
    env = gym()
    _, graph = played(env, env.reset(SEEDS), 20, 0)
    other = gym(apart=True)
    restored = other.load_state_dict(env.state_dict())
    assert same(played(other, restored, 20, 1)[0], played(env, graph, 20, 1)[0])


def test_a_replay_has_time_for_all_its_steps():
    env = gym(apart=True, timeout_s=0.5)
    env.workers[0].send("replay", 0, [0] * 9)
    assert env.workers[0]._allowed == 5.0


def test_an_environment_that_hangs_on_more_than_its_seed_says_so(caplog):
    env = awkward(restless=True)
    played(env, env.reset(SEEDS), 9, 0)
    for k, worker in enumerate(env.workers):
        worker.environment.unwrapped.born = 100 + k
    played(env, env.reset(SEEDS), 9, 0)  # in the second episode of each
    other = awkward(restless=True)
    for k, worker in enumerate(other.workers):
        worker.environment.unwrapped.born = 100 + (k if k != 1 else 77)
    with caplog.at_level(logging.WARNING):
        graph = other.load_state_dict(env.state_dict())
    (record,) = caplog.records
    assert record.getMessage().startswith(f"env.id={ID}: 1 of its 3 environments did not come to where they were")
    assert "\n" not in record.getMessage()
    assert other._episodes.tolist() == [2, 3, 2]
    assert [len(actions) for actions in other._actions] == [3, 0, 3]
    assert other._observations[1].tolist() == [0, 177]
    assert other._normalizer._count == env._normalizer._count + 1
    played(other, graph, 9, 1)


@pytest.mark.parametrize(("what", "at"), [("raise", 2), ("nan observation", 3), ("nan reward", 1), ("raise", 0)])
def test_an_environment_that_fails_on_the_way_starts_anew(what, at, caplog):
    env = awkward()
    played(env, env.reset(SEEDS), 3, 0)
    other = awkward(what=what, at=at, of=env._seed(2))
    other.load_state_dict(env.state_dict())
    assert "1 of its 3 environments did not come to where they were" in caplog.text
    assert other._episodes.tolist() == [1, 1, 2]


def test_an_episode_that_ends_too_early_is_another_one(caplog):
    env = gym()
    played(env, env.reset(SEEDS), 8, 0)
    other = gym(max_episode_steps=4)
    other.load_state_dict(env.state_dict())
    assert "3 of its 3 environments" in caplog.text
    with pytest.raises(Misbehaved, match="the episode was over after 4 of 8 steps"):
        other.workers[0].perform("replay", 0, [0, 1] * 4)


def test_a_process_that_hangs_on_the_way_is_an_error():
    env = awkward()
    played(env, env.reset(SEEDS), 2, 0)
    other = awkward(apart=True, timeout_s=1.0, what="hang", at=1, of=env._seed(1))
    with pytest.raises(TrainingError, match=r"environment 1, in step 2 of .*: no answer to replay within 3 s"):
        other.load_state_dict(env.state_dict())


def test_the_return_is_part_of_what_must_be_the_same(caplog):
    env = awkward()
    played(env, env.reset(SEEDS), 3, 0)
    env._returns[0] += 1e-9
    awkward().load_state_dict(env.state_dict())
    assert "1 of its 3 environments" in caplog.text
