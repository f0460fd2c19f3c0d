"""Evaluation of shipped policies, on what they were trained on and elsewhere; reports go outside the package."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from esper.tamiyo import loading

SCRIPT = Path(__file__).parents[2] / "scripts" / "ship.py"
ELSEWHERE = ("env=segment", "env.epochs=2", "env.training.steps_per_epoch=2", "env.host.width=[4,6]")


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ship", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["pretrained", "tamiyo_small", "file"])
def test_the_shipped_one_elsewhere(run_evaluate, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    package = Path(loading.__file__).parents[1] / "pretrained"
    before = content(package)
    given = package / "tamiyo_small.pt" if name == "file" else name
    result = run_evaluate(f"checkpoint={given}", "baselines=[never]", "episodes=2", *ELSEWHERE)
    assert result.code == 0, result.err
    folder = Path("runs/pretrained/tamiyo_small/segment/eval")
    assert set(content(Path())) == {folder / f"report.{kind}" for kind in ("json", "md", "html")}
    report = json.loads((folder / "report.json").read_text())
    assert report["environment"] == "segment"
    assert report["checkpoint"] == f"tamiyo_small {loading.card('tamiyo_small')['fingerprint']}"
    assert f"report: {folder / 'report.html'}" in result.out
    assert content(package) == before


def test_a_run_is_shipped_evaluated_and_shipped_with_its_scores(run_train, run_evaluate, script, tmp_path, monkeypatch):
    run = run_train("ppo.total_steps=32").run_dir
    shelf = tmp_path / "shelf"
    monkeypatch.setattr(script, "FOLDER", shelf)
    monkeypatch.setattr(loading, "_folder", lambda: shelf)
    script.ship(str(run))
    result = run_evaluate("checkpoint=pretrained", "baselines=[never]", "episodes=3")
    assert result.code == 0, result.err
    report = Path("runs/pretrained/tamiyo_small/digits/eval/report.json")
    shipped = json.loads(report.read_text())["controllers"]
    script.ship("tamiyo_small", report=report)
    measured = loading.card("tamiyo_small")["scores"]
    assert (measured["of"], measured["controllers"]["tamiyo"]["iqm"]) == ("the shipped file", shipped["tamiyo"]["iqm"])
    # without env=, on the very environment of the run
    assert run_evaluate(f"checkpoint={run}", "baselines=[never]", "episodes=3").code == 0
    own = json.loads((run / "eval/report.json").read_text())["controllers"]
    assert own["never"]["test_accuracy"] == shipped["never"]["test_accuracy"]
    script.ship(str(run), report=run / "eval/report.json")
    assert loading.card("tamiyo_small")["scores"]["of"].startswith("the checkpoint")


def test_an_unknown_name(run_evaluate):
    result = run_evaluate("checkpoint=tamiyo_large")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert result.err.startswith(
        "error: checkpoint=tamiyo_large: no such file or directory; give a run directory or a "
    )
    assert "the name of a shipped policy (tamiyo_small)" in result.err
