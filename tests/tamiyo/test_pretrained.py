"""The policies that are shipped: that they fit this version, that nothing but them is loaded, and how they are made."""

import hashlib
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import tomllib
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import esper
from envs.adapter_config import GymConfig
from envs.config import load_config
from esper.graph.schema import SCHEMA
from esper.runtime import checkpoint
from esper.runtime.errors import ConfigError
from esper.simic.config import PPOConfig
from esper.tamiyo import loading
from esper.tamiyo.policy import Tamiyo
from trainers.config import WarmStartConfig
from trainers.config import load_policy as policy_config

ROOT = Path(__file__).parents[2]
SHIPPED = Path(str(resources.files("esper"))) / "pretrained"
RENEW = (
    "esper/pretrained/{name}.pt is not of this version: retrain it with `python -m trainers.train experiment=study`, "
    "then `python scripts/ship.py RUN_DIR`, and commit esper/pretrained"
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ship", ROOT / "scripts" / "ship.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shelf(script, tmp_path, monkeypatch) -> Path:
    """An empty folder in place of esper/pretrained."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setattr(script, "FOLDER", folder)
    monkeypatch.setattr(loading, "_folder", lambda: folder)
    return folder


@pytest.fixture
def policy(small_policy) -> Tamiyo:
    return small_policy()


@pytest.fixture
def state(policy) -> dict[str, Any]:
    """Of a run's checkpoint, with what a policy does not need."""
    config = {
        "env": asdict(load_config("digits")),
        "policy": {**asdict(policy.config), "backend": "dense"},
        "warm_start": asdict(WarmStartConfig()),
        "ppo": asdict(PPOConfig()),
    }
    return {
        "schema_hash": SCHEMA.hash,
        "interface": None,
        "config": {"seed": 3, "output_dir": "/somewhere", **config},
        "step": 640,
        "learner": {"policy": policy.state_dict(), "optimizer": {"moments": torch.ones(1_000_000)}},
        "env": {"population": torch.ones(1000)},
        "rng": checkpoint.rng_state(),
    }


def run_of(folder: Path, state: dict[str, Any]) -> Path:
    run = folder / "2026-01-01_00-00-00"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "overrides.yaml").write_text(
        "- env=digits\n- env.contexts.learning_rate=[0.1,0.2]\n- output_dir=/x\n"
    )
    checkpoint.save(run, state["step"], state, keep=1)
    return run


@pytest.fixture
def run(tmp_path, state) -> Path:
    return run_of(tmp_path, state)


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["ship.py", *map(str, arguments)])
    return script.main()


# ---- what is shipped -----------------------------------------------------------------------------------------------


def test_the_default_is_shipped():
    assert loading.DEFAULT in loading.pretrained_names()


@pytest.mark.parametrize("name", loading.pretrained_names())
def test_a_shipped_policy_fits_this_version(name, script):
    file = SHIPPED / f"{name}.pt"
    state = checkpoint.read(file)
    assert state["schema_hash"] == SCHEMA.hash, RENEW.format(name=name)
    assert file.stat().st_size <= script.LARGEST == 2_000_000, "shipped policies are at most 2 MB"
    assert state.keys() == {"format_version", "schema_hash", "interface", "config", "step", "learner", "card"}
    assert state["learner"].keys() == {"policy"}
    parameters = state["learner"]["policy"]
    assert all(value.dtype == torch.float16 and value.isfinite().all() for value in parameters.values())
    assert state["card"]["fingerprint"] == script.fingerprint(parameters)
    assert loading.card(name) == state["card"]
    shown = (SHIPPED / f"{name}.md").read_text()
    assert shown == script.page(state["card"]), f"renew the card: python scripts/ship.py {name}"
    assert not esper.load_policy(name).training


def test_the_default_has_the_architecture_that_training_gives_by_default():
    state = checkpoint.read(SHIPPED / "tamiyo_small.pt")
    default = policy_config("tamiyo_small")
    assert state["config"]["policy"] == asdict(default), RENEW.format(name="tamiyo_small")
    shapes, own = (
        {name: list(value.shape) for name, value in each.items()}
        for each in (state["learner"]["policy"], Tamiyo(default).state_dict())
    )
    assert shapes == own, RENEW.format(name="tamiyo_small")


def test_they_are_packaged():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["esper"]
    packaged = {path for pattern in patterns for path in (ROOT / "esper").glob(pattern)}
    assert {path for path in SHIPPED.iterdir() if not path.name.startswith(".")} <= packaged
    for name in loading.pretrained_names():
        folder = resources.files("esper") / "pretrained"
        assert (folder / f"{name}.pt").is_file()
        assert (folder / f"{name}.md").is_file()


# ---- loading -------------------------------------------------------------------------------------------------------


def test_a_path_wins_over_a_name_and_names_are_listed(script, run, shelf, tmp_path, monkeypatch, small_policy):
    script.ship(str(run), "tamiyo_small")
    script.ship(str(run), "another")
    assert loading.pretrained_names() == ["another", "tamiyo_small"]
    for given in ("another", "tamiyo_small", "pretrained", shelf / "another.pt"):
        path, _ = loading.load_state(given)
        assert path == shelf / (f"{given}.pt" if given == "another" else path.name)
    assert loading.load_state("pretrained")[0].stem == "tamiyo_small"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "another")
    assert loading.load_state("another")[0] == Path("another/checkpoints/step_000000000640.ckpt")
    with pytest.raises(
        ConfigError, match=r"name=another: .*\.ckpt has no card; only what scripts/ship\.py has written"
    ):
        loading.card("another")
    with pytest.raises(ConfigError) as error:
        esper.load_policy("nobody")
    assert str(error.value) == (
        "path=nobody: no such file or directory; give a run directory or a checkpoint file, or the name of a shipped "
        "policy (another, tamiyo_small)"
    )
    with pytest.raises(ConfigError, match=r"path=\.\./shelf/another: no such file"):
        esper.load_policy("../shelf/another")


def test_a_shipped_policy_decides_as_the_run_does(script, run, shelf, policy, observe, random_graph):
    before = esper.load_policy(run)
    script.ship(str(run))
    after = esper.load_policy("tamiyo_small")
    assert sum(value.numel() for value in after.parameters()) == sum(value.numel() for value in policy.parameters())
    with torch.inference_mode():
        sizes = dict.fromkeys(SCHEMA.nodes, 3) | {"global": 1}
        for graph in (observe(), random_graph(32, sizes)):
            (logits, value), (rounded, rounded_value) = before(graph), after(graph)
            scale = logits.abs().max()
            assert scale > 1e-3
            torch.testing.assert_close(rounded, logits, rtol=0, atol=5e-3 * float(scale))
            torch.testing.assert_close(rounded_value, value, rtol=0, atol=5e-3 * float(value.abs().max()))
            for parameter in policy.parameters():
                parameter.copy_(parameter.half().float())
            assert torch.equal(policy(graph)[0], rounded)  # rounding is all that has happened


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_tampered_file_is_refused(script, run, shelf, damage):
    path = script.ship(str(run))
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes(flipped if damage == "flip" else content[:-1])
    with pytest.raises(ConfigError, match=r"path=tamiyo_small: .*tamiyo_small\.pt is damaged \(its checksum"):
        esper.load_policy("tamiyo_small")


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("torch_format", [True, False])
def test_code_in_a_file_does_not_run(script, run, shelf, tmp_path, torch_format):
    path, witness, buffer = script.ship(str(run)), tmp_path / "witness", io.BytesIO()
    state = {**checkpoint.read(path), "more": Code(witness)}
    if torch_format:
        torch.save(state, buffer)
    else:
        pickle.dump(state["more"], buffer, protocol=2)
    payload = buffer.getvalue()
    # with a checksum that is right
    path.write_bytes(checkpoint._MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
    with pytest.raises(ConfigError, match="holds more than tensors and plain values; it was not loaded"):
        esper.load_policy("tamiyo_small")
    assert not witness.exists()


def test_no_pickle_is_loaded(monkeypatch):
    def refuse(*given: Any, **more: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    load, asked = torch.load, []
    monkeypatch.setattr(
        torch, "load", lambda *given, **more: asked.append(more["weights_only"]) or load(*given, **more)
    )
    esper.load_policy("tamiyo_small")
    assert asked == [True]


def test_another_schema_says_what_to_do(script, run, shelf):
    path = script.ship(str(run))
    checkpoint.write(path, {**checkpoint.read(path), "schema_hash": "0" * 16})
    with pytest.raises(ConfigError) as error:
        esper.load_policy("tamiyo_small")
    assert str(error.value) == (
        "path=tamiyo_small: its graph schema differs from this version's; retrain with `python -m trainers.train "
        "experiment=study`, then `python scripts/ship.py RUN_DIR`"
    )
    assert loading.card("tamiyo_small")["name"] == "tamiyo_small"  # can be read all the same


# ---- making --------------------------------------------------------------------------------------------------------


def test_what_is_kept_and_what_is_told(script, run, shelf, state, monkeypatch, capsys):
    assert call(script, monkeypatch, run, "--name", "small_one", "--note", "only a test") == 0
    path = shelf / "small_one.pt"
    assert f"{path} ({path.stat().st_size:,} bytes) and small_one.md" in capsys.readouterr().out
    kept = checkpoint.read(path)
    assert kept["learner"].keys() == {"policy"}
    assert kept["config"].keys() == {"seed", "env", "policy", "warm_start", "ppo"}
    assert kept["config"]["policy"] == {**state["config"]["policy"], "backend": "auto"}
    card = loading.card("small_one")
    assert (card["name"], card["note"], card["scores"]) == ("small_one", "only a test", None)
    recipe = card["recipe"]
    assert recipe["command"] == "python -m trainers.train env=digits 'env.contexts.learning_rate=[0.1,0.2]'"
    assert (recipe["seed"], recipe["steps"], recipe["ppo"]) == (3, 640, state["config"]["ppo"])
    assert card["trained_on"]["instances"] == "digits/mixture"
    text = (shelf / "small_one.md").read_text()
    for expected in (
        "**Note: only a test**", recipe["command"], "640 of 320,000 environment steps", "It has not been evaluated.",
        "had not ended", f"`{SCHEMA.hash}`", "| `ppo.lr` |", "| `warm_start.episodes` |",
    ):  # fmt: skip
        assert expected in text
    # again: the same bytes; out of the shipped file the same content
    before = path.read_bytes(), text
    script.ship(str(run), "small_one", note="only a test")
    assert (path.read_bytes(), (shelf / "small_one.md").read_text()) == before
    script.ship("small_one", "small_one")
    assert (loading.card("small_one"), (shelf / "small_one.md").read_text()) == (card, text)


def test_a_resumed_run_tells_both_commands(script, run, shelf):
    (run / ".hydra_resume").mkdir()
    (run / ".hydra_resume" / "overrides.yaml").write_text("- resume=/x\n")
    first = "python -m trainers.train env=digits 'env.contexts.learning_rate=[0.1,0.2]'"
    assert script.command(run) == first
    (run / ".hydra_resume" / "overrides.yaml").write_text("- resume=/x\n- ppo.total_steps=128000\n")
    assert script.command(run) == f"{first}  # resumed with ppo.total_steps=128000"
    shutil.rmtree(run / ".hydra")
    shutil.rmtree(run / ".hydra_resume")
    assert script.command(run) is None
    script.ship(str(run))
    assert "(the run did not tell its command)" in (shelf / "tamiyo_small.md").read_text()


def set_number(state: dict[str, Any], value: float) -> None:
    state["learner"]["policy"]["from_slot.weight"][0, 0] = value


def without_config(state: dict[str, Any]) -> None:
    del state["config"]["ppo"]


def other_env(state: dict[str, Any]) -> None:
    state["config"]["env"]["moons"] = 2


def adapter(state: dict[str, Any]) -> None:
    state["config"]["env"] = asdict(GymConfig(name="gym", id="CartPole-v1"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: set_number(state, float("nan")), "from_slot.weight has numbers that are not finite"),
        (lambda state: set_number(state, float("-inf")), "from_slot.weight has numbers that are not finite"),
        (lambda state: set_number(state, 1e5), "from_slot.weight has numbers that are too large for half precision"),
        (without_config, "does not say how it was trained (it has no ppo)"),
        (lambda state: state.pop("learner"), "holds no policy (it has no learner)"),
        (lambda state: state.update(schema_hash="0"), "its graph schema differs from this version's; train it anew"),
        (
            lambda state: state["learner"]["policy"].pop("wait.bias"),
            "its policy has another architecture: wait.bias is",
        ),
        (other_env, "its env is another version's (Key 'moons' not in"),
        (adapter, "was trained on env=gym; only policies that grow networks are shipped"),
    ],
)
def test_a_bad_policy_is_refused(script, shelf, state, tmp_path, monkeypatch, capsys, change, expected):
    step = state["step"]
    change(state)
    run = run_of(tmp_path, {"step": step, **state})
    assert call(script, monkeypatch, run) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: checkpoint={run}: ")
    assert expected in error
    assert len(error.splitlines()) == 1
    assert not list(shelf.iterdir())


def test_a_large_policy_is_refused_and_leaves_the_old_one(script, run, shelf, monkeypatch, capsys):
    path = script.ship(str(run))
    before = path.read_bytes()
    monkeypatch.setattr(script, "LARGEST", len(before) - 1)
    assert call(script, monkeypatch, run, "--note", "") == 2
    assert re.search(r"would be [\d,]+ bytes; at most [\d,]+ are shipped", capsys.readouterr().err)
    assert path.read_bytes() == before
    assert sorted(each.name for each in shelf.iterdir()) == ["tamiyo_small.md", "tamiyo_small.pt"]


@pytest.mark.parametrize("name", ["", "../up", "pretrained", "Small", "a.b"])
def test_a_bad_name_is_refused(script, run, shelf, monkeypatch, capsys, name):
    assert call(script, monkeypatch, run, "--name", name) == 2
    assert f"error: --name {name}: use small letters" in capsys.readouterr().err


def test_files_that_are_none(script, shelf, tmp_path, monkeypatch, capsys):
    assert call(script, monkeypatch, "nowhere") == 2
    assert "checkpoint=nowhere: no such file or directory" in capsys.readouterr().err
    (tmp_path / "text").write_text("hello")
    assert call(script, monkeypatch, tmp_path / "text") == 2
    assert "is not an Esper checkpoint" in capsys.readouterr().err


def row(score: float) -> dict[str, Any]:
    figure = {"iqm": score, "interval": [score, score], "mean": score}
    accounts = {"points": 4.0, "test_accuracy": 0.5, "twin_test_accuracy": 0.4, "params_ratio": 1.1}
    return {**figure, **accounts, "scores": [score] * 4, "tamiyo_minus_this": figure, "probability_of_improvement": 0.5}


def report_of(label: str) -> dict[str, Any]:
    what = {"kind": "growth", "environment": "digits", "checkpoint": label, "episodes": 4, "seed": 0}
    return {**what, "deterministic": True, "controllers": {"tamiyo": row(0.25), "never": row(0.0)}}


def test_scores_come_from_a_report_of_the_same_policy(script, run, shelf, tmp_path, monkeypatch, capsys, state):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report_of(str(checkpoint.found(run)[0]))))
    assert call(script, monkeypatch, run, "--report", file) == 0
    card = loading.card("tamiyo_small")
    assert card["scores"]["controllers"]["tamiyo"]["iqm"] == 0.25
    assert "scores" not in card["scores"]["controllers"]["tamiyo"]
    assert card["scores"]["of"] == "the checkpoint, before it was rounded to half precision"
    text = (shelf / "tamiyo_small.md").read_text()
    assert "| tamiyo | +0.250 [+0.250, +0.250] |" in text
    assert "It has not been evaluated." not in text
    # of the shipped file itself, which then keeps its scores
    file.write_text(json.dumps(report_of(f"tamiyo_small {card['fingerprint']}")))
    script.ship("tamiyo_small", report=file)
    assert loading.card("tamiyo_small")["scores"]["of"] == "the shipped file"
    script.ship("tamiyo_small", note="older")
    assert loading.card("tamiyo_small")["scores"]["of"] == "the shipped file"
    # of another
    for label in ("tamiyo_small 000000000000", str(run.with_name("2027") / "checkpoints" / "step_000000000640.ckpt")):
        file.write_text(json.dumps(report_of(label)))
        assert call(script, monkeypatch, run, "--report", file) == 2
        assert f"error: --report {file}: is of {label}, not of " in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"checkpoint": 3}', None])
def test_a_file_that_is_no_report(script, run, shelf, tmp_path, monkeypatch, capsys, content):
    file = tmp_path / "report.json"
    if content is not None:
        file.write_text(content)
    assert call(script, monkeypatch, run, "--report", file) == 2
    error = capsys.readouterr().err
    assert f"error: --report {file}: " in error
    assert ("cannot be read" if content is None else "is no report.json of trainers.evaluate") in error
    assert not list(shelf.iterdir())
