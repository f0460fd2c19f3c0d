"""Ratios of times that were taken in turns: what reports of different days and machines can be compared by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trainers.benchmarks.timing import Spread

HIGHER, LOWER = "higher", "lower"


@dataclass(frozen=True)
class Ratio:
    """One time over another, or a share of one: the speed of the machine cancels.

    Attributes:
        low, high: quartiles over the turns; None where they are not known.
        better: which way is the better one, HIGHER or LOWER.
    """

    value: float
    low: float | None = None
    high: float | None = None
    better: str = HIGHER

    @classmethod
    def of(cls, turns: Iterable[float], better: str = HIGHER) -> Ratio:
        """Of its values in all turns: their median and quartiles."""
        return cls(*Spread.of(list(turns)), better=better)

    @property
    def interval(self) -> tuple[float, float]:
        """Where it lies: from `low` to `high`, and the value, which is all of it where those are not known."""
        known = [self.value, *(end for end in (self.low, self.high) if end is not None)]
        return min(known), max(known)

    def text(self) -> str:
        """As `value (low - high)`."""
        if self.low is None or self.high is None:
            return f"{self.value:.3g}"
        return Spread(self.value, self.low, self.high).text(".3g")
