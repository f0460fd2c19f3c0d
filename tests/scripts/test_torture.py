"""The torture script: that it sees differences, and that a few kills are survived."""

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "torture.py"


@pytest.fixture(scope="module")
def torture() -> Any:
    spec = importlib.util.spec_from_file_location("torture", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["torture"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_equal_states_do_not_differ(torture: Any) -> None:
    state = {"a": torch.tensor([1.0, float("nan")]), "b": [1, {"c": float("nan")}], "d": ("x", None)}
    copy = {"a": state["a"].clone(), "b": [1, {"c": float("nan")}], "d": ("x", None)}
    assert torture.same(state, copy) == []


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([1.0, 2.0]), "b": [1, 2]},
        {"a": torch.tensor([1.0, 3.0]), "b": [1, 3]},
        {"a": torch.tensor([1.0, 3.0]), "b": [1]},
        {"a": torch.tensor([1.0, 3.0])},
    ],
)
def test_a_difference_is_found(torture: Any, other: dict[str, Any]) -> None:
    assert len(torture.same({"a": torch.tensor([1.0, 3.0]), "b": [1, 2]}, other)) == 1


def test_damage_changes_one_file(torture: Any, tmp_path: Path) -> None:
    files = {name: bytes(range(100)) for name in ("a", "b", "c")}
    for seed in range(10):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        touched = torture.damage(tmp_path, random.Random(seed))
        changed = [name for name, content in files.items() if (tmp_path / name).read_bytes() != content]
        assert changed == [touched]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_kills_are_survived(torture: Any, tmp_path: Path) -> None:
    tally = torture.torture(5, 2, list(torture.SMALL), tmp_path / "tally.json")
    assert (tally.kills, tally.recovered, tally.lost, tally.mismatches, tally.problems) == (5, 5, 0, 0, [])
