"""Exact resume: from every iteration boundary, after stops at any moment, and with any piece of the state left out."""

import copy
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module

from envs.growth_env import GrowthEnv
from esper.runtime import checkpoint
from esper.runtime.errors import Preempted, TrainingError
from esper.simic.update import UpdateStep
from trainers import config
from trainers.loop import Trainer
from trainers.preemption import Preemption, Stop

from .conftest import STATEFUL, differences, newest, untimed

HETERO = ("env=hetero", "env.target=scheduling:Scheduling", "env.action_node=job")
EVERYTHING = "env.contexts.mixture={repair:1,sequential:1,shift:1,growth:1,plain:1}"

Make = Callable[..., Trainer]
State = dict[str, Any]


@pytest.fixture
def make(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`make(*overrides, state, folder)`: a trainer, with a run directory of its own if none is given."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs" / "examples"))
    config.register()
    growth = [each for each in tiny if not each.startswith("env.")]
    folders = iter(range(1000))

    def made(*overrides: str, state: State | None = None, folder: Path | None = None) -> Trainer:
        grows = not any(each in ("env=gym", "env=hetero") for each in overrides)
        with initialize_config_module("esper.conf", version_base="1.3"):
            given = compose("train", [*(tiny if grows else growth), *overrides])
        if folder is None:
            folder = tmp_path / str(next(folders))
            folder.mkdir()
        return Trainer(config.to_train_config(given), folder, state)

    return made


def stored(state: State, tmp_path: Path) -> State:
    """The state as a file gives it back."""
    path = tmp_path / "state.ckpt"
    checkpoint.write(path, {"format_version": checkpoint.FORMAT_VERSION, **state})
    return checkpoint.read(path)


def whole(trainer: Trainer) -> tuple[list[State], State, list[State]]:
    """The states at all boundaries of a run that is never stopped, its last state, and what it has logged."""
    boundaries, honest = [], trainer.snapshot

    def recorded() -> State:
        state = honest()
        boundaries.append(copy.deepcopy(state))
        return state

    trainer.snapshot = recorded
    trainer.run(Preemption())
    return boundaries[:-1], boundaries[-1], untimed(trainer.run_dir)


FAMILIES = {
    "segment": ["env=segment"],
    "digits": ["env=digits", EVERYTHING],
    "digits_conv": ["env=digits_conv", EVERYTHING],
    "signal": ["env=signal"],
    "mnist5k": ["env=mnist5k"],
    "charlm": ["env=charlm"],
    "tensors": ["env=digits", "env.engine=stacked", EVERYTHING],
    "surrogate": ["env=surrogate", "env.training.steps_per_epoch=10", "env.training.batch_size=32", "env.epochs=24"],
    "stateful": ["env=segment", *STATEFUL],
    "starts": ["env=segment", *STATEFUL, "ppo.starts=2", "ppo.critic_first=0.5"],
    "cartpole": ["env=gym", "env.id=CartPole-v1", "env.normalize=true", "env.num_envs=4"],
    "hetero": [*HETERO, "env.num_envs=4"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_from_every_boundary(make: Make, tmp_path: Path, family: str) -> None:
    overrides = FAMILIES[family]
    boundaries, last, logged = whole(make(*overrides))
    assert [state["iteration"] for state in boundaries] == [0, 1, 2]
    for state in boundaries:
        resumed = make(*overrides, state=stored(state, tmp_path))
        resumed.run(Preemption())
        assert not differences(resumed.snapshot(), last)
        assert untimed(resumed.run_dir) == logged[state["iteration"] :]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_from_every_boundary_compiled(make: Make, tmp_path: Path, precision: str) -> None:
    overrides = ("env=segment", *STATEFUL, f"runtime.precision={precision}", "runtime.compile=true")
    trainer = make(*overrides)
    boundaries, last, logged = whole(trainer)
    assert trainer.learner.guard.runs > 0
    for state in boundaries:
        resumed = make(*overrides, state=stored(state, tmp_path))
        resumed.run(Preemption())
        assert not differences(resumed.snapshot(), last)
        assert untimed(resumed.run_dir) == logged[state["iteration"] :]


@pytest.mark.parametrize("seed", range(3))
def test_after_three_stops_in_the_middle_of_anything(make: Make, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    overrides = ("env=digits", EVERYTHING, *STATEFUL, "ppo.total_steps=384", "checkpoint.every=3", f"seed={seed}")
    _, last, logged = whole(make(*overrides))
    draw, calls_left = random.Random(seed), [0]
    # One call for each step of the environments, and one for each minibatch.
    for kind, name in ((GrowthEnv, "step"), (UpdateStep, "__call__")):
        monkeypatch.setattr(kind, name, stopping(getattr(kind, name), calls_left))
    state = folder = None
    for _ in range(3):
        calls_left[0] = draw.randrange(40)  # of twelve in an iteration
        trainer = make(*overrides, state=state, folder=folder)
        with pytest.raises(Preempted, match="stopped by SIGTERM"):
            trainer.run(Preemption())
        folder = trainer.run_dir
        state = newest(folder)
    calls_left[0] = -1
    resumed = make(*overrides, state=state, folder=folder)
    resumed.run(Preemption())
    assert not differences(resumed.snapshot(), last)
    assert untimed(resumed.run_dir) == logged


def stopping(honest: Callable[..., Any], calls_left: list[int]) -> Callable[..., Any]:
    """`honest`, but for a signal once `calls_left[0]` calls have been made; none if that is negative."""

    def called(*args: Any) -> Any:
        if calls_left[0] == 0:
            raise Stop(signal.SIGTERM)
        calls_left[0] -= 1
        return honest(*args)

    return called


def test_a_start_anew_in_the_same_place_takes_back_what_was_logged(make: Make) -> None:
    """As after a restart by torchrun, where there was no checkpoint yet."""
    first = make("env=segment")
    _, _, logged = whole(first)
    assert whole(make("env=segment", folder=first.run_dir))[2] == logged


# ---- every piece of the state is needed ---------------------------------------------------------------------------

# Neither has an effect of its own here: checked when a run is resumed, and (the last) tested in tests/simic.
CHECKED = ("format_version", "schema_hash", "interface", "config", "learner/skipped/1")
# Each is one piece, whatever it is made of.
WHOLE = (
    "window", "processes/0/rng/python", "processes/0/rng/numpy", "learner/policy", "learner/scaler",
    "learner/optimizer/state", "learner/optimizer/param_groups", "processes/0/env/population/seed_theta",
    "processes/0/env/population/seed_exp_avg", "processes/0/env/population/seed_exp_avg_sq",
)  # fmt: skip


def pieces(state: Any, path: str = "") -> Iterator[str]:
    if path in CHECKED:
        return
    if path not in WHOLE and isinstance(state, dict | list):
        for key in state if isinstance(state, dict) else range(len(state)):
            yield from pieces(state[key], f"{path}/{key}".lstrip("/"))
    else:
        yield path


def place(state: Any, path: str) -> tuple[Any, Any]:
    """The container of a piece, and its key there."""
    *parts, last = path.split("/")
    for part in parts:
        state = state[int(part) if isinstance(state, list) else part]
    return state, int(last) if isinstance(state, list) else last


def draw_everywhere(honest: Callable[..., Any]) -> Callable[..., Any]:
    """An environment's step that also depends on the global generators, as other people's do."""

    def step(*args: Any) -> Any:
        graph, reward, *rest = honest(*args)
        return graph, reward + 0.1 * (random.random() + np.random.rand() + torch.rand(len(reward))), *rest

    return step


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_piece_of_the_state_can_be_left_out(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrowthEnv, "step", draw_everywhere(GrowthEnv.step))
    overrides = ("env=digits", EVERYTHING, *STATEFUL, "env.num_envs=16", "ppo.num_steps=7", "ppo.total_steps=448")
    trainer = make(*overrides)
    trainer.learner.update_step.halved = True
    trainer.learner.skipped_total = 3
    boundaries, last, logged = whole(trainer)
    saved = stored(boundaries[1], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_restore", lambda self, state: None)
        fresh = make(*overrides, state=saved).snapshot()
    assert not outcome(make, overrides, saved, last, logged)
    unneeded = []
    for path in pieces(saved):
        state = copy.deepcopy(saved)
        (container, key), (others, _) = place(state, path), place(fresh, path)
        container[key] = copy.deepcopy(others[key])
        if not outcome(make, overrides, state, last, logged):
            unneeded.append(path)
    assert not unneeded


def outcome(make: Make, overrides: tuple[str, ...], state: State, last: State, logged: list[State]) -> list[str]:
    """Where a run that goes on from `state` ends otherwise than the whole one."""
    resumed = make(*overrides, state=state)
    try:
        resumed.run(Preemption())
    except (TrainingError, ValueError, IndexError, RuntimeError) as error:
        return [repr(error)]
    return differences(resumed.snapshot(), last) or differences(untimed(resumed.run_dir), logged[1:], "metrics")
