"""The Gymnasium space of a GraphBatch, on real observations."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from esper.graph import GraphBatch
from esper.graph.space import BOUND, from_numpy, space_of, to_numpy


def row(arrays: dict[str, np.ndarray], index: int) -> dict[str, np.ndarray]:
    return {key: value[index] for key, value in arrays.items()}


def test_every_observation_of_an_episode_lies_in_the_space(observations: list[GraphBatch]) -> None:
    space = space_of(observations[0])
    for graph in observations:
        arrays = to_numpy(graph)
        for host in range(len(graph)):
            outside = [k for k, v in row(arrays, host).items() if not space[k].contains(v)]
            assert not outside
            assert space.contains(row(arrays, host))


def test_the_batched_space_contains_the_batch(observations: list[GraphBatch]) -> None:
    graph = observations[-1]
    assert batch_space(space_of(graph), len(graph)).contains(to_numpy(graph))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("x__slot", BOUND + 1),
        ("attr__blueprint__fits__slot", -BOUND - 1),
        ("source__blueprint__fits__slot", 4),  # four blueprints: 0 to 3
        ("target__layer__hosts__slot", -1),
        ("target__slot__reads__layer", 6),  # six layers
        ("action_mask", 2),
    ],
)
def test_the_space_has_limits(observations: list[GraphBatch], key: str, value: float) -> None:
    graph = observations[0]
    arrays = row(to_numpy(graph), 0)
    arrays[key] = arrays[key].copy()
    arrays[key].flat[0] = value
    assert not space_of(graph).contains(arrays)


@pytest.mark.parametrize(
    ("key", "highest"), [("source__slot__precedes__slot", 3), ("source__slot__writes__layer", 3), ("x__global", BOUND)]
)
def test_the_highest_value_is_inside(observations: list[GraphBatch], key: str, highest: float) -> None:
    box = space_of(observations[0])[key]
    assert isinstance(box, spaces.Box)
    assert box.high.max() == highest


def test_from_numpy_undoes_to_numpy(observations: list[GraphBatch]) -> None:
    for graph in observations:
        before, after = graph.to_dict(), from_numpy(to_numpy(graph)).to_dict()
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert value.dtype == after[key].dtype
            assert torch.equal(value, after[key]), key


def test_masks_are_int8(observations: list[GraphBatch]) -> None:
    arrays = to_numpy(observations[0])
    kinds = {key.partition("__")[0]: value.dtype for key, value in arrays.items()}
    assert kinds == {
        "x": np.float32, "mask": np.int8, "source": np.int64, "target": np.int64, "attr": np.float32,
        "valid": np.int8, "action_mask": np.int8,
    }  # fmt: skip


def test_the_arrays_are_fresh(observations: list[GraphBatch]) -> None:
    graph = observations[2]
    before = {key: value.clone() for key, value in graph.to_dict().items()}
    for value in to_numpy(graph).values():
        value[...] = 1
    for key, value in graph.to_dict().items():
        assert torch.equal(value, before[key]), key


def test_rows_do_not_share_memory(observations: list[GraphBatch]) -> None:
    # The topology is one tensor expanded over the hosts; writing to one host's array must not reach another's.
    arrays = to_numpy(observations[2])
    before = {key: value[1].copy() for key, value in arrays.items()}
    for value in arrays.values():
        value[0] = 7
    for key, value in arrays.items():
        assert np.array_equal(value[1], before[key]), key


def test_a_sample_of_the_space_is_a_graph(observations: list[GraphBatch]) -> None:
    space = batch_space(space_of(observations[0]), 2)
    space.seed(0)
    graph = from_numpy(space.sample())
    assert len(graph) == 2
    assert graph.x["slot"].shape == observations[0].x["slot"][:2].shape
    assert graph.action_mask.dtype == torch.bool
