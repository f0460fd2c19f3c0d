import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from envs.config import load_config
from envs.growth_env import GrowthEnv
from envs.gym_env import SingleGrowthEnv, VectorGrowthEnv
from esper.graph.space import from_numpy, to_numpy
from esper.growth.actions import Verb
from esper.runtime.errors import ConfigError

SHORT = {"epochs": 4, "training": {"steps_per_epoch": 3, "batch_size": 32}}
IDS = ["envs:esper/Segment-v0", "envs:esper/Digits-v0"]
ACCOUNTS = {"gain", "germinated", "fossilized", "culled", "params_ratio", "flops_ratio"}


def make(**kwargs):
    return gymnasium.make(IDS[0], **{**SHORT, **kwargs})


def make_vec(num_envs=3, **kwargs):
    return gymnasium.make_vec(IDS[0], num_envs=num_envs, **{**SHORT, **kwargs})


def same(a, b):
    assert a.keys() == b.keys()
    return all(np.array_equal(a[k], b[k]) for k in a)


def row(observation, k):
    return {key: value[k] for key, value in observation.items()}


def pick(mask, dice):
    return dice.choice(np.flatnonzero(mask))


@pytest.mark.parametrize("name", IDS)
def test_gymnasium_s_checker_has_nothing_to_say(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(name, **SHORT)
        check_env(env.unwrapped)
        env.close()


@pytest.mark.parametrize("name", IDS)
def test_a_whole_episode_through_make(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(name, **SHORT)  # with Gymnasium's passive checks
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
    # 4 slots of (4 blueprints + 4 ramps + FOSSILIZE + CULL), and WAIT
    assert env.single_action_space.n == 1 + 4 * 10
    assert env.action_space.nvec.tolist() == [41] * 3
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
        assert all(np.allclose(final[key], value, atol=1e-5) for key, value in single_observation.items())
        assert np.array_equal(info["final_info"]["action_mask"][k], final["action_mask"])
        for name in ACCOUNTS:
            assert info["final_info"][f"_{name}"].tolist() == [True] * 3
            assert info["final_info"][name][k] == single_info[name]
        fresh, _ = singles[k].reset()
        assert all(np.allclose(observation[key][k], value, atol=1e-5) for key, value in fresh.items())
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
    germinate, cull = layout.index(Verb.GERMINATE, 2, 1), layout.index(Verb.CULL, 0)
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


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("nope", {}, r"env=nope: no such environment; choose one of digits, segment"),
        ("segment", {"task": "mnist"}, r"env\.task=mnist: no such task; choose one of digits, segment"),
        ("segment", {"blueprints": ["conv"]}, r"env\.blueprints=conv: .*choose from glu, low_rank, mlp, norm"),
        ("segment", {"blueprints": []}, r"env\.blueprints=\[\]: name at least one"),
        ("segment", {"blueprints": ["mlp", "mlp"]}, r"env\.blueprints=.*none twice"),
        ("segment", {"epochs": 0}, r"env\.epochs=0: must be above 0"),
        ("segment", {"host": {"width": -1}}, r"env\.host\.width=-1: must be above 0"),
        ("segment", {"training": {"batch_size": 0}}, r"env\.training\.batch_size=0"),
        ("segment", {"lifecycle": {"auto_ramp": 0}}, r"env\.lifecycle\.auto_ramp=0"),
        ("segment", {"context": {"train_size": [300, 1101]}}, r"env\.context\.train_size=\[300, 1101\].*1100"),
        ("segment", {"context": {"train_size": [300, 200]}}, r"env\.context\.train_size=\[300, 200\]"),
        ("segment", {"context": {"label_noise": [0.1]}}, r"env\.context\.label_noise=\[0\.1\]"),
        ("segment", {"context": {"learning_rate": [0.0, 0.1]}}, r"env\.context\.learning_rate"),
    ],
)
def test_bad_configuration_names_the_key_and_the_remedy(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(name, **overrides)


@pytest.mark.parametrize("overrides", [{"epochs": "many"}, {"epoch": 5}, {"host": {"depth": 3}}], ids=str)
def test_a_wrong_type_or_an_unknown_key_is_a_configuration_error(overrides):
    with pytest.raises(ConfigError):
        load_config("segment", **overrides)


def test_make_with_an_unknown_environment():
    with pytest.raises(ConfigError, match="choose one of digits, segment"):
        gymnasium.make(IDS[0], name="nope")


def test_an_environment_without_a_reference_says_so():
    config = load_config("segment")
    config.name = "other"
    with pytest.raises(ConfigError, match=r"no reference stored; run `python scripts/references\.py other`"):
        GrowthEnv(config, 1)
