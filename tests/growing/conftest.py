"""A small network on real data, and its training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from esper.tamiyo.baselines import Controller

Action = tuple[str, int, int] | None
"""(verb, slot, choice), or None to wait."""


class Scripted:
    """Does what it is told, one action after the other, and remembers how many it has done."""

    def __init__(self, *script: Action):
        self.script, self.done = script, 0

    def begin(self, hosts: int) -> None:
        self.done = 0

    def act(self, graph: Any) -> Tensor:
        from esper.growth.actions import ActionLayout, Verb

        layout = ActionLayout(graph.x["slot"].shape[1], graph.x["blueprint"].shape[1])
        action = self.script[self.done] if self.done < len(self.script) else None
        self.done += 1
        return torch.tensor([0 if action is None else layout.index(Verb[action[0]], *action[1:])])


def features() -> tuple[Tensor, Tensor]:
    """400 images of digits as features, and their classes."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[:400], dtype=torch.float32) / 16, torch.tensor(y[:400])


digits = pytest.fixture(scope="session")(features)


class Loop:
    """An ordinary training loop on digits.

    Args:
        data: features and classes.
        model: by default a perceptron with three stages.
        optimizer: makes the optimiser.
    """

    def __init__(
        self,
        data: tuple[Tensor, Tensor],
        model: nn.Module | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        seed: int = 0,
        **settings: Any,
    ):
        (self.x, self.y), self.seed, self.epochs = data, seed, 0
        torch.manual_seed(seed)
        stages = [layer for _ in range(2) for layer in (nn.Linear(8, 8), nn.ReLU())]
        self.model = model or nn.Sequential(nn.Linear(64, 8), nn.ReLU(), *stages, nn.Linear(8, 10))
        self.optimizer = optimizer(self.model.parameters(), **{"lr": 3e-3, **settings})

    def train(self, batches: int = 5) -> float:
        """An epoch of minibatches of 32; returns the mean loss."""
        order = torch.randperm(300, generator=torch.Generator().manual_seed(self.seed + self.epochs))
        self.epochs += 1
        total = 0.0
        for batch in order.split(32)[:batches]:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(self.x[batch]), self.y[batch])
            loss.backward()
            self.optimizer.step()
            total += float(loss.detach()) / batches
        return total

    @torch.no_grad()
    def validate(self) -> float:
        """Of the model in eval mode, which is left in training mode."""
        self.model.eval()
        loss = float(F.cross_entropy(self.model(self.x[300:]), self.y[300:]))
        self.model.train()
        return loss

    def output(self) -> Tensor:
        with torch.no_grad():
            return self.model.eval()(self.x[300:])


@pytest.fixture
def loop(digits: tuple[Tensor, Tensor]) -> Callable[..., Loop]:
    """Makes loops."""
    return lambda *args, **kwargs: Loop(digits, *args, **kwargs)


@pytest.fixture
def scripted() -> Callable[..., Controller]:
    """Makes controllers that do what they are told."""
    return Scripted
