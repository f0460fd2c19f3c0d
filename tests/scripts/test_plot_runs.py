"""scripts/plot_runs.py: its groups, its bands against hand arithmetic, and what it says of bad input."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"
TAG = "rollout/ep_rew_mean"


@pytest.fixture(scope="module")
def plot_runs() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        return importlib.import_module("plot_runs")


@pytest.fixture
def make_run(tmp_path):
    """`make_run(name, values, **keys)`: a run with those values of TAG at steps 10, 20, ..."""

    def make(name: str, values: list[float | None], seed: int = 1, lr: float = 0.1, steps: int = 10) -> Path:
        folder = tmp_path / name
        (folder / ".hydra").mkdir(parents=True)
        config = {"seed": seed, "env": {"name": "digits"}, "ppo": {"lr": lr}}
        OmegaConf.save(OmegaConf.create(config), folder / ".hydra" / "config.yaml")
        lines = [{"step": steps * n, "time": 0.0, "train/loss": 1.0, TAG: value} for n, value in enumerate(values, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


def curves(plot_runs, folders, key=None, centre="mean"):
    groups = plot_runs.grouped([plot_runs.read(folder, TAG) for folder in folders], key)
    return {label: plot_runs.curve(label, runs, centre) for label, runs in groups.items()}


def test_runs_that_differ_in_the_seed_alone_are_one_group(plot_runs, make_run):
    folders = [
        make_run("a", [0.0, 1.0], seed=1),
        make_run("b", [2.0, 5.0], seed=2),
        make_run("c", [9.0, 9.0], seed=1, lr=0.2),
    ]
    found = curves(plot_runs, folders)
    assert list(found) == ["ppo.lr=0.1", "ppo.lr=0.2"]
    pair, single = found.values()
    assert (pair.runs, single.runs) == (2, 1)
    # two runs: the band is from the lower to the higher
    np.testing.assert_array_equal(pair.steps, [10, 20])
    np.testing.assert_array_equal([pair.low, pair.centre, pair.high], [[0, 1], [1, 3], [2, 5]])
    np.testing.assert_array_equal(single.low, single.high)


def test_group_by_one_key(plot_runs, make_run):
    folders = [make_run("a", [0.0]), make_run("b", [2.0], lr=0.2), make_run("c", [4.0], seed=2, lr=0.2)]
    assert {label: each.runs for label, each in curves(plot_runs, folders, "env.name").items()} == {
        "env.name=digits": 3
    }
    assert [each.centre[0] for each in curves(plot_runs, folders, "ppo.lr").values()] == [0.0, 3.0]


def test_the_interval_of_many_runs_is_a_bootstrap_of_their_centre(plot_runs, make_run):
    values = np.random.default_rng(3).normal(size=100)
    folders = [make_run(str(n), [value], seed=n) for n, value in enumerate(values)]
    (found,) = curves(plot_runs, folders).values()
    error = values.std() / np.sqrt(len(values))
    assert found.centre[0] == pytest.approx(values.mean())
    assert found.low[0] == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high[0] == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    (found,) = curves(plot_runs, folders, centre="iqm").values()
    assert found.centre[0] == pytest.approx(np.sort(values)[25:75].mean())


def test_curves_are_compared_where_all_runs_have_been(plot_runs, make_run):
    folders = [make_run("a", [1.0, 2.0, 3.0]), make_run("b", [0.0, 4.0], seed=2, steps=15)]  # at 15 and 30
    (found,) = curves(plot_runs, folders).values()
    np.testing.assert_array_equal(found.steps, [15, 20, 30])
    np.testing.assert_allclose(found.high, [1.5, 2.0, 4.0])
    np.testing.assert_allclose(found.low, [0.0, 4 / 3, 3.0])


def test_the_picture(plot_runs, make_run, tmp_path, capsys):
    folders = [make_run("a", [None, 1.0]), make_run("b", [0.5, 3.0], seed=2)]
    out = tmp_path / "sub" / "plot.png"
    assert plot_runs.main([*map(str, folders), "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert min(picture.size) > 300
    assert "digits: 2 run(s), +2.0000 [+1.0000, +3.0000] at step 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{there}", "{folder}/none"], "{folder}/none: not a run directory of Esper's (it has no metrics.jsonl)"),
        (["{there}", "--tag", "a/b"], f"{{there}}: it has logged no a/b; choose one of {TAG}, train/loss"),
        (["{there}", "--group", "ppo.l"], "--group ppo.l: no run has such a key; choose one of env.name, ppo.lr"),
        (["{there}", "{short}"], "digits: its runs have no steps in common; plot them one by one"),
    ],
)
def test_bad_input(plot_runs, make_run, tmp_path, capsys, arguments, message):
    places = {"there": make_run("there", [0.0]), "short": make_run("short", [0.0], 2, steps=7), "folder": tmp_path}
    given = [each.format(**places) for each in arguments]
    assert plot_runs.main([*given, "--out", str(tmp_path / "plot.png")]) == 2
    assert not (tmp_path / "plot.png").exists()
    assert capsys.readouterr().err == f"error: {message.format(**places)}\n"
