import dataclasses
import math

import pytest
import torch

from envs import tasks
from envs.config import load_config
from envs.growth_env import GrowthEnv, draw_context, host_spec
from esper.graph.schema import SCHEMA
from esper.growth.actions import Verb
from esper.growth.lifecycle import Stage
from esper.runtime import seeding

TAGS = ["a", "b", "c", "d"]


def rewards(out):
    return torch.stack([reward for _, reward, _, _ in out])


def glob(graph, name):
    return graph.x["global"][:, 0, SCHEMA.feature("global", name)]


def leaves(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return [leaf for part in (state.values() if isinstance(state, dict) else state) for leaf in leaves(part)]


def same_state(a, b):
    left, right = leaves(a), leaves(b)
    return len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


# ---- seeds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["segment", "digits"])
def test_the_same_seeds_give_the_same_run(play, name):
    first = play.run(play.env(4, 5, name), 8, TAGS)
    again = play.run(play.env(4, 5, name), 8, TAGS)
    assert torch.equal(rewards(first), rewards(again))
    assert rewards(first).abs().max() > 0
    for (graph, *_), (other, *_) in zip(first, again, strict=True):
        assert play.same_graph(graph, other) == []


def test_a_used_environment_starts_over_from_its_seeds(play):
    env = play.env(4, 5)
    first = play.run(env, 8, TAGS)
    env.reset(torch.arange(4) + 5)
    assert torch.equal(rewards(play.run(env, 8, TAGS)), rewards(first))


def test_another_seed_is_another_run(play):
    a, b = play.run(play.env(4, 0), 6, TAGS), play.run(play.env(4, 100), 6, TAGS)
    assert not torch.isclose(glob(a[0][0], "log_validation_loss"), glob(b[0][0], "log_validation_loss")).any()


def single_and_vector(play, name):
    vector = play.env(4, 5, name)
    single = play.env(1, 7, name)  # seed 5 + 2: environment 2
    return single, vector, play.run(single, 14, TAGS[2:3]), play.run(vector, 14, TAGS)


@pytest.mark.parametrize("name", ["segment", "digits"])
def test_rewards_of_an_environment_alone_are_those_beside_others(play, name):
    _, _, alone, together = single_and_vector(play, name)  # 14 steps: over two autoresets
    assert torch.equal(rewards(alone)[:, 0], rewards(together)[:, 2])
    assert rewards(alone).abs().max() > 0


@pytest.mark.parametrize("name", ["segment", "digits"])
def test_observations_of_an_environment_alone_are_those_beside_others(play, name):
    _, _, alone, together = single_and_vector(play, name)
    different = set()
    for (graph, *_), (other, *_) in zip(alone, together, strict=True):
        different |= set(play.same_graph(graph, other, (0, 2)))
    assert different == set()


def keys_of(env):
    return env.population.context.key[: env.num_envs].tolist()


def test_train_and_heldout_instances_differ(play):
    seen = {}
    for split in ("train", "heldout"):
        env, keys = play.env(16, split=split, epochs=1, training={"steps_per_epoch": 1}), []
        for _ in range(5):
            keys += keys_of(env)
            env.step(torch.zeros(16, dtype=torch.int64))
        assert len(set(keys)) == 16 * 5
        seen[split] = set(keys)
    assert not seen["train"] & seen["heldout"]
    a, b = play.env(3, split="train").population, play.env(3, split="heldout").population
    assert not torch.isclose(a.theta[:3], b.theta[:3]).any(1).all()
    assert not torch.equal(a.subset[:3], b.subset[:3])
    assert (a.context.learning_rate != b.context.learning_rate).all()


def test_an_unknown_split_is_refused(play):
    with pytest.raises(ValueError, match="not in"):
        GrowthEnv(load_config("segment"), 1, "test")


def test_reset_without_seeds_goes_on_and_with_seeds_starts_over(play):
    env = play.env(3, 9)
    first = keys_of(env)
    env.reset()
    second = keys_of(env)
    env.reset(torch.arange(3) + 9)
    assert keys_of(env) == first
    assert not set(first) & set(second)


def test_autoreset_goes_through_the_same_instances_as_reset(play):
    automatic, manual = play.env(3, 9), play.env(3, 9, autoreset=False)
    for _ in range(3):
        assert keys_of(automatic) == keys_of(manual)
        a, b = play.run(automatic, 6, TAGS[:3]), play.run(manual, 6, TAGS[:3])
        assert torch.equal(rewards(a), rewards(b))
        assert play.same_graph(a[-1][0], manual.reset()) == []


# ---- contexts -----------------------------------------------------------------------------------------------------


def test_contexts_are_drawn_from_their_ranges():
    config = load_config("segment")
    context = draw_context(config, seeding.fold(torch.arange(4000), 9))
    share = {}
    for name, (low, high) in dataclasses.asdict(config.context).items():
        value = getattr(context, name).double()
        slack = 0.5 if name == "train_size" else 1e-9 + 1e-6 * high
        assert value.min() >= low - slack
        assert value.max() <= high + slack
        if name == "label_noise":
            share[name] = (value - low) / (high - low)
        else:
            share[name] = (value / low).log() / math.log(high / low)  # log-uniform
    for u in share.values():
        counts = torch.bincount((u * 10).long().clamp(0, 9), minlength=10).double()
        assert ((counts - 400) ** 2 / 400).sum() < 34  # chi-square with 9 degrees: p = 1e-4
    drawn = torch.stack(list(share.values()))
    assert (torch.corrcoef(drawn) - torch.eye(3)).abs().max() < 5 / 4000**0.5


def test_a_range_of_one_value_is_that_value():
    config = load_config(
        "segment", context={"learning_rate": [5e-3, 5e-3], "train_size": [700, 700], "label_noise": [0.1, 0.1]}
    )
    context = draw_context(config, torch.arange(50))
    assert torch.allclose(context.learning_rate, torch.tensor(5e-3))
    assert set(context.train_size.tolist()) == {700}
    assert torch.allclose(context.label_noise, torch.tensor(0.1))


def test_twins_share_context_start_and_data(play):
    env = play.env(3, 9)
    play.run(env, 7, TAGS[:3])  # one step into the second episode
    p = env.population
    for state in (*vars(p.context).values(), p.subset, p.labels, p.epoch):
        assert torch.equal(state[:3], state[3:])
    assert (p.lifecycle.stage[3:] == Stage.DORMANT).all()


def test_a_context_does_not_tell_which_samples_the_host_has(play):
    # The places of the first samples of the pool in each host's order, against what was drawn for its context.
    env = play.env(400, epochs=1, training={"steps_per_epoch": 1})
    context = env.population.context
    place = env.population.subset[:400].argsort(1)[:, :3].double()
    drawn = torch.stack([getattr(context, n)[:400].double() for n in ("learning_rate", "train_size", "label_noise")])
    correlation = torch.corrcoef(torch.cat([drawn, place.T]))[:3, 3:]
    assert correlation.abs().max() < 5 / 400**0.5


def test_the_host_is_what_the_task_asks_for():
    spec = host_spec(load_config("digits", host={"width": 6, "stages": 2}))
    assert (spec.inputs, spec.classes, spec.width, spec.stages) == (64, 10, 6, 2)


# ---- episodes -----------------------------------------------------------------------------------------------------


def test_autoreset_starts_new_instances_and_keeps_the_terminal_graph(play):
    env = play.env(3, 9)
    before = keys_of(env)
    out = play.run(env, 6, TAGS[:3])
    assert [t.tolist() for _, _, t, _ in out] == [[False] * 3] * 5 + [[True] * 3]
    assert all(info == {} for _, _, _, info in out[:-1])
    graph, _, _, info = out[-1]
    assert not set(keys_of(env)) & set(before)
    assert glob(graph, "epoch_fraction").tolist() == [0.0] * 3
    assert glob(info["final_graph"], "epoch_fraction").tolist() == [1.0] * 3
    assert glob(info["final_graph"], "remaining_fraction").tolist() == [0.0] * 3
    assert (env.population.lifecycle.stage == Stage.DORMANT).all()
    assert info["episodes"]["length"].tolist() == [6] * 3

    manual = play.env(3, 9, autoreset=False)
    last = play.run(manual, 6, TAGS[:3])[-1]
    assert play.same_graph(info["final_graph"], last[0]) == []
    assert play.same_graph(last[3]["final_graph"], last[0]) == []


def test_the_summary_counts_what_was_done(play):
    env = play.env(2)
    out = play.script(
        env, (Verb.GERMINATE, 0, 2), (Verb.GERMINATE, 1, 1), (Verb.WAIT,), (Verb.CULL, 1), (Verb.FOSSILIZE, 0)
    )
    summary = out[-1][3]["episodes"]
    for name, count in {"germinated": 2, "fossilized": 1, "culled": 1, "waited": 2}.items():
        assert summary[name].tolist() == [count] * 2, name
    assert summary["env"].tolist() == [0, 1]
    torch.testing.assert_close(summary["return"], rewards(out).sum(0))
    # The second episode starts its counts anew; seeds that the end removes are not counted as culled.
    summary = play.script(env, (Verb.WAIT,), (Verb.WAIT,), (Verb.WAIT,), (Verb.GERMINATE, 0, 2))[-1][3]["episodes"]
    assert [summary[n].tolist()[0] for n in ("germinated", "fossilized", "culled", "waited")] == [1, 0, 0, 5]


def test_test_accuracies_are_of_the_grown_host_and_of_its_twin(play):
    env = play.env(2, autoreset=False)
    summary = play.script(env, (Verb.GERMINATE, 0, 0))[-1][3]["episodes"]
    population = env.population
    assert torch.equal(summary["test_accuracy"], population.test_accuracy(torch.tensor([0, 1])))
    assert torch.equal(summary["twin_test_accuracy"], population.test_accuracy(torch.tensor([2, 3])))
    assert ((summary["test_accuracy"] > 0.1) & (summary["test_accuracy"] < 1)).all()


def test_an_illegal_action_raises_and_changes_nothing(play):
    env = play.env(3)
    play.run(env, 2, TAGS[:3])
    before = env.state_dict()
    illegal = int((~env.action_mask()[1]).nonzero()[0])
    with pytest.raises(ValueError, match="is not legal for host 1"):
        env.step(torch.tensor([0, illegal, 0]))
    assert same_state(before, env.state_dict())


def test_the_mask_is_that_of_the_graph(play):
    env = play.env(3)
    graph = play.run(env, 5, TAGS[:3])[-1][0]
    assert torch.equal(graph.action_mask, env.action_mask())
    assert not graph.action_mask.all()


# ---- state --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shaping", [0.0, 0.5])
def test_a_restored_environment_goes_on_bitwise(play, shaping):
    reward = {"shaping": shaping}
    whole = play.env(3, 9, reward=reward)
    expected = play.run(whole, 11, TAGS[:3])[4:]  # two episodes: over an autoreset
    half = play.env(3, 9, reward=reward)
    stopped = play.run(half, 4, TAGS[:3])[-1][0]
    state = half.state_dict()
    play.run(half, 3, TAGS[:3])  # the state is a copy
    restored = play.env(3, 50, reward=reward)
    play.run(restored, 8, ["x", "y", "z"])
    assert play.same_graph(restored.load_state_dict(state), stopped) == []
    out = play.run(restored, 7, TAGS[:3])
    assert torch.equal(rewards(out), rewards(expected))
    for (graph, _, _, info), (other, _, _, expected_info) in zip(out, expected, strict=True):
        assert play.same_graph(graph, other) == []
        assert info.keys() == expected_info.keys()
        if info:
            assert all(torch.equal(v, expected_info["episodes"][k]) for k, v in info["episodes"].items())
    assert same_state(restored.state_dict(), whole.state_dict())


def test_a_state_without_one_of_its_keys_is_refused(play):
    env = play.env(1)
    state = env.state_dict()
    for name in state:
        with pytest.raises(KeyError, match=name):
            env.load_state_dict({k: v for k, v in state.items() if k != name})


def test_loading_does_not_tie_the_environment_to_the_state(play):
    env = play.env(2)
    play.run(env, 2, TAGS[:2])
    state = env.state_dict()
    before = [leaf.clone() for leaf in leaves(state)]
    env.load_state_dict(state)
    play.run(env, 6, TAGS[:2])
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(state), strict=True))


# ---- the test split -----------------------------------------------------------------------------------------------


def test_the_test_split_enters_neither_observation_nor_reward(play, monkeypatch):
    clean = play.run(play.env(3, reward={"shaping": 0.5}), 8, TAGS[:3])
    data = tasks.load("segment")
    wrong = dataclasses.replace(data, test_x=torch.full_like(data.test_x, float("nan")), test_y=(data.test_y + 1) % 7)
    monkeypatch.setattr(tasks, "load", lambda name: wrong)
    poisoned = play.run(play.env(3, reward={"shaping": 0.5}), 8, TAGS[:3])
    assert torch.equal(rewards(clean), rewards(poisoned))
    for (graph, _, _, info), (other, _, _, wrong_info) in zip(clean, poisoned, strict=True):
        assert play.same_graph(graph, other) == []
        if info:
            assert play.same_graph(info["final_graph"], wrong_info["final_graph"]) == []
            assert not torch.equal(info["episodes"]["test_accuracy"], wrong_info["episodes"]["test_accuracy"])
