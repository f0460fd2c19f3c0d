"""`esper.grow` under torch.compile, autocast with a scaled loss, and DistributedDataParallel."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import esper
from esper.growth.lifecycle import LifecycleSpec

QUICK = LifecycleSpec(auto_blend=1, auto_ramp=1)
LIFE = (("GERMINATE", 1, 3), None, None, ("FOSSILIZE", 1, 0))
BUDGET = esper.Budget(parameters=None)


@pytest.mark.parametrize("when", ["before", "after", "in place"])
def test_a_compiled_model_grows_as_it_does_in_eager_code(loop: Callable[..., Any], scripted: Any, when: str) -> None:
    """Nothing is compiled anew when seeds come and go, but once when hooks come, and once when they go."""
    torch._dynamo.reset()
    compiled: list[int] = []

    def backend(module: Any, example: Any) -> Any:
        compiled.append(1)
        return module.forward

    results, counts = [], []
    for form in ("eager", when):
        own = loop()
        model = own.model
        if form in ("before", "after"):
            own.model = torch.compile(model, backend=backend)
        elif form == "in place":
            model.compile(backend=backend)
        if form == "after":
            own.model(own.x[:32])  # compiled before anybody grows it
        growth = esper.grow(own.model, policy=scripted(*LIFE), budget=BUDGET, epochs=7, lifecycle=QUICK)
        for _ in range(7):
            own.train()
            growth.step(own.validate, own.optimizer)
            counts.append(len(compiled))
        before = own.output()
        assert growth.finish() is own.model
        torch.testing.assert_close(own.output(), before)
        assert model[3].seed.blueprint.name == "mlp"
        results.append(own.output())
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    steps = counts[7:]
    assert steps[0] > 0, "it was compiled"
    assert steps[1] > steps[0], "hooks were seen"
    assert len(set(steps[1:])) == 1, "seeds came and went without another compilation"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaled_loss(loop: Callable[..., Any], scripted: Any, dtype: torch.dtype) -> None:
    """Statistics are those of an unscaled loss."""
    seen = []
    for scaled in (False, True):
        own = loop()
        scaler = torch.amp.GradScaler("cpu", enabled=scaled and dtype == torch.float16)
        growth = esper.grow(own.model, policy=scripted(*LIFE), budget=BUDGET, epochs=7, lifecycle=QUICK)
        for _ in range(6):
            for batch in torch.arange(160).split(32):
                own.optimizer.zero_grad()
                with torch.autocast("cpu", dtype, enabled=scaled):
                    output = own.model(own.x[batch])
                    assert output.dtype == (dtype if scaled else torch.float32)
                    loss = F.cross_entropy(output.float(), own.y[batch])
                scaler.scale(loss).backward()
                scaler.step(own.optimizer)
                scaler.update()
            growth.step(own.validate, own.optimizer, scaler=scaler)
        seen.append(growth.host.statistics)
        growth.finish()
        assert own.output().dtype == torch.float32
    for name in ("activation_backward_rms", "growth_gradient", "layer_gradient_rms", "seed_gradient_rms"):
        torch.testing.assert_close(getattr(seen[1], name), getattr(seen[0], name), rtol=0.2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_one_grown_network(tmp_path: Path) -> None:
    """The seeds' gradients are averaged like all others, and the first process decides."""
    script, init = Path(__file__).parent / "replica.py", f"file://{tmp_path}/rendezvous"
    runs = [(0, 1), (0, 2), (1, 2)]  # rank, world
    processes = [
        subprocess.Popen([sys.executable, script, str(rank), str(world), init, tmp_path / f"{rank} of {world}"])
        for rank, world in runs
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    alone, first, second = (torch.load(tmp_path / f"{rank} of {world}") for rank, world in runs)
    assert any(name.startswith("3.seed.") for name in alone["state"])
    for name, value in alone["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-6)
    assert "germinate mlp in 3" in second["report"]
