import json

import numpy as np
import pytest
import torch

from envs.config import load_config
from envs.growth_env import GrowthEnv
from envs.reward import LOWEST
from esper.growth.population import Population
from esper.runtime.errors import ConfigError
from esper.tamiyo import baselines
from esper.tamiyo.baselines import BaselinesConfig
from trainers import evaluation
from trainers.config import EvaluationConfig


@pytest.fixture
def run(run_train):
    return run_train("ppo.total_steps=32").run_dir


def report(run):
    return json.loads((run / "eval/report.json").read_text())


def test_report_compares_on_the_same_instances(run, run_evaluate):
    result = run_evaluate(f"checkpoint={run}", "baselines=all", "episodes=6")
    assert result.code == 0, result.err
    controllers = report(run)["controllers"]
    assert set(controllers) == {"tamiyo", *baselines.usable("digits/mixture")}
    assert len(controllers) > 8
    assert all(len(row["scores"]) == 6 for row in controllers.values())
    assert controllers["never"]["scores"] == [0.0] * 6
    # one twin per instance, whoever grows the host beside it
    assert len({row["twin_test_accuracy"] for row in controllers.values()}) == 1
    assert controllers["never"]["test_accuracy"] == controllers["never"]["twin_test_accuracy"]
    mine, theirs = (np.array(controllers[name]["scores"]) for name in ("tamiyo", "random"))
    versus = controllers["random"]
    assert versus["probability_of_improvement"] == pytest.approx(np.mean((mine > theirs) + 0.5 * (mine == theirs)))
    assert versus["tamiyo_minus_this"]["mean"] == pytest.approx((mine - theirs).mean())
    text = (run / "eval/report.md").read_text()
    assert all(f"| {name} |" in text for name in controllers)
    assert "all_at_start" in result.out


def test_more_episodes_keep_the_first_ones(run, run_evaluate):
    run_evaluate(f"checkpoint={run}", "baselines=[all_at_start]", "episodes=3")
    few = report(run)["controllers"]
    run_evaluate(f"checkpoint={run}", "baselines=[all_at_start]", "episodes=5")
    many = report(run)["controllers"]
    for name in ("tamiyo", "all_at_start"):
        assert many[name]["scores"][:3] == few[name]["scores"]
    run_evaluate(f"checkpoint={run}", "baselines=[all_at_start]", "episodes=3", "seed=1")
    assert report(run)["controllers"]["all_at_start"]["scores"] != few["all_at_start"]["scores"]


def test_a_single_file_and_another_environment(run, run_evaluate):
    file = next((run / "checkpoints").iterdir())
    result = run_evaluate(f"checkpoint={file}", "baselines=none", "episodes=2", "env=segment")
    assert result.code == 0, result.err
    assert report(run)["environment"] == "segment"
    assert list(report(run)["controllers"]) == ["tamiyo"]


def test_contexts_of_another_kind(run, run_evaluate):
    given = [f"checkpoint={run}", "baselines=[never]", "episodes=2", "env=digits", "env.epochs=3"]
    scores = []
    for kind in ("plain", "shift"):
        result = run_evaluate(*given, f"env/contexts={kind}")
        assert result.code == 0, result.err
        scores.append(report(run)["controllers"]["never"]["test_accuracy"])
        assert report(run)["controllers"]["never"]["scores"] == [0.0, 0.0]
    assert scores[0] != scores[1]


def test_names_of_the_baselines():
    everything = baselines.usable("digits/mixture")
    assert EvaluationConfig().names("digits/mixture") == list(everything)
    assert EvaluationConfig(baselines="none").names("digits/mixture") == []
    assert EvaluationConfig(baselines="never").names("digits/mixture") == ["never"]
    assert EvaluationConfig(baselines=["probe", "never"]).names("digits/mixture") == ["probe", "never"]
    with pytest.raises(ConfigError, match=r"here\.baselines=magic: no such baseline; choose all, none, or from "):
        EvaluationConfig(baselines=["never", "magic"]).names("digits/mixture", "here.")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["checkpoint=nowhere"], "checkpoint=nowhere: no such file or directory"),
        ([], "checkpoint: must be given"),
        (["checkpoint={run}", "episodes=0"], "episodes=0: must be above 0"),
        (["checkpoint={run}", "baselines=[wizard]"], "baselines=wizard: no such baseline"),
        (
            ["checkpoint={run}", "env=mars"],
            "env=mars: no such option; choose one of charlm, digits, digits_conv, gym, hetero, mnist5k, segment",
        ),
        (["checkpoint={run}/metrics.jsonl"], "checkpoint={run}/metrics.jsonl: {run}/metrics.jsonl is not an Esper"),
        (["checkpoint={run}/tb"], "checkpoint={run}/tb: {run}/tb/checkpoints holds no checkpoint"),
        (["checkpoint={run}", "episode=4"], "episode: no such key; did you mean episodes?"),
    ],
)
def test_bad_input(run, run_evaluate, overrides, expected):
    result = run_evaluate(*(override.format(run=run) for override in overrides))
    assert result.code == 2
    assert result.err.startswith(f"error: {expected.format(run=run)}"), result.err
    assert len(result.err.splitlines()) == 1


def test_iqm_and_interval():
    # the middle half of 1 .. 8 is 3, 4, 5, 6
    assert evaluation.iqm(np.array([8.0, 1, 2, 7, 3, 6, 4, 5])) == 4.5
    # one wild value out of eight does not move it
    assert evaluation.iqm(np.array([800.0, 1, 2, 7, 3, 6, 4, 5])) == 4.5
    assert evaluation.interval(np.full(5, 2.5)) == (2.5, 2.5)
    assert evaluation.interval(np.array([0.7])) == (0.7, 0.7)
    scores = np.random.default_rng(0).normal(1.0, 1.0, 400)
    low, high = evaluation.interval(scores)
    # standard error of the IQM of 400 normal values is about 1.09 / 20; the interval is four of them wide
    assert low < evaluation.iqm(scores) < high
    assert 0.16 < high - low < 0.28


def test_instances_of_a_batch_do_not_depend_on_its_size(monkeypatch):
    config = load_config("segment", epochs=2)
    controller = baselines.make("all_at_start", BaselinesConfig(), config.instances, list(config.blueprints), 0)
    together = evaluation.play(controller, config, 5, 0, "cpu", lambda done: None)
    monkeypatch.setattr(evaluation, "_BATCH", 2)
    apart = evaluation.play(controller, config, 5, 0, "cpu", lambda done: None)
    for name in set(together) - {"env"}:
        assert np.array_equal(together[name], apart[name]), name


def test_an_episode_that_ends_early_keeps_its_place(monkeypatch):
    config = load_config("segment", epochs=4, reward={"measure": "loss"})
    controller = baselines.make("never", BaselinesConfig(), config.instances, list(config.blueprints), 0)
    whole = evaluation.play(controller, config, 5, 0, "cpu", lambda done: None)
    honest = Population.diverged

    def diverged(self):
        return honest(self) | ((self.context.train_size == size) & (self.epoch == 2))

    env = GrowthEnv(config, 5, split="heldout", autoreset=False)
    env.reset(torch.arange(5))
    sizes = env.population.context.train_size.tolist()
    size = next(size for size in sizes[:-1] if sizes.count(size) == 1)
    monkeypatch.setattr(Population, "diverged", diverged)
    played = evaluation.play(controller, config, 5, 0, "cpu", lambda done: None)
    ended = np.arange(5) == sizes.index(size)
    assert played["diverged"].tolist() == ended.tolist()
    assert played["length"].tolist() == np.where(ended, 2, 4).tolist()
    assert played["return"][ended] == LOWEST
    for name in set(whole) - {"diverged"}:
        assert np.array_equal(played[name][~ended], whole[name][~ended]), name
