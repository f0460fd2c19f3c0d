"""Environments that emit HeteroData: the schema that is found, what is read from step to step, and what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch_geometric.data import HeteroData

from envs.adapter_config import HeteroConfig
from envs.hetero import HeteroEnv, HeteroReader
from envs.worker import Misbehaved
from esper.graph import GraphBatch
from esper.runtime.errors import ConfigError, TrainingError
from esper.tamiyo.policies import make_policy
from esper.tamiyo.policy import PolicyConfig

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NAN, INF = float("nan"), float("inf")
FITS, BACK = ("job", "fits", "machine"), ("machine", "rev_fits", "job")


def data(jobs=3, machines=2, edges=((0, 0), (2, 1)), attr=True) -> HeteroData:
    """Job k's features are k and 10 k, machine k's is -k; edge (j, m) has the attribute j + m."""
    seen = HeteroData()
    seen["job"].x = torch.arange(jobs).float()[:, None] * torch.tensor([1.0, 10.0])
    seen["machine"].x = -torch.arange(machines).float()[:, None]
    seen[FITS].edge_index = torch.tensor(edges, dtype=torch.int64).view(-1, 2).T
    if attr:
        seen[FITS].edge_attr = torch.tensor(edges).float().view(-1, 2).sum(1)
    return seen


class Plan:
    """Shows the observations of a list one after the other."""

    action_space = spaces.Discrete(2)

    def __init__(self, shown=None, masks=None, space=None):
        self.shown, self.masks = shown or [data()], masks
        self.action_space = space or self.action_space
        self.taken = []

    def _seen(self):
        info = {} if self.masks is None else {"action_mask": self.masks[self.at]}
        return self.shown[self.at], info

    def reset(self, *, seed=None, options=None):
        self.at = 0
        return self._seen()

    def step(self, action):
        self.taken.append(action)
        self.at += 1
        observation, info = self._seen()
        return observation, 1.0, self.at == len(self.shown) - 1, False, info


plan = {}


def make_plan():
    return Plan(**plan)


def broken():
    raise RuntimeError("no licence\nsecond line")


class Flat(Plan):
    def reset(self, *, seed=None, options=None):
        return np.zeros(3), {}


class Failing(Plan):
    def reset(self, *, seed=None):
        raise KeyError("lost")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "plans", sys.modules[__name__])
    plan.clear()


def made(num_envs=1, node=None, autoreset=True, target="plans:make_plan", **settings) -> HeteroEnv:
    config = HeteroConfig(target=target, action_node=node, **settings)
    config.validate()
    return HeteroEnv(config, num_envs, autoreset=autoreset)


def listed(graph: GraphBatch, relation) -> list[tuple]:
    edges = graph.edges[relation]
    mask = edges.mask[0]
    columns = (edges.source[0][mask], edges.target[0][mask], edges.attr[0][mask])
    return sorted((int(s), int(t), *a) for s, t, a in zip(*(c.tolist() for c in columns), strict=True))


def test_types_and_features_are_those_of_the_first_observation():
    schema = made(node="job").interface.schema
    assert schema.nodes == {"job": ("f0", "f1"), "machine": ("f0",)}
    assert schema.relations == {FITS: ("a0",), BACK: ("a0",)}


def test_what_is_missing_gets_a_constant():
    seen = data(attr=False)
    del seen["machine"].x
    seen["machine"].num_nodes = 2
    reader = HeteroReader(seen, False)
    assert reader.schema.nodes["machine"] == ("presence",)
    # no relation ends in a job, so jobs are joined with themselves
    assert reader.schema.relations == {FITS: ("presence",), ("job", "itself", "job"): ("presence",)}
    graph = reader(seen)
    assert graph.x["machine"].tolist() == [[1.0], [1.0]]
    assert graph.edges[FITS][2].tolist() == [[1.0], [1.0]]
    assert [column.tolist() for column in graph.edges["job", "itself", "job"]] == [[0, 1, 2], [0, 1, 2], [[1.0]] * 3]


def test_a_relation_that_is_given_both_ways_is_not_reversed():
    seen = data()
    seen[BACK].edge_index = torch.tensor([[1], [0]])
    reader = HeteroReader(seen, True)
    assert set(reader.schema.relations) == {FITS, BACK, ("job", "rev_rev_fits", "machine")}
    assert reader(seen).edges[BACK][0].tolist() == [1]


def test_observations_are_read_as_they_are():
    graph = made(node="job").reset()
    assert graph.x["job"][0, :3].tolist() == [[0, 0], [1, 10], [2, 20]]
    assert graph.x["machine"][0].tolist() == [[0], [-1]]
    assert graph.node_mask["job"].tolist() == [[True, True, True, False]]  # room for four
    assert listed(graph, FITS) == [(0, 0, 0.0), (2, 1, 3.0)]
    assert listed(graph, BACK) == [(0, 0, 0.0), (1, 2, 3.0)]
    assert graph.action_mask.tolist() == [[True, True, True, False]]


def test_several_edges_between_a_pair_are_kept():
    plan["shown"] = [data(edges=((1, 0), (1, 0), (2, 1)))]
    plan["shown"][0][FITS].edge_attr = torch.tensor([5.0, 6.0, 7.0])
    assert listed(made(node="job").reset(), FITS) == [(1, 0, 5.0), (1, 0, 6.0), (2, 1, 7.0)]


def test_sizes_vary_and_room_never_shrinks():
    sizes = (3, 6, 2, 0)
    plan["shown"] = [data(n, edges=((0, 1),) if n else ()) for n in sizes]
    env = made(node="job", autoreset=False)
    graphs = [env.reset()] + [env.step(torch.tensor([0]))[0] for _ in sizes[1:]]
    assert [int(graph.node_mask["job"].sum()) for graph in graphs] == list(sizes)
    assert [graph.x["job"].shape[1] for graph in graphs] == [4, 8, 8, 8]
    assert [graph.action_mask.shape[1] for graph in graphs] == [4, 8, 8, 8]
    assert graphs[1].x["job"][0, :6, 0].tolist() == [0, 1, 2, 3, 4, 5]
    joined = GraphBatch.cat(graphs)  # as the rollout does
    assert joined.x["job"].shape == (4, 8, 2)
    assert joined.node_mask["job"].sum(1).tolist() == list(sizes)
    assert joined.action_mask[:3].sum(1).tolist() == [3, 6, 2]
    for k, graph in enumerate(graphs):
        assert listed(joined[k], FITS) == listed(graph, FITS)


def test_room_is_part_of_the_state():
    plan["shown"] = [data(3), data(6), data(3)]
    env = made(node="job")
    env.reset()
    for _ in range(2):
        env.step(torch.tensor([0]))
    other = made(node="job")
    assert other.reset().x["job"].shape[1] == 4
    assert other.load_state_dict(env.state_dict()).x["job"].shape[1] == 8


def test_a_first_observation_that_is_not_finite():
    plan["shown"] = [changed(x=torch.full((3, 2), NAN))]
    with pytest.raises(ConfigError, match=r"env.target=plans:make_plan: job.x is nan at \[0, 0\]"):
        made(node="job")


def test_environments_of_different_sizes_side_by_side():
    small, large = data(1, 1, ((0, 0),)), data(5, 3, ((4, 2), (1, 0)))
    env = made(2, node="job")
    for worker, seen in zip(env.workers, (small, large), strict=True):
        worker.environment.shown = [seen]
    graph = env.reset()
    assert graph.node_mask["job"].sum(1).tolist() == [1, 5]
    assert (listed(graph[0], FITS), listed(graph[1], FITS)) == ([(0, 0, 0.0)], [(1, 0, 1.0), (4, 2, 6.0)])
    assert graph.action_mask.sum(1).tolist() == [1, 5]
    config = PolicyConfig(hidden=[8, 8, 8, 8], heads=2)
    policy = make_policy(config, env.interface)
    logits, values = policy(graph)
    for k in range(2):
        alone = made(1, node="job")
        alone.workers[0].environment.shown = [(small, large)[k]]
        own, value = policy(alone.reset())
        n = (1, 5)[k]
        torch.testing.assert_close(own[0, :n], logits[k, :n], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value, values[k : k + 1], rtol=1e-5, atol=1e-6)


def test_the_action_is_the_index_of_a_node_and_masked():
    plan.update(shown=[data(3), data(2, edges=((0, 0),)), data(1, edges=())], masks=[[0, 1, 1], [1, 0], [0]])
    env = made(node="job", autoreset=False)
    assert env.reset().action_mask[0].tolist() == [False, True, True, False]
    for illegal in (0, 3):
        with pytest.raises(ValueError, match=f"action {illegal} of environment 0 is not legal"):
            env.step(torch.tensor([illegal]))
    graph, *_ = env.step(torch.tensor([2]))
    assert graph.action_mask[0].tolist() == [True, False, False, False]
    env.step(torch.tensor([0]))
    assert env.workers[0].environment.taken == [2, 0]


def test_discrete_actions_of_the_graph():
    plan["space"] = spaces.Discrete(3, start=-1)
    plan["shown"] = [data(), data(5), data()]
    env = made()
    assert env.reset().action_mask.tolist() == [[True, True, True]]
    graph, *_ = env.step(torch.tensor([2]))
    assert env.workers[0].environment.taken == [1]
    assert graph.action_mask.shape == (1, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "no_such_package.module:make"}, "importing no_such_package.module failed: ModuleNotFoundError"),
        ({"target": "plans:nothing"}, "nothing does not exist in plans; name a function or class"),
        ({"target": "plans:FITS"}, "FITS is not callable in plans"),
        ({"target": "plans:broken"}, r"calling broken failed: RuntimeError: no licence \(test_hetero.py:\d+\)"),
        ({"target": "plans:make_plan", "kwargs": {"a": 1}}, "calling make_plan failed: TypeError"),
        ({"target": "plans:Flat"}, "its observations are ndarray; they must be torch_geometric.data.HeteroData"),
        (
            {"target": "plans:Failing"},
            r"target=plans:Failing: reset\(seed=0\) raised KeyError: 'lost' \(test_hetero.py:\d+\); mend it",
        ),
        ({"target": "plans"}, "env.target=plans: must be of the form package.module:factory"),
        ({"node": "robot"}, "env.action_node=robot: .*no such node type; choose one of job, machine"),
        ({"num_envs_": 0}, "env.num_envs=0: must be above 0"),
    ],
)
def test_environments_that_cannot_be_made(settings, message):
    count = {"num_envs": settings.pop("num_envs_")} if "num_envs_" in settings else {}
    with pytest.raises(ConfigError, match=message) as raised:
        made(**settings, **count) if not count else HeteroConfig(target="plans:make_plan", **count).validate()
    assert len(str(raised.value).splitlines()) == 1


def test_actions_that_are_neither():
    plan["space"] = spaces.Box(0, 1)
    with pytest.raises(ConfigError, match=r"only Discrete actions can be learned, or .* env.action_node=job"):
        made()


def changed(**parts) -> HeteroData:
    seen = data()
    for name, value in parts.items():
        if name == "extra":
            seen[value].x = torch.zeros(1, 1)
        elif name == "x":
            seen["job"].x = value
        else:
            seen[FITS][name] = value
    return seen


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (changed(extra="robot"), "an observation has 'robot', which the first one had not"),
        (changed(x=torch.zeros(3, 5)), r"job.x has shape \(3, 5\); it must be \[n, 2\]"),
        (changed(x=None), r"job.x has shape None; it must be \[n, 2\]"),
        (
            changed(edge_index=torch.tensor([[0], [2]]), edge_attr=torch.zeros(1)),
            "names a node from 2 to 2 where there",
        ),
        (changed(edge_index=torch.tensor([[-1], [0]]), edge_attr=torch.zeros(1)), "names a node from -1 to -1 where"),
        (changed(edge_attr=torch.zeros(1, 1)), r"edge_attr has shape \(1, 1\); it must be \[2, 1\]"),
        (changed(edge_index=torch.zeros(3, 1)), r"edge_index has shape \(3, 1\)"),
        (changed(edge_index=None), "job__fits__machine has no edge_index"),
        (changed(edge_index="none"), "edge_index is 'none'; it must be a tensor"),
        (changed(x=torch.tensor([[0, 1], [2, NAN], [0, 0]])), r"job.x is nan at \[1, 1\]; it must be finite"),
        (changed(edge_attr=torch.tensor([0.0, -INF])), r"edge_attr is -inf at \[1, 0\]; it must be finite"),
        (changed(x=torch.full((3, 2), 1e300, dtype=torch.float64)), r"job.x is inf at \[0, 0\]"),
        (np.zeros(3), "its observations are ndarray"),
    ],
)
def test_observations_that_do_not_fit_the_first_one(second, message):
    plan["shown"] = [data(), second, data()]
    env = made(node="job")
    env.reset()
    seed = env._seed(0)
    where = f"env.target=plans:make_plan: environment 0, in step 1 of the episode of seed {seed}: "
    with pytest.raises(TrainingError, match=message) as raised:
        env.step(torch.tensor([0]))
    assert str(raised.value).startswith(where)
    assert len(str(raised.value).splitlines()) == 1


def test_types_may_be_missing_later():
    second = HeteroData()
    second["job"].x = torch.ones(1, 2)
    plan["shown"] = [data(), second, data()]
    env = made(node="job")
    env.reset()
    graph, *_ = env.step(torch.tensor([0]))
    assert not graph.node_mask["machine"].any()
    assert listed(graph, FITS) == []


@pytest.mark.parametrize("name", ["a__b", "type", "two words"])
def test_names_that_cannot_be_used(name):
    seen = data()
    seen[name].x = torch.zeros(1, 1)
    with pytest.raises(Misbehaved, match=f"is called '{name}'; choose another name"):
        HeteroReader(seen, True)
    assert HeteroReader(changed(), True)


def test_the_documented_example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    env = made(4, node="job", target="scheduling:Scheduling")
    graph = env.reset(torch.arange(4))
    generator, ended = torch.Generator().manual_seed(0), 0
    assert env.interface.schema.nodes == {"job": ("f0", "f1"), "machine": ("f0", "f1")}
    for _ in range(40):
        assert (graph.action_mask.sum(1) > 0).all()
        actions = torch.multinomial(graph.action_mask.float(), 1, generator=generator).squeeze(1)
        graph, reward, _, truncated, info = env.step(actions)
        assert (reward < 0).all()
        assert not truncated.any()
        if info:
            ended += len(info["episodes"]["env"])
            assert ((info["episodes"]["length"] >= 6) & (info["episodes"]["length"] <= 12)).all()
    assert ended > 8
