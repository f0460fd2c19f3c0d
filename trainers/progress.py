"""Progress of anything longer than a few seconds: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from esper.runtime import launch

_EVERY_SECONDS = 10.0  # between two lines where there is no terminal


def duration(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def announce() -> None:
    """Says that something goes on before anything else can be said, unless what is printed is asked for by a flag."""
    if launch.rank() == 0 and not any(argument.startswith("--") for argument in sys.argv[1:]):
        print("starting ...", flush=True)


def pace(rate: float) -> str:
    """Of a positive number of units per second; of slow ones, how long each takes."""
    if rate >= 10:
        return f"{rate:,.0f}/s"
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"


class Reporter:
    """Shows how far something is, how fast it goes and when it will end. A context manager. Of several processes the
    first one alone shows it.

    Args:
        label: what is going on.
        total: units of work in all.
        unit: their name.
        done: units that were done before (a resumed run).
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0):
        self._label, self._total, self._unit, self._start_done = label, total, unit, done
        self._bar: Progress | None = None
        self._quiet = launch.rank() > 0
        if sys.stdout.isatty() and not self._quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),  # moves also while a single unit takes long
            )
            self._bar = Progress(*columns, console=Console())
            self._task = self._bar.add_task(label, total=total, completed=done, status="")
        self._started = time.monotonic()
        self._printed = -_EVERY_SECONDS

    def __enter__(self) -> Reporter:
        if self._bar:
            self._bar.start()
        self.update(self._start_done)  # whoever waits sees at once for what
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """`done` units are finished now, counted from the very beginning; `note` is shown beside the figures."""
        now = time.monotonic()
        elapsed = now - self._started
        rate = (done - self._start_done) / max(elapsed, 1e-9)
        counted = f"{min(done, self._total):,}/{self._total:,} {self._unit}"
        known = done > self._start_done
        left = duration((self._total - done) / rate) if known and done < self._total else "0:00"
        ending = f"ETA {left}" if known or done >= self._total else ""
        figures = (counted, pace(rate) if known else "", note, ending)
        status = "  ".join(figure for figure in figures if figure)
        if self._bar:
            self._bar.update(self._task, completed=done, status=status)
        elif not self._quiet and (now - self._printed >= _EVERY_SECONDS or done >= self._total):
            self._printed = now
            print(f"{self._label}  {status}", flush=True)
