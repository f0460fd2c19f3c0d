"""Where seeds may live in networks that were not made for it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from esper.growing import places
from esper.growing.places import found, named
from esper.hosts.anatomy import Slot, traced
from esper.runtime.errors import ConfigError


def chosen(model: nn.Module, x: Tensor, slots: places.Slots = "auto") -> list[tuple[str, int]]:
    calls = traced(model, (x,))
    return [(slot.name, slot.channels) for slot in found(model, named(model, slots), calls)]


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


class Residual(nn.Module):
    """A block of a residual network, perhaps with half the resolution."""

    def __init__(self, before: int, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, width, 3, stride=1 + (before != width), padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.skip = nn.Conv2d(before, width, 1, stride=2) if before != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.body(x)


class Residuals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.first = nn.Sequential(Residual(4, 4), Residual(4, 4))
        self.second = nn.Sequential(Residual(4, 8), Residual(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)))


class LastChannels(nn.Module):
    """Images whose units are their last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(5), nn.Sequential(nn.Linear(5, 5))) for _ in range(2))
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Functional(nn.Module):
    """Its activation functions are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class Tuples(nn.Module):
    """Blocks that give tuples, with one inside that gives a tensor."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x + self.mlp(x), None

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("model", "x", "expected"),
    [
        (perceptron(), torch.randn(3, 6), [("1", -1), ("3", -1)]),
        (
            nn.Sequential(nn.Sequential(*perceptron()[:4]), perceptron()[4]),
            torch.randn(3, 6),
            [("0.1", -1), ("0.3", -1)],
        ),
        (
            # As many units as pixels in a row.
            nn.Sequential(
                nn.Conv2d(1, 4, 3),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Conv2d(4, 4, 3),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(16, 2),
            ),
            torch.randn(3, 1, 6, 6),
            [("2", 1), ("4", 1)],
        ),
        (
            nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)),
            torch.randn(3, 2, 8),
            [("1", 1), ("3", 1)],
        ),
        (Residuals(), torch.randn(3, 1, 8, 8), [(f"{part}.{i}", 1) for part in ("first", "second") for i in range(2)]),
        (Transformer(), torch.randint(10, (3, 7)), [(f"encoder.layers.{i}", -1) for i in range(3)]),
        (LastChannels(), torch.randn(2, 5, 5, 5), [("blocks.0", -1), ("blocks.1", -1)]),
        (Functional(), torch.randn(3, 6), [("a", -1), ("b", -1)]),
        (Tuples(), torch.randn(3, 4), [(f"blocks.{i}.mlp", -1) for i in range(3)]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_auto_finds_blocks_or_else_activations_or_else_layers(
    model: nn.Module, x: Tensor, expected: list[tuple[str, int]]
) -> None:
    assert chosen(model, x) == expected


def test_of_many_places_some_at_equal_distances_are_taken() -> None:
    layers = [nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU()) for _ in range(46)]
    names = [int(name) for name, _ in chosen(nn.Sequential(*layers, nn.Linear(4, 2)), torch.randn(2, 4))]
    assert len(names) == places.MOST
    assert (names[0], names[-1]) == (0, 45)
    assert {b - a for a, b in pairwise(names)} == {3}


def test_named_slots_are_in_the_order_of_the_forward_pass() -> None:
    x = torch.randn(3, 6)
    assert chosen(perceptron(), x, ["3", "0"]) == [("0", -1), ("3", -1)]
    assert chosen(
        perceptron(), x, lambda model: [name for name, m in model.named_modules() if isinstance(m, nn.ReLU)]
    ) == [
        ("1", -1),
        ("3", -1),
    ]
    assert chosen(perceptron(), x, [Slot("1", causal=True)]) == [("1", -1)]


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ("all", "slots=all: give auto, a list of names"),
        ([], "name at least one submodule"),
        (["1", "nine"], "slots: 'nine' is no submodule; there are 0, 1, 2"),
        ([""], "slots: '' is no submodule"),
        ([3], "slots: 3 is no submodule"),
    ],
)
def test_names_that_do_not_fit_are_refused(slots: places.Slots, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        named(perceptron(), slots)


def test_a_network_without_any_place_says_so() -> None:
    with pytest.raises(ConfigError, match="slots=auto: no place was found"):
        chosen(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3))


def test_units_that_cannot_be_told_are_asked_for() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.repeat(1, 2, 2)

    model = nn.Sequential(nn.Linear(4, 4), Odd(), nn.Linear(8, 2))
    with pytest.raises(ConfigError, match=r'of what 1 gives .* esper.Slot\("1", channels=1\)'):
        chosen(model, torch.randn(2, 3, 4), ["1"])
    assert chosen(model, torch.randn(2, 3, 4), [Slot("1", channels=1)]) == [("1", 1)]
