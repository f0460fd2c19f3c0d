"""Writes the tables of docs/scaling.md from scripts/results/benchmark/distributed.json: what was measured, and what
follows from it for more machines.

    python scripts/scaling.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "scripts" / "results" / "benchmark" / "distributed.json"
PAGE = ROOT / "docs" / "scaling.md"
MEASURED, PROJECTED = "measured", "projected"

NETWORKS = {
    # latency of one message in s, usable bytes/s of one machine
    "1 Gb/s Ethernet": (50e-6, 0.11e9),
    "10 Gb/s Ethernet": (30e-6, 1.1e9),
    "25 Gb/s Ethernet (RoCE)": (5e-6, 2.8e9),
    "100 Gb/s InfiniBand (EDR)": (2e-6, 11e9),
}
MACHINES = (1, 2, 4, 8, 16, 32, 64)


def exchange(machines: int, size: float, latency: float, bandwidth: float) -> float:
    """Seconds of a ring all-reduce of `size` bytes (Thakur et al., 2005): 2 (W - 1) messages of size / W each."""
    return 2 * (machines - 1) * (latency + size / machines / bandwidth) if machines > 1 else 0.0


def projected(report: dict[str, Any]) -> list[list[str]]:
    """Environment steps per second of 1 to 64 machines with one process each, as many environments in each (weak
    scaling)."""
    alone, weak = report["rows"][0], next(row for row in report["rows"] if row["kind"] == "in each process")
    steps = alone["steps"]
    compute = steps / float(np.median(alone["steps_per_s"]))
    # Processes wait for the slowest of them; with more of them that is further from the mean.
    waiting = float(np.median(weak["communication_and_waiting"])) - float(np.median(weak["communication"]))
    rows = []
    for name, (latency, bandwidth) in NETWORKS.items():
        row = [name]
        for machines in MACHINES:
            exchanged = sum(many * exchange(machines, size, latency, bandwidth) for size, many in weak["sums"])
            spread = waiting * _largest(machines) / _largest(2) if machines > 1 else 0.0
            taken = compute * (1 + max(spread, 0.0)) + exchanged
            row.append(f"{machines * steps / taken:,.0f} ({compute / taken:.0%})")
        rows.append(row)
    return rows


def _largest(count: int) -> float:
    """Of as many standard normal numbers, the mean of the largest (Blom, 1958)."""
    from statistics import NormalDist

    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def measured(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    ratios = [ratio for name, ratio in report["ratios"].items() if "steps/s" in name]
    for row, ratio in zip(report["rows"], [None, *ratios], strict=True):
        times = f"{ratio['value']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f})" if ratio else ""
        share, waiting = (float(np.median(row[key])) for key in ("communication", "communication_and_waiting"))
        speed = f"{np.median(row['steps_per_s']):,.0f}"
        size = f"{sum(size * count for size, count in row['sums']) / 1e6:.1f}"
        count = f"{row['environments']} {row['kind']}"
        rows.append([str(row["processes"]), count, speed, times, f"{share:.1%}", f"{waiting:.1%}", size])
    return rows


def table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """In Markdown."""
    return [f"| {' | '.join(row)} |" for row in [headings, ["---"] * len(headings), *rows]]


def between(text: str, name: str, lines: list[str]) -> str:
    """`text` with `lines` between the markers called `name`."""
    begin, end = f"<!-- {name}: made by scripts/scaling.py -->", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    return before + "\n".join([begin, "", *lines, "", end]) + rest.split(end)[1]


def main() -> None:
    report = json.loads(REPORT.read_text())
    headings = ["processes", "environments", "steps/s", "times one process", "communication", "with waiting"]
    text = between(PAGE.read_text(), MEASURED, table([*headings, "MB an iteration"], measured(report)))
    names = ["network", *(f"{machines}" for machines in MACHINES)]
    PAGE.write_text(between(text, PROJECTED, table(names, projected(report))))


if __name__ == "__main__":
    main()
