"""The Python of the documentation: all of it parses, and whole pages run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since pages register things and write files."""
    (folder / "page.py").write_text(program)
    return subprocess.run([sys.executable, "page.py"], cwd=folder, capture_output=True, text=True, timeout=280)


def test_every_block_parses(docs: Any) -> None:
    for page in docs.pages():
        for block in docs.blocks(page):
            if block.language in ("python", "py"):
                try:
                    # `return` and `await` stand by themselves where a block is part of a function.
                    ast.parse(block.text)
                except SyntaxError as error:
                    pytest.fail(f"{block}: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["your_own_network.md", "your_own_blueprint.md"])
def test_a_page_runs_from_top_to_bottom(docs: Any, name: str, tmp_path: Path) -> None:
    found = run(docs.program(docs.root / "docs" / name), tmp_path)
    assert found.returncode == 0, found.stderr


def test_a_program_has_its_lines_where_the_page_has_them(docs: Any, tmp_path: Path) -> None:
    page = docs.root / "docs" / "your_own_network.md"
    lines, program = page.read_text().splitlines(), docs.program(page).splitlines()
    assert all(line in ("", lines[number]) for number, line in enumerate(program))
    failed = run(docs.program(page)[:40] + "\nraise ValueError", tmp_path)
    assert failed.returncode == 1
