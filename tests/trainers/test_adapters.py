"""Training on other people's environments: runs, resumed runs, evaluations, and what is refused."""

import itertools
import json
import math
import signal
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hydra import compose, initialize_config_module

import esper
from envs.adapter_config import GymConfig
from envs.making import make_envs
from esper.simic.config import PPOConfig
from trainers import config, returns
from trainers.config import RuntimeConfig, TrainConfig
from trainers.loop import Trainer

from .conftest import differences, lines, newest, stop_at, untimed

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SMALL = [
    "env.num_envs=2",
    "policy.hidden=[8,8,8,8]",
    "ppo.num_steps=16",
    "ppo.total_steps=96",  # three iterations of 32
    "ppo.epochs=2",
    "ppo.minibatches=2",
    "runtime.compile=false",
    "checkpoint.every=1",
    "evaluation.episodes=3",
]
CARTPOLE = ["env=gym", "env.id=CartPole-v1", *SMALL]
SCHEDULING = ["env=hetero", "env.target=scheduling:Scheduling", "env.action_node=job", *SMALL]


class Line(gymnasium.Env):
    """Walks to the right; an episode is cut off after four steps and never ends by itself."""

    observation_space = spaces.Box(-10.0, 10.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.at = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        self.at += 1
        return np.full(1, self.at, dtype=np.float32), 1.0, False, self.at == 4, {}


gymnasium.register("test/Line-v0", Line)


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    sys.modules.pop("scheduling", None)


def report(run: Path) -> dict:
    return json.loads((run / "eval/report.json").read_text())


@pytest.mark.parametrize(("overrides", "name"), [(CARTPOLE, "gym"), (SCHEDULING, "hetero")])
def test_a_run(run_train, overrides, name):
    result = run_train(*overrides, tiny=False)
    assert result.code == 0, result.err
    run = result.run_dir
    assert run.parts[-3:-1] == ("runs", name)
    written = lines(run)
    assert [line["step"] for line in written] == [32, 64, 96, 96]
    assert {"train/loss", "grad/norm", "perf/graph_build_ms", "rollout/ep_rew_mean"} <= written[2].keys()
    assert not any(key.startswith("growth/") for line in written for key in line)
    assert all(math.isfinite(value) for line in written for value in line.values())
    found = report(run)
    assert set(found["controllers"]) == {"policy", "random"}
    for each, row in found["controllers"].items():
        assert len(row["scores"]) == 3
        assert row["mean"] == pytest.approx(np.mean(row["scores"]))
        assert row["std"] == pytest.approx(np.std(row["scores"]))
        assert written[3][f"eval/{each}"] == row["mean"]
    assert "random" in result.out
    assert "| policy |" in (run / "eval/report.md").read_text()
    policy = esper.load_policy(run)
    state = newest(run)
    assert all(torch.equal(value, state["learner"]["policy"][key]) for key, value in policy.state_dict().items())


def test_same_seed_same_numbers(run_train):
    runs = [run_train(*CARTPOLE, *more, tiny=False).run_dir for more in ([], [], ["seed=2"])]
    losses = [[line.get("train/loss") for line in lines(run)] for run in runs]
    assert losses[0] == losses[1] != losses[2]
    assert report(runs[0])["controllers"] == report(runs[1])["controllers"]


@pytest.mark.parametrize(
    "overrides",
    [[*CARTPOLE, "env.normalize=true"], SCHEDULING, [*CARTPOLE, "env.subprocess=true"]],
    ids=["gym", "hetero", "subprocess"],
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(run_train, monkeypatch, overrides):
    whole = run_train(*overrides, "evaluation.episodes=0", tiny=False)
    assert whole.code == 0, whole.err
    with monkeypatch.context() as patch:
        stop_at(64, signal.SIGTERM, patch)
        stopped = run_train(*overrides, "evaluation.episodes=0", tiny=False)
    run = stopped.run_dir
    assert (stopped.code, newest(run)["step"]) == (75, 64)
    result = run_train(f"resume={run}", tiny=False)
    assert result.code == 0, result.err
    assert "resuming at step 64 of 96" in result.out
    assert "start new episodes" not in result.out + result.err
    assert not differences(newest(whole.run_dir), newest(run))
    assert untimed(whole.run_dir) == untimed(run)
    assert (newest(run)["processes"][0]["env"]["episodes"] > 1).any()


class Born(Line):
    """Shows how many were made before it."""

    _count = itertools.count()

    def __init__(self):
        self.born = next(self._count) / 8

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.full(1, self.born, dtype=np.float32), {}


gymnasium.register("test/Born-v0", Born)


def test_a_run_on_an_environment_that_is_not_deterministic_says_so(run_train, monkeypatch):
    overrides = ["env=gym", "env.id=test/Born-v0", *SMALL, "evaluation.episodes=0"]
    with monkeypatch.context() as patch:
        stop_at(32, signal.SIGTERM, patch)
        stopped = run_train(*overrides, tiny=False)
    before = newest(stopped.run_dir)["processes"][0]["env"]["episodes"]
    result = run_train(f"resume={stopped.run_dir}", tiny=False)
    assert result.code == 0, result.err
    said = [line for line in (result.out + result.err).splitlines() if "start new episodes" in line]
    assert len(said) == 1
    assert "env.id=test/Born-v0: 2 of its 2 environments did not come to where they were" in said[0]
    assert (newest(stopped.run_dir)["processes"][0]["env"]["episodes"] > before).all()


def test_what_a_resumed_run_may_not_change(run_train):
    run = run_train(*CARTPOLE, "ppo.total_steps=32", "evaluation.episodes=0", tiny=False).run_dir
    result = run_train(f"resume={run}", "env=gym", "env.id=Acrobot-v1", tiny=False)
    assert result.code == 2
    assert "env=gym: cannot be changed when resuming" in result.err
    result = run_train(f"resume={run}", "env.id=Acrobot-v1", tiny=False)
    assert result.err.startswith("error: env.id: the environment chosen by env=NAME has no such key")


def test_evaluation_uses_what_training_has_learned(run_train, run_evaluate, monkeypatch):
    run = run_train(*CARTPOLE, "env.normalize=true", tiny=False).run_dir
    trained = report(run)["controllers"]
    used = []
    monkeypatch.setattr(returns, "make_envs", lambda *args, **named: used.append(make_envs(*args, **named)) or used[-1])
    result = run_evaluate(f"checkpoint={run}", "episodes=3")
    assert result.code == 0, result.err
    learned = newest(run)["processes"][0]["env"]["learned"]
    assert len(used) == 4  # three episodes, two side by side, of two controllers
    for env in used:
        assert env.learned()["count"] == learned["count"]
        assert torch.equal(env.learned()["mean"], learned["mean"])
    assert report(run)["controllers"] == trained


def test_more_episodes_keep_the_first_ones(run_train, run_evaluate):
    run = run_train(*CARTPOLE, tiny=False).run_dir
    few = report(run)["controllers"]["policy"]["scores"]
    assert run_evaluate(f"checkpoint={run}", "episodes=5", "baselines=none").code == 0
    many = report(run)["controllers"]
    assert list(many) == ["policy"]
    assert many["policy"]["scores"][:3] == few
    assert run_evaluate(f"checkpoint={run}", "episodes=3", "seed=1", "deterministic=false").code == 0
    assert report(run)["controllers"]["policy"]["scores"] != few


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env=digits"], "env=digits: its graphs or actions differ from those that"),
        (["env=gym", "env.id=Acrobot-v1"], "env=gym: its graphs or actions differ from those that"),
        (["baselines=[never]"], "baselines=never: the only baseline of this environment is random"),
    ],
)
def test_evaluations_that_make_no_sense(run_train, run_evaluate, overrides, message):
    run = run_train(*CARTPOLE, "ppo.total_steps=32", "evaluation.episodes=0", tiny=False).run_dir
    result = run_evaluate(f"checkpoint={run}", "episodes=2", *overrides)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert message in result.err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env=gym"], "error: env.id: must be given"),
        (["env=gym", "env.id=Nowhere-v3"], "error: env.id=Nowhere-v3: gymnasium.make failed: "),
        (["env=gym", "env.id=Pendulum-v1"], "error: env.id=Pendulum-v1: its actions are Box"),
        (["env=gym", "env.idd=CartPole-v1"], "error: env.idd: no such key; did you mean env.id?"),
        (["env=gym", "+env.epochs=3"], "error: env.epochs: the environment chosen by env=NAME has no such key"),
        (["env=gym", "env.id=CartPole-v1", "env.num_envs=many"], "error: env.num_envs: 'many' of type 'str' could not"),
        (["env=gym", "env.id=CartPole-v1", "env.num_envs=0"], "error: env.num_envs=0: must be above 0"),
        (["env=gym", "env.id=CartPole-v1", "env.kind=hetero"], "error: env.kind=hetero: is gym for this environment"),
        (["env.kind=gym"], "error: env.kind=gym: is growth for this environment"),
        (["env=hetero"], "error: env.target: must be given"),
        (["env=hetero", "env.target=lost"], "error: env.target=lost: must be of the form package.module:factory"),
        (["env=hetero", "env.target=lost:make"], "error: env.target=lost:make: importing lost failed"),
        (
            ["env=hetero", "env.target=scheduling:Scheduling"],
            "error: env.target=scheduling:Scheduling: its action_space",
        ),
        (
            ["env=gym", "env.id=CartPole-v1", "evaluation.baselines=never"],
            "error: evaluation.baselines=never: the only",
        ),
    ],
)
def test_bad_input_is_one_line(run_train, overrides, message):
    result = run_train(*overrides, tiny=False)
    assert result.code == 2
    assert result.err.startswith(message), result.err
    assert len(result.err.splitlines()) == 1


def test_arguments_of_the_environment(run_train):
    result = run_train(*CARTPOLE, "+env.kwargs.max_episode_steps=5", "ppo.total_steps=32", tiny=False)
    assert result.code == 0, result.err
    assert lines(result.run_dir)[0]["rollout/ep_len_mean"] == 5


@pytest.mark.parametrize("name", ["cartpole", "acrobot", "mountaincar"])
def test_packaged_experiments_are_valid(name):
    config.register()
    with initialize_config_module("esper.conf", version_base="1.3"):
        given = compose("train", [f"experiment={name}"])
    settings = config.to_train_config(given)
    assert isinstance(settings.env, GymConfig)
    assert settings.env.name == name
    assert settings.ppo.total_steps in (100_000, 500_000)


def test_truncation_bootstraps_from_the_final_observation(tmp_path):
    settings = TrainConfig(
        env=GymConfig(id="test/Line-v0", num_envs=2),
        ppo=PPOConfig(num_steps=8, gamma=0.9, gae_lambda=1.0),
        runtime=RuntimeConfig(compile=False),
    )
    trainer = Trainer(settings, tmp_path)
    trainer._collect()
    rollout = trainer.rollout
    last = trainer.env.reset(torch.arange(2))
    for _ in range(4):
        *_, info = trainer.env.step(torch.zeros(2, dtype=torch.int64))
    assert info["final_graph"].x["observation"][:, 0, 0].tolist() == [4, 4]
    with torch.no_grad():
        final, start = (trainer.policy(graph)[1] for graph in (info["final_graph"], last))
    # four steps that pay 1, then V(4), not V(0) of the episode that the same step began
    expected = 1 + 0.9 + 0.81 + 0.729 + 0.6561 * final
    torch.testing.assert_close(rollout.returns[0], expected)
    torch.testing.assert_close(rollout.returns[4], expected)
    assert not torch.allclose(final, start, atol=1e-4)


@pytest.mark.slow
def test_the_documented_example_learns(run_train):
    result = run_train(
        "env=hetero", "env.target=scheduling:Scheduling", "env.action_node=job", "env.num_envs=16", "ppo.num_steps=64",
        "ppo.total_steps=12288", "ppo.lr=1e-3", "runtime.compile=false", "evaluation.episodes=50", tiny=False,
    )  # fmt: skip
    assert result.code == 0, result.err
    found = report(result.run_dir)["controllers"]
    assert found["policy"]["mean"] > 0.9 * found["random"]["mean"]  # returns are negative: 10 % better
