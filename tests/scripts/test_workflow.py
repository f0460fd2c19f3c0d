"""The workflow for forks: it names scripts that are there, and the very modes that are tested."""

import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def jobs() -> Any:
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]


def commands(job: Any) -> str:
    return "\n".join(step["run"] for step in job["steps"] if "run" in step)


def test_scripts_are_there(jobs: Any) -> None:
    named = re.findall(r"(?:scripts|\.ci)/[\w.]+", "\n".join(map(commands, jobs.values())))
    assert set(named) == {".ci/run", "scripts/test.sh"}
    assert all((ROOT / name).stat().st_mode & 0o100 for name in named)


def test_pytorch_is_there_before_the_scripts_which_keep_it(jobs: Any) -> None:
    for job in jobs.values():
        torch, *_, script = re.findall(
            r"\.venv/bin/pip install .* \"\$TORCH\"|scripts/test\.sh|\.ci/run", commands(job)
        )
        assert torch.startswith(".venv/")
        assert not script.startswith(".venv/")
    assert '"$root/.venv"' in (ROOT / "scripts" / "_env.sh").read_text()


@pytest.mark.slow
def test_modes_are_those_that_are_tested(jobs: Any) -> None:
    job = jobs["modes"]
    matrix = job["strategy"]["matrix"]
    assert job["steps"][-1]["env"]["MODE"] == "-".join(f"${{{{ matrix.{axis} }}}}" for axis in matrix)
    ((path, name),) = re.findall(r"(tests/\S+\.py)::(\w+)\[\$MODE\]", commands(job))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", path]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert set(re.findall(rf"::{name}\[(\S+)\]$", collected, re.MULTILINE)) == set(
        map("-".join, product(*matrix.values()))
    )
