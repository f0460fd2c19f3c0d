"""Rollout storage: nothing lost, nothing doubled, nothing mixed up."""

import math
from collections.abc import Callable

import pytest
import torch

from esper.graph import GraphBatch
from esper.simic.gae import gae
from esper.simic.rollout import Minibatch, Rollout

STEPS, HOSTS = 5, 8
TOTAL = STEPS * HOSTS


def marked(graph: GraphBatch, step: int) -> GraphBatch:
    """The graphs with their transition's number, step * HOSTS + host, in a feature."""
    x = {**graph.x, "global": graph.x["global"].clone()}
    x["global"][:, 0, 0] = step * HOSTS + torch.arange(HOSTS)
    return GraphBatch(x, graph.node_mask, graph.edges, graph.action_mask)


def filled(graph: GraphBatch) -> Rollout:
    """Every stored number is a function of its transition's number; host 3 is cut off in step 2."""
    rollout = Rollout(STEPS, HOSTS)
    for step in range(STEPS):
        number = step * HOSTS + torch.arange(HOSTS)
        cut = (number == 2 * HOSTS + 3) if step == 2 else torch.zeros(HOSTS, dtype=torch.bool)
        end = number % 7 == 6
        rollout.add(
            marked(graph, step), number, -number.float(), number / 10, number.float().cos(), end, cut, number / 3.0
        )
    rollout.finish(torch.arange(HOSTS) / 2, 0.9, 0.8)
    return rollout


def numbers(batch: Minibatch) -> list[int]:
    return batch.graph.x["global"][:, 0, 0].long().tolist()


def one_pass(rollout: Rollout, count: int, seed: int = 0) -> list[Minibatch]:
    return list(rollout.minibatches(count, torch.Generator().manual_seed(seed)))


# ---- minibatches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 4, TOTAL])
def test_a_pass_has_every_transition_once(observations: GraphBatch, count: int) -> None:
    batches = one_pass(filled(observations), count)
    assert len(batches) == count
    assert sorted(number for batch in batches for number in numbers(batch)) == list(range(TOTAL))
    sizes = [len(batch.graph) for batch in batches]
    assert max(sizes) - min(sizes) <= 1


def test_every_number_stays_with_its_graph(observations: GraphBatch) -> None:
    rollout = filled(observations)
    for batch in one_pass(rollout, 3):
        number = torch.tensor(numbers(batch))
        step, host = number // HOSTS, number % HOSTS
        assert torch.equal(batch.targets.actions, number)
        assert torch.equal(batch.targets.log_probs, -number.float())
        assert torch.equal(batch.targets.values, number / 10)
        assert torch.equal(batch.targets.advantages, rollout.advantages[step, host])
        assert torch.equal(batch.targets.returns, rollout.returns[step, host])
        assert torch.equal(batch.graph.x["slot"], observations.x["slot"][host])
        assert torch.equal(batch.graph.action_mask, observations.action_mask[host])


def test_minibatches_are_shuffled_over_steps_and_environments(observations: GraphBatch) -> None:
    first = numbers(one_pass(filled(observations), 2)[0])
    assert first != sorted(first)
    assert len({number // HOSTS for number in first}) == STEPS
    assert len({number % HOSTS for number in first}) == HOSTS


def test_the_generator_fixes_the_order(observations: GraphBatch) -> None:
    rollout = filled(observations)
    one, two, other = ([numbers(batch) for batch in one_pass(rollout, 3, seed)] for seed in (1, 1, 2))
    assert one == two
    assert one != other


def test_each_pass_has_a_new_order(observations: GraphBatch) -> None:
    rollout, generator = filled(observations), torch.Generator().manual_seed(0)
    one, two = ([numbers(batch) for batch in rollout.minibatches(3, generator)] for _ in range(2))
    assert one != two


# ---- storage --------------------------------------------------------------------------------------------------------


def test_finish_is_gae_of_what_was_added(observations: GraphBatch) -> None:
    number = torch.arange(TOTAL).view(STEPS, HOSTS)
    advantages, returns = gae(
        number.float().cos(), number / 10, number % 7 == 6, number == 2 * HOSTS + 3, number / 3.0,
        torch.arange(HOSTS) / 2, 0.9, 0.8,
    )  # fmt: skip
    rollout = filled(observations)
    assert torch.equal(rollout.advantages, advantages)
    assert torch.equal(rollout.returns, returns)
    # Transition 19 was cut off: its reward and the value of its own final observation, without a future.
    assert rollout.advantages[2, 3] == pytest.approx(math.cos(19) + 0.9 * 19 / 3 - 1.9)


def test_what_is_added_is_copied(observations: GraphBatch) -> None:
    rollout = Rollout(1, HOSTS)
    parts = [torch.ones(HOSTS, dtype=torch.int64), *(torch.ones(HOSTS) for _ in range(3))]
    flags = [torch.ones(HOSTS, dtype=torch.bool) for _ in range(2)]
    final = torch.ones(HOSTS)
    rollout.add(observations, *parts, *flags, final)
    for part in (*parts, *flags, final):
        part.zero_()
    for name in ("actions", "log_probs", "values", "rewards", "terminated", "truncated", "final_values"):
        assert getattr(rollout, name).bool().all(), name


def test_after_clear_it_is_as_new(observations: GraphBatch) -> None:
    used = filled(observations)
    used.clear()
    fresh = Rollout(STEPS, HOSTS)
    for rollout in (used, fresh):
        for step in range(STEPS):
            number = torch.arange(HOSTS) + 3 * step
            no = torch.zeros(HOSTS, dtype=torch.bool)
            rollout.add(marked(observations, step), number, number / 5, number / 4, number / 3, no, ~no)
        rollout.finish(torch.zeros(HOSTS), 0.9, 0.9)
    assert torch.equal(used.advantages, fresh.advantages)
    assert [numbers(b) for b in one_pass(used, 2)] == [numbers(b) for b in one_pass(fresh, 2)]


def overfill(rollout: Rollout, graph: GraphBatch) -> None:
    number, no = torch.arange(HOSTS), torch.zeros(HOSTS, dtype=torch.bool)
    rollout.add(graph, number, number / 1, number / 1, number / 1, no, no)


def test_a_full_rollout_refuses_more(observations: GraphBatch) -> None:
    rollout = filled(observations)
    with pytest.raises(IndexError):
        overfill(rollout, observations)


def test_a_refused_step_leaves_the_rollout_as_it_was(observations: GraphBatch) -> None:
    rollout = filled(observations)
    with pytest.raises(IndexError):
        overfill(rollout, observations)
    batches = one_pass(rollout, 3)
    assert sorted(number for batch in batches for number in numbers(batch)) == list(range(TOTAL))


# ---- explained variance ---------------------------------------------------------------------------------------------


def of_two_steps(graph: GraphBatch, values: list[float], returns: list[float]) -> Rollout:
    """Two steps of two hosts with those returns: each step is an episode, so that its reward is its return."""
    rollout, over = Rollout(2, 2), torch.ones(2, dtype=torch.bool)
    for step in (slice(0, 2), slice(2, 4)):
        reward, value = torch.tensor(returns[step]), torch.tensor(values[step])
        rollout.add(graph, torch.zeros(2, dtype=torch.int64), torch.zeros(2), value, reward, over, ~over)
    rollout.finish(torch.zeros(2), 1.0, 1.0)
    return rollout


@pytest.mark.parametrize(
    ("values", "returns", "expected"),
    [
        # Var(returns) = 20/3; residuals 0
        ([1.0, 3.0, 5.0, 7.0], [1.0, 3.0, 5.0, 7.0], 1.0),
        # A constant offset is not an error of variance.
        ([0.0, 2.0, 4.0, 6.0], [1.0, 3.0, 5.0, 7.0], 1.0),
        # A constant critic explains nothing.
        ([2.0, 2.0, 2.0, 2.0], [1.0, 3.0, 5.0, 7.0], 0.0),
        # Residuals 0, 1, 0, 1: their variance is 1/3, and 1 - (1/3) / (20/3) = 0.95
        ([1.0, 2.0, 5.0, 6.0], [1.0, 3.0, 5.0, 7.0], 0.95),
        # Residuals 2, 6, 10, 14 vary four times as much: 1 - 4
        ([-1.0, -3.0, -5.0, -7.0], [1.0, 3.0, 5.0, 7.0], -3.0),
    ],
)
def test_explained_variance_by_hand(
    observations: GraphBatch, values: list[float], returns: list[float], expected: float
) -> None:
    assert of_two_steps(observations[:2], values, returns).explained_variance() == pytest.approx(expected)


def test_explained_variance_of_equal_returns_is_not_a_number(observations: GraphBatch) -> None:
    assert math.isnan(of_two_steps(observations[:2], [1.0, 2.0, 3.0, 4.0], [5.0] * 4).explained_variance())


def test_a_collected_rollout_is_whole(collected: Callable[[], Rollout]) -> None:
    rollout = collected()
    assert rollout.terminated.nonzero()[:, 0].tolist() == [5] * 4  # episodes of six epochs
    assert rollout.rewards.any()
    graphs = GraphBatch.cat(rollout.graphs)
    assert graphs.action_mask.gather(1, rollout.actions.flatten()[:, None]).all()
