"""Reading the documentation as a program would: its pages, fenced blocks, and what is outside of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int  # of its first line, from 1
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """All of them."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    return [Block(page, text.count("\n", 0, match.start(3)) + 1, match[2], match[3]) for match in _FENCE.finditer(text)]


def prose(page: Path) -> str:
    """A page without its fenced blocks, of the same lines."""
    return _FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text())


def program(page: Path) -> str:
    """The Python of a page as one program, each line where the page has it."""
    lines: list[str] = []
    for block in blocks(page):
        if block.language == "python":
            lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    return "\n".join(lines) + "\n"


class Documentation:
    """What the tests of this folder read, for a conftest cannot be imported."""

    root = ROOT
    pages = staticmethod(pages)
    blocks = staticmethod(blocks)
    prose = staticmethod(prose)
    program = staticmethod(program)


@pytest.fixture(scope="session")
def docs() -> type[Documentation]:
    """Pages and their parts."""
    return Documentation
