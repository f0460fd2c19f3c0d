"""Memory that is used again: aligned, never shared, and returned by what has ended."""

import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.runtime.native import Memory


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3000), st.booleans()), min_size=1, max_size=20))
def test_living_tensors_never_share_memory(steps: list[tuple[int, bool]]) -> None:
    memory, living = Memory(), []
    for number, (count, end_first) in enumerate(steps):
        if end_first and living:
            living.pop(0)
        tensor = memory.take(count)
        assert (tensor.dtype, tensor.shape) == (torch.float32, (count,))
        assert count == 0 or tensor.data_ptr() % 64 == 0
        living.append((tensor.fill_(number), number))
        for other, value in living:
            assert (other == value).all()


def test_the_memory_of_a_tensor_that_has_ended_is_used_again() -> None:
    memory = Memory()
    first = memory.take(1000)
    place = first.data_ptr()
    assert memory.take(1000).data_ptr() != place
    view = first[10:20]
    del first
    gc.collect()
    assert memory.take(1000).data_ptr() != place  # a view of it is still there
    del view
    gc.collect()
    assert memory.take(900).data_ptr() == place


def test_what_is_too_small_is_given_up_and_few_blocks_are_kept() -> None:
    memory = Memory(keep=2)
    tensors = [memory.take(100) for _ in range(5)]
    del tensors
    gc.collect()
    assert len(memory._free) == 2
    large = memory.take(10_000)
    assert not memory._free
    assert len(large) == 10_000
