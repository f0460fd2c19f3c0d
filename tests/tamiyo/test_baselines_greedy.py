"""Controllers that follow one statistic, and the probe, on graphs whose features are set by hand."""

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from envs.growth_env import GrowthEnv
from esper.graph import GraphBatch
from esper.growth.actions import WAIT, ActionLayout, Verb
from esper.tamiyo.baselines import greedy
from esper.tamiyo.baselines.greedy import GradientKnobs, GreedyKnobs, Probe, ProbeKnobs, StatisticKnobs

Envs = Callable[..., GrowthEnv]
LAYOUT = ActionLayout(4, 5)  # of `make_env`: bypass, low_rank, widen, mlp, norm
BYPASS, NORM = 0, 4
RULES = {
    "statistic": (greedy.Statistic, StatisticKnobs, ("activation", "zero_derivative_fraction")),
    "gradient_norm": (greedy.GradientNorm, GradientKnobs, ("layer", "log_gradient_rms")),
    "gradmax": (greedy.GradMax, GradientKnobs, ("slot", "log_growth_gradient")),
}


def germinate(slot: int, blueprint: int = BYPASS) -> int:
    return LAYOUT.index(Verb.GERMINATE, slot, blueprint)


@pytest.fixture(scope="module")
def fresh(make_env: Envs) -> GraphBatch:
    """The first observation of three hosts: all slots empty."""
    return make_env(3).reset(torch.arange(3))


def rule(name: str, blueprint: int = BYPASS, **knobs: Any) -> Any:
    cls, schema, _ = RULES[name]
    made = cls(schema(**{"first": 0, "every": 1, "threshold": -100.0, **knobs}), blueprint, 3)
    made.begin(3)
    return made


@pytest.fixture(scope="module")
def observed(fresh: GraphBatch, edited: Any) -> Callable[..., GraphBatch]:
    """`observed(name, values, mask)`: the statistic of each slot [3, 4], and which slots are free [3, 4]."""

    def make(name: str, values: Any, free: Any = None) -> GraphBatch:
        node, feature = RULES[name][2]
        values = torch.as_tensor(values, dtype=torch.float32).expand(3, 4)
        if node == "layer":
            # The stem and the head are none of the stages, however steep they are.
            values = torch.nn.functional.pad(values, (1, 1), value=99.0)
        graph = edited(fresh, {(node, feature): values})
        if free is None:
            return graph
        mask = graph.action_mask.clone()
        mask[:, 1:21] &= torch.as_tensor(free).repeat_interleave(5, dim=1)
        return graph.with_actions(mask)

    return make


VALUES = st.lists(st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=4, max_size=4), min_size=3, max_size=3)
FREE = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=3, max_size=3)


@pytest.mark.parametrize("name", RULES)
@hypothesis.settings(max_examples=40)
@hypothesis.given(values=VALUES, free=FREE, blueprint=st.integers(0, 4), threshold=st.sampled_from([-100.0, 0.0, 1.0]))
def test_the_largest_statistic_among_the_free_slots(
    observed: Any, name: str, values: list, free: list, blueprint: int, threshold: float
) -> None:
    actions = rule(name, blueprint, threshold=threshold).act(observed(name, values, free))
    for action, row, open_ in zip(actions.tolist(), values, free, strict=True):
        able = [slot for slot in range(4) if open_[slot]]
        best = max((row[slot] for slot in able), default=-1e9)
        if best <= threshold:
            assert action == WAIT
        else:
            assert action == germinate(next(slot for slot in able if row[slot] == best), blueprint)


@pytest.mark.parametrize("name", RULES)
def test_the_threshold_must_be_passed(observed: Any, name: str) -> None:
    graph = observed(name, [0.1, 0.5, 0.3, 0.2])
    for threshold, action in ((0.49, germinate(1)), (0.5, WAIT), (0.51, WAIT)):
        assert rule(name, threshold=threshold).act(graph).tolist() == [action] * 3


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("first", "every"), [(0, 1), (3, 3), (2, 5)])
def test_decisions_fall_on_every_few_epochs(observed: Any, name: str, first: int, every: int) -> None:
    controller, graph = rule(name, first=first, every=every), observed(name, [1.0, 2.0, 3.0, 4.0])
    acted = [bool(controller.act(graph).any()) for _ in range(12)]
    assert acted == [epoch >= first and (epoch - first) % every == 0 for epoch in range(12)]


def test_every_rule_reads_its_own_statistic(observed: Any) -> None:
    for name in RULES:
        graph = observed(name, [0.0, 0.0, 9.0, 0.0])
        chosen = {other: rule(other).act(graph).tolist() for other in RULES}
        assert chosen.pop(name) == [germinate(2)] * 3
        assert all(actions != [germinate(2)] * 3 for actions in chosen.values())


def test_a_statistic_of_a_host_with_dead_stages(make_env: Envs) -> None:
    """No hand in it: a stage whose units are all off is where the one-statistic rule goes."""
    env = make_env(4)
    env.reset(torch.arange(4))
    context = env.population.context
    for host in range(4):
        context.condition[host, host] = 3  # Condition.DYING: a bias far below 0
        context.severity[host, host] = 1.0
    graph = env.step(torch.zeros(4, dtype=torch.int64))[0]
    assert rule("statistic", threshold=0.5).act(graph).tolist() == [germinate(slot) for slot in range(4)]


# ---- probe -----------------------------------------------------------------------------------------------------------


def probe(**knobs: Any) -> Probe:
    made = Probe(ProbeKnobs(**{"first": 0, "every": 100, "threshold": -100.0, **knobs}), BYPASS, 3)
    made.begin(3)
    return made


@pytest.mark.parametrize("probation", [2, 3, 6])
@pytest.mark.parametrize(("keep", "culled"), [(100.0, True), (-100.0, False)])
def test_the_verdict_falls_once_after_the_probation(make_env: Envs, probation: int, keep: float, culled: bool) -> None:
    env = make_env(3, epochs=12, lifecycle={"auto_blend": 0})
    controller = probe(probation=probation, keep=keep, first=2)
    graph, taken = env.reset(torch.arange(3)), []
    for _ in range(11):
        taken.append(controller.act(graph))
        graph = env.step(taken[-1])[0]
    verbs = LAYOUT.table()[0][torch.stack(taken)]
    assert (verbs[2] == Verb.GERMINATE).all()
    expected = [2 + probation] if culled else []
    for host in range(3):
        assert (verbs[:, host] == Verb.CULL).nonzero().flatten().tolist() == expected
        assert (verbs[:, host] != Verb.WAIT).sum() == 1 + len(expected)
    if culled:
        slots = LAYOUT.table()[1]
        assert torch.equal(slots[taken[2 + probation]], slots[taken[2]])


@pytest.fixture(scope="module")
def alive(make_env: Envs) -> Callable[..., GraphBatch]:
    """`alive(slot)`: three hosts with a seed that blends in that slot."""
    known = {}

    def make(slot: int) -> GraphBatch:
        if slot not in known:
            env = make_env(3, lifecycle={"auto_blend": 0})
            env.reset(torch.arange(3))
            env.step(torch.full((3,), germinate(slot)))
            known[slot] = env.step(torch.zeros(3, dtype=torch.int64))[0]
        return known[slot]

    return make


@pytest.mark.parametrize(
    ("contribution", "known", "keep", "culled"),
    [
        (0.00, 1.0, 0.0, True),  # at most
        (-0.1, 1.0, 0.0, True),
        (0.01, 1.0, 0.0, False),
        (0.01, 1.0, 0.02, True),
        (0.03, 1.0, 0.02, False),
        (-0.1, 0.0, 0.0, False),  # not measured
    ],
)
def test_a_seed_stays_if_it_contributes(
    alive: Any, edited: Any, contribution: float, known: float, keep: float, culled: bool
) -> None:
    graph = alive(2)
    values = {("slot", "contribution"): contribution, ("slot", "contribution_known"): known}
    controller = probe(probation=2, keep=keep, first=50)
    assert not controller.act(edited(graph, {("slot", "contribution"): -9.0})).any()  # too early
    actions = controller.act(edited(graph, values))
    assert actions.tolist() == [LAYOUT.index(Verb.CULL, 2) if culled else WAIT] * 3
    assert not controller.act(edited(graph, {("slot", "contribution"): -9.0})).any()  # too late


def test_each_host_and_slot_has_its_own_verdict(alive: Any, edited: Any) -> None:
    contributions = torch.full((3, 4), 9.0)
    contributions[1] = -1.0
    graph = edited(alive(1), {("slot", "contribution"): contributions, ("slot", "contribution_known"): 1.0})
    assert probe(probation=1, first=50).act(graph).tolist() == [WAIT, LAYOUT.index(Verb.CULL, 1), WAIT]


def test_another_seed_in_the_slot_gets_its_own_time(alive: Any, fresh: GraphBatch, edited: Any) -> None:
    values = {("slot", "contribution"): -1.0, ("slot", "contribution_known"): 1.0}
    controller = probe(probation=3, first=50)
    acted = []
    for graph in (alive(0), alive(0), fresh, alive(0), alive(0), alive(0)):
        acted.append(bool(controller.act(edited(graph, values)).any()))
    assert acted == [False] * 5 + [True]


def test_begin_starts_the_clock_anew(alive: Any, edited: Any) -> None:
    graph = edited(alive(0), {("slot", "contribution"): -1.0, ("slot", "contribution_known"): 1.0})
    controller = probe(probation=2, first=50)
    for _ in range(2):
        controller.begin(3)
        assert [bool(controller.act(graph).any()) for _ in range(3)] == [False, True, False]


def test_a_cull_comes_before_a_germination(alive: Any, edited: Any) -> None:
    values = {("slot", "contribution"): -1.0, ("slot", "contribution_known"): 1.0, ("slot", "log_growth_gradient"): 5.0}
    graph = edited(alive(3), values)
    controller = probe(probation=1, first=0, every=1)
    assert controller.act(graph).tolist() == [LAYOUT.index(Verb.CULL, 3)] * 3
    assert probe(probation=9, first=0, every=1).act(graph).tolist() == [germinate(0)] * 3


def test_a_seed_that_is_kept_for_good_is_not_culled(make_env: Envs, edited: Any) -> None:
    env = make_env(3, epochs=12, lifecycle={"auto_blend": 0, "auto_ramp": 1})
    env.reset(torch.arange(3))
    for move in (germinate(1), WAIT, WAIT, LAYOUT.index(Verb.FOSSILIZE, 1)):
        graph = env.step(torch.full((3,), move))[0]
    graph = edited(graph, {("slot", "contribution"): -9.0, ("slot", "contribution_known"): 1.0})
    assert not probe(probation=1, first=50).act(graph).any()


def test_probe_goes_by_the_growth_gradient(observed: Any) -> None:
    assert probe().act(observed("gradmax", [0.0, 3.0, 1.0, 2.0])).tolist() == [germinate(1)] * 3
    assert isinstance(ProbeKnobs(), GreedyKnobs)
