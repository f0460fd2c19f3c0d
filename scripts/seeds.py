"""Trains one configuration with several seeds and gathers the results in one file.

    python scripts/seeds.py [--name digits_default] [--seeds 1 2 3 4 5] [--jobs 2] [KEY=VALUE ...]

Writes scripts/results/NAME.json: per seed the learning curve, every held-out score of Tamiyo and of the baselines, and
the wall time; and over the seeds, Tamiyo's mean held-out return with a 95 % bootstrap interval that resamples runs.
Runs go to OUTPUT_DIR/NAME/seed_N. A seed that is in the file already with the same overrides, or whose run is finished,
is not run again.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from scipy import stats

import esper
from esper.runtime.telemetry import METRICS_FILE

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 5000
RETURN = "rollout/ep_rew_mean"


def _settings(run: Path) -> list[str]:
    """The command line of a run, without where it went."""
    given = OmegaConf.load(run / ".hydra" / "overrides.yaml")
    return [override for override in given if not override.startswith("output_dir=")]


def train(seed: int, overrides: list[str], output_dir: Path) -> dict:
    """One run in a process of its own, unless a finished one is there; its curve, scores and wall time."""
    settings = [f"seed={seed}", *overrides]

    def finished() -> list[Path]:
        runs = [path.parents[1] for path in sorted(output_dir.glob("*/*/eval/report.json"))]
        return [run for run in runs if settings == _settings(run)]

    if not finished():
        command = [sys.executable, "-m", "trainers.train", f"output_dir={output_dir}", *settings]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"seed {seed} ended with exit code {done.returncode}: {done.stderr.strip()}")
    run = finished()[-1]
    file = run / "eval" / "report.json"
    report = json.loads(file.read_text())
    lines = [json.loads(text) for text in (run / METRICS_FILE).read_text().splitlines()]
    seconds = file.stat().st_mtime - (run / ".hydra" / "config.yaml").stat().st_mtime
    return {
        "wall_s": round(seconds, 1),
        "environment": report["environment"],
        "episodes": report["episodes"],
        "curve": [[line["step"], round(line[RETURN], 5)] for line in lines if RETURN in line],
        "controllers": {
            name: {key: row[key] for key in ("iqm", "interval", "mean", "params_ratio", "scores")}
            for name, row in report["controllers"].items()
        },
    }


def summarise(seeds: dict[str, dict]) -> dict:
    """What the runs say together; the unit of resampling is the run."""
    rows = list(seeds.values())
    means = {name: [row["controllers"][name]["mean"] for row in rows] for name in rows[0]["controllers"]}
    rivals = [name for name in means if name != "tamiyo"]
    final = [row["curve"][-1][1] for row in rows]
    summary: dict = {
        "runs": len(rows),
        "mean_held_out_return": {name: float(np.mean(values)) for name, values in means.items()},
        "runs_whose_final_training_return_is_above": {
            name: int(sum(f > m for f, m in zip(final, means[name], strict=True))) for name in rivals
        },
        "runs_whose_held_out_return_is_above": {
            name: int(sum(t > m for t, m in zip(means["tamiyo"], means[name], strict=True))) for name in rivals
        },
        "first_training_return": [row["curve"][0][1] for row in rows],
        "final_training_return": final,
    }
    if len(rows) > 1:
        sample = (np.array(means["tamiyo"]),)
        found = stats.bootstrap(
            sample, np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
        )
        summary["tamiyo_interval"] = [float(x) for x in found.confidence_interval]
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="digits_default", help="of the result file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/seeds"), help="of the runs themselves")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for trainers.train")
    arguments = parser.parse_args()
    file = RESULTS / f"{arguments.name}.json"
    result: dict = json.loads(file.read_text()) if file.exists() else {}
    if result.get("overrides") != arguments.overrides:
        result = {"overrides": arguments.overrides, "seeds": {}}
    command = ["python scripts/seeds.py", f"--name {arguments.name}", "--seeds", *map(str, arguments.seeds)]
    result["command"] = " ".join([*command, *arguments.overrides])
    result["esper"] = esper.__version__
    result["machine"] = {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    missing = [seed for seed in arguments.seeds if str(seed) not in result["seeds"]]
    start = time.time()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        folder = arguments.output_dir / arguments.name
        runs = {pool.submit(train, seed, arguments.overrides, folder / f"seed_{seed}"): seed for seed in missing}
        for number, future in enumerate(as_completed(runs), start=1):
            if future.exception():
                pool.shutdown(cancel_futures=True)
            result["seeds"][str(runs[future])] = future.result()
            result["seeds"] = dict(sorted(result["seeds"].items(), key=lambda item: int(item[0])))
            result["summary"] = summarise(result["seeds"])
            RESULTS.mkdir(exist_ok=True)
            file.write_text(json.dumps(result, indent=1) + "\n")
            elapsed = time.time() - start
            left = elapsed / number * (len(missing) - number)
            print(f"{number}/{len(missing)} runs  {elapsed / 60:.1f} min  ETA {left / 60:.1f} min", flush=True)
    print(json.dumps(result["summary"], indent=1))
    print(f"written: {file}")


if __name__ == "__main__":
    main()
