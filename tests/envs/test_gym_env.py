"""The Gymnasium faces: spaces, seeding, autoreset, and actions that are not legal."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import envs
from envs.gym_env import SingleGrowthEnv, VectorGrowthEnv
from esper.graph.space import from_numpy, to_numpy
from esper.growth.actions import Verb
from esper.runtime.errors import ConfigError

SHORT = {
    "epochs": 4,
    "training": {"steps_per_epoch": 2, "batch_size": 8},
    "host": {"width": [4, 6], "stages": [2, 3]},
}
SURROGATE = {**SHORT, "training": {}}  # it knows one way of training only
PHOTOGRAPHS = {"crop": 12, "crops": [3, 4], "judged": 2, "training": {"steps_per_epoch": 1, "batch_size": 2}}
SEGMENT = "envs:esper/Segment-v0"
ACCOUNTS = {"gain", "germinated", "fossilized", "culled", "params_ratio", "flops_ratio", "diverged"}


def make(**kwargs):
    return gymnasium.make(SEGMENT, **{**SHORT, **kwargs})


def make_vec(num_envs=3, **kwargs):
    return gymnasium.make_vec(SEGMENT, num_envs=num_envs, **{**SHORT, **kwargs})


def shortest(name):
    return {**{"surrogate": SURROGATE, "super_resolution": PHOTOGRAPHS}.get(name, SHORT), "epochs": 2}


def same(a, b):
    assert a.keys() == b.keys()
    return all(np.array_equal(a[k], b[k]) for k in a)


def row(observation, k):
    return {key: value[k] for key, value in observation.items()}


DICE = np.random.default_rng(0)


def pick(mask, dice):
    return dice.choice(np.flatnonzero(mask))


@pytest.mark.parametrize("name", envs.IDS)
def test_gymnasium_s_checker_has_nothing_to_say(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(f"envs:{envs.IDS[name]}", **shortest(name))
        check_env(env.unwrapped)
        assert env.unwrapped.growth.config.name == name
        env.close()


@pytest.mark.parametrize("name", envs.IDS)
def test_ids_lead_to_vectors_too(name):
    env = gymnasium.make_vec(envs.IDS[name], num_envs=2, **shortest(name))
    observation, info = env.reset(seed=1)
    for _ in range(2):
        observation, _, terminated, _, info = env.step(np.array([pick(mask, DICE) for mask in info["action_mask"]]))
        assert env.observation_space.contains(observation)
    assert terminated.all()
    assert all(env.single_observation_space.contains(final) for final in info["final_obs"])


@pytest.mark.parametrize("name", ["Segment", "DigitsConv"])
def test_a_whole_episode_through_make(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(f"envs:esper/{name}-v0", **SHORT)  # with Gymnasium's passive checks
        observation, info = env.reset(seed=3)
        dice, ended = np.random.default_rng(0), []
        while not ended or not ended[-1]:
            assert env.observation_space.contains(observation)
            assert np.array_equal(info["action_mask"], observation["action_mask"])
            observation, reward, terminated, truncated, info = env.step(pick(info["action_mask"], dice))
            assert isinstance(reward, float)
            assert not truncated
            assert not info["illegal_action"]
            ended.append(terminated)
        assert ended == [False] * 3 + [True]
        assert env.observation_space.contains(observation)
        assert set(info) >= ACCOUNTS


def test_a_vector_s_observations_lie_in_its_space():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make_vec()
        observation, info = env.reset(seed=3)
        dice = np.random.default_rng(0)
        for _ in range(9):
            assert env.observation_space.contains(observation)
            for k in range(3):
                assert env.single_observation_space.contains(row(observation, k))
            assert np.array_equal(info["action_mask"], observation["action_mask"])
            actions = np.array([pick(mask, dice) for mask in info["action_mask"]])
            assert env.action_space.contains(actions)
            observation, reward, terminated, truncated, info = env.step(actions)
            assert reward.shape == terminated.shape == truncated.shape == (3,)
            assert (reward.dtype, terminated.dtype, truncated.dtype) == (np.float64, np.bool_, np.bool_)
        env.close()


def test_action_spaces_have_the_layout_s_size():
    env = make_vec()
    # 3 slots of (5 blueprints + 4 ramps + FOSSILIZE + CULL), and WAIT
    assert env.single_action_space.n == 1 + 3 * 11
    assert env.action_space.nvec.tolist() == [34] * 3
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert isinstance(env.unwrapped, VectorGrowthEnv)
    assert isinstance(make().unwrapped, SingleGrowthEnv)


def test_same_step_autoreset_hands_over_the_final_observation():
    vector, dice = make_vec(), np.random.default_rng(1)
    _, info = vector.reset(seed=11)
    singles = [make() for _ in range(3)]
    for k, single in enumerate(singles):
        single.reset(seed=11 + k)
    for step in range(4):
        actions = np.array([pick(mask, dice) for mask in info["action_mask"]])
        observation, _, terminated, _, info = vector.step(actions)
        last = [single.step(action) for single, action in zip(singles, actions, strict=True)]
        if step < 3:
            assert not any(name.startswith(("final", "_final")) for name in info)
    assert terminated.all()
    assert info["_final_obs"].tolist() == info["_final_info"].tolist() == [True] * 3
    for k in range(3):
        single_observation, *_, single_info = last[k]
        final = info["final_obs"][k]
        assert vector.single_observation_space.contains(final)
        assert same(final, single_observation)
        assert np.array_equal(info["final_info"]["action_mask"][k], final["action_mask"])
        for name in ACCOUNTS:
            assert info["final_info"][f"_{name}"].tolist() == [True] * 3
            assert info["final_info"][name][k] == single_info[name]
        fresh, _ = singles[k].reset()
        assert same(row(observation, k), fresh)
    # The info beside the new observation is that of the new episodes.
    assert np.array_equal(info["action_mask"], observation["action_mask"])
    assert not np.array_equal(info["final_obs"][0]["action_mask"], observation["action_mask"][0])


def test_rewards_of_environment_k_are_those_of_a_single_one_with_seed_s_plus_k():
    vector, dice = make_vec(4), np.random.default_rng(2)
    single = make()
    _, info = vector.reset(seed=20)
    single.reset(seed=22)
    for _ in range(4):
        actions = np.array([pick(mask, dice) for mask in info["action_mask"]])
        _, reward, _, _, info = vector.step(actions)
        assert single.step(actions[2])[1] == reward[2]
    assert reward[2] != 0


def test_a_list_of_seeds():
    a, b = make_vec(), make_vec()
    observation, _ = a.reset(seed=[7, 3, 5])
    other, _ = b.reset(seed=3)  # 3, 4, 5
    for mine, theirs in ((1, 0), (2, 2)):
        assert same(row(observation, mine), row(other, theirs))
    assert not same(row(observation, 0), row(other, 1))


def test_a_list_of_seeds_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 seeds for 3 environments"):
        make_vec().reset(seed=[1, 2])


@pytest.mark.parametrize("build", [make, make_vec])
def test_reset_with_a_seed_repeats_and_without_goes_on(build):
    env = build()
    first, _ = env.reset(seed=3)
    second, _ = env.reset()
    again, _ = env.reset(seed=3)
    other = build()
    other.reset(seed=3)
    assert same(first, again)
    assert not same(first, second)
    assert same(second, other.reset()[0])


@pytest.mark.parametrize("build", [make, make_vec])
def test_unseeded_environments_differ(build):
    assert not same(build().reset()[0], build().reset()[0])


def test_train_and_heldout_split():
    assert not same(make(split="train").reset(seed=1)[0], make(split="heldout").reset(seed=1)[0])


def test_an_illegal_action_counts_as_wait_and_is_flagged():
    wrong, right = make(), make()
    for env in (wrong, right):
        env.reset(seed=5)
    layout = wrong.unwrapped.growth.layout
    for verb in (Verb.FOSSILIZE, Verb.CULL, Verb.BLEND):
        observation, reward, *_, info = wrong.step(layout.index(verb, 1))
        expected, expected_reward, *_, expected_info = right.step(0)
        assert same(observation, expected)
        assert reward == expected_reward
        assert (info["illegal_action"], expected_info["illegal_action"]) == (True, False)


def test_an_illegal_action_in_a_vector_leaves_the_others_their_own():
    wrong, right = make_vec(), make_vec()
    for env in (wrong, right):
        env.reset(seed=5)
    layout = wrong.unwrapped.growth.layout
    germinate, cull = layout.index(Verb.GERMINATE, 1, 1), layout.index(Verb.CULL, 0)
    observation, *_, info = wrong.step(np.array([germinate, cull, 0]))
    expected, *_, expected_info = right.step(np.array([germinate, 0, 0]))
    assert same(observation, expected)
    assert info["illegal_action"].tolist() == [False, True, False]
    assert expected_info["illegal_action"].tolist() == [False] * 3


def test_observations_do_not_change_under_the_agent():
    env = make_vec()
    observation, _ = env.reset(seed=1)
    before = {k: v.copy() for k, v in observation.items()}
    for _ in range(4):
        env.step(np.zeros(3, dtype=np.int64))
    assert same(before, observation)


def test_observations_are_the_graph_in_numpy():
    env = make_vec()
    observation, _ = env.reset(seed=1)
    graph = env.unwrapped.growth.load_state_dict(env.unwrapped.growth.state_dict())
    assert same(observation, to_numpy(graph))
    back = from_numpy(observation).to_dict()
    assert all(torch.equal(back[k], v) for k, v in graph.to_dict().items())


# ---- configuration ------------------------------------------------------------------------------------------------


def test_overrides_and_contexts_reach_the_configuration():
    config = make(contexts="repair", epochs=3).unwrapped.growth.config
    assert (config.instances, config.epochs) == ("segment/repair", 3)


def test_make_with_an_unknown_environment():
    with pytest.raises(ConfigError, match="choose one of charlm, digits, digits_conv"):
        gymnasium.make(SEGMENT, name="nope")
