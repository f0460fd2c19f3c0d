"""The suite `distributed`: training iterations of several processes against those of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from envs.config import load_config
from esper.runtime.errors import TrainingError
from trainers.benchmarks import Report, suite
from trainers.benchmarks.ratios import LOWER, Ratio
from trainers.benchmarks.timing import Spread
from trainers.config import BenchmarkConfig
from trainers.progress import Reporter

_EACH, _APART = "in each process", "in each of runs apart"
_COUNTS = [1, 256, 4096, 65_536, 262_144, 1_048_576, 4_194_304]  # numbers that are added up


class Members:
    """Processes of one run that wait for orders; they end with `close`.

    Args:
        size: how many.
        settings: of `trainers.benchmarks.member`.
        apart: each is a run by itself.

    Raises:
        TrainingError: one has ended.
    """

    def __init__(self, size: int, settings: dict[str, Any], apart: bool):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        world = {
            "WORLD_SIZE": "1" if apart else str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "trainers.benchmarks.member", json.dumps(settings)]
        self._processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **world, "RANK": "0" if apart else str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def told(self, order: str) -> list[dict[str, Any]]:
        """What each of them answers."""
        for process in self._processes:
            assert process.stdin
            process.stdin.write(f"{order}\n")
            process.stdin.flush()
        return [self._answer(process) for process in self._processes]

    def close(self) -> None:
        """Ends them."""
        for process in self._processes:
            process.kill()
            process.communicate()

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("{"):  # others tell what is being compiled
                return dict(json.loads(line))
        raise TrainingError(f"suite=distributed: a process has ended with {process.wait()}; its output says why")


@suite("distributed")
def run(config: BenchmarkConfig) -> Report:
    """Iterations of the default configuration on `benchmark.processes`: as many environments in all (strong scaling),
    as many in each process (weak scaling), and the latter in runs apart, which tell how much of the machine is left to
    the second of two processes that have nothing to do with each other; in turns."""
    settings, hosts = config.benchmark, load_config("digits").num_envs
    sizes = sorted({1, *settings.processes})
    cases = [(size, "in all", hosts) for size in sizes]
    cases += [(size, kind, hosts) for size in sizes if size > 1 for kind in (_EACH, _APART)]
    given = {"seed": config.seed, "policy": settings.policies[0], "runtime": asdict(config.runtime)}
    found: list[list[list[dict[str, Any]]]] = [[] for _ in cases]
    exchanges: dict[int, list[dict[str, Any]]] = {}
    with Reporter("benchmark", settings.iterations + 1, "iterations of each") as reporter:
        worlds = [
            Members(size, {**given, "hosts": count * size if kind == _EACH else count}, kind == _APART)
            for size, kind, count in cases
        ]
        try:
            for number in range(settings.iterations + 1):  # the first one, which compiles, does not count
                for members, own in zip(worlds, found, strict=True):
                    answers = members.told("iterate")
                    own.extend([answers] if number else [])
                reporter.update(number + 1)
            for (size, kind, _), members in zip(cases, worlds, strict=True):
                if size > 1 and kind == "in all":
                    exchanges[size] = [members.told(f"exchange {count}")[0] for count in _COUNTS]
        finally:
            for members in worlds:
                members.close()
    rows = [_row(*case, own) for case, own in zip(cases, found, strict=True)]
    times = ratios(rows)
    content = {"ratios": times, "rows": rows, "exchanges": [_line(*each) for each in exchanges.items()]}
    return Report(content, [_table(rows, times)])


def _row(size: int, kind: str, hosts: int, turns: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """Of one case; an iteration takes as long as its slowest process."""
    first = turns[0][0]
    steps = first["steps"] * (size if kind == _APART else 1)
    seconds = [max(answer["s"] for answer in answers) for answers in turns]
    # Each waits for the last to come to it, whose own time is what an exchange takes.
    exchanges = [np.array([answer["exchanges_s"] for answer in answers]) for answers in turns]
    least = [float(times.min(0).sum()) for times in exchanges]
    mean = [float(times.mean(0).sum()) for times in exchanges]
    return {
        "processes": size,
        "environments": hosts,
        "kind": kind,
        "steps": steps,
        "steps_per_s": [steps / s for s in seconds],
        "collect_s": [max(answer["collect_s"] for answer in answers) for answers in turns],
        "update_s": [max(answer["update_s"] for answer in answers) for answers in turns],
        "communication": [c / s for c, s in zip(least, seconds, strict=True)],
        "communication_and_waiting": [c / s for c, s in zip(mean, seconds, strict=True)],
        "sums": first["sums"],  # (bytes, how many) of an iteration
    }


def _line(size: int, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The time of an exchange as alpha + beta * bytes, by least squares of the relative error."""
    size_b, time_s = (np.array([each[key] for each in measured]) for key in ("bytes", "s"))
    design = np.stack([1 / time_s, size_b / time_s], 1)
    alpha, beta = np.linalg.lstsq(design, np.ones(len(time_s)), rcond=None)[0]
    return {"processes": size, "alpha_s": float(alpha), "beta_s_per_byte": float(beta), "measured": measured}


def ratios(rows: list[dict[str, Any]]) -> dict[str, Ratio]:
    """What the suite compares: the rows after the first against it, in the turns in which they were measured."""
    alone, *others = rows
    found = {}
    for row in others:
        name = f"{row['processes']} processes, {row['environments']} environments {row['kind']}"
        turns = zip(row["steps_per_s"], alone["steps_per_s"], strict=True)
        found[f"{name}: steps/s, times those of one process"] = Ratio.of(a / b for a, b in turns)
        if row["kind"] != _APART:
            found[f"{name}: share of time in communication"] = Ratio.of(row["communication"], LOWER)
    return found


def _table(rows: list[dict[str, Any]], ratios: dict[str, Ratio]) -> Table:
    result = Table(title="Several processes", box=box.SIMPLE_HEAD, title_justify="left")
    headings = (
        "processes",
        "environments",
        "steps/s",
        "times one process",
        "communication",
        "with waiting",
        "MB/iteration",
    )
    for heading in headings:
        result.add_column(heading, justify="right")
    speeds = [ratio for name, ratio in ratios.items() if "steps/s" in name]
    for row, speed in zip(rows, [None, *speeds], strict=True):
        result.add_row(
            str(row["processes"]),
            f"{row['environments']:,} {row['kind']}",
            Spread.of(row["steps_per_s"]).text(",.0f"),
            speed.text() if speed else "",
            Spread.of(row["communication"]).text(".1%"),
            Spread.of(row["communication_and_waiting"]).text(".1%"),
            f"{sum(size * count for size, count in row['sums']) / 1e6:.1f}",
        )
    return result
