"""Another library's agent on the padded observation: MaskablePPO of sb3-contrib.

`scripts/maskable_ppo.py` trains one for as long as it takes to learn something.
"""

import warnings

import gymnasium
import numpy as np
import pytest

import envs

sb3_contrib = pytest.importorskip("sb3_contrib")

STEPS = 256

TINY = {
    "epochs": 4,
    "training": {"steps_per_epoch": 1, "batch_size": 8},
    "host": {"width": [4, 6], "stages": [2, 3]},
}


class Watched(gymnasium.Wrapper):
    """Notes what is asked of the environment."""

    def __init__(self, env):
        super().__init__(env)
        self.illegal, self.actions, self.episodes = 0, [], 0

    def step(self, action):
        result = self.env.step(action)
        self.actions.append(int(action))
        self.illegal += result[4]["illegal_action"]
        self.episodes += result[2]
        return result


@pytest.fixture
def env():
    from sb3_contrib.common.wrappers import ActionMasker

    watched = Watched(gymnasium.make(envs.IDS["segment"], **TINY))
    # The mask must be that of the very environment: an info is not at hand when SB3 asks for it.
    return ActionMasker(watched, lambda wrapped: wrapped.unwrapped.growth.action_mask()[0].numpy())


@pytest.mark.slow
def test_maskable_ppo_trains_on_the_padded_observation(env):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # SB3 warns of spaces that it is not made for
        agent = sb3_contrib.MaskablePPO("MultiInputPolicy", env, n_steps=64, batch_size=32, n_epochs=2, seed=1)
        before = [parameter.detach().clone() for parameter in agent.policy.parameters()]
        agent.learn(STEPS)
    watched = env.env
    assert len(watched.actions) >= STEPS
    assert watched.episodes == len(watched.actions) // TINY["epochs"]
    assert watched.illegal == 0
    assert len(set(watched.actions)) > 10
    after = list(agent.policy.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert any(not old.equal(new) for old, new in zip(before, after, strict=True))


@pytest.mark.slow
def test_a_trained_agent_plays_an_episode_legally(env):
    agent = sb3_contrib.MaskablePPO("MultiInputPolicy", env, n_steps=64, seed=1)
    observation, info = env.reset(seed=5)
    for _ in range(TINY["epochs"]):
        mask = env.action_masks()
        assert np.array_equal(mask, info["action_mask"])
        assert np.array_equal(mask, observation["action_mask"])
        action, _ = agent.predict(observation, action_masks=mask, deterministic=True)
        observation, _, terminated, _, info = env.step(int(action))
    assert terminated
    assert env.env.illegal == 0


def test_stable_baselines_checker_has_nothing_to_say():
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Edge attributes and node features are matrices, which SB3's policies flatten.
        warnings.filterwarnings("ignore", message=".*unconventional shape")
        checker.check_env(gymnasium.make(envs.IDS["segment"], **TINY).unwrapped)
