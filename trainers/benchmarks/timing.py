"""Wall times, their spread, and the machine they were taken on."""

from __future__ import annotations

import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = np.percentile(np.asarray(values, dtype=float), [25, 50, 75])
        return cls(float(median), float(low), float(high))

    def text(self, form: str) -> str:
        """As `median (low - high)`, each in the format `form`."""
        return f"{self.median:{form}} ({self.low:{form}} - {self.high:{form}})"


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(function: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    """Seconds of one call, until the device has finished, without the garbage collector; `clock` is one of CLOCKS."""
    now = CLOCKS[clock]
    enabled = gc.isenabled()
    gc.disable()
    try:
        _wait(device)
        start = now()
        function()
        _wait(device)
        return now() - start
    finally:
        if enabled:
            gc.enable()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: str) -> dict[str, Any]:
    """What the times depend on besides the code."""
    kind = torch.device(device)
    return {
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name(kind) if kind.type == "cuda" else str(kind),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
