"""Grows a perceptron on 8x8 digits inside a Lightning fit, and compares it with the same network that never grows, and
with one that has as many parameters from the start. Needs the extra `lightning`.

    python examples/lightning_digits.py [--policy gradmax] [--help]
"""

from __future__ import annotations

import logging

import lightning.pytorch as pl
import torch
from side_by_side import arguments, conclude, parameters, wide_as
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.growing.lightning import GrowthCallback

WIDTH, STAGES, RATE = 8, 4, 3e-3


def network(width: int = WIDTH) -> nn.Module:
    stages = [layer for _ in range(STAGES - 1) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), *stages, nn.Linear(width, 10))


def data() -> dict[str, tuple[Tensor, Tensor]]:
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(classes)[order]
    ends = {"train": slice(0, 900), "validation": slice(900, 1300), "test": slice(1300, None)}
    return {split: (x[part], y[part]) for split, part in ends.items()}


class Classifier(pl.LightningModule):
    """An ordinary module of Lightning: it knows nothing of growing."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        self.log("val_loss", F.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), RATE)


def main() -> None:
    given = arguments(__doc__)
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    splits = data()
    loaders = {
        split: DataLoader(TensorDataset(*splits[split]), batch_size=size, shuffle=split == "train")
        for split, size in (("train", 32), ("validation", 400))
    }

    def fit(model: nn.Module, *callbacks: pl.Callback) -> nn.Module:
        trainer = pl.Trainer(
            max_epochs=given.epochs,
            accelerator="cpu",
            callbacks=[*callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
        trainer.fit(Classifier(model), loaders["train"], loaders["validation"])
        return model

    @torch.no_grad()
    def score(model: nn.Module, split: str) -> tuple[float, float]:
        x, y = splits[split]
        logits = model.eval()(x)
        return float(F.cross_entropy(logits, y)), 100 * float((logits.argmax(1) == y).float().mean())

    pl.seed_everything(given.seed, verbose=False)
    callback = GrowthCallback(
        "val_loss", "network", policy=given.policy, budget=esper.Budget(given.budget), seed=given.seed
    )
    model = fit(network(), callback)
    assert callback.growth is not None
    pl.seed_everything(given.seed, verbose=False)
    twin = fit(network())
    pl.seed_everything(given.seed, verbose=False)
    large = fit(wide_as(network, parameters(model)))
    networks = {"grown": model, "the same, never grown": twin, "as large from the start": large}
    conclude(networks, score, callback.growth.report(), given.out, "lightning_digits", "accuracy (%)")


if __name__ == "__main__":
    main()
