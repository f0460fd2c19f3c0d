"""Where seeds live."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """Where seeds live: what all slots of a host have in common.

    Attributes:
        width: units per token.
        grid: how the tokens lie; (1,) for hosts without tokens.
        causal: a token may only see itself and those before it.
    """

    width: int
    grid: tuple[int, ...] = (1,)
    causal: bool = False

    @property
    def tokens(self) -> int:
        count = 1
        for extent in self.grid:
            count *= extent
        return count
