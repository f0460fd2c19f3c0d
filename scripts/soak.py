"""Trains the default configuration for an hour and measures whether anything grows.

    python scripts/soak.py [--minutes 60] [--out FILE] [OVERRIDE ...]

Every ten seconds it reads of the training process the resident memory, the open files, the threads, and the CPU time.
Growth is the median over the last sixth of the time against the median over the second sixth (the first is warm-up:
compilation, caches that fill, a policy that still changes how much is grown). Step time is CPU time per iteration,
which other work on the machine disturbs less than wall time, over the CPU time that a fixed piece of work takes at that
moment, since a shared machine is not always equally fast. Exit code 1 if anything has grown by more than 5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trainers.progress import Reporter

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "scripts" / "results" / "soak.json"
LIMIT = 0.05
JUDGED = ("memory_mib", "files", "threads", "step_relative")
EVERY_S = 10.0
SHORTEST = 3  # minutes
PARTS = 6
REFERENCES, WORK = 5, 400_000
ENDLESS = ("recipe=none", "ppo.total_steps=1000000000", "evaluation.episodes=0")


def sample(pid: int) -> dict[str, float]:
    """What the system says of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return {
        "memory_mib": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "cpu_s": (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
    }


def reference() -> float:
    """CPU seconds that a fixed piece of work takes now: the median of a few times."""
    times = []
    for _ in range(REFERENCES):
        start = time.process_time()
        sum(range(WORK))
        times.append(time.process_time() - start)
    return statistics.median(times)


def iterations(folder: Path) -> list[dict[str, Any]]:
    """What has been logged so far; a line that is being written is left out."""
    path = next(folder.glob("*/*/metrics.jsonl"), None)
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path else []


def part(values: list[float], number: int) -> float:
    """Median of one of PARTS."""
    return statistics.median(values[len(values) * number // PARTS : len(values) * (number + 1) // PARTS])


def growth(samples: list[dict[str, float]], lines: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each measure, its median over the second and over the last part, and by what share it grew."""
    pairs = list(zip(samples, samples[6:], strict=False))  # a minute apart
    series = {name: [float(each[name]) for each in samples] for name in ("memory_mib", "files", "threads")}
    series["step_cpu_s"], series["step_relative"] = [], []
    for number, (a, b) in enumerate(pairs):
        if b["iterations"] > a["iterations"]:
            step = (b["cpu_s"] - a["cpu_s"]) / (b["iterations"] - a["iterations"])
            between = statistics.median(each["reference_s"] for each in samples[number : number + 7])
            series["step_cpu_s"].append(step)
            series["step_relative"].append(step / between)
    for name in ("perf/update_s", "perf/collect_s", "perf/checkpoint_s"):
        series[f"{name} (wall)"] = [line[name] for line in lines]
    found = {}
    for name, values in series.items():
        early, late = part(values, 1), part(values, PARTS - 1)
        found[name] = {"early": round(early, 4), "late": round(late, 4), "growth": round(late / early - 1, 4)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for trainers.train")
    arguments = parser.parse_args()
    if arguments.minutes < SHORTEST:
        parser.error(f"--minutes {arguments.minutes:g}: must be at least {SHORTEST}, to have something to compare")
    with tempfile.TemporaryDirectory() as name, Reporter("soak", round(60 * arguments.minutes), "s") as reporter:
        folder, samples, began = Path(name), [], time.monotonic()
        command = [sys.executable, "-m", "trainers.train", f"output_dir={folder}", *ENDLESS, *arguments.overrides]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while (passed := time.monotonic() - began) < 60 * arguments.minutes:
            time.sleep(EVERY_S)
            if process.poll() is not None:
                sys.exit(f"error: training ended with exit code {process.returncode}: {process.communicate()[1]}")
            done = {"s": round(passed, 1), "iterations": len(iterations(folder)), "reference_s": reference()}
            samples.append({**done, **sample(process.pid)})
            reporter.update(round(passed), f"{samples[-1]['memory_mib']:.0f} MiB")
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
        lines = iterations(folder)
    found = growth(samples, lines)
    grown = [name for name in JUDGED if found[name]["growth"] > LIMIT]
    steady = [each for each in samples if each["iterations"] >= 50]
    later = next((each for each in steady if each["iterations"] >= steady[0]["iterations"] + 500), None)
    result = {
        "command": f"python scripts/soak.py --minutes {arguments.minutes:g} {' '.join(arguments.overrides)}".strip(),
        "iterations": len(lines),
        "exit_code_after_sigterm": code,
        "growth": found,
        "over_500_iterations": later and {"from_mib": steady[0]["memory_mib"], "to_mib": later["memory_mib"]},
        "samples": samples[::6],
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in found.items():
        print(f"{name:26} {row['early']:10.3f} -> {row['late']:10.3f}  {100 * row['growth']:+.1f} %")
    print(f"{len(lines)} iterations; report: {arguments.out}")
    sys.exit(bool(grown) or code != 75)


if __name__ == "__main__":
    main()
