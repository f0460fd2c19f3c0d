"""The entry points, called in this process, and one small finished run."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from trainers import evaluate, train

TINY = [
    "env.num_envs=4",
    "env.epochs=4",
    "env.host.width=[4,6]",
    "env.host.stages=[2,3]",
    "env.training.steps_per_epoch=2",
    "env.training.batch_size=8",
    "policy.hidden=[8,8,8,8]",
    "ppo.num_steps=8",
    "ppo.total_steps=96",  # three iterations of 32
    "ppo.epochs=2",
    "ppo.minibatches=2",
    "checkpoint.every=1",
    "evaluation.episodes=0",
    "runtime.compile=false",  # it takes far longer than the run
]


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def run_dir(self) -> Path:
        line = next(line for line in self.out.splitlines() if line.startswith("run directory:"))
        return Path(line.split(maxsplit=2)[2])


Command = Callable[..., Result]


def call(main: Callable[[], None], arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys) -> Result:
    monkeypatch.setattr("sys.argv", ["esper", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main()
    captured = capsys.readouterr()
    return Result(exit.value.code or 0, captured.out, captured.err)


def flags(arguments: tuple[str, ...]) -> list[str]:
    return [argument for argument in arguments if argument.startswith("-")]


def values(arguments: tuple[str, ...]) -> list[str]:
    return [argument for argument in arguments if not argument.startswith("-")]


@pytest.fixture
def tiny() -> list[str]:
    """Overrides that make a run of three iterations and a few seconds."""
    return TINY


@pytest.fixture
def run_train(tmp_path, monkeypatch, capsys) -> Command:
    """`run_train(*overrides)`: a tiny run in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *overrides, tiny=True: call(
        train.main, (*flags(overrides), *(TINY if tiny else ()), *values(overrides)), monkeypatch, capsys
    )


@pytest.fixture
def run_evaluate(monkeypatch, capsys) -> Command:
    return lambda *overrides: call(evaluate.main, overrides, monkeypatch, capsys)
