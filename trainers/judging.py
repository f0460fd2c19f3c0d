"""Evaluation of a policy, in whichever way its environment is judged: `trainers.evaluation` for growth environments,
which have baselines and twins, `trainers.returns` for all others."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from rich import box
from rich.table import Table

from envs.config import BaseEnvConfig, GrowthConfig
from envs.making import CONFIGS
from esper.tamiyo.policy import GraphPolicy
from trainers import evaluation, returns
from trainers.config import EvaluationConfig


def evaluate(
    policy: GraphPolicy,
    config: BaseEnvConfig,
    settings: EvaluationConfig,
    device: str,
    checkpoint: str,
    learned: dict[str, Any],
) -> dict[str, Any]:
    """The report on held-out episodes; `learned` is what training has found out about the observations."""
    if isinstance(config, GrowthConfig):
        return evaluation.evaluate(policy, config, settings, device, checkpoint)
    return returns.evaluate(policy, config, settings, device, checkpoint, learned)


def scalars(report: dict[str, Any]) -> dict[str, float]:
    """What is logged as `eval/`."""
    return _judge(report).scalars(report)


def table(report: dict[str, Any]) -> Table:
    """The report for a terminal."""
    judge = _judge(report)
    shown = Table(*judge.HEADINGS, title=judge.title(report), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for line in judge.rows(report):
        shown.add_row(*line, style="bold" if line[0] == judge.POLICY else None)
    return shown


def write(report: dict[str, Any], folder: Path) -> None:
    """Writes `report.json` (every score) and `report.md` (the table) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    judge = _judge(report)
    lines = [f"# {judge.title(report)}", "", f"Checkpoint: `{report['checkpoint']}`", ""]
    lines += [f"| {' | '.join(judge.HEADINGS)} |", f"|{'---|' * len(judge.HEADINGS)}"]
    lines += [f"| {' | '.join(line)} |" for line in judge.rows(report)]
    (folder / "report.md").write_text("\n".join([*lines, *judge.LEGEND, ""]))


def _judge(report: dict[str, Any]) -> ModuleType:
    return evaluation if issubclass(CONFIGS[report["kind"]], GrowthConfig) else returns
