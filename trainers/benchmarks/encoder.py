"""The suite `encoder`: every backend of Tamiyo's encoder against PyG's modules on real observations."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from envs.config import load_config
from envs.growth_env import GrowthEnv
from esper.graph import GraphBatch, Layout
from esper.tamiyo import encoders
from esper.tamiyo.encoder import Encoder
from esper.tamiyo.encoders import dense, pyg
from esper.tamiyo.policy import Tamiyo
from trainers.benchmarks import Report, suite
from trainers.benchmarks.rows import FLOOR, REFERENCE, Row, compare, content, table, turns
from trainers.config import BenchmarkConfig, load_policy

_STEPS = 8  # of the environment between two batches


def observations(config: BenchmarkConfig, count: int) -> GraphBatch:
    """`count` graphs of hosts that grow at random."""
    hosts = min(config.benchmark.hosts, count)
    env = GrowthEnv(load_config(config.benchmark.tasks[0]), hosts, device=config.runtime.device)
    env.reset(torch.arange(hosts) + config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    graphs: list[GraphBatch] = []
    while sum(map(len, graphs)) < count:
        for _ in range(_STEPS):
            actions = torch.multinomial(env.action_mask().float(), 1, generator=generator).squeeze(1)
            graph = env.step(actions)[0]
        graphs.append(graph)
    return GraphBatch.cat(graphs)[:count]


def floor(encoder: Encoder, layout: Layout, batch: int) -> Callable[[], None]:
    """The matrix products of a forward pass by themselves: every relation is projected on the side with fewer nodes."""
    shape, products = encoder.shape, []
    device = next(encoder.parameters()).device

    def product(rows: int, width: int, out: int) -> None:
        a, b = torch.randn(rows * batch, width, device=device), torch.randn(width, out, device=device)
        products.append((a, b, torch.empty(rows * batch, out, device=device)))

    for _, count, features in layout.types:
        product(count, features, shape.hidden[0])
    for depth, (width, out) in enumerate(shape.widths):
        for source, _, target in shape.relations(depth):
            product(min(layout.counts[source], layout.counts[target]), width, out)
        for node in shape.targets(depth):
            if not shape.attends(depth):
                product(layout.counts[node], width, out)
            if width != out:
                product(layout.counts[node], width, out)

    def run() -> None:
        for a, b, out in products:
            torch.mm(a, b, out=out)

    return run


def _forward(function: Callable[[], dict[str, Tensor]]) -> None:
    with torch.no_grad():
        function()


def _both(function: Callable[[], dict[str, Tensor]], module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None
    torch.stack([value.square().sum() for value in function().values()]).sum().backward()


def _compiled(encoder: Encoder, graph: GraphBatch, backward: bool) -> tuple[Callable[[], dict[str, Tensor]], float]:
    """The dense backend compiled from nothing, and the seconds that its first call takes."""
    packed = graph.pack()
    torch._dynamo.reset()
    function = torch.compile(dense.of_tensors(encoder, packed.layout), dynamic=False, fullgraph=True)
    call = partial(function, packed.x, packed.attr, packed.mask)
    with torch._inductor.utils.fresh_cache():
        start = time.perf_counter()
        _both(call, encoder) if backward else _forward(call)
        return call, time.perf_counter() - start


@suite("encoder")
def run(config: BenchmarkConfig) -> Report:
    """All backends, forward and with the backward pass."""
    settings, device = config.benchmark, torch.device(config.runtime.device)
    rows: list[Row] = []
    cases = [(p, n, b) for p in settings.policies for n in settings.graphs for b in (False, True)]
    with turns(len(cases), settings) as tick:
        for policy, count, backward in cases:
            case = f"{policy}, {count} graphs, {'forward + backward' if backward else 'forward'}"
            encoder = Tamiyo(load_policy(policy)).to(device).encoder
            graph = observations(config, count)
            plain = pyg.PyGEncoder(encoder.shape).to(device)
            plain.load_state_dict({name: value.detach() for name, value in pyg.parameters(encoder).items()})
            forms: dict[str, tuple[Callable[[], dict[str, Tensor]], nn.Module]] = {
                REFERENCE: (partial(plain, graph), plain)
            }
            for name in encoders.BACKENDS:
                if name != REFERENCE and not (name == "native" and device.type != "cpu"):
                    forms[name] = (partial(encoders.backend(name), encoder, graph), encoder)
            took = {}
            if settings.compile:
                call, took["dense, compiled"] = _compiled(encoder, graph, backward)
                forms["dense, compiled"] = (call, encoder)
            variants: dict[str, Callable[[], object]] = {
                name: partial(_both, form, module) if backward else partial(_forward, form)
                for name, (form, module) in forms.items()
            }
            if not backward:
                variants[FLOOR] = floor(encoder, graph.pack().layout, count)
            rows += compare("encoder", case, variants, settings, device, tick, took)
    return Report(content(rows), [table(rows, "Encoder backends")])
