"""What a run is worth, for a sweep that looks for good settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from esper.runtime.telemetry import METRICS_FILE

NAMES = ("eval/tamiyo", "eval/policy", "rollout/ep_rew_mean")
"""Scalars by which a run is judged; the first that it has counts."""


def objective(run_dir: Path) -> float | None:
    """The newest value of the first of NAMES that a run has logged: the score on held-out episodes where there was an
    evaluation, else the mean return of the latest training episodes. None if it has logged none, or no finite one."""
    path = run_dir / METRICS_FILE
    newest: dict[str, Any] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        newest |= json.loads(line)
    value = next((newest[name] for name in NAMES if name in newest), None)
    return None if value is None else float(value)
