"""docs/configuration.md is what the schemas say now."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from esper.runtime.errors import ConfigError
from trainers import cli
from trainers.config import register

SECTIONS = ("env.contexts", "evaluation.controllers")
SCRIPT = Path(__file__).parents[2] / "scripts" / "config_reference.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = util.spec_from_file_location("config_reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["config_reference"] = module  # where dataclasses of its own would be looked for
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_page_is_up_to_date() -> None:
    """In a process of its own, since other tests register blueprints and environments."""
    found = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("overrides", [[], ["env=super_resolution"], ["env=gym"], ["env=hetero"]], ids=str)
def test_every_key_of_training_is_there(docs: Any, overrides: list[str]) -> None:
    page = (docs.root / "docs" / "configuration.md").read_text()
    register()
    with initialize_config_module("esper.conf", version_base="1.3"):
        keys = list(cli._keys(compose("train", overrides)))
    assert len(keys) > 90
    # A mapping of names to weights has one row.
    rows = set(re.findall(r"^\| `([\w.]+)` \|", page, flags=re.MULTILINE))
    parents = {key.rpartition(".")[0] for key in rows}
    assert not [
        key for key in keys if not {key, key.rpartition(".")[0]} & rows and key not in parents and key not in SECTIONS
    ]


@dataclass
class Parts:
    """Parts.

    Attributes:
        both, other: said above,
            in two lines.
    """

    both: int = 1
    beside: float = 2.0  # said beside
    share: float = 0.5
    name: str = "a"
    wrapped: str = "a"  # said inside


@dataclass
class Whole:
    """With checks."""

    parts: Parts = field(default_factory=Parts)

    def validate(self) -> None:
        if not self.parts.beside > 0:
            raise ConfigError(f"whole.parts.beside={self.parts.beside}: must be above 0")
        if not 0 <= self.parts.share <= 1:
            raise ConfigError(f"parts.share={self.parts.share}: give a share from 0 to 1")
        if self.parts.name not in ("a", "b"):
            raise ConfigError(f"parts.name={self.parts.name}: no such name; choose one of a, b")


def test_meanings_come_from_comments_and_attributes(script: ModuleType) -> None:
    assert script.meanings(Parts) == {
        "both": "said above, in two lines",
        "other": "said above, in two lines",
        "beside": "said beside",
        "wrapped": "said inside",
    }


def test_what_is_allowed_comes_from_refusals(script: ModuleType) -> None:
    config = Whole()
    assert script.allowed(config, "parts.share", float) == "from 0 to 1"
    assert script.allowed(config, "parts.name", str | None) == "a, b"
    assert script.allowed(config, "parts.both", int) == ""
    assert script.allowed(config, "parts.beside", float) == "", "a refusal that names another key"
    assert config == Whole(), "left as it was"


def test_no_text_is_left_over(script: ModuleType, docs: Any) -> None:
    """Of keys that are gone, or that say by now what they mean."""
    page = (docs.root / "docs" / "configuration.md").read_text()
    for pattern, text in (*script.MEANING.items(), *script.ALLOWED.items()):
        assert f"| {text}".replace("<", "&lt;") in page, pattern


def test_every_environment_variable_is_there(script: ModuleType, docs: Any) -> None:
    sources = [
        path.read_text() for folder in ("esper", "envs", "trainers") for path in (docs.root / folder).rglob("*.py")
    ]
    assert {name for text in sources for name in re.findall(r"\"(ESPER_[A-Z_]+)\"", text)} <= set(script.VARIABLES)
