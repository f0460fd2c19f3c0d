"""docs/metrics.md has every tag that a run writes, and says of each what it means, what is healthy and what to do."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esper.attention import cache_info
from trainers import board

_TAG = re.compile(r"(rollout|growth|train|grad|eval|time|perf|amp|attention)/[\w.{}]+(/[\w.{}]+)*|tamiyo\.gnn\.[\w.]+")
HEAD = ["scalar", "meaning", "healthy", "if not"]


@pytest.fixture(scope="module")
def rows(docs: Any) -> dict[str, list[str]]:
    """tag -> the cells behind it."""
    found: dict[str, list[str]] = {}
    for line in docs.prose(docs.root / "docs" / "metrics.md").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        names = re.findall(r"`([^`]+)`", cells[0]) if cells else []
        if names and all("/" in name or name.startswith("tamiyo.gnn.") for name in names):
            found |= dict.fromkeys(names, cells[1:])
    return found


def described(tag: str, rows: dict[str, list[str]]) -> bool:
    """`<word>` and, in the source, `{expression}` stand for any word."""
    forms = [re.sub(r"<\w+>", "[^/]+", re.escape(name).replace(r"\<", "<").replace(r"\>", ">")) for name in rows]
    return any(re.fullmatch(form, re.sub(r"\{.*?\}", "x", tag)) for form in forms)


def test_every_scalar_says_what_it_means_what_is_healthy_and_what_to_do(rows: dict[str, list[str]]) -> None:
    assert len(rows) > 40
    assert not [tag for tag, cells in rows.items() if len(cells) != len(HEAD) - 1 or not all(cells)]


def test_every_tag_of_the_source_is_described(docs: Any, rows: dict[str, list[str]]) -> None:
    """Every text of the trainer that has the form of a tag, but for those that are made of several."""
    missing = []
    for path in sorted((docs.root / "trainers").rglob("*.py")):
        if path.parent.name == "benchmarks" or path.name == "board.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _TAG.fullmatch(node.value):
                missing += [] if described(node.value, rows) else [f"{path.name}:{node.lineno}: {node.value}"]
    missing += [f"attention/{name}" for name in cache_info() if not described(f"attention/{name}", rows)]
    pictures = (docs.root / "docs" / "metrics.md").read_text()
    assert not [line for line in missing if f"`{line.split(': ')[-1]}`" not in pictures]


def test_every_chart_is_of_something_that_is_described(rows: dict[str, list[str]]) -> None:
    for charts in board.LAYOUT.values():
        for tag in (tag for tags in charts.values() for tag in tags):
            examples = [re.sub(r"<\w+>", "x", name) for name in rows]
            assert any(re.match(tag, example) for example in examples), tag


@pytest.mark.slow
def test_every_tag_of_a_run_is_described(tmp_path: Path, rows: dict[str, list[str]]) -> None:
    overrides = [
        f"output_dir={tmp_path}", "recipe=none", "env.num_envs=4", "env.epochs=4", "ppo.num_steps=8",
        "ppo.total_steps=64", "ppo.minibatches=2", "policy.hidden=[8,8,8,8]", "evaluation.episodes=4",
        "runtime.compile=false",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "trainers.train", *overrides], check=True, capture_output=True, timeout=280)
    (run,) = (tmp_path / "digits").iterdir()
    logged = {tag for line in (run / "metrics.jsonl").read_text().splitlines() for tag in json.loads(line)}
    accumulator = EventAccumulator(str(run / "tb"))
    accumulator.Reload()
    logged |= {*accumulator.Tags()["scalars"], *accumulator.Tags()["histograms"]}
    logged -= {"step", "time"}
    assert len(logged) > 30
    assert not [tag for tag in sorted(logged) if not described(tag, rows)]
