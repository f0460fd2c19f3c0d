"""The proof: trains Tamiyo on the mixture of growth environments, and compares it with every baseline on instances,
hosts and data that it has never seen.

    python scripts/study.py [STAGE ...] [--seeds 1 2 3 4 5] [--variants short ...] [--workers 2] (see --help)

Stages, in their order; without any, all of them:

    fit     supervised scorers, on what germinations gain on forks in random episodes
    tune    knobs of every baseline, and the look-ahead's margin, on training instances
    train   the recipe (`experiment=study`) with every seed
    play    every controller on the same held-out instances
    ablate  trains and plays variants of the recipe, with the first three of the seeds
    cost    times one run of the recipe with two processes, for which nothing else should run

Everything is kept under runs/study, so that a stopped study goes on where it was. Scores go to
scripts/results/study/scores-*.json, ablations-*.json and recipes-*.json, with training.json, tuning.json and cost.json;
scripts/study_report.py makes docs/results.md of them. Points are percentages of test accuracy over the ungrown twin,
less 10 per 100 % more parameters.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import study_work as work
import torch
from child import output_of
from chunks import Pool
from study_work import SETS, TRAINED_ON

from esper.runtime import checkpoint
from trainers.progress import Reporter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results" / "study"
RUNS = ROOT / "runs" / "study"
SCORERS = RUNS / "scorers.pt"
STAGES = ("fit", "tune", "train", "play", "ablate", "cost")

_ONCE = ["ppo.starts=1", "ppo.critic_first=0.0"]
_SHORT = ["warm_start.episodes=3584", "ppo.total_steps=200_000", *_ONCE]
_DEFAULTS = ["ppo.lr=1e-3", "ppo.entropy_coef=0.003", *_ONCE]  # which suit training from scratch
ABLATIONS: dict[str, list[str]] = {
    "short": _SHORT,
    "from_scratch": ["warm_start.episodes=0", "ppo.total_steps=400_000", *_DEFAULTS],
    "pooled": [*_SHORT, "policy.encoder=pooled"],
    "no_edges": [*_SHORT, "policy.edge_attributes=false"],
    "sage_only": [*_SHORT, "policy.convolutions=[sage,sage,sage,sage]"],
    "gat_only": [*_SHORT, "policy.convolutions=[gat,gat,gat,gat]"],
    "auxiliary": [*_SHORT, "ppo.auxiliary_coef=0.1"],
    "no_twin": [*_SHORT, "env.reward.twin=false"],
}
"""What is ablated, as overrides of `experiment=study`: the recipe in short, and what differs from that in one thing."""

_HALF = ["ppo.starts=1", "ppo.total_steps=800_000"]
_FEWER = "warm_start.episodes=8192"
RECIPES: dict[str, list[str]] = {
    "supervised": ["ppo.total_steps=1", "ppo.starts=1", "ppo.lr=1e-9"],
    "one_start": _HALF,
    "fewer": [*_HALF, _FEWER],
    "fewer_at_once": [*_HALF, _FEWER, "ppo.critic_first=0.0"],
    "fewer_monte_carlo": [*_HALF, _FEWER, "ppo.gae_lambda=1.0"],
    "fewer_long": ["ppo.starts=1", _FEWER],
    "fewer_long_monte_carlo": ["ppo.starts=1", _FEWER, "ppo.gae_lambda=1.0"],
}
"""Others at full length: the warm start alone, with one start of PPO, and with half the episodes for the warm start."""

RECIPE = "tamiyo"
VARIANTS = {**ABLATIONS, **RECIPES}
OVERRIDES = {RECIPE: [], **VARIANTS}
COMPARISONS = {"ablations": list(ABLATIONS), "recipes": [RECIPE, *RECIPES]}  # by the name of the file

RECORD = "study.json"  # of a run that has ended, in its directory
KINDS = ["bypass", "norm", "widen", "mlp", "low_rank"]


def _grid(**knobs: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(knobs, values, strict=True)) for values in product(*knobs.values())]


_RULE = {"blueprint": ["bypass", "norm", "widen"], "first": [1, 3], "every": [1, 3]}
_SCORES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]
GRID: dict[str, list[dict[str, Any]]] = {
    "all_at_start": _grid(blueprint=KINDS),
    "periodic": _grid(blueprint=KINDS, first=[1, 3], every=[2, 4, 8, 16]),
    "plateau": _grid(blueprint=KINDS, slope=[-0.1, -0.05, -0.02, 0.0], patience=[3, 6]),
    "statistic": _grid(**_RULE, threshold=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
    "gradient_norm": _grid(**_RULE, threshold=[-10.0, 0.0, 0.5, 1.0]),
    "gradmax": _grid(**_RULE, threshold=[-10.0, 0.0, 0.5, 1.0, 1.5]),
    "probe": _grid(
        blueprint=["bypass", "norm"], first=[1, 3], every=[1, 3], probation=[4, 5, 6, 8], keep=[0.0, 0.01, 0.03, 0.06]
    ),
    "best_fixed": _grid(slot=[0, 1, 2, 3, 4, 5], blueprint=KINDS, epoch=[1, 3, 6]),
    "linear": _grid(first=[1, 3], every=[1, 3], threshold=_SCORES),
    "shallow": _grid(first=[1, 3], every=[1, 3], threshold=_SCORES),
    "neural": _grid(first=[1, 3], every=[1, 3], threshold=_SCORES),
}
"""Knobs that are tried for each baseline, on training instances."""

MARGINS = [0.01, 0.02, 0.03, 0.05]  # of the look-ahead, in returns
ROUNDS = ((256, None), (1024, 6), (4096, 3))
"""Instances of each round of tuning, and how many of the best knobs go on to it (successive halving)."""
LOOKED = 128  # instances of the look-ahead's margin

LABELS = 128  # chunks of labelled random episodes, as many as the warm start's
FEW = 28  # of them, to which `linear` and `shallow` are fitted: with all they gained less on training instances
PLAYED = {"digits/sequential": 2048, "digits/mixture": 2048, "digits/repair": 1024, "digits/shift": 2048}
PLAYED_ELSE = 512
RIVALS = ("never", "linear", "shallow", "neural", "statistic", "gradmax", "probe")  # that come near Tamiyo somewhere
RIVALS_PLAYED = {"digits/sequential": 16384, "digits/mixture": 8192, "digits/shift": 8192}
"""So many instances of these sets are played by Tamiyo and its rivals, so that intervals can tell them apart."""
CEILING = 512  # instances of a ceiling
CEILING_ELSE = 128  # on sets of the role "generalisation"
COMPARED = ("digits/mixture", "digits/sequential")  # sets on which variants are played
ABLATED = 2048  # instances of each
CHUNK = {"lookahead": 32, "oracle": 64}
CHUNK_ELSE = 256
PROCESSES = 2  # of the run that is timed


def _name(*parts: Any) -> str:
    """A file name."""
    plain = (",".join(f"{k}={v}" for k, v in p.items()) if isinstance(p, dict) else str(p) for p in parts)
    return "-".join(plain).replace("/", "-") + ".pt"


Trial = tuple[str, dict[str, Any], str]
"""A controller: its name, knobs and source, see `study_work.controller_of`."""


def play(pool: Pool, of: str, split: str, count: int, chosen: list[Trial], what: str) -> Any:
    """The accounts of controllers on the first `count` instances of a set, in their order."""
    jobs, numbers = [], []
    for name, knobs, source in chosen:
        chunk = CHUNK.get(name, CHUNK_ELSE)
        firsts = range(0, count, chunk)
        numbers.append(len(firsts))
        for first in firsts:
            size = min(chunk, count - first)
            path = RUNS / "played" / of / split / _name(name, knobs, _version(source), first, size)
            jobs.append((work.played, (of, split, first, size, name, knobs, source), path))
    parts = iter(pool.run(f"{of} {what}", jobs))
    found = []
    for number in numbers:
        own = [next(parts) for _ in range(number)]
        found.append({account: torch.cat([part[account] for part in own]).double() for account in own[0]})
    return found


def _version(source: str) -> str:
    """Tells results of other checkpoints and fits from those of this one."""
    if not source:
        return ""
    path = Path(source)
    if path.is_dir():
        path = checkpoint.found(path)[0]
    return f"{zlib.crc32(path.read_bytes()):08x}"


# ---- stages ---------------------------------------------------------------------------------------------------------


def fit(pool: Pool) -> None:
    """Labels, and the scorers that are fitted to them."""
    paths = [RUNS / "labels" / f"{chunk}.pt" for chunk in range(LABELS)]
    pool.run("labels", [(work.labels, (chunk,), path) for chunk, path in enumerate(paths)])
    pool.run("scorers", [(work.fit, ([str(path) for path in paths], FEW), SCORERS)])


def tune(pool: Pool) -> None:
    """The knobs with the largest mean return on training instances, by successive halving."""
    left = {name: list(grid) for name, grid in GRID.items()}
    scores: dict[str, dict[str, float]] = {}

    def tried(trials: list[Trial], instances: int, what: str) -> None:
        found = play(pool, TRAINED_ON, "train", instances, trials, what)
        for (name, knobs, _), accounts in zip(trials, found, strict=True):
            scores.setdefault(name, {})[str(knobs)] = round(100 * float(accounts["return"].mean()), 3)

    def ranked(name: str, own: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(own, key=lambda knobs: -scores[name][str(knobs)])

    for instances, kept in ROUNDS:
        if kept:
            left = {name: ranked(name, own)[:kept] for name, own in left.items()}
        trials = [(name, knobs, str(SCORERS)) for name, own in left.items() for knobs in own]
        tried(trials, instances, f"tuning on {instances}")
    left["lookahead"] = [{"margin": margin} for margin in MARGINS]
    tried([("lookahead", knobs, "") for knobs in left["lookahead"]], LOOKED, "margins")
    chosen = {name: ranked(name, own)[0] for name, own in left.items()}
    grid = {**GRID, "lookahead": left["lookahead"]}
    _save("tuning.json", {"rounds": ROUNDS, "grid": grid, "chosen": chosen, "scores": scores})


def run_of(variant: str, seed: int) -> Path:
    """The run directory."""
    return RUNS / "train" / variant / f"seed{seed}"


def _runs(variants: Iterable[str]) -> dict[str, Path]:
    """The directories of the runs that have ended, by VARIANT/SEED, in the order of the seeds."""
    records = [path for variant in variants for path in (RUNS / "train" / variant).glob(f"seed*/{RECORD}")]
    found = {f"{path.parts[-3]}/{path.parts[-2][4:]}": path.parent for path in records}
    return dict(sorted(found.items(), key=lambda run: int(run[0].rpartition("/")[2])))


def train(variants: list[str], seeds: list[int], workers: int) -> None:
    """Trains what has not been trained, `workers` runs side by side, each on one core."""
    done = _runs(variants)
    todo = [(variant, seed) for seed in seeds for variant in variants if f"{variant}/{seed}" not in done]
    if todo:
        with Reporter("training", 100 * len(todo), "%") as reporter, ThreadPoolExecutor(workers) as threads:
            shares = dict.fromkeys(todo, 0.0)

            def shown(job: tuple[str, int], share: float, stage: str) -> None:
                shares[job] = share
                reporter.update(round(100 * sum(shares.values())), f"{job[0]}/{job[1]}, {stage}")

            list(threads.map(lambda job: _train(*job, shown), todo))
    records = {name: json.loads((folder / RECORD).read_text()) for name, folder in _runs(OVERRIDES).items()}
    path = RESULTS / "training.json"
    before = json.loads(path.read_text())["runs"] if path.exists() else {}
    _save("training.json", {"runs": {**before, **records}})


def _train(variant: str, seed: int, shown: Any) -> None:
    """One run in a process of its own, from where an earlier one was stopped; leaves RECORD in its directory."""
    folder = run_of(variant, seed)
    command = ["-m", "trainers.train", "experiment=study", f"seed={seed}", *OVERRIDES[variant], "evaluation.episodes=0"]
    given = [f"resume={folder}"] if folder.exists() and checkpoint.found(folder) else []
    arguments = command[:2] + given if given else [*command, f"hydra.run.dir={folder}"]
    start = time.perf_counter()
    before = _wall(folder)

    def noted(share: float, stage: str) -> None:
        shown((variant, seed), share, stage)
        (folder / "wall").write_text(str(before + time.perf_counter() - start))

    _follow(arguments, noted)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["step"], line["rollout/ep_rew_mean"]) for line in lines if "rollout/ep_rew_mean" in line]
    policy = checkpoint.latest(folder)[1]["learner"]["policy"]
    record = {
        "command": "python " + " ".join(command),
        "wall_s": round(_wall(folder)),
        "steps": curve[-1][0],
        "parameters": sum(values.numel() for values in policy.values()),
        "curve": [[step, round(100 * value, 2)] for step, value in _thinned(curve)],
    }
    (folder / RECORD).write_text(json.dumps(record))


def _follow(arguments: list[str], shown: Callable[[float, str], None]) -> None:
    """`python ARGUMENTS` to its end; tells what share of PPO's steps is behind it, and the stage."""
    for line in output_of(arguments):
        if match := re.match(r"(training|warm start: [\w ]+?)\s+([\d,]+)/([\d,]+)", line):
            stage, done, total = match[1], *(int(text.replace(",", "")) for text in match.groups()[1:])
            shown(done / total if stage == "training" else 0.0, stage)


def cost() -> None:
    """Times one run of the recipe, from its start to its last checkpoint; one that was stopped begins anew."""
    folder = RUNS / "timed"
    shutil.rmtree(folder, ignore_errors=True)
    torchrun = [f"--nproc-per-node={PROCESSES}", "-m", "trainers.train", "experiment=study", *OVERRIDES[RECIPE]]
    torchrun.append("evaluation.episodes=0")
    start = time.perf_counter()
    with Reporter("a run, timed", 100, "%") as reporter:
        arguments = ["-m", "torch.distributed.run", *torchrun, f"hydra.run.dir={folder}"]
        _follow(arguments, lambda share, stage: reporter.update(round(100 * share), stage))
    wall = time.perf_counter() - start
    _save("cost.json", {"command": " ".join(["torchrun", *torchrun]), "processes": PROCESSES, "wall_s": round(wall)})


def _wall(folder: Path) -> float:
    """Seconds that a run has taken so far."""
    return float((folder / "wall").read_text()) if (folder / "wall").exists() else 0.0


def _thinned(curve: list[tuple[int, float]], points: int = 60) -> list[tuple[int, float]]:
    """Means over equal parts."""
    size = max(len(curve) // points, 1)
    parts = [curve[first : first + size] for first in range(0, len(curve), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def play_all(pool: Pool, names: list[str]) -> None:
    """Every controller on every set."""
    chosen = json.loads((RESULTS / "tuning.json").read_text())["chosen"]
    policies = [(name, {}, str(folder)) for name, folder in _runs([RECIPE]).items()]
    rules = [("never", {}, ""), ("random", {}, "")]
    rules += [(name, chosen[name], str(SCORERS) if name in work.SCORERS else "") for name in GRID]
    for of in names:
        role, label, _ = SETS[of]
        count = PLAYED.get(of, PLAYED_ELSE)
        static = [("static", {}, policies[0][2])] if policies else []
        ceilings = [("lookahead", chosen["lookahead"], ""), ("oracle", {}, "")]
        everyone = [*rules, *policies, *static, *ceilings]
        shares: list[tuple[str, int, list[Trial]]] = [
            ("play", RIVALS_PLAYED.get(of, count), [*(rule for rule in rules if rule[0] in RIVALS), *policies]),
            ("play", count, [*(rule for rule in rules if rule[0] not in RIVALS), *static]),
            ("ceilings", min(count, CEILING if role == "training" else CEILING_ELSE), ceilings),
        ]
        played = {}
        for what, instances, trials in shares:
            accounts = play(pool, of, "heldout", instances, trials, what)
            played |= {name: own for (name, _, _), own in zip(trials, accounts, strict=True)}
        found = [played[name] for name, _, _ in everyone]
        _save(f"scores-{of.replace('/', '-')}.json", _scores(of, role, label, everyone, found))


def play_variants(pool: Pool) -> None:
    """Every variant that has been trained."""
    for what, names in COMPARISONS.items():
        policies = [(name, {}, str(folder)) for name, folder in _runs(names).items()]
        for of in COMPARED:
            role, label, _ = SETS[of]
            everyone = [("never", {}, ""), *policies]
            found = play(pool, of, "heldout", ABLATED, everyone, what)
            _save(f"{what}-{of.replace('/', '-')}.json", _scores(of, role, label, everyone, found))


def _scores(of: str, role: str, label: str, everyone: list[Trial], found: Any) -> Any:
    first = found[0]
    noisy = first["label_noise"] > 0
    epochs = work.config_of(of).epochs
    rows = {}
    for (name, knobs, _), accounts in zip(everyone, found, strict=True):
        waited = accounts["waited"] / epochs
        hard = noisy[: len(waited)]
        rows[name] = {
            "points": [round(value, 2) for value in accounts["points"].tolist()],
            "return": round(100 * float(accounts["return"].mean()), 3),
            **{k: round(float(accounts[k].mean()), 4) for k in ("params_ratio", "flops_ratio", "germinated", "culled")},
            "waited": round(float(waited.mean()), 4),
            "waited_noisy": round(float(waited[hard].mean()), 4) if hard.any() else None,
            "knobs": knobs or None,
        }
    return {
        "set": of,
        "role": role,
        "label": label,
        "split": "heldout",
        "seed": work.seed_of(of),
        "instances": len(first["points"]),
        "kind": [int(kind) for kind in first["kind"].tolist()],
        "label_noise": [round(value, 3) for value in first["label_noise"].tolist()],
        "controllers": rows,
    }


def _save(name: str, values: Any) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / name).write_text(json.dumps(values) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"any of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of training (default 1 to 5)")
    parser.add_argument("--variants", nargs="+", default=list(ABLATIONS), choices=VARIANTS, help="(ABLATIONS)")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, metavar="SET", help="to play (all)")
    parser.add_argument("--workers", type=int, default=2, help="processes, each of one thread (default 2)")
    arguments = parser.parse_args()
    for stage in arguments.stages:
        if stage not in STAGES:
            parser.error(f"{stage}: no such stage; choose from {', '.join(STAGES)}")
    stages = arguments.stages or STAGES
    with Pool(arguments.workers) as pool:
        if "fit" in stages:
            fit(pool)
        if "tune" in stages:
            tune(pool)
        if "train" in stages:
            train([RECIPE], arguments.seeds, arguments.workers)
        if "play" in stages:
            play_all(pool, arguments.sets)
        if "ablate" in stages:
            train(arguments.variants, arguments.seeds[:3], arguments.workers)
            play_variants(pool)
    if "cost" in stages:
        cost()


if __name__ == "__main__":
    main()
