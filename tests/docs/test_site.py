"""The site is built without a warning, needs no network, and its pictures say what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from esper.growth.lifecycle import TRANSITIONS


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(docs: Any, tmp_path: Path) -> None:
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    found = subprocess.run(command, cwd=docs.root, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(https?:[^\">\s]+)", page.read_text())
        loaded += re.findall(r"<link[^>]*\shref=\"?(https?:[^\">\s]+)", page.read_text())
        assert not loaded, page.name
    assert (tmp_path / "cards" / "tamiyo_small.html").exists()


def test_the_picture_of_the_lifecycle_has_every_stage_and_event(docs: Any) -> None:
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", (docs.root / "docs" / "pictures" / "lifecycle.svg").read_text())
    for (stage, event), after in TRANSITIONS.items():
        assert stage.name in texts
        assert after.name in texts
        assert any(text.startswith(event.name.lower()) for text in texts), event
    culls = [event for _, event in TRANSITIONS if event.name == "CULL"]
    assert texts.count("cull") == len(culls)
