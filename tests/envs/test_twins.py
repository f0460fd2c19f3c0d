"""Twins: the episode of a host that never grows, trained once per instance."""

import pytest
import torch

from envs import tasks, twins
from envs.contexts import KINDS
from envs.growth_env import GrowthEnv, draw_context, population_spec
from envs.twins import COLUMNS, Twins
from esper.growth.population import Population
from esper.runtime import seeding

EPOCHS = 5


@pytest.fixture
def made(play):
    """`made(kind, capacity)`: twins of a short environment, with the numbers of the instances that they trained."""

    def make(kind="mixture", capacity=100, name="segment"):
        config = play.config(name, kind, epochs=EPOCHS)
        found = Twins(Population, population_spec(config), EPOCHS, "cpu", capacity)
        train, trained = found._train, []

        def counted(context):
            trained.append(context.key.tolist())
            return train(context)

        found._train = counted
        return found, trained, lambda keys: draw_context(config, torch.as_tensor(keys))[0]

    return make


@pytest.mark.parametrize(("name", "kind"), [("segment", kind) for kind in KINDS] + [("digits_conv", "mixture")])
def test_a_twin_is_the_host_that_never_grows(play, name, kind):
    count = 6 if name == "segment" else 3
    env = play.env(count, 3, name, contexts=kind, epochs=EPOCHS, autoreset=False)
    for _ in range(EPOCHS):
        *_, info = env.step(torch.zeros(count, dtype=torch.int64))
    episodes = Twins(Population, population_spec(env.config), EPOCHS, "cpu")(env.population.context)
    assert episodes.shape == (count, EPOCHS + COLUMNS)
    assert torch.equal(episodes[:, EPOCHS], env.population.validation_loss)
    for column, split in ((-4, "validation"), (-3, "test")):
        assert torch.equal(episodes[:, column], info["episodes"][f"{split}_accuracy"])
        assert torch.equal(episodes[:, column], info["episodes"][f"twin_{split}_accuracy"])
    assert torch.equal(episodes, env._twin)
    assert (episodes[:, -2:] > 0).all()
    assert info["episodes"]["points"].tolist() == [0.0] * count


@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_of_a_twin_is_that_of_the_host_that_never_grows(play, kind):
    env = play.env(6, 3, contexts=kind, epochs=EPOCHS, autoreset=False)
    losses = [env.population.validation_loss.clone()]
    for _ in range(EPOCHS):
        env.step(torch.zeros(6, dtype=torch.int64))
        losses.append(env.population.validation_loss.clone())
    assert torch.equal(env._twin[:, : EPOCHS + 1], torch.stack(losses, dim=1))


def test_a_twin_does_not_depend_on_what_it_is_trained_beside(made, monkeypatch):
    found, _, draw = made()
    keys = seeding.fold(torch.arange(9), 4)
    together = found(draw(keys))
    alone = torch.cat([made()[0](draw(keys[k : k + 1])) for k in range(9)])
    assert torch.equal(together, alone)
    monkeypatch.setattr(twins, "_BATCH", 4)  # 4, 4 and 1
    split, trained, _ = made()
    assert torch.equal(split(draw(keys)), together)
    assert [len(part) for part in trained] == [4, 4, 1]


def test_a_known_twin_is_not_trained_again(made, monkeypatch):
    found, trained, draw = made()
    first = found(draw([1, 2, 3]))
    calls, train_epoch = [], Population.train_epoch
    monkeypatch.setattr(Population, "train_epoch", lambda self, *a: calls.append(self.hosts) or train_epoch(self, *a))
    assert torch.equal(found(draw([3, 1])), first[[2, 0]])
    assert torch.equal(found(draw([2, 2])), first[[1, 1]])
    assert calls == []
    both = found(draw([1, 4]))
    assert calls == [1] * EPOCHS  # the new one alone
    assert torch.equal(both[0], first[0])
    assert trained == [[1, 2, 3], [4]]


def test_the_oldest_twins_are_forgotten_first(made):
    found, trained, draw = made(capacity=3)
    first = found(draw([1, 2]))
    found(draw([3]))
    found(draw([1]))  # met again, but not younger for it
    found(draw([4]))
    assert trained == [[1, 2], [3], [4]]
    assert torch.equal(found(draw([1])), first[:1])  # 1 was forgotten
    assert trained == [[1, 2], [3], [4], [1]]
    found(draw([3, 4, 1]))
    assert trained == [[1, 2], [3], [4], [1]]  # and then 2


def test_more_twins_than_can_be_remembered(made):
    found, trained, draw = made(capacity=2)
    episodes = found(draw([1, 2, 3, 4]))
    assert torch.equal(episodes, made()[0](draw([1, 2, 3, 4])))
    found(draw([3, 4]))
    assert trained == [[1, 2, 3, 4]]


def test_a_twin_asked_for_twice_takes_one_place(made):
    found, trained, draw = made(capacity=2)
    first = found(draw([1, 2]))
    found(draw([3, 3]))  # in the place of 1
    assert torch.equal(found(draw([2, 3, 2])), torch.stack([first[1], made()[0](draw([3]))[0], first[1]]))
    assert trained == [[1, 2], [3, 3]]
    found(draw([4]))  # in that of 2
    assert torch.equal(found(draw([3, 4])), made()[0](draw([3, 4])))
    assert trained == [[1, 2], [3, 3], [4]]


def test_environments_of_the_same_kind_share_their_twins(play, no_twins, monkeypatch):
    trained = []
    train = Twins._train
    monkeypatch.setattr(Twins, "_train", lambda self, context: trained.append(len(context)) or train(self, context))
    first = play.env(4)
    # What costs and what may be planted does not matter to a host that does not grow.
    second = play.env(4, reward={"rent": 0.7}, blueprints=["mlp"], lifecycle={"auto_blend": None})
    assert trained == [4]
    assert torch.equal(first._twin, second._twin)
    for changed in (
        {"epochs": 5},
        {"training": {"steps_per_epoch": 4, "batch_size": 16}},
        {"host": {"width": [4, 5], "stages": [2, 3]}},
        {"contexts": "repair"},
        {"name": "digits"},
    ):
        trained.clear()
        play.env(4, **changed)
        assert trained == [4], changed


def test_playing_the_same_instances_again_trains_no_twin(play, no_twins, monkeypatch):
    env = play.env(3, 20)
    play.script(env)
    monkeypatch.setattr(Twins, "_train", lambda self, context: pytest.fail("trained again"))
    env.reset(torch.arange(3) + 20)
    again = GrowthEnv(env.config, 2)
    again.reset(torch.arange(2) + 21)
    assert torch.equal(again._twin, env._twin[1:])


def test_twins_are_not_measured(made):
    found, _, draw = made()
    assert not found._spec.measured
    assert found(draw([7])).isfinite().all()
    assert tasks.load("segment") is found._spec.data


def test_what_takes_long_is_announced_once(made, monkeypatch, caplog):
    monkeypatch.setattr(twins, "_LONG_S", 0.0)
    found, _, draw = made()
    keys = seeding.fold(torch.arange(5), 4)
    with caplog.at_level("INFO"):
        found(draw(keys[:3]))
        found(draw(keys[3:]))
    (line,) = (record.message for record in caplog.records if "twins" in record.message)
    assert line.startswith("training the twins of the first 3 hosts (about ")
