"""`esper.grow` as a callback of Lightning: `Trainer(callbacks=[GrowthCallback(monitor="val_loss")])`.

Needs the extra `lightning`.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from esper.growing.growth import Growth, grow
from esper.runtime.errors import ConfigError


class GrowthCallback(Callback):
    """Lets a controller grow the network of a LightningModule after each validation in a fit, and finishes growing when
    the fit ends. Checkpoints hold its state; a fit that is resumed from one goes on growing.

    Args:
        monitor: name of the logged validation loss.
        network: name of the submodule that grows, which is called with samples; by default the module itself.
        settings: of `esper.grow`; `epochs` is by default the trainer's `max_epochs`.

    Attributes:
        growth: once a fit has begun.
    """

    def __init__(self, monitor: str = "val_loss", network: str = "", **settings: Any):
        self.monitor, self.network, self.settings = monitor, network, settings
        self.growth: Growth | None = None
        self._saved: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See Callback. Optimisers are there, and their state has not been restored yet."""
        if len(trainer.optimizers) != 1:
            raise ConfigError(f"GrowthCallback: grows networks with one optimiser, not {len(trainer.optimizers)}")
        epochs = self.settings.get("epochs", trainer.max_epochs)
        if epochs is None or epochs < 2:
            raise ConfigError(f"GrowthCallback: max_epochs={epochs}: give Trainer max_epochs, or the callback epochs")
        model = pl_module.get_submodule(self.network)
        self.growth = grow(model, **{**self.settings, "epochs": epochs})
        if self._saved is not None:
            self.growth.load_state_dict(self._saved, trainer.optimizers[0])
            self._saved = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See Callback."""
        if trainer.sanity_checking or self.growth is None or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ConfigError(
                f"GrowthCallback: monitor={self.monitor}: is not logged in validation; logged are {known}"
            )
        self.growth.step(float(trainer.callback_metrics[self.monitor]), trainer.optimizers[0])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See Callback."""
        if self.growth is not None:
            self.growth.finish()

    def state_dict(self) -> dict[str, Any]:
        """See Callback."""
        return {} if self.growth is None else {"growth": self.growth.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See Callback."""
        self._saved = state_dict.get("growth")
