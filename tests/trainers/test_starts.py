"""Several starts of PPO: each is a run of its own with the same episodes, and the best of them is kept."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from torch import nn

from esper.runtime.errors import ConfigError
from esper.simic.config import PPOConfig
from trainers import config
from trainers.episodes import LatestEpisodes
from trainers.loop import Trainer
from trainers.preemption import Preemption
from trainers.starts import Starts

from .conftest import Command, differences, untimed

Make = Callable[..., Trainer]
SEGMENT = ("env=segment", "ppo.normalize_returns=true")


@pytest.fixture
def make(tiny: list[str], tmp_path: Path) -> Make:
    config.register()
    folders = iter(range(1000))

    def made(*overrides: str) -> Trainer:
        with initialize_config_module("esper.conf", version_base="1.3"):
            given = compose("train", [*tiny, *SEGMENT, *overrides])
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        return Trainer(config.to_train_config(given), folder)

    return made


def test_places_of_steps() -> None:
    starts = Starts(PPOConfig(total_steps=200, starts=2))
    # 100 steps each, of which iterations of 30 take 0 to 120 and 120 to 210.
    assert [starts.place(step)[0] for step in (0, 30, 60, 90, 120, 150, 180, 210)] == [0, 0, 0, 0, 1, 1, 1, 2]
    assert [starts.place(step)[1] for step in (0, 90, 120)] == pytest.approx([0, 0.9, 0.2])


def test_one_start_goes_by_all_steps() -> None:
    starts = Starts(PPOConfig(total_steps=96))
    assert [starts.place(step) for step in (0, 32, 64)] == [(0, 0), (0, 32 / 96), (0, 64 / 96)]


def test_what_counts_is_the_end_of_a_start() -> None:
    starts, policy = Starts(PPOConfig(total_steps=200, starts=2)), nn.Linear(1, 1)
    returns = [9.0, 9.0, 1.0, 2.0, 0.0, 0.0, 1.0, 1.8]
    begun = [0, 25, 50, 85, 100, 125, 150, 185]  # only 85 and 185 are beyond four fifths
    ended = []
    for number, (step, value) in enumerate(zip(begun, returns, strict=True)):
        with torch.no_grad():
            policy.weight.fill_(number)
        window = LatestEpisodes([{"return": value}])
        ended.append(starts.note(step, 25 * (number + 1), window, policy.state_dict()))
    assert ended == [False, False, False, True] * 2
    assert starts.best is not None
    assert (starts.best["number"], starts.best["return"], starts.best["policy"]["weight"].item()) == (0, 2.0, 3.0)


def test_each_start_is_a_run_and_the_best_is_kept(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, both = make("ppo.total_steps=128"), make("ppo.total_steps=256", "ppo.starts=2")
    begun = {name: value.clone() for name, value in both.policy.state_dict().items()}
    alone.run(Preemption())
    honest = both.starts.note

    def noted(before: int, step: int, window: LatestEpisodes, policy: dict[str, torch.Tensor]) -> bool:
        better = 1.0 if both.starts.place(before)[0] == 0 else 0.0  # as if the first had been
        seen = LatestEpisodes({**episode, "return": episode["return"] + better} for episode in window)
        return honest(before, step, seen, policy)

    monkeypatch.setattr(both.starts, "note", noted)
    both.run(Preemption())
    rows = untimed(both.run_dir)
    assert [row.pop("train/start") for row in rows] == [1] * 4 + [2] * 4
    first, second = rows[:4], rows[4:]
    assert first == untimed(alone.run_dir)
    assert [row["train/learning_rate"] for row in second] == [row["train/learning_rate"] for row in first]
    assert first[0]["train/loss"] != second[0]["train/loss"]  # other draws
    assert both.starts.begun is not None
    assert not differences(dict(both.starts.begun["policy"]), begun)
    assert not differences(both.policy.state_dict(), alone.policy.state_dict())  # the first one's


def test_starts_begin_alike(make: Make) -> None:
    """With the same learner, optimiser and all, and the same episodes, but other draws."""
    trainer = make("ppo.total_steps=64", "ppo.starts=2")
    found, honest = [], trainer._between_starts

    def seen() -> list[Any]:
        learner = trainer.learner.state_dict()
        draws = learner.pop("generator"), trainer.actor.generator.get_state()
        return copy.deepcopy([learner, trainer.graph.x, *draws])

    def noted(before: int) -> None:
        moved = seen()
        honest(before)
        found.extend([moved, seen()])

    begun = seen()
    trainer._between_starts = noted  # type: ignore[method-assign]
    trainer.run(Preemption())
    moved, again = found[:2]
    assert differences(moved[0], begun[0])
    assert not differences(again[:2], begun[:2])
    assert not any(torch.equal(now, then) for now in again[2:] for then in (*begun[2:], *moved[2:]))


@pytest.mark.parametrize(
    ("override", "named"),
    [("ppo.starts=3", "ppo.starts was 2"), ("ppo.total_steps=256", "ppo.total_steps was 64")],
)
def test_a_resumed_run_has_the_same_starts(run_train: Command, override: str, named: str) -> None:
    done = run_train(*SEGMENT, "ppo.total_steps=64", "ppo.starts=2")
    assert done.code == 0
    assert f"train longer:     start a new run with init={done.run_dir}" in done.out
    refused = run_train(f"resume={done.run_dir}", override, tiny=False)
    assert refused.code == 2
    assert named in refused.err


def test_each_start_needs_an_iteration(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"ppo.starts=4: ppo.total_steps=96 .* = 32; use more steps or fewer starts"):
        make("ppo.starts=4")
