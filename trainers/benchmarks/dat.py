"""The suite `dat`: whole Dual Aggregation Transformers, eager and compiled, by every backend of attention, against the
package spandrel where that is installed."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from esper.hosts import dat
from esper.runtime.errors import ConfigError, EsperError
from trainers.benchmarks import Report, suite
from trainers.benchmarks.rows import Row, compare, content, table, turns
from trainers.config import BenchmarkConfig

SPANDREL = "spandrel"
_SIZE = 64  # pixels
_PRESETS = ("dat_light",)


class _Absent(ModuleType):
    """Has any public name."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """Other networks of spandrel want torchvision; this one does not."""
    names = [f"torchvision{rest}" for rest in ("", ".transforms", ".transforms.functional")]
    absent = {} if importlib.util.find_spec("torchvision") else {name: _Absent(name) for name in names}
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


def independent(spec: dat.DATSpec) -> nn.Module:
    """spandrel's network of an architecture, without stochastic depth, with random weights.

    Raises:
        ImportError: the package is not installed.
    """
    with _without_torchvision():
        from spandrel.architectures.DAT import DAT as Reference

    network: nn.Module = Reference(
        img_size=spec.img_size,
        in_chans=spec.channels,
        embed_dim=spec.dim,
        split_size=list(spec.split),
        depth=list(spec.depth),
        num_heads=[spec.heads_of(i) for i in range(len(spec.depth))],
        expansion_factor=spec.expansion,
        qkv_bias=spec.qkv_bias,
        drop_path_rate=0.0,
        upscale=spec.scale,
        resi_connection=spec.residual,
        upsampler=spec.upsampler,
    )
    return network


def networks(name: str, x: Tensor, compiled: bool) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Networks of a preset that compute the same, by how they do it, and the seconds that compilation took.

    Raises:
        EsperError: they do not compute the same.
    """
    spec = dat.spec_of(name)
    found: dict[str, nn.Module] = {}
    if importlib.util.find_spec(SPANDREL):
        found[SPANDREL] = independent(spec).to(x.device).eval()
    weights = next(iter(found.values()), dat.build(name)).state_dict()
    seconds: dict[str, float] = {}
    plain, more = [("reference", "eager"), ("sdpa", "eager")], [("reference", "compiled"), ("sdpa", "compiled")]
    for backend, form in [*plain, *more, ("flex", "eager")] if compiled else plain:
        model = dat.build(name, attention=backend).to(x.device).eval()
        model.load_state_dict(weights)
        if form == "compiled":
            dat.compile_regions(model)
        label, start = f"{backend}, {form}", time.perf_counter()
        try:
            out = model(x)
        except ConfigError:  # the backend cannot run here
            continue
        if (backend, form) not in plain:
            seconds[label] = time.perf_counter() - start
        found[label] = model
        if not torch.allclose(out, next(iter(found.values()))(x), atol=1e-3, rtol=1e-3):
            raise EsperError(f"{name}: {label}: differs from the others, so there is nothing to compare")
    return found, seconds


@suite("dat")
@torch.no_grad()
def run(config: BenchmarkConfig) -> Report:
    """Forward passes of one image."""
    settings, device = config.benchmark, torch.device(config.runtime.device)
    torch.manual_seed(config.seed)
    x = torch.rand(1, 3, _SIZE, _SIZE, device=device)
    rows: list[Row] = []
    with turns(len(_PRESETS), settings) as tick:
        for name in _PRESETS:
            found, seconds = networks(name, x, settings.compile)
            variants: dict[str, Callable[[], object]] = {label: partial(model, x) for label, model in found.items()}
            if device.type == "cuda":
                captured = dat.Captured(found["sdpa, eager"], tuple(x.shape[i] for i in (0, 2, 3)))  # type: ignore[arg-type]
                variants["sdpa, CUDA graph"] = partial(captured, x)
            reference = next(iter(variants))
            case = f"{name}, {_SIZE}x{_SIZE}"
            rows += compare("dat", case, variants, settings, device, tick, seconds, reference)
    note = "" if SPANDREL in variants else f"; {SPANDREL} is not installed"
    return Report(content(rows), [table(rows, f"DAT, forward{note}", reference)])
