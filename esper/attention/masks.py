"""Masks: boolean (True: attend) or additive (0 or -inf), and the arena that keeps the ones that are used again.

A position bias is no mask: it is finite and added to the scores whatever may be attended to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from esper.attention.executables import bucket


def causal(queries: int, keys: int, dtype: torch.dtype = torch.bool, device: torch.device | str = "cpu") -> Tensor:
    """[queries, keys]: query i attends to the keys 0 to i, as torch's `is_causal`; boolean, or additive in a floating
    point `dtype`."""
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
    return allowed if dtype == torch.bool else additive(allowed, dtype)


def padding(length: int, keys: int, dtype: torch.dtype = torch.bool, device: torch.device | str = "cpu") -> Tensor:
    """[1, keys]: the first `length` keys may be attended to."""
    allowed = (torch.arange(keys, device=device) < length)[None]
    return allowed if dtype == torch.bool else additive(allowed, dtype)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as 0 and -inf; an additive one in `dtype`."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def dead(mask: Tensor) -> Tensor:
    """bool [..., queries, 1], the queries of an additive mask that have no key to attend to."""
    return (mask == -torch.inf).all(-1, keepdim=True)


class Arena:
    """Keeps masks by kind, bucketed shape, dtype and device, so that growing sequences share them.

    Args:
        limit: how many are kept; the first goes first.
    """

    def __init__(self, limit: int = 64):
        self.limit = limit
        self._masks: dict[tuple[object, ...], Tensor] = {}

    def __len__(self) -> int:
        return len(self._masks)

    def causal(self, queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As the function `causal`; a view that must not be written to."""
        return self._kept("causal", causal, queries, keys, dtype, device)[:queries, :keys]

    def _kept(
        self, kind: str, build: Callable[..., Tensor], queries: int, keys: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        shape = bucket(queries), bucket(keys)
        key = kind, *shape, dtype, device
        if key not in self._masks:
            with torch.inference_mode(False):  # to be used in training, too
                self._masks[key] = build(*shape, dtype, device)
            while len(self._masks) > self.limit:
                del self._masks[next(iter(self._masks))]
        return self._masks[key]


arena = Arena()
"""Of this process."""
