"""The script that kills ranks: that it sees what is lost."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from esper.runtime import checkpoint

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_ranks.py"


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("kill_ranks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ended(folder: Path, step: int, steps: list[int]) -> Path:
    run = folder / "digits" / "now"
    run.mkdir(parents=True)
    checkpoint.save(run, step, {"step": step}, 3)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": each}) + "\n" for each in steps))
    return run


def test_a_whole_run(script: Any, tmp_path: Path) -> None:
    ended(tmp_path, script.STEPS, list(range(32, script.STEPS + 1, 32)))
    assert script.whole(tmp_path) == []
    assert script.newest(tmp_path) == script.STEPS


def test_what_is_not_whole(script: Any, tmp_path: Path) -> None:
    run = ended(tmp_path, 64, [32, 64, 64])
    assert script.whole(tmp_path) == ["it has ended at step 64", "its logs have gaps or doubles"]
    (run / "checkpoints" / f"step_{96:012d}.ckpt").write_bytes(b"half a file")
    assert script.newest(tmp_path) == 64
    assert any("not an Esper checkpoint" in problem for problem in script.whole(tmp_path))


def test_a_lost_checkpoint_is_seen(script: Any, tmp_path: Path) -> None:
    assert script.going_on(tmp_path, 2, -1, tmp_path / "out") == []
    assert script.going_on(tmp_path, 2, 64, tmp_path / "out") == ["the run directory is lost"]
    ended(tmp_path, 64, [32, 64])
    assert script.going_on(tmp_path, 2, 128, tmp_path / "out") == ["the checkpoint of step 128 is lost"]
