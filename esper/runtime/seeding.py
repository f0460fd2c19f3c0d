"""Counter-based random numbers: pure functions of (key, counter), so a host's draws never depend on its neighbours.

There is no generator state to save or to advance: the same key gives the same numbers on any day, in any batch.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014);
# its constants as signed 64-bit integers.
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's `>>` is arithmetic)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _MIX1
    z = (z ^ _shift_right(z, 27)) * _MIX2
    return z ^ _shift_right(z, 31)


def fold(key: Tensor, *data: Tensor | int) -> Tensor:
    """Derives a new int64 key from `key` and each of `data` in turn (broadcasting). Order matters."""
    for item in data:
        key = _mix(_mix(key + _GOLDEN) ^ (item * _GOLDEN if isinstance(item, Tensor) else _wrap(item * _GOLDEN)))
    return key


def _wrap(value: int) -> int:
    """Reduces a Python integer to the signed 64-bit range."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def bits(key: Tensor, count: int) -> Tensor:
    """[..., count] hashed int64 values for keys of shape [...]."""
    counter = torch.arange(1, count + 1, device=key.device, dtype=torch.int64) * _GOLDEN
    return _mix(_mix(key).unsqueeze(-1) + counter)


def uniform(key: Tensor, count: int) -> Tensor:
    """[..., count] float32 in [0, 1) with 24 random bits each."""
    return _shift_right(bits(key, count), 40).to(torch.float32) * 2.0**-24


def permutation(key: Tensor, size: Tensor, count: int) -> Tensor:
    """[N, count] int64: row k starts with a random permutation of range(size[k]), then the indices >= size[k]."""
    draws = _shift_right(bits(key, count), 1)
    beyond = torch.arange(count, device=key.device) >= size.unsqueeze(-1)
    return draws.masked_fill(beyond, torch.iinfo(torch.int64).max).argsort(dim=-1, stable=True)


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
