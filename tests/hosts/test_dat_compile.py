"""Compiled blocks and captured networks compute what the network does."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from esper.hosts.dat import Captured, compile_regions
from esper.runtime.errors import ConfigError

Make = Callable[..., Any]
KINDS = {"spatial": 0, "channel": 1, "shifted": 2}


@pytest.fixture(autouse=True)
def fresh() -> None:
    """What was compiled before would count as another size of the same function."""
    torch._dynamo.reset()


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_compile_whole(kind: str, small: Make, image: Make) -> None:
    model = small(depth=(3,))
    block = model.blocks[KINDS[kind]]
    assert block.kind == kind
    masks, x = model.masks(image(1, 20, 12)), torch.randn(2, 20, 12, 96)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    close(compiled(x, masks), block(x, masks))


@pytest.mark.slow
@torch.no_grad()
def test_inductor_compiles_all_kinds(small: Make, image: Make) -> None:
    model, x = small(depth=(3,), dim=32, heads=4), image(2, 20, 12)
    expected = model(x)
    close(compile_regions(model)(x), expected)


@torch.no_grad()
def test_blocks_of_a_kind_and_images_of_a_size_share_a_program(small: Make, image: Make) -> None:
    model, counter = small(depth=(5, 3)), CompileCounterWithBackend("eager")
    images = [image(2, 16, 16), image(2, 12, 9)]
    expected = [model(x) for x in images]
    compile_regions(model, backend=counter)
    # Of every size there may be programs, however few torch.compile allows for one function.
    with torch._dynamo.config.patch(recompile_limit=1):
        outputs = [model(x) for x in [*images, *images]]
    assert counter.frame_count == 2 * len(KINDS)
    for output, other in zip(outputs, expected * 2, strict=True):
        close(output, other)


@pytest.mark.slow
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_training_compiled_is_training(drop_path: float, small: Make, image: Make) -> None:
    model, x = small(depth=(4, 3), drop_path=drop_path).train(), image(2, 16, 16)
    counter = CompileCounterWithBackend("aot_eager")
    twin = compile_regions(copy.deepcopy(model), backend=counter)
    for _ in range(2):  # the second is with other weights and statistics
        for network in (model, twin):
            optimizer = torch.optim.SGD(network.parameters(), 1e-3)
            torch.manual_seed(0)
            network(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    # Which of two factors is there decides between two programs, how large it is does not.
    assert counter.frame_count <= 2 * len(KINDS)
    for (name, value), expected in zip(twin.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_loaded_weights_count(small: Make, image: Make, randomise: Make) -> None:
    model, x = small(depth=(3,)), image(1, 16, 16)
    compiled = compile_regions(copy.deepcopy(model), backend="eager")
    compiled(x)
    randomise(model, seed=1)
    compiled.load_state_dict(model.state_dict())
    close(compiled(x), model(x))


def test_copies_are_not_compiled(small: Make) -> None:
    model = compile_regions(small(depth=(3,)), backend="eager")
    assert all(block.program is not None for block in model.blocks)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(block.program is None for block in other.blocks)


def test_a_cuda_graph_needs_cuda(small: Make) -> None:
    with pytest.raises(ConfigError, match=r"device=cpu: CUDA graphs need CUDA; move the model"):
        Captured(small(), (1, 16, 16))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.no_grad()
def test_a_captured_network_computes_the_same(small: Make, image: Make, randomise: Make) -> None:
    model = small(depth=(4, 3)).cuda()
    with pytest.raises(ConfigError, match="training=True"):
        Captured(copy.deepcopy(model).train(), (2, 20, 12))
    captured = Captured(model, (2, 20, 12))
    for seed in (1, 2):
        randomise(copied := copy.deepcopy(model).cpu(), seed)
        model.load_state_dict(copied.state_dict())
        x = torch.rand(2, 3, 20, 12, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        torch.testing.assert_close(captured(x), model(x), atol=1e-3, rtol=1e-3)
    first, second = captured(x), captured(x + 1)
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="captured for"):
        captured(x[:1])
