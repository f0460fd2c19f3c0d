"""The warm start: what it learns, that it acts on it, and that a stop in between leaves no trace."""

import os
import signal

import pytest
import torch
from hydra import compose, initialize_config_module

from envs import fork_gains
from envs.config import load_config
from envs.growth_env import GrowthEnv
from esper.growth.actions import WAIT, ActionLayout, Verb
from esper.runtime.errors import ConfigError
from esper.tamiyo.policy import PolicyConfig, Tamiyo
from trainers import warm_start
from trainers.config import WarmStartConfig

from .conftest import differences, newest, untimed

SHORT = {
    "epochs": 6,
    "host": {"width": [4, 6], "stages": [2, 3]},
    "training": {"steps_per_epoch": 3, "batch_size": 16},
}
GIVEN = ("warm_start.episodes=200", "warm_start.epochs=1")


@pytest.fixture(scope="module")
def config():
    return load_config("segment", "repair", **SHORT)


@pytest.fixture(scope="module")
def found(config):
    return fork_gains.collect(config, seed=3, chunk=0)


def test_gains_are_returns_above_waiting(config, found):
    """Those of the decisions before anything has been done, played in an environment of their own."""
    again = fork_gains.collect(config, seed=3, chunk=0)
    assert all(torch.equal(found[name], again[name]) for name in found)
    other = fork_gains.collect(config, seed=3, chunk=1)
    assert not torch.equal(found["gains"][:100], other["gains"][:100])
    layout = ActionLayout(3, len(config.blueprints))
    verbs = layout.table()[0]
    tried = verbs[found["actions"]]
    assert set(tried.unique().tolist()) == {Verb.GERMINATE, Verb.CULL}
    assert found["action_mask"].gather(1, found["actions"]).all()
    assert 0.01 < found["gains"].abs().mean() < 0.5


def test_the_graphs_are_those_of_the_decisions(config, found):
    of = fork_gains.layout(config)
    graph = fork_gains.graphs(found, of, slice(5, 9))
    assert len(graph) == 4
    assert torch.equal(graph.action_mask, found["action_mask"][5:9])
    assert torch.equal(graph.pack().x, found["x"][5:9])


def test_it_learns_what_actions_gain(config, found):
    torch.manual_seed(0)
    policy = Tamiyo(PolicyConfig(hidden=[16, 16, 16, 16]))
    settings = WarmStartConfig(episodes=1, epochs=30, batch_size=32, huber=None)
    targets = found["gains"].clamp(-warm_start.LARGEST, warm_start.LARGEST) / warm_start.UNIT

    @torch.no_grad()
    def error() -> float:
        logits, _ = policy(fork_gains.graphs(found, fork_gains.layout(config), slice(None)))
        return float((logits.gather(1, found["actions"]) - logits[:, WAIT, None] - targets).square().mean())

    before = error()
    warm_start.fit(policy, config, settings, 0, found)
    assert error() < 0.6 * before


def test_large_errors_count_by_their_size(config, found, monkeypatch):
    gains = found["gains"]
    torch.manual_seed(0)
    policy = Tamiyo(PolicyConfig(hidden=[16, 16, 16, 16]))
    seen = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: seen.append(loss.detach()))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with torch.no_grad():
        logits, _ = policy(fork_gains.graphs(found, fork_gains.layout(config), slice(None)))
    errors = logits.gather(1, found["actions"]) - logits[:, WAIT, None] - gains.clamp(-0.6, 0.6) / warm_start.UNIT
    beta = 0.02 / warm_start.UNIT
    by_hand = torch.where(errors.abs() < beta, errors.square() / (2 * beta), errors.abs() - beta / 2).mean()
    for huber, expected in ((None, errors.square().mean()), (0.02, by_hand)):
        seen.clear()
        settings = WarmStartConfig(episodes=1, epochs=1, batch_size=len(gains), huber=huber)
        warm_start.fit(policy, config, settings, 0, found)
        torch.testing.assert_close(torch.stack(seen), expected[None])


def test_acting_on_gains_by_hand(config):
    torch.manual_seed(0)
    policy = Tamiyo(PolicyConfig(hidden=[16, 16, 16, 16]))
    env = GrowthEnv(config, 4)
    graph = env.reset(torch.arange(4))
    with torch.no_grad():
        before, value = policy(graph)
        policy.act_on_gains(5.0, 2.0)
        after, same = policy(graph)
    expected = 5 * before
    expected[:, WAIT] += 2
    torch.testing.assert_close(after, expected)
    assert torch.equal(value, same)


def test_a_run_with_a_warm_start(run_train):
    cold, warm = run_train(), run_train(*GIVEN)
    assert (cold.code, warm.code) == (0, 0)
    first = [untimed(each.run_dir)[0]["rollout/ep_rew_mean"] for each in (cold, warm)]
    assert first[0] != first[1]
    assert not (warm.run_dir / warm_start.FOLDER).exists()
    assert newest(warm.run_dir)["warm"] is True


@pytest.mark.parametrize("chunk", [0, 1])
def test_a_stop_in_between_leaves_no_trace(run_train, monkeypatch, chunk):
    whole = run_train(*GIVEN)
    collect = fork_gains.collect

    def stopped(config, seed, number, tried):
        if number == chunk:
            os.kill(os.getpid(), signal.SIGTERM)
        return collect(config, seed, number, tried)

    with monkeypatch.context() as patch:
        patch.setattr(fork_gains, "collect", stopped)
        cut = run_train(*GIVEN)
    assert cut.code == 75
    run = next((whole.run_dir.parent).glob("*/warm_start")).parent
    assert newest(run)["step"] == 0
    assert newest(run)["warm"] is False
    again = run_train(f"resume={run}", tiny=False)
    assert again.code == 0
    assert untimed(run) == untimed(whole.run_dir)
    assert differences(newest(run)["learner"], newest(whole.run_dir)["learner"]) == []


def test_an_output_that_is_gone_is_no_reason_not_to_save(run_train, monkeypatch, tmp_path):
    def broken(*arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(fork_gains, "collect", broken)
    assert run_train(*GIVEN).code not in (0, 75)
    run = next(tmp_path.glob("runs/digits/*"))
    assert (newest(run)["step"], newest(run)["warm"]) == (0, False)


def test_bad_settings():
    segment = load_config("segment")
    for name in ("tried", "epochs", "batch_size", "lr", "temperature"):
        with pytest.raises(ConfigError, match=rf"warm_start\.{name}=0: must be above 0"):
            WarmStartConfig(**{name: 0}).validate(segment)
    with pytest.raises(ConfigError, match=r"warm_start\.huber=0\.0: must be above 0"):
        WarmStartConfig(huber=0.0).validate(segment)
    with pytest.raises(ConfigError, match=r"warm_start\.episodes=-1: must not be negative"):
        WarmStartConfig(episodes=-1).validate(segment)
    with pytest.raises(ConfigError, match=r"env\.epochs=2: a warm start needs at least 3"):
        WarmStartConfig(episodes=1).validate(load_config("segment", epochs=2))


def test_it_needs_hosts(run_train):
    result = run_train("env=gym", "env.id=CartPole-v1", "warm_start.episodes=5", tiny=False)
    assert (result.code, len(result.err.splitlines())) == (2, 1), result.err
    assert result.err.startswith("error: warm_start.episodes=5: env=gym has no hosts to fork")


def test_a_run_that_starts_from_another_policy_has_none(run_train, monkeypatch):
    first = run_train()
    monkeypatch.setattr(fork_gains, "collect", lambda *arguments: pytest.fail("collects"))
    again = run_train(f"init={first.run_dir}", *GIVEN)
    assert (first.code, again.code) == (0, 0), again.err
    assert newest(again.run_dir)["warm"] is True


def test_growing_digits_starts_warm_unless_told_otherwise():
    given = ("", "experiment=study", "recipe=none", "env=segment", "experiment=cartpole", "experiment=smoke")
    with initialize_config_module("esper.conf", version_base="1.3"):
        recipes = {each: compose("train", each.split()) for each in given}
    episodes = {given: config.warm_start.episodes for given, config in recipes.items()}
    assert 0 < episodes.pop("") < episodes.pop("experiment=study")
    assert not any(episodes.values())
    short, whole = recipes[""].ppo, recipes["experiment=study"].ppo
    assert short == {**whole, "total_steps": short.total_steps, "starts": 1}
    assert short.total_steps < whole.total_steps
    assert short.lr < recipes["recipe=none"].ppo.lr
