"""GrowthEnv: instances that depend on seeds alone, whole episodes, state, and data that must not leak."""

import dataclasses

import pytest
import torch

from envs import tasks, twins
from envs.contexts import KINDS
from esper.graph.schema import SCHEMA
from esper.growth.actions import Verb
from esper.growth.lifecycle import Stage

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


@pytest.mark.parametrize(("name", "steps"), [("segment", 14), ("digits_conv", 7)])  # over one or two autoresets
def test_an_environment_alone_goes_as_beside_others(play, name, steps):
    together = play.run(play.env(4, 5, name), steps, TAGS)
    alone = play.run(play.env(1, 7, name), steps, TAGS[2:3])  # seed 5 + 2: environment 2
    assert torch.equal(rewards(alone)[:, 0], rewards(together)[:, 2])
    assert rewards(alone).abs().max() > 0
    different = set()
    for (graph, *_), (other, *_) in zip(alone, together, strict=True):
        different |= set(play.same_graph(graph, other, (0, 2)))
    assert different == set()


def keys_of(env):
    return env.population.context.key.tolist()


def test_train_and_heldout_instances_never_coincide(play):
    seen = {}
    for split in ("train", "heldout"):
        env, keys = play.env(16, split=split, epochs=1, training={"steps_per_epoch": 1, "batch_size": 2}), []
        for _ in range(4):
            keys += keys_of(env)
            env.reset()
        assert len(set(keys)) == 16 * 4
        seen[split] = set(keys)
    assert not seen["train"] & seen["heldout"]
    a, b = play.env(3, split="train").population, play.env(3, split="heldout").population
    assert not torch.isclose(a.theta, b.theta).any(1).all()
    assert not torch.equal(a.subset, b.subset)
    assert (a.context.learning_rate != b.context.learning_rate).all()


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


# ---- instances ----------------------------------------------------------------------------------------------------


def test_a_context_does_not_tell_which_samples_the_host_has(play):
    # The places of the first samples of the pool in each host's order, against what was drawn for its context.
    env = play.env(400, epochs=1, training={"steps_per_epoch": 1, "batch_size": 2})
    context = env.population.context
    place = env.population.subset.argsort(1)[:, :3].double()
    drawn = torch.stack([getattr(context, n).double() for n in ("learning_rate", "train_size", "label_noise")])
    correlation = torch.corrcoef(torch.cat([drawn, place.T]))[:3, 3:]
    assert correlation.abs().max() < 5 / 400**0.5


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
    env = play.env(2, contexts="repair")
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_summary_names_the_kind(play, kind):
    summary = play.script(play.env(2, contexts=kind, epochs=2))[-1][3]["episodes"]
    assert [KINDS[number] for number in summary["kind"].tolist()] == [kind] * 2


def test_a_mixture_names_the_kind_of_each_instance(play):
    env = play.env(24, epochs=1, training={"steps_per_epoch": 1, "batch_size": 2}, autoreset=False)
    kinds = play.script(env)[-1][3]["episodes"]["kind"]
    context = env.population.context
    assert torch.equal(context.priced, kinds == KINDS.index("growth"))
    assert torch.equal(context.shift_epoch < 100, kinds == KINDS.index("shift"))
    assert len(kinds.unique()) == len(KINDS)


def test_accuracies_are_of_the_grown_host_and_of_its_twin(play):
    env, other = (play.env(2, contexts="repair", autoreset=False) for _ in range(2))
    summary = play.script(env, (Verb.GERMINATE, 0, 0))[-1][3]["episodes"]
    play.script(other)
    both = torch.arange(2)
    for split in ("validation", "test"):
        assert torch.equal(summary[f"{split}_accuracy"], env.population.accuracy(both, split))
        assert torch.equal(summary[f"twin_{split}_accuracy"], other.population.accuracy(both, split))
    assert not torch.equal(summary["test_accuracy"], summary["twin_test_accuracy"])
    assert not torch.equal(summary["test_accuracy"], summary["validation_accuracy"])


@pytest.mark.parametrize("actions", [torch.zeros(2, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64)])
def test_one_action_for_each_environment(play, actions):
    with pytest.raises(ValueError, match="for 3 environments"):
        play.env(3).step(actions)


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


@pytest.mark.parametrize(("kind", "shaping"), [("mixture", 0.0), ("growth", 0.5)])
def test_a_restored_environment_goes_on_bitwise(play, kind, shaping):
    given = {"contexts": kind, "reward": {"shaping": shaping}}
    whole = play.env(3, 9, **given)
    expected = play.run(whole, 11, TAGS[:3])[4:]  # two episodes: over an autoreset
    half = play.env(3, 9, **given)
    stopped = play.run(half, 4, TAGS[:3])[-1][0]
    state = half.state_dict()
    play.run(half, 3, TAGS[:3])  # the state is a copy
    restored = play.env(3, 50, **given)
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


@pytest.mark.parametrize("kind", ["mixture", "growth"])
def test_the_test_split_enters_neither_observation_nor_reward(play, monkeypatch, kind):
    def played():
        monkeypatch.setattr(twins, "_SHARED", {})
        return play.run(play.env(4, contexts=kind, reward={"shaping": 0.5}), 8, TAGS)

    clean = played()
    data = tasks.load("segment")
    wrong = dataclasses.replace(data, test_x=torch.full_like(data.test_x, float("nan")), test_y=(data.test_y + 1) % 7)
    monkeypatch.setattr(tasks, "load", lambda name: wrong)
    poisoned = played()
    assert rewards(clean).abs().max() > 0
    assert torch.equal(rewards(clean), rewards(poisoned))
    for (graph, _, _, info), (other, _, _, wrong_info) in zip(clean, poisoned, strict=True):
        assert play.same_graph(graph, other) == []
        if info:
            assert play.same_graph(info["final_graph"], wrong_info["final_graph"]) == []
            episodes, wrong_episodes = info["episodes"], wrong_info["episodes"]
            changed = {name for name in episodes if not torch.equal(episodes[name], wrong_episodes[name])}
            assert changed == {"points", "test_accuracy", "twin_test_accuracy"}
