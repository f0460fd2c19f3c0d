"""The entry points, called in this process, one small finished run, and what of a run is looked at."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from esper.runtime import checkpoint
from esper.runtime.telemetry import METRICS_FILE, Telemetry
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
    "recipe=none",
]

# Everything that has state of its own: the loss scale, the scale of returns, a learning rate that follows the KL.
STATEFUL = (
    "runtime.precision=fp16", "ppo.normalize_returns=true", "ppo.lr_schedule=adaptive", "ppo.auxiliary_coef=0.1",
    "ppo.entropy_final=0", "ppo.clip_final=0.1", "ppo.value_clip=0.2",
)  # fmt: skip
TIMED = ("time", "perf/", "tamiyo.gnn.", "attention/")


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


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """What has been logged."""
    return [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]


def untimed(run_dir: Path) -> list[dict[str, Any]]:
    """The same without wall times."""
    return [{key: value for key, value in line.items() if not key.startswith(TIMED)} for line in lines(run_dir)]


def newest(run_dir: Path) -> dict[str, Any]:
    """The state in the newest checkpoint."""
    return checkpoint.latest(run_dir)[1]


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two states differ, by a bit or by a type."""
    if type(a) is not type(b):
        return [path]
    if isinstance(a, dict) and a.keys() == b.keys():
        return [each for key in a for each in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [each for number, (x, y) in pairs for each in differences(x, y, f"{path}/{number}")]
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    return [] if a == b else [path]


def stop_at(step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process gets a signal while it logs that step."""
    log = Telemetry.log

    def logging(self: Telemetry, at: int, scalars: dict[str, float]) -> None:
        log(self, at, scalars)
        if at == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Telemetry, "log", logging)
