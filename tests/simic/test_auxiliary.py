"""What the auxiliary head is to predict: the next observation's contributions, within an episode."""

from collections.abc import Callable

import pytest
import torch

from esper.graph import GraphBatch
from esper.graph.schema import SCHEMA
from esper.simic.learner import Simic
from esper.simic.rollout import Rollout

CONTRIBUTION, KNOWN = (SCHEMA.feature("slot", name) for name in ("contribution", "contribution_known"))


def shown(graph: GraphBatch, value: float, known: list[bool]) -> GraphBatch:
    """The graphs where slot s of host h has contribution value + h / 10, known for all slots of the hosts that are."""
    x = {**graph.x, "slot": graph.x["slot"].clone()}
    x["slot"][:, :, CONTRIBUTION] = value + torch.arange(len(graph))[:, None] / 10
    x["slot"][:, :, KNOWN] = torch.tensor(known).float()[:, None]
    return GraphBatch(x, graph.node_mask, graph.edges, graph.action_mask)


def finished(learner: Simic, observations: GraphBatch, steps: int) -> Rollout:
    """Three hosts: the first one's episode terminates in step 1, the second one's is truncated in step 2. What the
    third one shows is not known in step 3."""
    rollout = Rollout(steps, 3)
    for step in range(steps):
        graph = shown(observations[:3], float(step), [True, True, step != 3])
        zeros, numbers = torch.zeros(3), torch.full((3,), step)
        ends = torch.tensor([step == 1, False, False]), torch.tensor([False, step == 2, False])
        rollout.add(graph, numbers, zeros, zeros, zeros, *ends, zeros)
    learner.finish(rollout, torch.zeros(3))
    return rollout


def test_targets_are_of_the_next_step_of_the_same_episode(
    make_learner: Callable[..., Simic], observations: GraphBatch
) -> None:
    rollout = finished(make_learner(auxiliary_coef=0.1), observations, 5)
    (batch,) = rollout.minibatches(1, torch.Generator().manual_seed(0))
    found, known, steps = batch.targets.auxiliary, batch.targets.auxiliary_mask, batch.targets.actions
    hosts = (10 * (batch.graph.x["slot"][:, 0, CONTRIBUTION] % 1)).round().long()
    slots = observations.x["slot"].shape[1]
    assert found.shape == known.shape == (15, slots)
    for row in range(15):
        step, host = int(steps[row]), int(hosts[row])
        ended = (step, host) in ((1, 0), (2, 1)) or step == 4
        expected = not ended and (step, host) != (2, 2)
        assert known[row].tolist() == [expected] * slots, (step, host)
        if expected:
            assert found[row].tolist() == pytest.approx([step + 1 + host / 10] * slots), (step, host)


def test_a_rollout_of_one_step_has_nothing_to_predict(
    make_learner: Callable[..., Simic], observations: GraphBatch
) -> None:
    learner = make_learner(auxiliary_coef=0.1, minibatches=1)
    rollout = finished(learner, observations, 1)
    rollout.log_probs -= 2
    metrics = learner.update(rollout, 0.0)
    assert metrics["auxiliary_loss"] == 0
    assert metrics["skipped"] == 0


def test_it_is_read_only_where_it_counts(make_learner: Callable[..., Simic], observations: GraphBatch) -> None:
    rollout = finished(make_learner(), observations, 5)
    (batch,) = rollout.minibatches(1, torch.Generator())
    assert batch.targets.auxiliary.shape == batch.targets.auxiliary_mask.shape == (15, 0)


def test_the_head_learns_what_comes_next(make_learner: Callable[..., Simic], observations: GraphBatch) -> None:
    learner = make_learner(auxiliary_coef=1.0, lr=0.01, lr_schedule="constant", epochs=8, minibatches=1)
    errors = [
        learner.update(finished(learner, observations, 5), 0.0)["auxiliary_loss"] for _ in range(15)
    ]  # fmt: skip
    assert errors[-1] < 0.2 * errors[0]
