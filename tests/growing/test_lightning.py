"""The callback of Lightning does what the loop by hand does, and goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from esper.growth.lifecycle import LifecycleSpec
from esper.hosts.budget import Budget
from esper.runtime.errors import ConfigError

pl = pytest.importorskip("lightning.pytorch")
GROWING = {"budget": Budget(parameters=None), "lifecycle": LifecycleSpec(auto_blend=1, auto_ramp=1)}
LIFE = (("GERMINATE", 1, 3), None, None, ("FOSSILIZE", 1, 0))


class Module(pl.LightningModule):  # type: ignore[name-defined,misc]
    def __init__(self, network: nn.Module, optimizers: int = 1):
        super().__init__()
        self.network, self.count = network, optimizers
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        self.log("val_loss", F.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.network.parameters(), 3e-3) for _ in range(self.count)]


def fit(loop: Any, callback: Any, epochs: int, folder: Path, ckpt: str | None = None, module: Any = None) -> Any:
    data = TensorDataset(loop.x[:160], loop.y[:160]), TensorDataset(loop.x[300:], loop.y[300:])
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[callback, pl.callbacks.ModelCheckpoint(folder, save_last=True, every_n_epochs=1)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = DataLoader(data[0], batch_size=32), DataLoader(data[1], batch_size=100)
    trainer.fit(module or Module(loop.model), *loaders, ckpt_path=ckpt)
    return trainer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_network_grows_in_a_fit_and_goes_on_from_a_checkpoint(loop: Any, scripted: Any, tmp_path: Path) -> None:
    from esper.growing.lightning import GrowthCallback

    def callback() -> Any:
        return GrowthCallback("val_loss", "network", policy=scripted(*LIFE), epochs=6, **GROWING)

    whole, first = loop(), loop()
    one = callback()
    fit(whole, one, 6, tmp_path / "whole")
    report = one.growth.report()
    assert [step.action for step in report.decisions[:4]] == ["germinate mlp in 3", "wait", "wait", "fossilise 3"]
    assert report.kept == ["mlp in 3"]

    stopped = callback()
    fit(first, stopped, 4, tmp_path / "stopped")
    again, second = loop(), callback()
    fit(again, second, 6, tmp_path / "again", ckpt=str(tmp_path / "stopped" / "last.ckpt"))
    assert [str(step) for step in second.growth.report().decisions] == [str(step) for step in report.decisions]
    assert torch.equal(again.output(), whole.output())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_does_not_fit_is_named(loop: Any, tmp_path: Path) -> None:
    from esper.growing.lightning import GrowthCallback

    with pytest.raises(ConfigError, match="monitor=loss: is not logged in validation; logged are val_loss"):
        fit(loop(), GrowthCallback("loss", "network", policy="never"), 2, tmp_path)
    with pytest.raises(ConfigError, match="max_epochs=-1: give Trainer max_epochs"):
        fit(loop(), GrowthCallback("val_loss", "network", policy="never"), -1, tmp_path)
    own = loop()
    with pytest.raises(ConfigError, match="one optimiser, not 2"):
        fit(own, GrowthCallback("val_loss", "network", policy="never"), 2, tmp_path, module=Module(own.model, 2))
