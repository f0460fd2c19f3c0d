"""The suite `dat`: whole Dual Aggregation Transformers, eager and compiled, by every backend of attention, against the
package spandrel where that is installed."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from esper.hosts import dat
from esper.runtime.errors import ConfigError, EsperError
from trainers.benchmarks import Report, suite
from trainers.benchmarks.apart import Apart
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


def network(name: str, variant: str, size: int, seed: int, device: str) -> tuple[Callable[[], object], dict[str, Any]]:
    """The forward pass of one image by a network of a preset, and what there is to know of it: its `output`, and the
    seconds that its first call took where it was compiled for that. All variants have the same weights.

    Raises:
        ConfigError: the backend cannot run here.
    """
    spec = dat.spec_of(name)
    torch.manual_seed(seed)
    source = independent(spec) if importlib.util.find_spec(SPANDREL) else dat.build(name)
    x = torch.rand(1, spec.channels, size, size).to(device)
    backend, _, form = variant.partition(", ")
    if variant == SPANDREL:
        function: Callable[[], Tensor] = partial(source.to(device).eval(), x)
    else:
        model = dat.build(name, attention=backend)
        model.load_state_dict(source.state_dict())
        model.to(device).eval()
        if form == "compiled":
            dat.compile_regions(model)
        function = partial(dat.Captured(model, (1, size, size)) if form == "CUDA graph" else model, x)
    start = time.perf_counter()
    output, seconds = function().cpu(), time.perf_counter() - start
    late = form not in ("", "eager") or backend == "flex"
    return function, {"output": output, "compile_s": seconds if late else None}


def variants(compiled: bool, device: str) -> list[str]:
    """Names of the networks that are compared, the first one being what the others are compared with."""
    found = [SPANDREL] if importlib.util.find_spec(SPANDREL) else []
    found += ["reference, eager", "sdpa, eager"]
    if compiled:
        found += ["reference, compiled", "sdpa, compiled", "flex, eager"]
    if device.startswith("cuda"):
        found += ["sdpa, CUDA graph"]
    return found


@suite("dat")
def run(config: BenchmarkConfig) -> Report:
    """Forward passes of one image, each network in a process of its own."""
    settings, device = config.benchmark, config.runtime.device
    rows: list[Row] = []
    with turns(len(_PRESETS), settings) as tick, ExitStack() as stack:
        for name in _PRESETS:
            apart: dict[str, Apart] = {}
            for variant in variants(settings.compile, device):
                try:
                    apart[variant] = Apart(network, name, variant, _SIZE, config.seed, device)
                except ConfigError:
                    continue  # the backend cannot run here
                stack.callback(apart[variant].close)
            reference = next(iter(apart))
            for variant, other in apart.items():
                a, b = other.found["output"], apart[reference].found["output"]
                if not torch.allclose(a, b, atol=1e-3, rtol=1e-3):
                    raise EsperError(f"{name}: {variant}: differs from the others, so there is nothing to compare")
            seconds = {variant: s for variant, other in apart.items() if (s := other.found["compile_s"]) is not None}
            case = f"{name}, {_SIZE}x{_SIZE}"
            rows += compare("dat", case, apart, settings, torch.device(device), tick, seconds, reference)
    note = "" if reference == SPANDREL else f"; {SPANDREL} is not installed"
    return Report(content(rows), [table(rows, f"DAT, forward{note}", reference)])
