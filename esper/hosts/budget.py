"""What a module may spend on growing."""

from __future__ import annotations

from dataclasses import dataclass

from esper.runtime.errors import ConfigError


@dataclass(frozen=True)
class Budget:
    """Limits; None is no limit.

    Attributes:
        parameters: of the grown module, over those of the module itself: 1.5 allows half as many again.
        flops: the same of multiply-adds for one sample, forward.
        seeds: germinations, those of seeds that are culled later included. Controllers have been trained with 2 to 4.

    Raises:
        ConfigError: a limit that leaves no room; names it.
    """

    parameters: float | None = 1.5
    flops: float | None = None
    seeds: int = 4

    def __post_init__(self) -> None:
        for name in ("parameters", "flops"):
            value = getattr(self, name)
            if value is not None and not value > 1:
                raise ConfigError(f"budget.{name}={value}: must be above 1, which is the module as it is, or None")
        if self.seeds < 1:
            raise ConfigError(f"budget.seeds={self.seeds}: must be at least 1")
