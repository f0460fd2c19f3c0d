"""Evaluation of a policy, in whichever way its environment is judged: `trainers.evaluation` for growth environments,
which have baselines and twins, `trainers.returns` for all others."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from rich.table import Table

from envs.config import BaseEnvConfig, EnvConfig
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
    if isinstance(config, EnvConfig):
        return evaluation.evaluate(policy, config, settings, device, checkpoint)
    return returns.evaluate(policy, config, settings, device, checkpoint, learned)


def scalars(report: dict[str, Any]) -> dict[str, float]:
    """What is logged as `eval/`."""
    return _judge(report).scalars(report)


def table(report: dict[str, Any]) -> Table:
    """The report for a terminal."""
    return _judge(report).table(report)


def write(report: dict[str, Any], folder: Path) -> None:
    """Writes `report.json` and `report.md` into `folder`."""
    _judge(report).write(report, folder)


def _judge(report: dict[str, Any]) -> ModuleType:
    return evaluation if report["kind"] == EnvConfig.kind else returns
