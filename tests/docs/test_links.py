"""Relative links of the documentation lead to files, and to headings that are there. Nothing is fetched."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_IMAGE = re.compile(r"<img[^>]*\ssrc=\"([^\"]+)\"")


def links(prose: str) -> list[tuple[int, str]]:
    """(line, target) of everything that is linked to from a page."""
    # Code spans keep their length, so that lines stay where they are.
    bare = _CODE.sub(lambda match: re.sub(r"[\[\]()<]", " ", match[0]), prose)
    found = [
        (bare.count("\n", 0, match.start()) + 1, match[1]) for form in (_LINK, _IMAGE) for match in form.finditer(bare)
    ]
    return [(line, target) for line, target in found if not re.match(r"[a-z]+:", target)]


def anchors(prose: str) -> set[str]:
    """Of a page's headings, as sites of repositories make them."""
    seen: Counter[str] = Counter()
    found = set(re.findall(r"<a id=\"([^\"]+)\"", prose))
    for heading in re.findall(r"^#+ +(.*?) *#*$", prose, flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(page: Path, docs: Any) -> list[str]:
    """What is wrong with a page's links, one line each."""
    wrong = []
    for line, target in links(docs.prose(page)):
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            wrong.append(f"{page.name}:{line}: {target}: no such file")
        elif anchor and anchor not in anchors(docs.prose(file)):
            wrong.append(f"{page.name}:{line}: {target}: no such heading")
    return wrong


def test_links_lead_somewhere(docs: Any) -> None:
    assert not [line for page in docs.pages() for line in broken(page, docs)]


def test_every_page_is_linked_to(docs: Any) -> None:
    """From the navigation of the site."""
    navigation = (docs.root / "mkdocs.yml").read_text()
    inside = [page.relative_to(docs.root / "docs") for page in docs.pages() if docs.root / "docs" in page.parents]
    assert not [str(page) for page in inside if f" {page}\n" not in navigation]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](b.md)", ["b.md: no such file"]),
        ("![a](b.png)", ["b.png: no such file"]),
        ("[one\ntwo](page.md#here-and-there)\n\n## Here, and `there`", []),
        ("[a](#nowhere)", ["#nowhere: no such heading"]),
        ("`[a](b.md)` [c](https://example.org) [d](mailto:x)", []),
        ("```\n[a](b.md)\n```", []),
    ],
)
def test_what_is_broken_is_found(text: str, expected: list[str], docs: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert [line.split(": ", 1)[1] for line in broken(page, docs)] == expected
