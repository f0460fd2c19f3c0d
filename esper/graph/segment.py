"""Reductions over segments: rows of a tensor that share an index.

Each has the same values and gradients in both of two ways: native PyTorch, or torch-scatter, which sums in eager code
where it is installed and `ESPER_TORCH_SCATTER` is not 0. Compiled code is native, since `torch.compile` cannot trace
torch-scatter. Maxima are native everywhere: torch-scatter's give the gradient of a shared maximum to one row only, pass
over NaN, and take 6 to 13 times as long on a CPU (docs/performance.md).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_SWITCH = "ESPER_TORCH_SCATTER"
_native: ContextVar[bool] = ContextVar("native", default=False)


# ---- reductions ------------------------------------------------------------------------------------------------------


def segment_sum(x: Tensor, index: Tensor, segments: int) -> Tensor:
    """[segments, ...], the sum of the rows of x [E, ...] with each index (int64 [E]); 0 for empty segments.

    Raises:
        ValueError: there is not one index for each row.
        IndexError, RuntimeError: an index is not from 0 to segments - 1 (on a CPU).
    """
    _check(x, index)
    # In half precision a running sum stops at 2048 (bfloat16: 256), in some of PyTorch's kernels.
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    accelerated = _accelerated()
    if accelerated is None:
        total = wide.new_zeros(segments, *x.shape[1:]).index_add(0, index, wide)
    else:
        total = accelerated(wide, index, 0, None, segments)
    return total.to(x.dtype)


def segment_mean(x: Tensor, index: Tensor, segments: int) -> Tensor:
    """As `segment_sum`, the mean; float32 for integers."""
    wide = _wide(x)
    rows = segment_sum(torch.ones_like(index), index, segments).clamp(min=1)
    mean = segment_sum(wide, index, segments) / rows.to(wide.dtype).view(-1, *[1] * (x.dim() - 1))
    return mean.to(x.dtype) if x.is_floating_point() else mean


def segment_max(x: Tensor, index: Tensor, segments: int) -> Tensor:
    """As `segment_sum`, the largest; 0 also for segments of nothing but -inf. NaN is the largest of all.

    Where several rows share it they share its gradient.
    """
    _check(x, index)
    spread = index.view(-1, *[1] * (x.dim() - 1)).expand_as(x)
    if not x.is_floating_point():
        return x.new_zeros(segments, *x.shape[1:]).scatter_reduce(0, spread, x, "amax", include_self=False)
    # From -inf: starting from 0 would hide a maximum of exactly 0 from the gradient.
    top = x.new_full((segments, *x.shape[1:]), -torch.inf)
    top = top.scatter_reduce(0, spread, x, "amax", include_self=True)
    return top.masked_fill(top == -torch.inf, 0.0)


def segment_softmax(x: Tensor, index: Tensor, segments: int) -> Tensor:
    """[E, ...], the softmax of x [E, ...] among the rows with the same index; float32 for integers, errors as above."""
    wide = _wide(x)
    top = segment_max(wide.detach(), index, segments)
    weight = (wide - top[index]).exp()
    share = weight / segment_sum(weight, index, segments)[index]
    return share.to(x.dtype) if x.is_floating_point() else share


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _check(x: Tensor, index: Tensor) -> None:
    if len(index) != len(x):  # a single index would be spread over all rows
        raise ValueError(f"{len(index)} indices for {len(x)} rows")


# ---- which way -------------------------------------------------------------------------------------------------------


class AccelerationStatus(TypedDict):
    """What eager code does; compiled code is native whatever it says."""

    torch_scatter_available: bool  # it is installed and loads
    acceleration_enabled: bool  # sums, means and softmaxes use it
    fallback_mode: bool  # all reductions are native
    version: str | None  # of torch-scatter, where it loads
    why: str  # one line


def acceleration_status() -> AccelerationStatus:
    """Which way the reductions take here and now, and why."""
    extension = _extension()
    enabled, why = extension.scatter_sum is not None, extension.why
    if enabled and _native.get():
        enabled, why = False, "turned off by native_only"
    return {
        "torch_scatter_available": extension.version is not None,
        "acceleration_enabled": enabled,
        "fallback_mode": not enabled,
        "version": extension.version,
        "why": why,
    }


@contextmanager
def native_only() -> Iterator[None]:
    """Within it all reductions are native, to compare the two."""
    token = _native.set(True)
    try:
        yield
    finally:
        _native.reset(token)


class _Extension(NamedTuple):
    scatter_sum: Callable[..., Tensor] | None  # None: not to be used
    version: str | None
    why: str


@cache
def _extension() -> _Extension:
    """torch-scatter, if it is there; one that does not load is reported once."""
    off = os.environ.get(_SWITCH) == "0"
    try:
        import torch_scatter
    # OSError: undefined symbols, after a change of PyTorch; RuntimeError: another CUDA; ImportError: not all compiled.
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch_scatter":
            return _Extension(None, None, "torch-scatter is not installed")
        cause = error.__cause__ or error  # PyTorch's own error names the library, its cause the symbol
        why = f"torch-scatter is installed but does not load: {(str(cause) or repr(cause)).splitlines()[0]}"
        if not off:
            log.warning(
                "%s; segment reductions are native. It must be compiled against the PyTorch that is installed: pip "
                "install --no-build-isolation --no-cache-dir --force-reinstall --no-deps torch-scatter",
                why,
            )
        return _Extension(None, None, why)
    version = torch_scatter.__version__
    if off:
        return _Extension(None, version, f"torch-scatter {version} is turned off by {_SWITCH}=0")
    return _Extension(torch_scatter.scatter_sum, version, f"torch-scatter {version} is installed")


def _accelerated() -> Callable[..., Tensor] | None:
    """torch-scatter's sum where it is to be used."""
    if torch.compiler.is_compiling() or _native.get():
        return None
    return _extension().scatter_sum
