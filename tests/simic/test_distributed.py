"""Updates that several processes take together against those that one takes alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ONE_STEP = {"epochs": 1, "minibatches": 1, "lr": 1e-3, "entropy_coef": 0.01}  # what is in a batch is then the same


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(start_together: Callable[..., Any], tmp_path: Path) -> Run:
    """`run(size, settings)`: what each of `size` processes has come to."""

    def together(size: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
        out = tmp_path / str(size)
        out.mkdir()
        script = Path(__file__).parent / "replica.py"
        processes = start_together([script, out, json.dumps(settings)], size)
        assert [process.wait(200) for process in processes] == [0] * size
        return [torch.load(out / f"{rank}.pt") for rank in range(size)]

    return together


def settings(hosts: int, precision: str = "fp32", updates: int = 1, **ppo: Any) -> dict[str, Any]:
    return {"hosts": hosts, "precision": precision, "updates": updates, "ppo": {**ONE_STEP, **ppo}}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "given"),
    [
        (2, settings(4)),
        (2, settings(4, auxiliary_coef=0.5, target_kl=0.5, lr_schedule="adaptive")),
        (2, settings(3, normalize_advantages=False, value_clip=0.2)),
        (3, settings(2, normalize_returns=False)),  # one of them has no environment
    ],
    ids=["shares", "auxiliary", "unequal", "empty"],
)
def test_many_take_the_step_that_one_takes(run: Run, size: int, given: dict[str, Any]) -> None:
    (alone,), several = run(1, given), run(size, given)
    for other in several:
        for name, value in alone["policy"].items():
            torch.testing.assert_close(other["policy"][name], value, rtol=1e-6, atol=1e-7)
            assert torch.equal(other["policy"][name], several[0]["policy"][name]), name
        for name, value in alone["normalizer"].items():
            torch.testing.assert_close(other["normalizer"][name], value, rtol=1e-9, atol=1e-12)
        for name, value in alone["metrics"][0].items():
            assert other["metrics"][0][name] == pytest.approx(value, rel=2e-5, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_processes_do_not_drift_apart(run: Run, precision: str) -> None:
    """Minibatches of two, of which some processes have none, for more than a hundred steps."""
    given = settings(3, precision, updates=4, minibatches=15, epochs=2, lr=0.01)
    first, second = run(2, given)
    assert first["policy"].keys() == second["policy"].keys()
    for name, value in first["policy"].items():
        assert torch.equal(value, second["policy"][name]), name
    assert first["metrics"] == second["metrics"]
    assert first["scale"] == second["scale"]
