"""The suite `grow`: what `esper.grow` costs a training loop: a step of training with its hooks, and a decision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.growing import Growth, grow
from trainers.benchmarks import Report, suite
from trainers.benchmarks.rows import Row, compare, content, table, turns
from trainers.config import BenchmarkConfig

_LAYERS, _BATCH = 50, 128
_WIDTHS = {"perceptron": 128, "convolutions": 16}
_PLAIN, _HOOKED, _STEP = "by itself", "growing", "a step"


def network(kind: str) -> tuple[nn.Module, Tensor]:
    """A network of 50 layers, and inputs of a minibatch."""
    width, between = _WIDTHS[kind], range(_LAYERS - 2)
    stages: list[nn.Module]
    if kind == "perceptron":
        stages = [module for _ in between for module in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), *stages, nn.Linear(width, 10)), torch.randn(_BATCH, 64)
    stages = [module for _ in between for module in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), *stages, *head), torch.randn(_BATCH, 1, 14, 14)


class _Loop:
    """Trains a network of a kind on noise; with hooks once it has been told what to grow with."""

    def __init__(self, kind: str, device: str, policy: str | None):
        torch.manual_seed(0)
        model, x = network(kind)
        self.model, self.x = model.to(device), x.to(device)
        self.y = torch.randint(10, (_BATCH,), device=device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3)
        self.growth: Growth | None = None if policy is None else grow(self.model, policy=policy, epochs=1_000_000)
        self()
        if self.growth is not None:
            self.decide()

    def __call__(self) -> None:
        """One step of training."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def decide(self) -> None:
        """What `Growth.step` does, but for the user's validation."""
        assert self.growth is not None
        self.growth.step(2.3, self.optimizer)


@suite("grow")
def run(config: BenchmarkConfig) -> Report:
    """Networks of 50 layers, with as many slots as are found."""
    settings, device = config.benchmark, config.runtime.device
    steps: list[Row] = []
    decisions: list[Row] = []
    with turns(2 * len(_WIDTHS), settings) as tick:
        for kind in _WIDTHS:
            plain, hooked = _Loop(kind, device, None), _Loop(kind, device, "never")
            loops: dict[str, Callable[[], object]] = {_PLAIN: plain, _HOOKED: hooked}
            steps += compare("grow", f"{kind}, step", loops, settings, torch.device(device), tick, reference=_PLAIN)
            policies = ("tamiyo_small", "gradmax")
            deciding = {name: _Loop(kind, device, name) for name in policies}
            for loop in deciding.values():
                loop()
            calls: dict[str, Callable[[], object]] = {_STEP: plain, **{n: each.decide for n, each in deciding.items()}}
            case = f"{kind}, decision"
            decisions += compare("grow", case, calls, settings, torch.device(device), tick, reference=_STEP)
    tables = [
        table(steps, f"esper.grow: a step of training, {_LAYERS} layers, minibatches of {_BATCH}", _PLAIN),
        table(decisions, f"esper.grow: a decision, {_LAYERS} layers", _STEP),
    ]
    return Report(content([*steps, *decisions]), tables)
