"""Kills single processes of distributed runs at random moments, and looks at what becomes of the others.

    python scripts/kill_ranks.py [--kills 20] [--processes 2] [--seed 1] [--out FILE]

Every other run is started with `--max-restarts=1`: torchrun is to start it again, from the last checkpoint, to its end.
The others are to end by themselves, and go on by `resume=`. A kill counts as clean if that happens within LIMIT_S, no
process is left over, no checkpoint that had been written is lost, and the run's logs have every iteration once. Exit
code 1 if any was not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from esper.runtime import checkpoint
from trainers.progress import Reporter

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "scripts" / "results" / "kill_ranks.json"
LIMIT_S = 30.0
RUN_S = 20.0  # kills come within that time after the start
SMALL = (
    "env=digits", "recipe=none", "env.num_envs=4", "env.epochs=8", "ppo.num_steps=8", "checkpoint.every=2",
    "evaluation.episodes=0", "runtime.compile=false", "policy.hidden=[16,16,16,16]",
)  # fmt: skip
STEPS = 1280  # forty iterations


def launched(processes: int, restarts: int, overrides: list[str], out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    with open(out, "ab") as file:
        return subprocess.Popen(
            [*command, f"--max-restarts={restarts}", "-m", "trainers.train", *SMALL, *overrides],
            cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def workers(launcher: int) -> dict[int, int]:
    """Rank -> process number of what torchrun has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            settings = dict(line.split("=", 1) for line in (folder / "environ").read_text().split("\0") if "=" in line)
        except (OSError, ValueError):  # it has just ended
            continue
        if parent == launcher and "RANK" in settings:
            found[int(settings["RANK"])] = int(folder.name)
    return found


def run_dir(folder: Path) -> Path | None:
    """The one run directory under `folder`, or None before there is a checkpoint."""
    found = sorted(folder.glob("*/*/checkpoints"))
    assert len(found) < 2, found
    return found[0].parent if found else None


def newest(folder: Path) -> int:
    """The step of the newest checkpoint that is whole; -1 without one."""
    run = run_dir(folder)
    return checkpoint.latest(run)[1]["step"] if run and checkpoint.found(run) else -1


def one(folder: Path, processes: int, restarts: int, chance: random.Random) -> dict[str, Any]:
    """One run, with one kill."""
    out = folder / "out"
    launcher = launched(processes, restarts, [f"ppo.total_steps={STEPS}", f"output_dir={folder}"], out)
    after, rank = chance.uniform(1.0, RUN_S), chance.randrange(processes)
    start = time.monotonic()
    while time.monotonic() - start < after or len(workers(launcher.pid)) < processes:
        time.sleep(0.05)
        if launcher.poll() is not None:
            break
    before, victims = newest(folder), workers(launcher.pid)
    found: dict[str, Any] = {"after_s": round(after, 1), "rank": rank, "restarts": restarts, "step": before}
    if rank not in victims:
        launcher.wait()
        return {**found, "clean": True, "why": "the run had ended before"}
    os.kill(victims[rank], signal.SIGKILL)
    killed, problems = time.monotonic(), []
    while launcher.poll() is None and time.monotonic() - killed < LIMIT_S:
        again = workers(launcher.pid)
        if restarts and len(again) == processes and not set(again.values()) & set(victims.values()):
            break
        time.sleep(0.05)
    else:
        if launcher.poll() is None:
            problems.append(f"others were still there {LIMIT_S:.0f} s later")
    found["ended_s"] = round(time.monotonic() - killed, 1)
    try:
        code = launcher.wait(300)
    except subprocess.TimeoutExpired:
        launcher.kill()
        problems.append("a process hangs")
        code = -1
    if left := [number for number in victims.values() if Path(f"/proc/{number}").exists()]:
        problems.append(f"left over: {left}")
    if restarts and code != 0:
        problems.append(f"ended with {code} after the restart")
    if not restarts:
        problems += going_on(folder, processes, before, out)
    problems += whole(folder)
    return {**found, "clean": not problems, "why": "; ".join(problems)}


def going_on(folder: Path, processes: int, before: int, out: Path) -> list[str]:
    """Resumes a run that has ended."""
    run = run_dir(folder)
    if run is None:
        return [] if before < 0 else ["the run directory is lost"]
    if not checkpoint.found(run):
        return [] if before < 0 else ["checkpoints are lost"]
    if newest(folder) < before:
        return [f"the checkpoint of step {before} is lost"]
    code = launched(processes, 0, [f"resume={run}"], out).wait(300)
    return [f"resumed, it ended with {code}"] if code else []


def whole(folder: Path) -> list[str]:
    """What is wrong with a run that has come to its end."""
    run = run_dir(folder)
    if run is None or not checkpoint.found(run):
        return []
    _, state, problems = checkpoint.latest(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, each = [line["step"] for line in lines], 32
    if state["step"] != STEPS:
        problems.append(f"it has ended at step {state['step']}")
    if steps != list(range(each, STEPS + 1, each)):
        problems.append("its logs have gaps or doubles")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    chance, rows = random.Random(given.seed), []
    with Reporter("killing", given.kills, "kills") as reporter:
        for number in range(given.kills):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(one(Path(folder), given.processes, number % 2, chance))
                if not rows[-1]["clean"]:
                    print((Path(folder) / "out").read_text()[-4000:])
            bad = sum(not row["clean"] for row in rows)
            reporter.update(number + 1, f"{bad} not clean")
            given.out.write_text(json.dumps({"processes": given.processes, "kills": rows}, indent=1) + "\n")
    print(f"{given.out}: {len(rows) - bad} of {len(rows)} clean")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
