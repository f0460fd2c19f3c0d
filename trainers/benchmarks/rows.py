"""Variants of one thing, timed in turns, as rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from trainers.benchmarks.ratios import HIGHER, LOWER, Ratio
from trainers.benchmarks.timing import timed
from trainers.config import BenchmarkSettings
from trainers.progress import Reporter

REFERENCE, FLOOR = "pyg", "floor"


@dataclass
class Row:
    """One variant of one case; ratios are the other's time over this one's, so that larger is faster."""

    suite: str
    case: str
    variant: str
    median_ms: float
    p95_ms: float
    peak_mb: float
    ratio_vs_reference: float | None = None
    ratio_vs_floor: float | None = None  # this time over that of the floor: 1 is the floor itself
    compile_s: float | None = None
    reference: str | None = None  # the variant of `ratio_vs_reference`
    ms: list[float] = field(default_factory=list)  # of every turn


@contextmanager
def turns(cases: int, settings: BenchmarkSettings) -> Iterator[Callable[[str], None]]:
    """Shows the progress of as many calls of `compare`; gives its `tick`."""
    done = count(1)
    with Reporter("benchmark", cases * (settings.warmup + settings.repeats), "turns") as reporter:
        yield lambda case: reporter.update(next(done), case)


def compare(
    suite: str,
    case: str,
    variants: Mapping[str, Callable[[], object]],
    settings: BenchmarkSettings,
    device: torch.device,
    tick: Callable[[str], None],
    compile_s: dict[str, float] | None = None,
    reference: str = REFERENCE,
) -> list[Row]:
    """Rows of all variants: called in turns, after calls that do not count.

    Args:
        variants: name -> what is timed, which knows its own `peak_mb` if that is not in this process; `reference` and
            FLOOR are what the others are compared with.
        tick: called with the case after each turn; see `turns`.
        compile_s: seconds that a variant took to compile.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, float] = {}
    for number in range(settings.warmup + settings.repeats):
        for name, function in variants.items():
            if number == 0:
                peaks[name] = getattr(function, "peak_mb", partial(peak_mb, function))(device)
                continue
            seconds = timed(function, device, settings.clock)
            if number >= settings.warmup:
                times[name].append(1000 * seconds)
        tick(case)
    medians = {name: float(np.median(values)) for name, values in times.items()}

    def over(name: str, other: str) -> float | None:
        return medians[other] / medians[name] if other in medians else None

    rows = []
    for name, values in times.items():
        floor = over(name, FLOOR)
        rows.append(
            Row(
                suite,
                case,
                name,
                medians[name],
                float(np.percentile(values, 95)),
                peaks[name],
                over(name, reference),
                None if floor is None else 1 / floor,
                (compile_s or {}).get(name),
                reference if reference in medians else None,
                values,
            )
        )
    return rows


def peak_mb(function: Callable[[], object], device: torch.device) -> float:
    """Memory that a call takes beyond what is there before it, in MiB; 0 where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - allocated) / 2**20
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        function()
        return 0.0
    reset.write_text("5")  # sets the peak to what is resident now
    before = _resident("VmHWM")
    function()
    return (_resident("VmHWM") - before) / 1024


def _resident(name: str) -> float:
    """KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return float(line.split()[1])
    return 0.0


def table(rows: Iterable[Row], title: str, reference: str = "PyG") -> Table:
    """For the terminal."""
    columns = (
        "case",
        "variant",
        "median ms",
        "p95 ms",
        "peak MiB",
        f"faster than {reference}",
        "times the floor",
        "compile s",
    )
    result = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for number, column in enumerate(columns):
        result.add_column(column, justify="left" if number < 2 else "right")

    def text(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    for row in rows:
        result.add_row(
            row.case,
            row.variant,
            f"{row.median_ms:.2f}",
            f"{row.p95_ms:.2f}",
            f"{row.peak_mb:.0f}",
            text(row.ratio_vs_reference, ".2f"),
            text(row.ratio_vs_floor, ".2f"),
            text(row.compile_s, ".1f"),
        )
    return result


def ratios(rows: Iterable[Row], rivals: Container[str] = ()) -> dict[str, Ratio]:
    """Name -> each variant against the reference of its case, and against the floor.

    Args:
        rivals: variants that are not Esper's, which are to be no faster than they were.
    """
    rows, found = list(rows), {}
    turns = {(row.case, row.variant): row.ms for row in rows}

    def ratio(value: float, over: list[float], under: list[float], better: str) -> Ratio:
        if not over or not under:  # the turns were not kept
            return Ratio(value, better=better)
        return Ratio.of((a / b for a, b in zip(over, under, strict=True)), better)

    for row in rows:
        if row.variant in (row.reference, FLOOR):
            continue
        if row.ratio_vs_reference is not None:
            of_reference = turns.get((row.case, str(row.reference)), [])
            better = LOWER if row.variant in rivals else HIGHER
            name = f"{row.case}: {row.variant}, times as fast as {row.reference}"
            found[name] = ratio(row.ratio_vs_reference, of_reference, row.ms, better)
        if row.ratio_vs_floor is not None:
            of_floor = turns.get((row.case, FLOOR), [])
            found[f"{row.case}: {row.variant}, times the floor"] = ratio(row.ratio_vs_floor, row.ms, of_floor, LOWER)
    return found


def content(rows: Iterable[Row], rivals: Container[str] = ()) -> dict[str, Any]:
    """For JSON: the rows, and their `ratios`."""
    rows = list(rows)
    return {"ratios": ratios(rows, rivals), "rows": [asdict(row) for row in rows]}
