"""Grows a small transformer that predicts the next letter of English text while it trains, and compares it with the
same network that never grows, and with one that has as many parameters from the start.

    python examples/transformer_text.py [--policy gradmax] [--help]
"""

from __future__ import annotations

import gzip
import time
from importlib import resources

import torch
from side_by_side import arguments, conclude, others, parameters, progress
from torch import Tensor, nn
from torch.nn import functional as F

import esper

SYMBOLS = " abcdefghijklmnopqrstuvwxyz0123456789.,:;'\"()-_\n"
LENGTH, BATCH, STEPS = 48, 32, 50
WIDTH, HEADS, LAYERS, RATE = 12, 2, 3, 4e-3


class Transformer(nn.Module):
    """Causal, with learnt positions."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        width -= width % HEADS
        self.embedding = nn.Embedding(len(SYMBOLS), width)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, HEADS, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(SYMBOLS))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, tokens, symbols] of symbols [batch, tokens]."""
        h = self.embedding(x) + self.position
        return self.head(self.blocks(h, mask=self.mask, is_causal=True))


def data() -> dict[str, Tensor]:
    """Parts of the documentation of Python, as numbers of symbols; what is no symbol is a blank."""
    text = gzip.decompress((resources.files("envs") / "data" / "english.txt.gz").read_bytes()).decode().lower()
    numbers = torch.tensor([max(SYMBOLS.find(symbol), 0) for symbol in text])
    return {"train": numbers[:180_000], "validation": numbers[180_000:215_000], "test": numbers[215_000:]}


def windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and what comes next, each [n, LENGTH]."""
    rows = text[starts[:, None] + torch.arange(LENGTH + 1)]
    return rows[:, :-1], rows[:, 1:]


def main() -> None:
    given = arguments(__doc__)
    texts = data()

    def train_one_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        generator = torch.Generator().manual_seed(epoch + 1000 * given.seed)
        model.train()
        for _ in range(STEPS):
            starts = torch.randint(len(texts["train"]) - LENGTH, (BATCH,), generator=generator)
            x, y = windows(texts["train"], starts)
            optimizer.zero_grad()
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            optimizer.step()

    @torch.no_grad()
    def score(model: nn.Module, split: str) -> tuple[float, float]:
        x, y = windows(texts[split], torch.arange(0, len(texts[split]) - LENGTH - 1, 200))
        logits = model.eval()(x).flatten(0, 1)
        right = (logits.argmax(1) == y.flatten()).float().mean()
        return float(F.cross_entropy(logits, y.flatten())), 100 * float(right)

    torch.manual_seed(given.seed)
    model = Transformer()
    optimizer, started = torch.optim.Adam(model.parameters(), RATE), time.monotonic()
    growth = esper.grow(
        model, policy=given.policy, budget=esper.Budget(parameters=given.budget), epochs=given.epochs, seed=given.seed
    )
    for epoch in range(given.epochs):
        train_one_epoch(model, optimizer, epoch)
        decision = growth.step(lambda: score(model, "validation")[0], optimizer)
        progress("growing", epoch, given.epochs, started, decision.action)
    growth.finish()

    networks = {"grown": model, **others(Transformer, parameters(model), train_one_epoch, RATE, given)}
    conclude(networks, score, growth.report(), given.out, "transformer_text", "letters right (%)")


if __name__ == "__main__":
    main()
