"""The reference network of the package spandrel, and weights that leave nothing at its default."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from esper.hosts.dat import DAT, DATSpec, build
from trainers.benchmarks.dat import independent

Theirs = Callable[[DATSpec], nn.Module]
SIZES_ALONE = ("attn_mask_", "rpe_biases", "relative_position_index")


@pytest.fixture(scope="session")
def theirs() -> Theirs:
    """`theirs(spec)`: spandrel's network of an architecture, in eval mode, without stochastic depth."""
    return lambda spec: independent(spec).eval()


@torch.no_grad()
def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """With random parameters and statistics under which attention, biases and gates all matter."""
    draw = torch.Generator().manual_seed(seed)
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        if value.dtype != torch.float32 or name.split(".")[-1].startswith(SIZES_ALONE) or name == "mean":
            continue
        noise = torch.randn(value.shape, generator=draw)
        if name.endswith(("running_var", "temperature")):
            value.copy_(0.5 + noise.abs())
        elif value.dim() == 1:
            value.add_(0.2 * noise)
        elif value.dim() > 1:
            value.copy_(noise * value[0].numel() ** -0.5)
    return network


@pytest.fixture(scope="session")
def small() -> Callable[..., DAT]:
    """`small(**changes)`: the preset "tiny" with other fields, random, in eval mode."""

    def make(**changes: object) -> DAT:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same network whatever ran before
            return randomised(build("tiny", **{"scale": 2, "img_size": 16, **changes})).eval()

    return make


@pytest.fixture(scope="session")
def randomise() -> Callable[..., nn.Module]:
    """`randomise(network)`, see `randomised`."""
    return randomised


@pytest.fixture(scope="session")
def image() -> Callable[..., torch.Tensor]:
    """`image(batch, height, width, channels=3)`: random pixels."""

    def make(batch: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
        return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(height * width))

    return make
