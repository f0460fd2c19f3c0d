"""What environments do wrong is one line that says which one, when, what, and what to do."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from envs.adapter_config import GymConfig
from envs.gym import GymEnv, _check
from envs.worker import Misbehaved
from esper.runtime.errors import ConfigError, EsperError, TrainingError

ID = "awkward:test/Awkward-v0"
WAIT = torch.zeros(3, dtype=torch.int64)

SHOWN = {
    "nan observation": r"the observation is nan at \[1\]; it must be finite",
    "inf observation": r"the observation is inf at \[0\]; it must be finite",
    "huge observation": r"the observation is 1e\+300 at \[0\]; it must be finite in float32",
    "long observation": r"the observation has shape \(3,\); its observation_space says \(2,\)",
    "deep observation": r"the observation has shape \(2, 1\); its observation_space says \(2,\)",
    "words": r"the observation is \['a', 'b'\]; its observation_space wants numbers",
    "ragged": r"the observation is \[\[1.0\], \[1.0, 2.0\]\]; its observation_space wants an array \(2,\)",
    "nothing": "the observation is None; its observation_space wants numbers",
    "mask": r'info\["action_mask"\] has shape \(3,\) where there are 2 actions; give one entry for each',
    "odd mask": r'info\["action_mask"\] has shape \(\) where there are 2 actions',
    "no action": "no action is legal in an episode that goes on; terminate it there, or allow one",
}
EITHER = {
    **SHOWN,
    "raise": r"CALL raised ValueError: no way \(awkward.py:\d+\); mend it there, it must return \(observation,",
    "exit": r"CALL raised SystemExit: 4 \(awkward.py:\d+\)",
    "list": r"CALL returned \[\] for info; it must be a dict",
}
STEP_ONLY = {
    "four": r"CALL returned 4 values; it must return \(observation, reward, terminated, truncated, info\)",
    "six": "CALL returned 6 values; it must return",
    "nan reward": "CALL returned the reward nan; it must be a finite float32",
    "inf reward": "CALL returned the reward -inf; it must be a finite float32",
    "huge reward": r"CALL returned the reward 1e\+39; it must be a finite float32",
    "no reward": "CALL returned reward, terminated, truncated = None, False, False; they must be a number and two",
    "rewards": r"CALL returned reward, terminated, truncated = \[1.0, 2.0\], False, False",
}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def made(**kwargs) -> GymEnv:
    return GymEnv(GymConfig(id=ID, kwargs=kwargs), 3)


def one_line(raised, where: str) -> str:
    text = str(raised.value)
    assert text.startswith(where), text
    assert len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize(("what", "message"), (EITHER | STEP_ONLY).items(), ids=(EITHER | STEP_ONLY).keys())
def test_in_a_step(what, message):
    seeds = torch.tensor([4, 5, 6])
    plain = made()
    plain.reset(seeds)
    seed = plain._seed(1)
    env = made(what=what, of=seed)
    env.reset(seeds)
    env.step(WAIT)
    with pytest.raises(TrainingError, match=message.replace("CALL", r"step\(0\)")) as raised:
        env.step(WAIT)
    one_line(raised, f"env.id={ID}: environment 1, in step 2 of the episode of seed {seed}: ")


@pytest.mark.parametrize(("what", "message"), EITHER.items(), ids=EITHER.keys())
def test_at_the_first_start(what, message):
    env = made(what=what, at=0)
    with pytest.raises(ConfigError, match=message.replace("CALL", r"reset\(seed=\d+\)")) as raised:
        env.reset(torch.tensor([4, 5, 6]))
    one_line(raised, f"env.id={ID}: environment 0, at the start of the episode of seed {env._seed(0)}: ")


def test_at_the_start_of_a_later_episode():
    plain = made()
    plain.reset(torch.tensor([4, 5, 6]))
    for _ in range(6):
        plain.step(WAIT)
    seed = plain._seed(2)  # of its second episode
    env = made(what="raise", at=0, of=seed)
    env.reset(torch.tensor([4, 5, 6]))
    for _ in range(5):
        env.step(WAIT)
    with pytest.raises(TrainingError, match=rf"reset\(seed={seed}\) raised ValueError: no way") as raised:
        env.step(WAIT)
    one_line(raised, f"env.id={ID}: environment 2, at the start of the episode of seed {seed}: ")


def test_the_rules_of_gymnasium_s_own_wrappers_are_told_too():
    # its TimeLimit unpacks what `step` returns
    env = GymEnv(GymConfig(id=ID, kwargs={"what": "four", "at": 1, "max_episode_steps": 50}), 1)
    env.reset()
    with pytest.raises(TrainingError, match=r"step\(0\) raised ValueError: not enough values.*must return \(obs"):
        env.step(torch.tensor([0]))


def test_an_environment_of_another_kind_of_result():
    class Old(gymnasium.Env):
        observation_space, action_space = spaces.Discrete(2), spaces.Discrete(2)

        def reset(self, seed=None):
            return 0

    gymnasium.register("test/Old-v0", Old, disable_env_checker=True, order_enforce=False)
    env = GymEnv(GymConfig(id="test/Old-v0"), 1)
    with pytest.raises(EsperError, match=r"reset\(seed=\d+\) returned int; it must return \(observation, info\)"):
        env.reset()


BOX = spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize(
    ("space", "value", "message"),
    [
        (spaces.Discrete(3), 3, "is 3, which is not in its observation_space Discrete"),
        (spaces.MultiBinary(2), np.array([0, 2]), "is not in its observation_space"),
        (spaces.Tuple([BOX, BOX]), (np.zeros(2),), r"wants a tuple of \[0, 1\]"),
        (spaces.Tuple([BOX, BOX]), (np.zeros(2), np.array([0, np.inf])), r"o\[1\] is inf at \[1\]"),
        (spaces.Dict(a=BOX), {"b": np.zeros(2)}, r"wants a dict of \['a'\]"),
        (spaces.Dict(a=BOX), np.zeros(2), r"wants a dict of \['a'\]"),
        (spaces.Dict(a=spaces.Dict(b=BOX)), {"a": {"b": np.zeros(3)}}, r"o\['a'\]\['b'\] has shape \(3,\)"),
        (spaces.Box(-1, 1, ()), np.nan, "o is nan; it must be finite"),
    ],
)
def test_observations_that_are_not_of_their_space(space, value, message):
    with pytest.raises(Misbehaved, match=message):
        _check(space, value, "o")


@pytest.mark.parametrize(
    ("space", "value"),
    [
        (BOX, [5, -7]),  # many environments exceed their bounds
        (spaces.Tuple([BOX, spaces.Discrete(2)]), (np.zeros(2), np.int64(1))),
        (spaces.Dict(a=BOX, b=spaces.Dict(c=BOX)), {"b": {"c": np.zeros(2)}, "a": np.zeros(2)}),
    ],
)
def test_observations_that_are(space, value):
    _check(space, value, "o")
