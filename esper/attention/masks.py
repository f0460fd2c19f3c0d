"""Masks: boolean (True: attend) or additive (0 or -inf), and the arena that keeps the ones that are used again.

A position bias is no mask: it is finite and added to the scores whatever may be attended to.
"""

from __future__ import annotations

from collections import OrderedDict
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


class Pool:
    """Keeps the newest results of functions of sizes, dtype and device.

    Args:
        limit: how many are kept; the one that was not used for longest goes first.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._kept: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, build: Callable[..., Tensor], *key: object) -> Tensor:
        """`build(*key)`, which must not be written to."""
        if torch.compiler.is_compiling():
            return build(*key)
        full = build, *key
        if full not in self._kept:
            with torch.inference_mode(False):  # to be used in training, too
                self._kept[full] = build(*key)
            while len(self._kept) > self.limit:
                self._kept.popitem(last=False)
        self._kept.move_to_end(full)
        return self._kept[full]


class Arena:
    """Keeps masks by kind, bucketed shape, dtype and device, so that growing sequences share them.

    Args:
        limit: how many are kept, see Pool.
    """

    def __init__(self, limit: int = 64):
        self.pool = Pool(limit)

    def __len__(self) -> int:
        return len(self.pool)

    def causal(self, queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As the function `causal`; a view that must not be written to."""
        return self.pool.get(causal, bucket(queries), bucket(keys), dtype, device)[:queries, :keys]


arena = Arena()
"""Of this process."""
