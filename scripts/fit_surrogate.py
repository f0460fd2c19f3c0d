"""Logs real episodes, fits the surrogate to them, and measures its fidelity and its cost.

    python scripts/fit_surrogate.py [log] [fit] [fidelity] [cost]     (default: all four)

`log` plays 2,176 episodes of `digits` on training instances from 5000 on, each group of 32 with one controller of
`surrogate_log.GROUPS` (random numbers from seed 1000 plus the group's number), into runs/surrogate/log.pt. `fit` fits
the network to seven eighths of them (seed 0; the others are for what it prints) and writes envs/surrogate.npz.
`fidelity` plays `surrogate_fidelity.CONTROLLERS` on held-out instances 0 to 191 in both environments, `cost` measures
CPU time; both write scripts/results/surrogate.json. One thread; about ten minutes in all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from surrogate_fidelity import compared, costs, scores
from surrogate_log import MIXTURE, log
from surrogate_training import fit

from envs.config import load_config

ROOT = Path(__file__).parents[1]
LOG = ROOT / "runs" / "surrogate" / "log.pt"
RESULTS = ROOT / "scripts" / "results" / "surrogate.json"
PARTS = ("log", "fit", "fidelity", "cost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    chosen = parser.parse_args().parts or PARTS
    for part in chosen:
        if part not in PARTS:
            parser.error(f"{part}: choose from {', '.join(PARTS)}")
    torch.set_num_threads(1)
    real = load_config("digits")
    if "log" in chosen:
        LOG.parent.mkdir(parents=True, exist_ok=True)
        logged = load_config("digits")
        logged.contexts.mixture = MIXTURE
        torch.save(log(logged), LOG)
    if "fit" in chosen:
        fit(torch.load(LOG, weights_only=True), real).save()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["command"] = "python scripts/fit_surrogate.py"
    surrogate = load_config("surrogate")
    if "fidelity" in chosen:
        results["fidelity"] = compared(scores(real), scores(surrogate))
    if "cost" in chosen:
        results["cost"] = costs(real, surrogate)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
