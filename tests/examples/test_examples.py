"""The examples run, and end with their table and their picture."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "side_by_side")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_in_short(name: str, tmp_path: Path) -> None:
    if name.startswith("lightning"):
        pytest.importorskip("lightning")
    command = [
        sys.executable,
        str(EXAMPLES / f"{name}.py"),
        "--epochs",
        "7",
        "--policy",
        "all_at_start",
        "--out",
        "out",
    ]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    assert "grown by all_at_start; slots: " in result.stdout
    rows = re.findall(r"^(grown|the same, never grown|as large from the start) +([\d,]+) ", result.stdout, re.M)
    sizes = {label: int(size.replace(",", "")) for label, size in rows}
    assert sizes["grown"] > sizes["the same, never grown"], result.stdout
    assert sizes["as large from the start"] == pytest.approx(sizes["grown"], rel=0.25)
    assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000


def test_there_are_examples() -> None:
    assert {"cnn_mnist5k", "transformer_text", "lightning_digits"} == set(NAMES)
