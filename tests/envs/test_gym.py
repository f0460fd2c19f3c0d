"""Flat Gymnasium environments as graphs of one node, against environments whose every number is known."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from envs.adapter_config import GymConfig
from envs.gym import NODE, GymEnv, Normalizer
from esper.graph import GraphBatch
from esper.runtime.errors import ConfigError


class Counter(gymnasium.Env):
    """Counts steps from a start that the seed draws; terminates at +3, or is truncated there; action 1 pays 1."""

    observation_space = spaces.Box(-100.0, 100.0, (2, 1), np.float32)
    action_space = spaces.Discrete(3, start=5)

    def __init__(self, cut=False, masked=False, last=3, legal=None):
        self.cut, self.masked, self.last, self.legal = cut, masked, last, legal

    def _seen(self):
        info = {"action_mask": np.array([1, self.count % 2, 0], dtype=np.int8)} if self.masked else {}
        if self.legal is not None:
            info = {"action_mask": np.array(self.legal)}
        return np.array([[self.start], [self.count]], dtype=np.float32), info

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start, self.count = int(self.np_random.integers(50)), 0
        return self._seen()

    def step(self, action):
        assert action in self.action_space
        self.count += 1
        observation, info = self._seen()
        over = self.count == self.last
        return observation, float(action == 6), over and not self.cut, over and self.cut, info


class Strange(Counter):
    """Of spaces that are given."""

    def __init__(self, observed=None, acted=None):
        super().__init__()
        self.observation_space = observed or self.observation_space
        self.action_space = acted or self.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}


for _class in (Counter, Strange):
    gymnasium.register(f"test/{_class.__name__}-v0", _class)


def made(num_envs=2, split="train", autoreset=True, id="test/Counter-v0", normalize=False, **kwargs) -> GymEnv:
    config = GymConfig(id=id, normalize=normalize, kwargs=kwargs | {"disable_env_checker": True})
    return GymEnv(config, num_envs, split, autoreset)


def seen(graph: GraphBatch) -> list[list[float]]:
    return graph.x[NODE][:, 0].tolist()


def act(*actions: int) -> torch.Tensor:
    return torch.tensor(actions)


def test_an_observation_is_one_node_that_is_joined_with_itself():
    env = made(3)
    graph = env.reset(torch.arange(3))
    assert graph.x[NODE].shape == (3, 1, 2)
    assert graph.node_mask[NODE].all()
    (edges,) = graph.edges.values()
    assert edges.source.tolist() == edges.target.tolist() == [[0]] * 3
    assert edges.mask.tolist() == [[True]] * 3
    assert env.interface.count == 3
    assert env.interface.schema.nodes == {NODE: ("f0", "f1")}
    assert graph.action_mask.tolist() == [[True] * 3] * 3


@pytest.mark.parametrize("cut", [False, True])
def test_an_episode_ends_as_the_environment_says(cut):
    env = made(1, cut=cut)
    (before,) = seen(env.reset(act(7)))
    for count in (1, 2):
        graph, reward, terminated, truncated, info = env.step(act(count))
        assert seen(graph) == [[before[0], count]]
        assert (reward.item(), terminated.item(), truncated.item(), info) == (count == 1, False, False, {})
    graph, _, terminated, truncated, info = env.step(act(1))
    assert (terminated.item(), truncated.item()) == (not cut, cut)
    # The last observation is there for bootstrapping; the next episode begins in the same step.
    assert seen(info["final_graph"]) == [[before[0], 3]]
    assert seen(graph)[0][1] == 0
    assert {name: value.tolist() for name, value in info["episodes"].items()} == {
        "env": [0],
        "return": [2.0],
        "length": [3],
    }


def test_autoreset_inserts_no_transition():
    env = made(1, last=2)
    env.reset(act(0))
    counts = []
    for _ in range(6):
        graph, *_ = env.step(act(0))
        counts.append(seen(graph)[0][1])
    assert counts == [1, 0, 1, 0, 1, 0]  # every step is one of an episode's own


def test_without_autoreset_an_environment_waits():
    env = made(2, autoreset=False, last=1)
    env.reset(act(0, 1))
    assert env.running
    graph, _, terminated, _, _ = env.step(act(1, 1))
    assert terminated.all()
    assert not env.running
    again, reward, terminated, truncated, info = env.step(act(1, 1))
    assert seen(again) == seen(graph)
    assert not torch.cat([reward, terminated, truncated]).any()
    assert info == {}


def test_side_by_side_is_one_by_one():
    together = made(3)
    graphs = [together.reset(act(4, 5, 6))]
    graphs += [together.step(act(0, 1, 2))[0] for _ in range(7)]
    for k, seed in enumerate((4, 5, 6)):
        alone = made(1)
        own = [alone.reset(act(seed))] + [alone.step(act(k))[0] for _ in range(7)]
        assert [seen(graph)[k] for graph in graphs] == [seen(graph)[0] for graph in own]


def test_seeds_splits_and_episodes_differ():
    def starts(seed: int, split: str) -> list[float]:
        env = made(1, split, last=1)
        first = seen(env.reset(act(seed)))[0][0]
        return [first] + [seen(env.step(act(0))[0])[0][0] for _ in range(5)]

    assert starts(1, "train") == starts(1, "train")
    assert len({tuple(starts(seed, split)) for seed in (1, 2) for split in ("train", "heldout")}) == 4
    assert len(set(starts(1, "train"))) > 1


def test_masks_in_info_are_respected():
    env = made(2, masked=True)
    graph = env.reset(act(0, 1))
    assert graph.action_mask.tolist() == [[True, False, False]] * 2
    with pytest.raises(ValueError, match="action 1 of environment 1 is not legal"):
        env.step(act(0, 1))
    assert seen(env.step(act(0, 0))[0])[0][1] == 1  # nothing was changed by the refusal
    with pytest.raises(ValueError, match="actions of shape"):
        env.step(act(0))


@pytest.mark.parametrize(
    ("legal", "message"), [([1, 1], "has shape .2,. where there are 3 actions"), ([0, 0, 0], "no action is legal")]
)
def test_bad_masks(legal, message):
    with pytest.raises(ConfigError, match=rf"env.id=test/Counter-v0: .*{message}"):
        made(1, legal=legal).reset()


def test_no_action_may_be_legal_at_the_end():
    env = made(1, autoreset=False, last=1)
    env.reset(act(0))
    env.workers[0].environment.unwrapped.legal = [0, 0, 0]
    graph, *_ = env.step(act(0))
    assert graph.action_mask.any()


def test_observations_are_normalised_in_training_and_frozen_in_evaluation():
    env = made(1, normalize=True, last=50)
    env.reset(act(0))
    raw, shown = [], []
    for _ in range(40):
        graph, *_ = env.step(act(0))
        raw.append(env._observations[0])
        shown.append(seen(graph)[0])
    everything = np.stack([[raw[0][0], 0.0], *raw])
    mean, std = everything.mean(0), np.sqrt(everything.var(0) + 1e-8)
    assert shown[-1] == pytest.approx(((raw[-1] - mean) / std).tolist(), abs=1e-5)
    held = made(1, "heldout", normalize=True)
    held.load_learned(env.learned())
    held.reset(act(0))
    for _ in range(5):
        graph, *_ = held.step(act(0))
    assert held._normalizer._count == 41
    assert seen(graph)[0] == pytest.approx(np.clip((held._observations[0] - mean) / std, -10, 10).tolist(), abs=1e-4)


def test_normalizer_starts_with_what_it_is_given():
    normalizer = Normalizer(2)
    assert normalizer(np.array([[1.0, -2.0]])).tolist() == [[1.0, -2.0]]


@pytest.mark.parametrize(
    ("space", "width"),
    [
        (spaces.Discrete(4), 4),
        (spaces.Tuple([spaces.Discrete(2), spaces.Box(0, 1, (3,))]), 5),
        (spaces.Dict(a=spaces.MultiDiscrete([2, 3]), b=spaces.Box(0, 1, (2, 2))), 9),
        (spaces.Box(0, 1, ()), 1),
    ],
)
def test_spaces_with_a_flat_form(space, width):
    env = made(2, id="test/Strange-v0", observed=space)
    x = env.reset(act(0, 1)).x[NODE]
    assert x.shape == (2, 1, width)
    if isinstance(space, spaces.Discrete):
        assert x.sum(-1).tolist() == [[1.0], [1.0]]  # one-hot


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"acted": spaces.Box(0, 1)}, "only Discrete actions can be learned"),
        ({"acted": spaces.MultiDiscrete([2, 2])}, "only Discrete actions can be learned"),
        ({"observed": spaces.Sequence(spaces.Discrete(2))}, "no flat form of fixed length"),
        ({"observed": spaces.Graph(spaces.Box(0, 1), None)}, "no flat form of fixed length"),
    ],
)
def test_spaces_that_do_not_fit(given, message):
    with pytest.raises(ConfigError, match=f"env.id=test/Strange-v0: .*{message}"):
        made(1, id="test/Strange-v0", **given)


@pytest.mark.parametrize(
    ("id", "kwargs", "message"),
    [
        ("Nowhere-v0", {}, "env.id=Nowhere-v0: gymnasium.make failed: NameNotFound: .*give the id of an installed"),
        ("no_such_module:A-v0", {}, "gymnasium.make failed: ModuleNotFoundError: .*no_such_module"),
        ("CartPole-v1", {"wings": 2}, r"failed \(env.kwargs=.'wings': 2.\): TypeError"),
    ],
)
def test_environments_that_cannot_be_made(id, kwargs, message):
    with pytest.raises(ConfigError, match=message) as raised:
        GymEnv(GymConfig(id=id, kwargs=kwargs), 1)
    assert len(str(raised.value).splitlines()) == 1


def test_what_several_have_seen_counts_once() -> None:
    """Three normalisers that begin alike, of which one sees nothing, and merge twice; against all numbers in one."""
    data = np.random.default_rng(0).normal([3.0, -50.0], [2.0, 0.1], (60, 2))
    whole, parts = Normalizer(2), [Normalizer(2) for _ in range(3)]
    for x in data[:20]:
        whole.learn(x)
    for part in parts:
        part.load_state_dict(whole.state_dict())
    for begin, end in ((20, 33), (33, 60)):
        for number, x in enumerate(data[begin:end]):
            whole.learn(x)
            parts[number % 2].learn(x)
        states = [part.state_dict() for part in parts]
        for part in parts:
            part.merge(states)
        for part in parts:
            assert part.state_dict()["count"] == end
            for name in ("mean", "squares"):
                torch.testing.assert_close(part.state_dict()[name], whole.state_dict()[name], rtol=1e-9, atol=1e-9)
