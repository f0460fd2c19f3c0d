"""The study: its stages on tiny environments, what they write, and that nothing is computed twice."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from envs.config import load_config
from envs.growth_env import GrowthEnv
from esper.tamiyo import baselines
from trainers.evaluation import TamiyoController, play

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = {
    "epochs": 6,
    "host": {"width": [6, 8], "stages": [2, 3]},
    "training": {"steps_per_epoch": 3, "batch_size": 16},
}
OVERRIDES = [
    "env=segment", "env.epochs=6", "env.host.width=[6,8]", "env.host.stages=[2,3]", "env.num_envs=4",
    "env.training.steps_per_epoch=3", "env.training.batch_size=16", "policy.hidden=[8,8,8,8]", "ppo.num_steps=6",
    "ppo.minibatches=2", "ppo.total_steps=48", "warm_start.episodes=0", "runtime.compile=false",
]  # fmt: skip
OF, OTHER = "segment/mixture", "f/segment/mixture-with"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The script with everything small; its files are in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        work, study = importlib.import_module("study_work"), importlib.import_module("study")
        folder = tmp_path_factory.mktemp("study")
        patch.setattr(work, "TRAINED_ON", OF)
        patch.setattr(study, "TRAINED_ON", OF)
        sets = {OF: ("training", "seen", TINY)}
        sets[OTHER] = ("generalisation", "new", {**TINY, "blueprints": ["glu", "bypass", "norm"]})
        for module in (work, study):
            patch.setattr(module, "SETS", sets)
        grid = {
            "best_fixed": [{"slot": 0, "blueprint": "bypass", "epoch": e} for e in (1, 2)],
            "linear": [{"threshold": t, "first": 1, "every": 1} for t in (0.0, 1000.0)],
            "shallow": [{"threshold": t, "first": 1, "every": 1} for t in (0.0, 1000.0)],
            "neural": [{"threshold": t, "first": 1, "every": 1} for t in (0.0, 1000.0)],
        }
        settings = {
            "RESULTS": folder / "results", "RUNS": folder / "runs", "SCORERS": folder / "runs" / "scorers.pt",
            "GRID": grid, "MARGINS": [0.0, 0.5], "ROUNDS": ((8, None), (12, 1)), "LOOKED": 4, "LABELS": 1, "FEW": 1,
            "PLAYED": {}, "PLAYED_ELSE": 10, "RIVALS_PLAYED": {OF: 12}, "CEILING": 6, "CEILING_ELSE": 4,
            "COMPARED": (OF,), "ABLATED": 8, "CHUNK": {"lookahead": 4, "oracle": 4}, "CHUNK_ELSE": 6,
            "COMPARISONS": {"ablations": ["other"], "recipes": ["tamiyo"]},
            "OVERRIDES": {"tamiyo": OVERRIDES, "other": [*OVERRIDES, "ppo.lr=1e-5"]},
        }  # fmt: skip
        for name, value in settings.items():
            patch.setattr(study, name, value)
        yield study
    for name in ("study", "study_work", "chunks"):
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def done(study: Any) -> Any:
    """After all stages."""
    with study.Pool(1) as pool:
        study.fit(pool)
        study.tune(pool)
        study.train(["tamiyo", "other"], [1, 2], 1)
        study.play_all(pool, list(study.SETS))
        study.play_variants(pool)
    return study


def read(study: Any, name: str) -> Any:
    return json.loads((study.RESULTS / name).read_text())


@pytest.mark.slow
def test_tuning_keeps_the_best_knobs(done: Any) -> None:
    tuning = read(done, "tuning.json")
    assert set(tuning["chosen"]) == {*done.GRID, "lookahead"}
    for name, own in tuning["grid"].items():
        scores = tuning["scores"][name]
        assert set(scores) == {str(knobs) for knobs in own}
        assert tuning["chosen"][name] in own
    # A threshold that nothing passes never grows.
    for name in done.work.SCORERS:
        assert tuning["scores"][name][str(done.GRID[name][1])] == 0.0
    config = load_config("segment", "mixture", reward={"measure": "accuracy", "rent": 0.1, "flops": 0.0}, **TINY)
    given = baselines.BaselinesConfig()
    for knob, value in tuning["chosen"]["best_fixed"].items():
        setattr(given.best_fixed, knob, value)
    controller = baselines.make("best_fixed", given, "none", list(config.blueprints), 0)
    returns = play(controller, config, range(12), 0, "cpu", split="train")["return"]
    score = tuning["scores"]["best_fixed"][str(tuning["chosen"]["best_fixed"])]
    assert score == pytest.approx(100 * returns.mean(), abs=1e-3)


@pytest.mark.slow
def test_scores_are_those_of_the_controllers(done: Any) -> None:
    found = read(done, "scores-segment-mixture.json")
    rows = found["controllers"]
    names = {"never", "random", *done.GRID, "static", "lookahead", "oracle"}
    assert set(rows) == {*names, "tamiyo/1", "tamiyo/2"}
    assert (found["role"], found["instances"]) == ("training", 12)
    assert len(found["kind"]) == len(found["label_noise"]) == 12
    assert rows["never"]["points"] == [0.0] * 12
    assert (rows["never"]["waited"], rows["never"]["params_ratio"]) == (1.0, 1.0)
    counts = {"tamiyo/2": 12, "neural": 12, "best_fixed": 10, "static": 10, "lookahead": 6, "oracle": 6}
    assert {name: len(rows[name]["points"]) for name in counts} == counts
    config = done.work.config_of(OF)
    policy = done.work.load_policy(done.run_of("tamiyo", 2))
    whole = play(TamiyoController(policy, 0, True), config, 12, 0, "cpu")
    assert rows["tamiyo/2"]["points"] == pytest.approx(whole["points"].round(2).tolist(), abs=0.006)
    assert rows["tamiyo/2"]["return"] == pytest.approx(100 * whole["return"].mean(), abs=1e-3)
    assert any(rows["tamiyo/2"]["points"])


@pytest.mark.slow
def test_variants_play_the_first_of_the_same_instances(done: Any) -> None:
    whole, part = read(done, "scores-segment-mixture.json"), read(done, "ablations-segment-mixture.json")
    assert set(part["controllers"]) == {"never", "other/1", "other/2"}
    recipes = read(done, "recipes-segment-mixture.json")["controllers"]
    assert set(recipes) == {"never", "tamiyo/1", "tamiyo/2"}
    assert recipes["tamiyo/1"]["points"] == whole["controllers"]["tamiyo/1"]["points"][:8]
    assert part["kind"] == whole["kind"][:8]
    config = done.work.config_of(OF)
    played = play(TamiyoController(done.work.load_policy(done.run_of("other", 2)), 0, True), config, 8, 0, "cpu")
    assert part["controllers"]["other/2"]["points"] == pytest.approx(played["points"].round(2).tolist(), abs=0.006)


@pytest.mark.slow
def test_a_static_network_has_as_many_parameters_as_the_grown_one(done: Any) -> None:
    found = done.work.static(OF, "heldout", range(6), str(done.run_of("tamiyo", 1)))
    config = done.work.config_of(OF)
    policy = done.work.load_policy(done.run_of("tamiyo", 1))
    grown = play(TamiyoController(policy, 0, True), config, 6, 0, "cpu")
    env = GrowthEnv(config, 6, "heldout")
    env.reset(torch.arange(6))
    hosts = env.population.host_parameters().numpy()
    # The nearest width is at most half a unit off, and a unit more is less than a quarter of such a host.
    assert np.abs(found["params_ratio"].numpy() - grown["params_ratio"]).max() < 0.125
    assert (found["params_ratio"] >= 1).all()
    assert (found["params_ratio"].numpy() * hosts).round().tolist() == (found["params_ratio"] * hosts).tolist()
    alone = grown["params_ratio"] == 1
    assert found["points"][alone].tolist() == [0.0] * int(alone.sum())  # a host that has not grown is its twin


def test_the_neural_scorer_learns_gains_that_no_line_fits(study: Any) -> None:
    torch.manual_seed(1)
    x, blueprint = 3 + 2 * torch.randn(3000, 4), torch.randint(2, (3000,))
    sign = ((x[:, 0] - 3) * (x[:, 1] - 3)).sign()
    scorer = study.work.Neural(4, 2)
    scorer.fit(x[:2500], blueprint[:2500], torch.where(blueprint == 0, 20 * sign, torch.tensor(-7.0))[:2500], passes=30)
    found = scorer(x[2500:])
    assert (found[:, 0].sign() == sign[2500:]).float().mean() > 0.8
    assert found[:, 1].mean().item() == pytest.approx(-7.0, abs=0.3)
    parts = [network((x[2500:] - x[:2500].mean(0)) / x[:2500].std(0)) for network in scorer.networks]
    assert torch.allclose(found, 10 * sum(parts) / len(parts), atol=1e-4)


@pytest.mark.slow
def test_blueprints_that_scorers_do_not_know_are_never_chosen(done: Any) -> None:
    rows = read(done, "scores-f-segment-mixture-with.json")["controllers"]
    assert {"linear", "shallow", "neural", "tamiyo/1", "static"} <= set(rows)
    assert "other/1" not in rows
    config = done.work.config_of(OTHER)
    knobs = {"threshold": -1000.0, "first": 0, "every": 1}
    for name in done.work.SCORERS:
        controller = done.work.controller_of(name, config, knobs, str(done.SCORERS))
        env = GrowthEnv(config, 4)
        graph = env.reset(torch.arange(4))
        controller.begin(4)
        actions = controller.act(graph)
        verbs, _, blueprints = env.layout.table()
        assert (verbs[actions] > 0).all()
        assert (blueprints[actions] != 0).all()  # glu is the first, and new


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_of_two_processes_is_timed(study: Any) -> None:
    (study.RUNS / "timed").mkdir(parents=True)
    stale = study.RUNS / "timed" / "stale"
    stale.touch()
    study.cost()
    found = read(study, "cost.json")
    assert found["command"].startswith("torchrun --nproc-per-node=2 -m trainers.train experiment=study env=segment")
    assert found["processes"] == 2
    assert found["wall_s"] > 0
    lines = [json.loads(line) for line in (study.RUNS / "timed" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 48
    assert not stale.exists()


@pytest.mark.slow
def test_nothing_is_computed_twice(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(done, "scores-segment-mixture.json")
    runs = read(done, "training.json")["runs"]
    assert runs["tamiyo/1"]["steps"] == 48
    assert runs["tamiyo/1"]["command"].startswith("python -m trainers.train experiment=study seed=1")

    def never(*arguments: Any) -> None:
        raise AssertionError("computed twice")

    monkeypatch.setattr(sys.modules["chunks"], "write", never)
    monkeypatch.setattr(done, "_train", never)
    with done.Pool(1) as pool:
        done.fit(pool)
        done.tune(pool)
        done.train(["tamiyo", "other"], [1, 2], 1)
        done.play_all(pool, [OF])
        done.play_variants(pool)
    assert read(done, "scores-segment-mixture.json") == before
