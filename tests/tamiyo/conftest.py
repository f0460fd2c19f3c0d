"""Graphs and policies for the tests of Tamiyo: real observations, random graphs, padding, random weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from envs.config import EnvConfig, load_config
from envs.growth_env import GrowthEnv
from esper.graph import Edges, GraphBatch
from esper.graph.schema import SCHEMA, GraphSchema
from esper.growth.actions import ActionLayout
from esper.growth.lifecycle import Stage, is_live
from esper.tamiyo.policy import PolicyConfig, Tamiyo


@pytest.fixture(scope="session")
def make_env() -> Callable[..., GrowthEnv]:
    """`make_env(hosts, **overrides)`: segment with short epochs and healthy hosts of four slots and width 4."""
    known: dict[str, EnvConfig] = {}  # reading one takes as long as several epochs

    def make(hosts: int, **overrides: Any) -> GrowthEnv:
        given = {"training": {"steps_per_epoch": 2, "batch_size": 16}, "contexts": "plain"}
        given |= {"host": {"width": [4, 4], "stages": [4, 4]}, **overrides}
        if repr(given) not in known:
            known[repr(given)] = load_config("segment", **given)
        return GrowthEnv(copy.deepcopy(known[repr(given)]), hosts)

    return make


@pytest.fixture(scope="session")
def observe(make_env: Callable[..., GrowthEnv]) -> Callable[..., GraphBatch]:
    """`observe(hosts, steps, **overrides)`: the observation after `steps` random actions."""

    @torch.enable_grad()  # the hosts train, also for a test that runs under no_grad
    def observed(hosts: int = 3, steps: int = 4, **overrides: Any) -> GraphBatch:
        env = make_env(hosts, **overrides)
        generator = torch.Generator().manual_seed(1)
        graph = env.reset(torch.arange(hosts))
        for _ in range(steps):
            graph = env.step(torch.multinomial(graph.action_mask.float(), 1, generator=generator).squeeze(1))[0]
        return graph

    return observed


@pytest.fixture(scope="session")
def randomise() -> Callable[..., Any]:
    """`randomise(module, seed, scale)`: every parameter normal, so that no zero bias or unit gain hides an error."""

    def fill(module: nn.Module, seed: int = 0, scale: float = 0.3) -> Any:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        return module

    return fill


@pytest.fixture(scope="session")
def small_policy(randomise: Callable[..., Any]) -> Callable[..., Tamiyo]:
    """`small_policy(seed, scale)`: a Tamiyo 8 to 12 wide with random weights."""
    return lambda seed=0, scale=0.3: randomise(Tamiyo(PolicyConfig(hidden=[8, 8, 12, 12], heads=2)), seed, scale)


@pytest.fixture(scope="session")
def random_graph() -> Callable[..., GraphBatch]:
    """`random_graph(batch, sizes, density, seed, schema)`: every possible edge with probability `density`."""

    def make(
        batch: int, sizes: dict[str, int], density: float = 0.6, seed: int = 0, schema: GraphSchema = SCHEMA
    ) -> GraphBatch:
        generator = torch.Generator().manual_seed(seed)
        x = {n: torch.randn(batch, sizes[n], len(names), generator=generator) for n, names in schema.nodes.items()}
        edges = {}
        for relation, names in schema.relations.items():
            sources, targets = sizes[relation[0]], sizes[relation[2]]
            shape = (batch, sources * targets)
            edges[relation] = Edges(
                torch.arange(sources).repeat(targets).expand(shape),
                torch.arange(targets).repeat_interleave(sources).expand(shape),
                torch.randn(*shape, len(names), generator=generator),
                torch.rand(shape, generator=generator) < density,
            )
        actions = ActionLayout(sizes.get("slot", 1), sizes.get("blueprint", 1)).size
        node_mask = {node: torch.ones(value.shape[:2], dtype=torch.bool) for node, value in x.items()}
        return GraphBatch(x, node_mask, edges, torch.ones(batch, actions, dtype=torch.bool))

    return make


@pytest.fixture(scope="session")
def pad() -> Callable[..., GraphBatch]:
    """`pad(graph, nodes, edges, seed)`: more nodes of each type in `nodes`, and `edges` more edges of every relation.

    All of it is masked, but full of large values, and the edges point at real nodes.
    """

    def padded(graph: GraphBatch, nodes: dict[str, int], edges: int, seed: int = 0) -> GraphBatch:
        generator = torch.Generator().manual_seed(seed)
        batch = len(graph)
        x, node_mask = dict(graph.x), dict(graph.node_mask)
        for node, count in nodes.items():
            garbage = 100 * torch.randn(batch, count, x[node].shape[2], generator=generator)
            x[node] = torch.cat([x[node], garbage], dim=1)
            node_mask[node] = torch.cat([node_mask[node], torch.zeros(batch, count, dtype=torch.bool)], dim=1)

        def extended(old: Edges, sources: int, targets: int) -> Edges:
            return Edges(
                torch.cat([torch.randint(sources, (batch, edges), generator=generator), old.source], dim=1),
                torch.cat([torch.randint(targets, (batch, edges), generator=generator), old.target], dim=1),
                torch.cat([100 * torch.randn(batch, edges, old.attr.shape[2], generator=generator), old.attr], dim=1),
                torch.cat([torch.zeros(batch, edges, dtype=torch.bool), old.mask], dim=1),
            )

        more = {r: extended(old, x[r[0]].shape[1], x[r[2]].shape[1]) for r, old in graph.edges.items()}
        return GraphBatch(x, node_mask, more, graph.action_mask)

    return padded


@pytest.fixture(scope="session")
def permute_nodes() -> Callable[[GraphBatch, str, Tensor], GraphBatch]:
    """`permute_nodes(graph, node, order)`: the same graph with the nodes of one type in another order, so that new
    node j is old node order[j]."""

    def permuted(graph: GraphBatch, node: str, order: Tensor) -> GraphBatch:
        new_number = order.argsort()
        edges = {
            relation: Edges(
                new_number[old.source] if relation[0] == node else old.source,
                new_number[old.target] if relation[2] == node else old.target,
                old.attr,
                old.mask,
            )
            for relation, old in graph.edges.items()
        }
        x = {**graph.x, node: graph.x[node][:, order]}
        return GraphBatch(x, {**graph.node_mask, node: graph.node_mask[node][:, order]}, edges, graph.action_mask)

    return permuted


@pytest.fixture(scope="session")
def shuffle_edges() -> Callable[..., GraphBatch]:
    """`shuffle_edges(graph, seed)`: the same graphs with the edges of each relation in random order."""

    def shuffled(graph: GraphBatch, seed: int = 0) -> GraphBatch:
        generator = torch.Generator().manual_seed(seed)
        edges = {}
        for relation, old in graph.edges.items():
            order = torch.randperm(old.source.shape[1], generator=generator)
            edges[relation] = Edges(*(t[:, order] for t in (old.source, old.target, old.attr, old.mask)))
        return GraphBatch(graph.x, graph.node_mask, edges, graph.action_mask)

    return shuffled


@pytest.fixture(scope="session")
def edited() -> Callable[..., GraphBatch]:
    """`edited(graph, {(node, feature): values})`: the graph with features of a type's nodes replaced; values [N, n] or
    what broadcasts to it."""

    def edit(graph: GraphBatch, changes: dict[tuple[str, str], Any]) -> GraphBatch:
        x = {node: value.clone() for node, value in graph.x.items()}
        for (node, name), values in changes.items():
            x[node][:, :, SCHEMA.feature(node, name)] = torch.as_tensor(values, dtype=torch.float32)
        return GraphBatch(x, graph.node_mask, graph.edges, graph.action_mask)

    return edit


@pytest.fixture(scope="session")
def scrambled() -> Callable[..., GraphBatch]:
    """`scrambled(env, seed)`: the observation of hosts of all depths whose slots are anywhere in their lifecycles, with
    random statistics. The environment is not to be used otherwise."""

    def scramble(env: GrowthEnv, seed: int) -> GraphBatch:
        p, generator = env.population, torch.Generator().manual_seed(seed)

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator)

        p.context.depth = 1 + draw(p.slots, p.hosts)
        p.context.seeds, p.germinated = draw(4, p.hosts), draw(3, p.hosts)
        missing = torch.arange(p.slots) >= p.context.depth[:, None]
        stage = draw(len(Stage), p.hosts, p.slots).masked_fill(missing, Stage.DORMANT)
        live = is_live(stage)
        p.lifecycle.stage, p.lifecycle.epochs = stage, draw(5, p.hosts, p.slots)
        p.lifecycle.blueprint = torch.where(live, draw(len(p.catalogue), p.hosts, p.slots), -1)
        p.lifecycle.alpha = (
            torch.where(stage > Stage.TRAINING, torch.rand(stage.shape, generator=generator), 0.0) * live
        )
        p.epoch = draw(env.config.epochs, p.hosts)
        for name, value in vars(p.statistics).items():
            if value.is_floating_point():
                setattr(p.statistics, name, torch.randn(value.shape, generator=generator).abs())
        p.statistics.history_length = draw(6, p.hosts)
        p.statistics.contribution_known = live & (draw(2, p.hosts, p.slots) > 0)
        return env._observe()

    return scramble
