"""Kills real training runs at random moments, damages their files, resumes them, and compares the end with a run that
was never stopped.

    python scripts/torture.py [--kills 50] [--seed 1] [--out FILE] [OVERRIDE ...]

Each kill comes a random time after the start of the process, by SIGKILL, SIGTERM, SIGINT or SIGUSR1; after one in five,
one file of the run directory is cut short or has a bit flipped. A run is resumed until it ends, then the next begins. A
kill counts as recovered if what followed it went on from a checkpoint (or started anew, if none had been written yet),
as lost if more than one save interval was lost, and as a mismatch if a run ended in another state, or with other
metrics, than the run that was never stopped. Exit code 1 if any was not recovered.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from esper.runtime import checkpoint
from trainers.progress import Reporter

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "scripts" / "results" / "torture.json"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
DAMAGED = 5  # a file is damaged after one in so many kills
SMALL = (
    "env=digits", "recipe=none", "env.num_envs=4", "env.epochs=8", "ppo.num_steps=8", "ppo.total_steps=320",
    "checkpoint.every=2", "evaluation.episodes=0", "runtime.compile=false",
)  # fmt: skip
TIMED = ("time/", "perf/", "tamiyo.gnn.", "attention/", "time")  # metrics of the process, not of the run


@dataclass
class Tally:
    """What has happened so far."""

    kills: int = 0
    recovered: int = 0
    lost: int = 0
    mismatches: int = 0
    runs: int = 0
    damaged: dict[str, int] = field(default_factory=dict)
    by_signal: dict[str, int] = field(default_factory=dict)
    exit_codes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def start(overrides: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainers.train", *overrides],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run_dir(folder: Path) -> Path | None:
    """The one run directory under `folder`, or None before there is one."""
    found = sorted(folder.glob("*/*/checkpoints"))
    return found[-1].parent if found else None


def same(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two states differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        left = [f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))}"] if a.keys() != b.keys() else []
        return left + [p for k in a.keys() & b.keys() for p in same(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} entries"]
        return [p for i, (x, y) in enumerate(zip(a, b, strict=True)) for p in same(x, y, f"{path}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) or (a.isnan() & b.isnan() | (a == b)).all() else [path]
    return [] if a == b or (a != a and b != b) else [f"{path}: {a} and {b}"]


def final_state(directory: Path) -> dict[str, Any]:
    """The newest checkpoint without what may differ between runs."""
    state = checkpoint.latest(directory)[1]
    for key in ("output_dir", "resume"):
        state["config"].pop(key, None)
    return state


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without wall times."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines]


def damage(directory: Path, draw: random.Random) -> str:
    """Cuts a random file short or flips one of its bits; returns its name."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.stat().st_size > 1)
    path = draw.choice(files)
    content = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        content = content[: draw.randrange(len(content))]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return str(path.relative_to(directory))


def logged(directory: Path) -> int:
    """The step of the last whole line of metrics.jsonl."""
    step, path = 0, directory / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            step = max(step, int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return step


def survivor(directory: Path) -> int | None:
    """The step of the newest whole checkpoint."""
    try:
        return int(checkpoint.latest(directory)[1]["step"])
    except checkpoint.CheckpointError:
        return None


def torture(kills: int, seed: int, overrides: list[str], out: Path | None) -> Tally:
    """Kills until `kills` have been counted and the run that the last one hit has ended."""
    draw, tally = random.Random(seed), Tally()
    with tempfile.TemporaryDirectory() as name, Reporter("torture", kills, "kills") as reporter:
        folder = Path(name)
        began = time.perf_counter()
        process = start([*overrides, f"output_dir={folder / 'whole'}"])
        output = process.communicate()[0]
        if process.returncode:
            raise SystemExit(f"the run that is not to be stopped fails:\n{output}")
        whole = run_dir(folder / "whole")
        assert whole is not None
        expected, lines, length = final_state(whole), metrics(whole), time.perf_counter() - began
        interval = expected["config"]["checkpoint"]["every"]
        steps = expected["step"] // expected["iteration"]
        while tally.kills < kills:
            tally.runs += 1
            place, clean = folder / f"run{tally.runs}", True
            while True:
                directory = run_dir(place)
                resumable = directory is not None and survivor(directory) is not None
                if directory is not None and not resumable:
                    shutil.rmtree(place)  # nothing had been saved yet: the user starts again
                # A process that was killed before it logged anything has lost nothing, whatever damage had cost before.
                before = (logged(directory), survivor(directory)) if resumable and directory is not None else None
                process = start([f"resume={directory}"] if resumable else [*overrides, f"output_dir={place}"])
                try:
                    if tally.kills >= kills:
                        output = process.communicate()[0]
                    else:
                        output = process.communicate(timeout=draw.uniform(0, length))[0]
                except subprocess.TimeoutExpired:
                    number = draw.choice(SIGNALS)
                    process.send_signal(number)
                    output = process.communicate()[0]
                    tally.kills += 1
                    tally.by_signal[number.name] = tally.by_signal.get(number.name, 0) + 1
                    code = str(process.returncode)
                    tally.exit_codes[code] = tally.exit_codes.get(code, 0) + 1
                    directory = run_dir(place)
                    if directory is not None and (directory / "metrics.jsonl").exists():
                        reached, kept = logged(directory), survivor(directory)
                        allowed = interval * steps if number == signal.SIGKILL else 0
                        if (reached, kept) != before and reached - (kept or 0) > allowed:
                            tally.lost += 1
                            tally.problems.append(f"{number.name}: {reached - (kept or 0)} steps lost")
                    owed = tally.kills // DAMAGED > sum(tally.damaged.values())
                    if owed and directory is not None and survivor(directory) is not None:
                        touched = damage(directory, draw)
                        clean = clean and touched != "metrics.jsonl"
                        kind = touched.split("/")[0]
                        tally.damaged[kind] = tally.damaged.get(kind, 0) + 1
                    tally.recovered += 1
                    reporter.update(tally.kills, f"{tally.mismatches} mismatches")
                    continue
                if process.returncode:
                    tally.problems.append(f"exit code {process.returncode}: {output.strip().splitlines()[-1:]}")
                    tally.recovered -= 1
                    break
                directory = run_dir(place)
                assert directory is not None
                differences = same(expected, final_state(directory))
                if clean:
                    differences += [] if metrics(directory) == lines else ["metrics.jsonl"]
                if differences:
                    tally.mismatches += 1
                    tally.problems.append(f"run {tally.runs}: {differences[:3]}")
                break
            shutil.rmtree(place, ignore_errors=True)
            if out is not None:
                out.write_text(json.dumps(asdict(tally), indent=1) + "\n")
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("overrides", nargs="*", help=f"of the runs; default: {' '.join(SMALL)}")
    arguments = parser.parse_args()
    tally = torture(arguments.kills, arguments.seed, arguments.overrides or list(SMALL), arguments.out)
    print(json.dumps(asdict(tally), indent=1))
    print(f"{tally.recovered} of {tally.kills} recovered, {tally.mismatches} mismatches, {tally.lost} lost")
    sys.exit(bool(tally.mismatches or tally.lost or tally.recovered != tally.kills))


if __name__ == "__main__":
    main()
