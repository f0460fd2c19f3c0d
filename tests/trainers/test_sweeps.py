"""Sweeps from the command line: the study of experiment=sweep_ppo, the launchers, and runs that fail."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from esper.runtime.errors import TrainingError
from trainers.loop import Trainer
from trainers.objective import objective

from .conftest import newest

FAST = ["ppo.total_steps=32"]
OPTUNA = ["hydra/sweeper=optuna", "experiment=sweep_ppo"]


def needs(plugin: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{plugin}") is None,
        reason=f"{plugin} is not installed (the extra sweep)",
    )


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainers.train", "-m", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs("hydra_optuna_sweeper")
def test_the_command_goes_on_with_its_study(tiny, tmp_path):
    from optuna import load_study

    for _ in range(2):
        done = sweep(tmp_path, *OPTUNA, *tiny, *FAST, "hydra.sweeper.n_trials=1")
        assert done.returncode == 0, done.stderr
    study = load_study("sweep_ppo", f"sqlite:///{tmp_path}/runs/sweep_ppo/study.db")
    runs = sorted(path.parent for path in tmp_path.glob("runs/sweep_ppo/*/0/metrics.jsonl"))
    assert len(runs) == len(study.trials) == 2
    for trial, run in zip(study.trials, runs, strict=True):
        assert trial.value == pytest.approx(objective(run))
        assert newest(run)["config"]["ppo"]["lr"] == pytest.approx(trial.params["ppo.lr"])
        assert newest(run)["config"]["evaluation"]["seed"] == 1000
    assert study.best_trial.value == max(trial.value for trial in study.trials)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("joblib", marks=needs("hydra_joblib_launcher")),
        pytest.param("submitit_local", marks=needs("hydra_submitit_launcher")),
    ],
)
def test_launchers_run_jobs_side_by_side(launcher, tiny, tmp_path):
    done = sweep(tmp_path, f"hydra/launcher={launcher}", *tiny, *FAST, "seed=1,2")
    assert done.returncode == 0, done.stderr
    runs = sorted(path.parent for path in tmp_path.glob("runs/multirun/*/*/metrics.jsonl"))
    assert [newest(run)["config"]["seed"] for run in runs] == [1, 2]
    assert all((run / ".hydra" / "config.yaml").exists() for run in runs)


def test_a_run_that_fails_does_not_keep_the_others_from_running(run_train, tmp_path, monkeypatch):
    honest = Trainer.iterate

    def iterate(self):
        if self.config.seed == 1:
            raise TrainingError("the numbers are not well")
        return honest(self)

    monkeypatch.setattr(Trainer, "iterate", iterate)
    result = run_train("-m", "seed=1,2", "ppo.total_steps=32")
    assert result.code == 3
    assert result.err.splitlines()[-1].startswith("error: the numbers are not well")
    runs = sorted(path.parent for path in tmp_path.glob("runs/multirun/*/*/metrics.jsonl"))
    assert [newest(run)["step"] for run in runs] == [0, 32]


def test_a_bad_value_ends_the_sweep(run_train, tmp_path):
    result = run_train("-m", "ppo.lr=-1,1e-3", "ppo.total_steps=32")
    assert result.code == 2
    assert result.err.startswith("error: ppo.lr=-1")
    assert len(result.err.splitlines()) == 1
    assert not list(tmp_path.glob("runs/multirun/*/1"))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"rollout/ep_rew_mean": 0.25}', '{"rollout/ep_rew_mean": 0.5}'], 0.5),
        (['{"rollout/ep_rew_mean": 0.25}', '{"eval/tamiyo": 0.75, "eval/never": 0.0}'], 0.75),
        (['{"rollout/ep_rew_mean": 0.25}', '{"eval/policy": 3}'], 3.0),
        (['{"rollout/ep_rew_mean": 0.25}', '{"rollout/ep_rew_mean": null}'], None),
        (['{"train/loss": 1.0}'], None),
    ],
)
def test_objective(tmp_path, lines, expected):
    assert objective(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert objective(tmp_path) == expected
