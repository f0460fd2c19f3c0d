import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.graph.schema import SCHEMA
from esper.growth.lifecycle import Stage, is_live
from esper.growth.observation import Observer
from trainers.benchmarks.naive import Naive, clip

HORIZON = 12
KEYS = [51, 52, 53, 54, 55]
TASKS = ["mlp", "grid", "causal"]


def assert_is_naive(toy, graph, population, horizon=HORIZON):
    assert len(graph) == population.hosts
    for k in range(population.hosts):
        w, spec = int(population.context.width[k]), population.spec
        names = [blueprint.name for blueprint in population.catalogue]
        sizes = {n: sum(p.numel() for p in toy.Seed(n, w, spec.grid, spec.causal).parameters()) for n in names}
        naive = Naive(population, k, horizon, sizes)
        for node, rows in naive.nodes().items():
            names = SCHEMA.nodes[node]
            assert all(set(row) == set(names) for row in rows.values()), node
            expected = torch.zeros_like(graph.x[node][k])  # padding is 0
            for place, row in rows.items():
                expected[place] = torch.tensor([clip(row[name]) for name in names])
            torch.testing.assert_close(
                graph.x[node][k], expected, rtol=1e-4, atol=2e-5, msg=lambda m, n=node: f"{n}: {m}"
            )
            assert graph.node_mask[node][k].nonzero().flatten().tolist() == sorted(rows)
        for relation, rows in naive.edges().items():
            edges = graph.edges[relation]
            there = edges.mask[k]
            names = SCHEMA.relations[relation]
            expected = torch.tensor([[clip(row[2][name]) for name in names] for row in rows]).view(-1, len(names))
            torch.testing.assert_close(edges.attr[k][there], expected, rtol=1e-5, atol=1e-6)
            assert not edges.attr[k][~there].any()
            for value, column in ((edges.target, 0), (edges.source, 1)):
                assert value.dtype == torch.int64
                assert value[k][there].tolist() == [row[column] for row in rows]


@pytest.mark.parametrize(("task", "tag", "auto_blend"), [("mlp", 1, None), ("grid", 2, None), ("causal", 3, 1)])
def test_observer_equals_the_naive_builder(toy, task, tag, auto_blend):
    p = toy.population(KEYS, task, mixed=True, width=6, steps=3, auto_blend=auto_blend)
    observer, seen = Observer(p, HORIZON), set()
    assert_is_naive(toy, observer(), p)
    for _ in range(7):
        toy.act(p, KEYS, tag)
        p.train_epoch()
        seen |= set(p.lifecycle.stage.flatten().tolist())
        assert_is_naive(toy, observer(), p)
    assert len(seen) >= 5
    assert len(p.context.depth.unique()) == 3


def scramble(p, seed):
    """Puts every host in a random state: depth, width, lifecycles, counters, and statistics of any size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    p.context.depth, p.context.width = 1 + draw(p.slots, p.hosts), 1 + draw(p.spec.width, p.hosts)
    p.context.seeds, p.germinated = draw(5, p.hosts), draw(4, p.hosts)
    p.context.learning_rate = 10 ** (-3 * torch.rand(p.hosts, generator=generator) - 1)
    missing = torch.arange(p.slots) >= p.context.depth[:, None]
    stage = draw(len(Stage), p.hosts, p.slots).masked_fill(missing, Stage.DORMANT)
    live = is_live(stage)
    p.lifecycle.stage, p.lifecycle.epochs = stage, draw(5, p.hosts, p.slots)
    p.lifecycle.blueprint = torch.where(live, draw(len(p.catalogue), p.hosts, p.slots), -1)
    p.lifecycle.alpha = torch.rand(stage.shape, generator=generator) * (stage > Stage.TRAINING) * live
    p.epoch = draw(HORIZON, p.hosts)
    p.seed_steps = draw(3, p.hosts, p.slots) * live * (p.epoch > 0)[:, None]
    p.extra_flops = 1e3 * torch.rand(p.hosts, generator=generator)
    for name, value in vars(p.statistics).items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator).abs() * 10.0 ** (draw(9, *value.shape) - 5)
            setattr(p.statistics, name, drawn)
    p.validation_loss = p.statistics.history[:, 0].clone()
    p.statistics.history_length = p.epoch + 1
    p.statistics.contribution_known = live & (draw(2, p.hosts, p.slots) > 0)
    p.statistics.fared_known = draw(2, *p.statistics.fared_known.shape) > 0


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30), hosts=st.integers(1, 4), task=st.sampled_from(TASKS))
def test_observer_equals_the_naive_builder_on_random_populations(toy, seed, hosts, task):
    p = toy.population(KEYS[:hosts], task, width=6)
    scramble(p, seed)
    assert_is_naive(toy, Observer(p, HORIZON)(), p)


@pytest.mark.parametrize("stages", [1, 5])
def test_naive_in_another_shape_of_host(toy, stages):
    data = toy.data(inputs=9, classes=7)
    p = toy.population(KEYS[:3], data=data, width=5, stages=stages, mixed=True)
    toy.walk(p, KEYS[:3], 4)
    assert_is_naive(toy, Observer(p, 7)(), p, horizon=7)


def test_naive_after_an_action_before_its_epoch_and_after_some_hosts_have_started_anew(toy):
    p = toy.population(KEYS, "grid", mixed=True)
    toy.walk(p, KEYS, 4)
    toy.act(p, KEYS)
    assert_is_naive(toy, Observer(p, HORIZON)(), p)
    p.train_epoch()
    p.reset(torch.tensor([3, 1]), toy.context([61, 62], mixed=True))
    assert_is_naive(toy, Observer(p, HORIZON)(), p)
    toy.walk(p, KEYS, 2)
    assert_is_naive(toy, Observer(p, HORIZON)(), p)


@pytest.mark.parametrize("seeds", [0, 1, 3, 8, 1 << 30])
def test_seeds_left(toy, seeds):
    p = toy.population(KEYS[:2])
    p.context.seeds[:] = seeds
    p.germinated[1] = min(seeds, 2)
    left = Observer(p, HORIZON)().x["global"][:, 0, SCHEMA.feature("global", "seeds_left")]
    assert left.tolist() == [min(seeds, 8) / 4, min(max(seeds - 2, 0), 8) / 4]


@pytest.mark.parametrize("task", TASKS)
def test_room_does_not_show(toy, task):
    """What is left without padding is what a host in a population of its own size shows."""
    p = toy.population(KEYS, task, mixed=True, width=6)
    toy.walk(p, KEYS, 4)
    exact = [toy.exact(p, k) for k in range(len(KEYS))]
    for one in (p, *exact):
        one.train_epoch()
    graph = Observer(p, HORIZON)()
    for k, q in enumerate(exact):
        own, depth = Observer(q, HORIZON)(), q.slots
        assert all(mask.all() for mask in own.node_mask.values())
        for node, x in own.x.items():
            left = graph.x[node][k][graph.node_mask[node][k]]
            torch.testing.assert_close(left, x[0], rtol=2e-3, atol=2e-3, msg=lambda m, n=node: f"{n}: {m}")
        for relation, edges in own.edges.items():
            roomy = graph.edges[relation]
            mask, whole = roomy.mask[k], edges.mask[0]
            for node, left, mine in (
                (relation[0], roomy.source[k][mask], edges.source[0][whole]),
                (relation[2], roomy.target[k][mask], edges.target[0][whole]),
            ):
                head = (left == p.slots + 1) & (node == "layer")
                assert torch.equal(torch.where(head, depth + 1, left), mine)
            torch.testing.assert_close(roomy.attr[k][mask], edges.attr[0][whole], rtol=1e-4, atol=1e-5)
        verb, slot, choice = toy.layout(q).table()
        index = [
            toy.layout(p).index(*action) for action in zip(verb.tolist(), slot.tolist(), choice.tolist(), strict=True)
        ]
        assert torch.equal(graph.action_mask[k][index], own.action_mask[0])
        assert graph.action_mask[k].sum() == own.action_mask.sum()
