"""Programs in processes of their own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = str(Path(__file__).parents[2] / "scripts")


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("child")


def test_lines_come_one_by_one_with_one_thread(child: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    program = (
        "import os, sys; print('out', flush=True); print('err', file=sys.stderr); print(os.environ['OMP_NUM_THREADS'])"
    )
    assert list(child.output_of(["-c", program])) == ["out\n", "err\n", "1\n"]


def test_a_failure_is_told_with_its_last_lines(child: Any) -> None:
    program = "import sys; print('a\\nb\\n\\nc\\nd\\n'); sys.exit(3)"
    lines = child.output_of(["-c", program])
    assert next(lines) == "a\n"
    with pytest.raises(SystemExit, match=r"^error: -c .* ended with exit code 3: b \| c \| d$"):
        list(lines)
