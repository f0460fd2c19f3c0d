"""Faster forms of a Dual Aggregation Transformer: compiled blocks, and a CUDA graph for images of one size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esper.hosts.dat.blocks import Block
from esper.hosts.dat.network import DAT
from esper.runtime.compiled import own_copy
from esper.runtime.errors import ConfigError


def compile_regions(model: DAT, **options: Any) -> DAT:
    """The model, every block of which is compiled in place when it is first called with images of a size.

    Blocks of one kind ("channel", "spatial", "shifted") and shape share a program. Programs read the weights when they
    are called, so that training and `load_state_dict` are safe; a copy of the model is not compiled.

    Args:
        model: is changed.
        options: of torch.compile. By default `fullgraph=True, dynamic=False`: a program for each size of images.
    """
    programs = _Programs({"fullgraph": True, "dynamic": False} | options)
    for block in model.blocks:
        block.program = programs
    return model


class _Programs:
    """Compiled forms of `Block.plain`, made when they are first called."""

    def __init__(self, options: dict[str, Any]):
        self._options = options
        self._made: dict[tuple[object, ...], Callable[..., Tensor]] = {}

    def __call__(self, block: Block, x: Tensor, *args: Any) -> Tensor:
        # Copies of their own: torch.compile gives up on a function with many programs.
        key = block.kind, x.shape, x.dtype, x.device, block.training, torch.is_grad_enabled()
        if key not in self._made:
            self._made[key] = torch.compile(own_copy(_plain), **self._options)
        return self._made[key](block, x, *args)


def _plain(block: Block, *args: Any) -> Tensor:
    return block.plain(*args)


class Captured:
    """A network in eval mode as a CUDA graph for batches of one size, replayed without Python between kernels.

    The weights are read where they lie: training steps and `load_state_dict` take effect, moving the model to another
    device or dtype does not.

    Args:
        model: on a CUDA device, in eval mode.
        size: batch, height and width of the inputs in pixels.
        warm_up: forward passes before the capture, so that libraries have chosen their kernels.

    Raises:
        ConfigError: the model is not on a CUDA device, or is in training mode.
    """

    def __init__(self, model: DAT, size: tuple[int, int, int], warm_up: int = 3):
        like = model.conv_first.weight
        if like.device.type != "cuda":
            raise ConfigError(
                f"device={like.device}: CUDA graphs need CUDA; move the model to a CUDA device, or call it as it is"
            )
        if model.training:
            raise ConfigError("training=True: a captured network is for inference; call eval() first")
        batch, height, width = size
        self._input = torch.zeros(batch, model.spec.channels, height, width, dtype=like.dtype, device=like.device)
        # The graph reads them where they lie, also after the pool has let them go.
        self._model, self._masks = model, model.masks(self._input)
        self._graph = torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream(like.device)
        aside.wait_stream(torch.cuda.current_stream(like.device))
        with torch.no_grad():
            with torch.cuda.stream(aside):
                for _ in range(warm_up):
                    model(self._input)
            torch.cuda.current_stream(like.device).wait_stream(aside)
            with torch.cuda.graph(self._graph):
                self._output = model(self._input)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """[batch, channels, scale H, scale W] from [batch, channels, H, W] of the captured size.

        Raises:
            ValueError: another size.
        """
        if x.shape != self._input.shape:
            raise ValueError(f"captured for {tuple(self._input.shape)}, not {tuple(x.shape)}")
        self._input.copy_(x)
        self._graph.replay()
        return self._output.clone()
