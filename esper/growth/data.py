"""A task's data as the engine wants it: tensors for every split, and how a sample's tokens lie."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Data:
    """A task's tensors for each split.

    Attributes:
        train_x, validation_x, test_x: features [n, tokens, features] float32; one token for tabular data.
        train_y, validation_y, test_y: labels int64, [n] for one label per sample, [n, tokens] for one per token.
        grid: how a sample's tokens lie, (length,) or (height, width); its product is `tokens`.
        causal: a token may only see itself and those before it (then `grid` has one axis).
    """

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor
    grid: tuple[int, ...] = (1,)
    causal: bool = False

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1

    def to(self, device: torch.device | str) -> Data:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith(("_x", "_y"))}
        return replace(self, **{name: value.to(device) for name, value in tensors.items()})
