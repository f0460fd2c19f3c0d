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
from trainers import evaluation, gaze, illustration, returns
from trainers.config import EvaluationConfig
from trainers.page import TableOf, render
from trainers.pictures import Picture
from trainers.recording import Recorder

PAGE = "report.html"
"""Name of the page."""


def evaluate(
    policy: GraphPolicy,
    config: BaseEnvConfig,
    settings: EvaluationConfig,
    device: str,
    checkpoint: str,
    learned: dict[str, Any],
) -> tuple[dict[str, Any], list[Picture]]:
    """The report on held-out episodes, and pictures of them if the environment is one of growth; `learned` is what
    training has found out about the observations."""
    if not isinstance(config, GrowthConfig):
        return returns.evaluate(policy, config, settings, device, checkpoint, learned), []
    recorder = Recorder(keep=gaze.attends(policy))
    report, played = evaluation.evaluate(policy, config, settings, device, checkpoint, recorder)
    return report, illustration.draw(policy, config, settings.seed, device, recorder.recording(), played)


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


def write(report: dict[str, Any], drawn: list[Picture], folder: Path) -> None:
    """Writes `report.json` (every score), `report.md` (the table) and PAGE (tables and pictures) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    judge = _judge(report)
    lines = [f"# {judge.title(report)}", "", f"Checkpoint: `{report['checkpoint']}`", ""]
    lines += [f"| {' | '.join(judge.HEADINGS)} |", f"|{'---|' * len(judge.HEADINGS)}"]
    lines += [f"| {' | '.join(line)} |" for line in judge.rows(report)]
    (folder / "report.md").write_text("\n".join([*lines, "", *judge.LEGEND, ""]))
    tables = [TableOf("Controllers", judge.HEADINGS, judge.rows(report), judge.POLICY)]
    if judge is evaluation:
        headings, rows, note = evaluation.details(report)
        tables.append(TableOf("What each controller did", headings, rows, judge.POLICY, note))
    heading = f"Esper: evaluation on {report['environment']}"
    text = render(heading, judge.title(report), report["checkpoint"], " ".join(judge.LEGEND), tables, drawn)
    (folder / PAGE).write_text(text, encoding="utf-8")
    # Last: a run counts as evaluated once it is there.
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def _judge(report: dict[str, Any]) -> ModuleType:
    return evaluation if issubclass(CONFIGS[report["kind"]], GrowthConfig) else returns
