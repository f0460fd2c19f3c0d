import numpy as np
import pytest
import torch

from envs.config import load_config
from envs.growth_env import GrowthEnv
from esper.growth.lifecycle import NO_BLUEPRINT
from esper.tamiyo.baselines.simple import Never, Random
from trainers import evaluation
from trainers.evaluation import play
from trainers.recording import Recorder

EPISODES, EPOCHS = 5, 9


@pytest.fixture
def config():
    return load_config("segment", epochs=EPOCHS)


@pytest.fixture
def truth(monkeypatch):
    """What the hosts themselves say, after each epoch and at the start: one list of moments for each batch."""
    batches = []
    honest_reset, honest_step = GrowthEnv.reset, GrowthEnv.step

    def note(env):
        lifecycle = env.population.lifecycle
        batches[-1].append(
            {
                "stage": lifecycle.stage.clone(),
                "alpha": lifecycle.alpha.clone(),
                "blueprint": lifecycle.blueprint.clone(),
                "loss": env.population.validation_loss.clone(),
            }
        )

    def reset(self, *given):
        batches.append([])
        graph = honest_reset(self, *given)
        note(self)
        return graph

    def step(self, *given):
        result = honest_step(self, *given)
        note(self)
        return result

    monkeypatch.setattr(GrowthEnv, "reset", reset)
    monkeypatch.setattr(GrowthEnv, "step", step)
    return batches


@pytest.fixture
def recorded(config, truth, monkeypatch):
    monkeypatch.setattr(evaluation, "_BATCH", 3)  # two batches
    recorder = Recorder(keep=True)
    played = play(Random(0), config, EPISODES, 0, "cpu", watch=recorder)
    return recorder.recording(), played


def test_it_is_what_the_hosts_say(config, truth, recorded):
    recording, played = recorded
    for name in ("stage", "alpha", "loss"):
        expected = torch.cat([torch.stack([moment[name] for moment in batch]) for batch in truth], dim=1)
        got = getattr(recording, name)
        assert got.shape[:2] == (EPOCHS + 1, EPISODES)
        assert torch.allclose(got, expected, rtol=1e-5), name
    assert recording.actions.shape == (EPOCHS, EPISODES)
    counts = recording.germinations(len(config.blueprints), played["length"])
    assert counts.sum((1, 2)).tolist() == played["germinated"].tolist()
    assert counts.sum() > EPISODES


def test_names_in_a_trace_are_those_of_what_lives_there(config, truth, recorded):
    recording, played = recorded
    blueprints = torch.cat([torch.stack([moment["blueprint"] for moment in batch]) for batch in truth], dim=1)
    named = 0
    for host in range(EPISODES):
        trace = recording.trace(host, config.blueprints, int(played["length"][host]))
        slots = recording.exists[host].nonzero().flatten()
        for epoch, names in enumerate(trace.blueprint):
            there = blueprints[epoch, host, slots].tolist()
            assert names == [None if kind == NO_BLUEPRINT else config.blueprints[kind] for kind in there]
            named += sum(name is not None for name in names)
        assert len(trace.names()) == len(slots)
    assert named > 20


def test_a_trace_ends_with_its_episode_and_has_its_twin(config, recorded):
    recording, _ = recorded
    beside = Recorder()
    play(Never(), config, range(2, 3), 0, "cpu", watch=beside)
    trace = recording.trace(2, config.blueprints, 4, beside.recording())
    assert [len(part) for part in (trace.stage, trace.alpha, trace.blueprint, trace.host_loss)] == [5] * 4
    assert trace.twin_loss[0] == pytest.approx(trace.host_loss[0], rel=1e-6)  # one and the same host to begin with
    trace.names()


def test_what_is_chosen_after_the_end_does_not_count(config, recorded):
    recording, _ = recorded
    assert recording.germinations(len(config.blueprints), np.zeros(EPISODES)).sum() == 0
    first = recording.germinations(len(config.blueprints), np.ones(EPISODES)).sum((1, 2))
    assert first.max() <= 1


def test_few_graphs_are_kept(recorded, config):
    recording, _ = recorded
    # of every fourth epoch of nine the graphs of both batches
    assert [len(graph) for graph in recording.graphs] == [3, 3, 3, 2, 2, 2]
    without = Recorder()
    play(Never(), config, 1, 0, "cpu", watch=without)
    assert without.recording().graphs == []
