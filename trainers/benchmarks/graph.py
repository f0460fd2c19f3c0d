"""The suite `graph`: building observations against HeteroData, and graphs of up to 100,000 nodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from envs.config import load_config
from envs.growth_env import GrowthEnv
from esper.graph import Edges, GraphBatch
from esper.graph.schema import SCHEMA
from esper.growth.observation import Observer
from esper.tamiyo import encoders
from esper.tamiyo.encoder import Encoder
from esper.tamiyo.policy import Tamiyo
from trainers.benchmarks import Report, naive, suite
from trainers.benchmarks.rows import REFERENCE, Row, compare, content, table, turns
from trainers.config import BenchmarkConfig, load_policy

_DEGREE = 5  # edges for each node of a large graph


def large(nodes: int, seed: int) -> GraphBatch:
    """One graph of `nodes` nodes, spread over the types, and about _DEGREE times as many edges, over the relations."""
    generator = torch.Generator().manual_seed(seed)
    types, relations = list(SCHEMA.nodes), list(SCHEMA.relations)
    counts = {node: max((nodes - 1) // (len(types) - 1), 1) for node in types} | {"global": 1}
    x = {n: torch.randn(1, counts[n], len(names), generator=generator) for n, names in SCHEMA.nodes.items()}
    edges = {}
    for relation in relations:
        count = max(_DEGREE * nodes // len(relations), 1)
        source, target = (torch.randint(counts[end], (1, count), generator=generator) for end in relation[::2])
        attr = torch.randn(1, count, len(SCHEMA.relations[relation]), generator=generator)
        edges[relation] = Edges(source, target.sort(1).values, attr, torch.ones(1, count, dtype=torch.bool))
    masks = {node: torch.ones(1, count, dtype=torch.bool) for node, count in counts.items()}
    return GraphBatch(x, masks, edges, torch.ones(1, 1, dtype=torch.bool))


def _no_grad(function: Callable[[], object]) -> None:
    with torch.no_grad():
        function()


@suite("graph")
def run(config: BenchmarkConfig) -> Report:
    """Building, then the segment backend on large graphs."""
    settings, device = config.benchmark, torch.device(config.runtime.device)
    rows: list[Row] = []
    with turns(1 + len(settings.large), settings) as tick:
        case = f"building the observation of {settings.hosts} hosts"
        env_config = load_config(settings.tasks[0])
        env = GrowthEnv(env_config, settings.hosts, device=device)
        env.reset(torch.arange(settings.hosts) + config.seed)
        env.step(env.action_mask().float().multinomial(1).squeeze(1))
        population, epochs = env.population, env_config.epochs
        variants: dict[str, Callable[[], object]] = {
            REFERENCE: partial(naive.batch, population, epochs),
            "observer": Observer(population, epochs),
        }
        rows += compare("graph", case, variants, settings, device, tick)
        encoder: Encoder = Tamiyo(load_policy(settings.policies[0])).to(device).encoder
        for nodes in settings.large:
            big = large(nodes, config.seed).to(device)
            case = f"one graph of {nodes:,} nodes, {_DEGREE * nodes:,} edges, forward"
            form = partial(_no_grad, partial(encoders.backend("segment"), encoder, big))
            rows += compare("graph", case, {"segment": form}, settings, device, tick)
    return Report(content(rows), [table(rows, "Graphs")])
