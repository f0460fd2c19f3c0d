"""Growing super-resolution networks: instances, twins, rewards, exact resume, and a trained policy that plays it."""

from __future__ import annotations

from typing import Any

import gymnasium
import pytest
import torch

from envs.config import load_any
from envs.making import CONFIGS, make_envs
from envs.super_resolution import SuperResolutionConfig, SuperResolutionEnv
from esper.graph import GraphBatch
from esper.growth.actions import Verb
from esper.hosts.super_resolver import SuperResolver, slots
from esper.runtime.errors import ConfigError

SMALL: dict[str, Any] = {
    "epochs": 3, "crop": 12, "crops": [4, 9], "judged": 3, "training": {"steps_per_epoch": 2, "batch_size": 2},
}  # fmt: skip


def config_of(**changes: Any) -> SuperResolutionConfig:
    config = load_any(CONFIGS, "super_resolution", **{**SMALL, **changes})
    assert isinstance(config, SuperResolutionConfig)
    return config


def env_of(count: int = 1, **changes: Any) -> SuperResolutionEnv:
    env = make_envs(config_of(**changes), count, autoreset=False)
    assert isinstance(env, SuperResolutionEnv)
    return env


def same(a: GraphBatch, b: GraphBatch) -> bool:
    ours, theirs = a.pack(), b.pack()
    return torch.equal(ours.x, theirs.x) and torch.equal(ours.attr, theirs.attr)


def test_the_network_has_the_size_it_should_and_starts_as_bicubic() -> None:
    network = SuperResolver.tiny()
    assert 0.38e6 < sum(p.numel() for p in network.parameters()) < 0.45e6
    assert len(slots(network.dat.spec)) == 4
    x = torch.rand(2, 3, 12, 20)
    large = torch.nn.functional.interpolate(x, scale_factor=2, mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(network.restored(x), large)
    assert network.training, "which restoring left as it was"


def test_without_growing_a_host_is_its_twin() -> None:
    env = env_of()
    env.reset(torch.tensor([5]))
    for _ in range(3):
        _, reward, terminated, _, info = env.step(torch.tensor([0]))
    assert terminated.all()
    assert reward.item() == 0
    episode = {name: value.item() for name, value in info["episodes"].items()}
    assert episode["return"] == episode["points"] == 0
    assert episode["test_psnr"] == episode["twin_test_psnr"] != episode["bicubic_test_psnr"]
    assert (episode["length"], episode["waited"], episode["params_ratio"]) == (3, 3, 1)
    assert not env.running


def test_an_episode_does_not_depend_on_its_neighbours() -> None:
    alone, beside = env_of(1), env_of(2)
    graph, graphs = alone.reset(torch.tensor([7])), beside.reset(torch.tensor([3, 7]))
    germinate = alone.layout.index(Verb.GERMINATE, 1, 0)
    for action in (germinate, 0):
        assert same(graph, graphs[1:])
        graph = alone.step(torch.tensor([action]))[0]
        graphs = beside.step(torch.tensor([0, action]))[0]
    assert same(graph, graphs[1:])
    assert not same(graph, graphs[:1])


def test_rewards_are_paid_at_the_end_with_rent() -> None:
    """A seed that holds at the end is kept; what its host is above its twin is paid, less its size."""
    env = env_of(epochs=6)
    env.reset(torch.tensor([1]))
    germinate = env.layout.index(Verb.GERMINATE, 3, 1)
    rewards = []
    for action in (germinate, 0, 0, 0, 0, 0):
        _, reward, _, _, info = env.step(torch.tensor([action]))
        rewards.append(reward.item())
    episode = {name: value.item() for name, value in info["episodes"].items()}
    assert rewards[:-1] == [0] * 5
    growth = 4 * 96 * 96 + 3 * 96  # of an mlp of width 96: two layers of twice the width
    total = sum(p.numel() for p in SuperResolver.tiny().parameters())
    assert episode["params_ratio"] == pytest.approx(1 + growth / total)
    assert rewards[-1] == pytest.approx(episode["gain"] - 0.1 * growth / total, abs=1e-6)
    expected = episode["test_psnr"] - episode["twin_test_psnr"] - 0.1 * growth / total
    assert episode["points"] == pytest.approx(expected, abs=1e-5)
    assert episode["germinated"] == 1


def test_an_interrupted_episode_goes_on_bit_for_bit() -> None:
    env, other = env_of(2, epochs=5), env_of(2, epochs=5)
    env.reset(torch.tensor([1, 2]))
    actions = [env.layout.index(Verb.GERMINATE, slot, 1) for slot in (0, 2)]
    for pair in (actions, [0, 0], [0, env.layout.index(Verb.CULL, 2)]):
        env.step(torch.tensor(pair))
    state = env.state_dict()
    other.reset()
    assert same(other.load_state_dict(state), env._observe())
    for _ in range(2):
        ours, theirs = (each.step(torch.tensor([0, 0])) for each in (env, other))
        assert same(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_a_host_that_diverges_ends_its_episode_and_scores_lowest() -> None:
    env = env_of(2)
    env.reset(torch.tensor([1, 2]))
    with torch.no_grad():
        env._running[0].learner.network.dat.norm.weight.fill_(torch.nan)
    _, reward, terminated, _, info = env.step(torch.tensor([0, 0]))
    assert terminated.tolist() == [True, False]
    assert reward.tolist() == [-3, 0]
    assert info["episodes"]["diverged"].tolist() == [True]


def test_the_next_episode_begins_where_one_has_ended() -> None:
    env = make_envs(config_of(epochs=1), 1)
    first = env.reset(torch.tensor([4]))
    graph, _, terminated, _, info = env.step(torch.tensor([0]))
    assert terminated.all()
    assert not same(graph, info["final_graph"])
    assert not same(graph, first)


def test_actions_that_are_not_legal_are_refused() -> None:
    env = env_of()
    env.reset()
    with pytest.raises(ValueError, match="not legal"):
        env.step(torch.tensor([env.layout.index(Verb.CULL, 0)]))
    with pytest.raises(ValueError, match="for 1 environments"):
        env.step(torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crops": [0, 5]}, r"env.crops=\[0, 5\]"),
        ({"learning_rate": [1.0, 0.1]}, "env.learning_rate="),
        ({"judged": 0}, "env.judged=0: must be above 0"),
        ({"blueprints": ["glue"]}, "env.blueprints=glue: no such blueprint"),
        ({"crop": "wide"}, "crop"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**changes)


def test_gymnasium_makes_it() -> None:
    env = gymnasium.make("envs:esper/SuperResolution-v0", **SMALL)
    observation, info = env.reset(seed=3)
    assert observation in env.observation_space
    action = int(info["action_mask"].nonzero()[0][-1])
    observation, _, terminated, _, info = env.step(action)
    assert observation in env.observation_space
    assert not terminated
    assert not info["illegal_action"]


@pytest.mark.slow
def test_a_whole_life_ends_above_bicubic_enlargement() -> None:
    """A seed is germinated, blends, holds and is fossilised, at full size but for fewer steps."""
    rules = {"training": {"steps_per_epoch": 20, "batch_size": 4}, "lifecycle": {"auto_ramp": 1}}
    config = load_any(CONFIGS, "super_resolution", epochs=5, learning_rate=[3e-4, 3e-4], **rules)
    env = make_envs(config, 1, autoreset=False)
    assert isinstance(env, SuperResolutionEnv)
    env.reset(torch.tensor([1]))
    for epoch in range(5):
        fossilize = env.layout.index(Verb.FOSSILIZE, 1)
        action = env.layout.index(Verb.GERMINATE, 1, 0) if epoch == 0 else 0
        if env.action_mask()[0, fossilize]:
            action = fossilize
        _, _, _, _, info = env.step(torch.tensor([action]))
    episode = {name: value.item() for name, value in info["episodes"].items()}
    assert (episode["germinated"], episode["fossilized"], episode["culled"]) == (1, 1, 0)
    assert episode["params_ratio"] > 1.1
    assert episode["test_psnr"] > episode["bicubic_test_psnr"] + 0.1
