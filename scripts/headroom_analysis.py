"""What the headroom study does with its chunks: fits, tunes, plays, and compares. Run scripts/headroom.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import headroom as h
import numpy as np
import torch
from torch import Tensor

from envs.config import EnvConfig
from esper.growth.conditions import DEFECTS, NEVER, Condition
from esper.tamiyo import baselines

if TYPE_CHECKING:
    from headroom import Sizes, Study

RIDGE = 30.0
CLIPPED = 60.0  # points; a diverged fork says no more than that
MARGINS = {"greedy": (3.0, 6.0), "planned": (1.0, 3.0, 6.0), "clairvoyant": (1.0, 3.0)}
MARGIN = {"greedy": 3.0, "planned": 3.0, "clairvoyant": 3.0}  # of studies too small to tune them
_RESAMPLES = 4000


def interval(x: np.ndarray) -> dict[str, float]:
    """Mean with its 95 % percentile bootstrap interval over instances."""
    generator = np.random.default_rng(0)
    means = x[generator.integers(len(x), size=(_RESAMPLES, len(x)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": round(float(x.mean()), 2), "low": round(float(low), 2), "high": round(float(high), 2), "n": len(x)}


def ridge(features: Tensor, blueprint: Tensor, gain: Tensor, blueprints: int) -> Tensor:
    """[blueprints, F], for each blueprint the linear regression of its gains on the features (which end in 1)."""
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-3)
    mean[-1], scale[-1] = 0.0, 1.0
    x, y = ((features - mean) / scale).double(), gain.clamp(-CLIPPED, CLIPPED).double()
    rows = []
    for number in range(blueprints):
        own = x[blueprint == number]
        penalty = RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
        penalty[-1, -1] = 1e-6
        weight = torch.linalg.solve(own.T @ own + penalty, own.T @ y[blueprint == number]).float() / scale
        weight[-1] -= (weight[:-1] * mean[:-1]).sum()
        rows.append(weight)
    return torch.stack(rows)


class Neural(torch.nn.Module):
    """A small network [m, F] -> [m, blueprints], the same for every slot, in points."""

    def __init__(self, mean: Tensor, scale: Tensor, blueprints: int):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.network = torch.nn.Sequential(
            torch.nn.Linear(len(mean), 64), torch.nn.GELU(), torch.nn.Linear(64, blueprints)
        )

    def forward(self, features: Tensor) -> Tensor:
        return 10 * self.network((features - self.mean) / self.scale)


def neural(features: Tensor, blueprint: Tensor, gain: Tensor, blueprints: int) -> Neural:
    """The neural scorer."""
    torch.manual_seed(0)
    scorer = Neural(features.mean(0), features.std(0).clamp(min=1e-3), blueprints)
    regress(scorer, lambda x: scorer(x) / 10, features, blueprint, gain, weight_decay=0.05)
    return scorer


def regress(
    network: torch.nn.Module,
    predict: Callable[[Tensor], Tensor],
    x: Tensor,
    blueprint: Tensor,
    gain: Tensor,
    *,
    weight_decay: float,
    passes: int = 12,
    last: float = 1.0,
) -> None:
    """Fits `network`, so that `predict` [m, blueprints] of `x` [m, F] is `gain` [m] over 10 points, large ones clipped.

    Args:
        last: the learning rate at the end, over that at the start.
    """
    steps = passes * len(x) // 256 + 1
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, last, steps)
    gain = gain.clamp(-CLIPPED, CLIPPED) / 10
    for _ in range(steps):
        rows = torch.randint(len(x), (256,))
        predicted = predict(x[rows]).gather(1, blueprint[rows, None]).squeeze(1)
        optimiser.zero_grad()
        torch.nn.functional.smooth_l1_loss(predicted, gain[rows]).backward()
        optimiser.step()
        schedule.step()


def remember(instances: str, what: str, value: Any) -> None:
    """Writes one entry of what has been tuned for `instances`."""
    stored = json.loads(h.FITTED.read_text())
    stored.setdefault(instances, {})[what] = value
    h.FITTED.write_text(json.dumps(dict(sorted(stored.items()))) + "\n")
    baselines.forget()


def analyse(study: Study, sizes: Sizes) -> dict[str, Any]:
    """Everything the study reports of one environment; also writes its tuned knobs."""
    config = h.config_of(study.instances)
    kinds = list(config.blueprints)
    labelled = h.stacked(study.run("labels", [(h.labels, (c,)) for c in range(sizes.labels)]))
    weights = ridge(labelled["features"], labelled["blueprint"], labelled["gain"], len(kinds))
    # Five digits are more than the fit is worth.
    rounded = {name: [float(f"{w:.5g}") for w in row] for name, row in zip(kinds, weights.tolist(), strict=True)}
    remember(study.instances, "weights", rounded)
    found: dict[str, Any] = {"instances": study.instances, "episodes_labelled": sizes.labels * h.CHUNK["labels"]}
    found["oracle"] = single(study, sizes, config, labelled)
    knobs = tune(study, sizes, config, found["oracle"]["best_fixed"])
    found["knobs"] = knobs
    found |= play(study, sizes)
    return found


def single(study: Study, sizes: Sizes, config: EnvConfig, labelled: dict[str, Tensor]) -> dict[str, Any]:
    """One germination at the first decision: the oracle, the best fixed one, scorers, and the effect by defect."""
    kinds = len(config.blueprints)
    jobs = [(h.oracle, (h.TRAINING, c)) for c in range(sizes.oracle)]
    jobs += [(h.oracle, (h.HELDOUT, c)) for c in range(sizes.oracle)]
    tables = study.run("oracle", jobs)
    training, heldout = h.stacked(tables[: sizes.oracle]), h.stacked(tables[sizes.oracle :])
    value = training["value"] - training["value"][:, :1]
    best = int(value.nan_to_num(0.0).mean(0).argmax())
    gain = heldout["test"] - heldout["test"][:, :1]
    choice = heldout["value"].nan_to_num(-torch.inf).argmax(1)
    everyone = torch.arange(len(gain))
    oracle_gain = gain[everyone, choice]
    fixed_gain = gain[:, best].nan_to_num(0.0)
    result: dict[str, Any] = {
        "never": interval(heldout["test"][:, 0].numpy()),
        "oracle_gain": interval(oracle_gain.numpy()),
        "best_fixed_gain": interval(fixed_gain.numpy()),
        "oracle_minus_best_fixed": interval((oracle_gain - fixed_gain).numpy()),
        # By validation no germination is better, or the one that seems to be does not help on the test split.
        "never_right": round(float((oracle_gain <= 0).float().mean()), 3),
        "best_fixed": {
            "slot": max(best - 1, 0) // kinds,
            "blueprint": list(config.blueprints)[(best - 1) % kinds],
            "epoch": h.FIRST if best else 1 << 20,
        },
    }
    # All germinations of the training instances teach the supervised scorers; labels of random episodes the curve.
    legal = (~value.isnan()).nonzero()
    legal = legal[legal[:, 1] > 0]
    slot, blueprint = (legal[:, 1] - 1) // kinds, (legal[:, 1] - 1) % kinds
    seen, gains = training["features"][legal[:, 0], slot], value[legal[:, 0], legal[:, 1]]
    early = labelled["epoch"] == h.FIRST
    seen = torch.cat([seen, labelled["features"][early]])
    blueprint = torch.cat([blueprint, labelled["blueprint"][early]])
    gains = torch.cat([gains, labelled["gain"][early]])
    result["scorers"] = {"episodes": len(seen)}
    tops = {
        "linear": lambda f: f @ ridge(seen, blueprint, gains, kinds).T,
        "neural": neural(seen, blueprint, gains, kinds),
    }
    for name, scorer in tops.items():
        result["scorers"][name] = _scored(scorer, heldout, gain, oracle_gain)
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))
    curve = []
    for count in (250, 500, 1000, 2000, 4000, 8000, len(seen)):
        if count <= len(seen):
            rows = order[:count]
            curve_weights = ridge(seen[rows], blueprint[rows], gains[rows], kinds)
            scored = _scored(lambda f, w=curve_weights: f @ w.T, heldout, gain, oracle_gain)
            curve.append({"episodes": count, **scored["gain"]})
    result["learning_curve"] = curve
    result["by_defect"] = by_defect(heldout, oracle_gain, fixed_gain, choice, list(config.blueprints))
    return result


@torch.no_grad()
def _scored(scorer: Any, heldout: dict[str, Tensor], gain: Tensor, oracle_gain: Tensor) -> dict[str, Any]:
    """Test points of the germination that a scorer ranks first (none if it promises nothing), and its share of the
    oracle's gain."""
    score = scorer(heldout["features"].flatten(0, 1)).view(len(gain), -1)
    score = torch.cat([torch.zeros(len(gain), 1), score.masked_fill(gain[:, 1:].isnan(), -torch.inf)], dim=1)
    got = gain[torch.arange(len(gain)), score.argmax(1)]
    return {"gain": interval(got.numpy()), "share_of_oracle": round(float(got.mean() / oracle_gain.mean()), 3)}


def by_defect(
    heldout: dict[str, Tensor], oracle_gain: Tensor, fixed_gain: Tensor, choice: Tensor, blueprints: list[str]
) -> dict[str, Any]:
    """Mean gains by the defects an instance has, in the end."""
    condition, strike, epoch = heldout["conditions"].unbind(2)
    final = torch.where(epoch < NEVER, strike, condition)
    exists = torch.arange(final.shape[1]) < heldout["depth"][:, None]
    defect = torch.isin(final, torch.tensor([int(d) for d in DEFECTS])) & exists
    number = defect.sum(1)
    name = [
        "none" if n == 0 else "several" if n > 1 else Condition(int(final[row][defect[row]][0])).name.lower()
        for row, n in enumerate(number.tolist())
    ]
    result = {}
    for kind in sorted(set(name)):
        rows = torch.tensor([other == kind for other in name])
        picked = choice[rows]
        counts = torch.bincount((picked[picked > 0] - 1) % len(blueprints), minlength=len(blueprints)).tolist()
        result[kind] = {
            "instances": int(rows.sum()),
            "oracle": round(float(oracle_gain[rows].mean()), 1),
            "best_fixed": round(float(fixed_gain[rows].mean()), 1),
            "wants": {b: c for b, c in zip(blueprints, counts, strict=True) if c},
        }
    return result


def tune(study: Study, sizes: Sizes, config: EnvConfig, best_fixed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The knobs of each controller with the largest mean value on the tuning instances; also stored."""
    grid = dict(h.GRID)
    grid["best_fixed"] = [{**best_fixed, "epoch": e} for e in sorted({best_fixed["epoch"], 6, 10})]
    trials = [
        (name, knobs)
        for name, candidates in grid.items()
        for knobs in candidates
        if knobs.get("blueprint", config.blueprints[0]) in config.blueprints
    ]
    jobs = [(h.play, (h.TUNING, sizes.tuning, name, knobs)) for name, knobs in trials]
    scores = [float(found["value"].mean()) for found in study.run("tuning", jobs)]
    chosen: dict[str, dict[str, Any]] = {}
    for name in grid:
        own = [(score, i) for i, (score, trial) in enumerate(zip(scores, trials, strict=True)) if trial[0] == name]
        chosen[name] = trials[max(own)[1]][1]
    remember(study.instances, "knobs", chosen)
    return chosen


def play(study: Study, sizes: Sizes) -> dict[str, Any]:
    """All controllers and look-aheads on the held-out instances, and how they compare."""
    names = ["never", "large", "random", *h.GRID, "best_fixed"]
    jobs = [(h.play, (h.HELDOUT, sizes.play, name, None)) for name in names]
    scores = {name: found["test"].numpy() for name, found in zip(names, study.run("controllers", jobs), strict=True)}
    margins = dict(MARGIN)
    for mode in sizes.modes:
        candidates = MARGINS[mode]
        if sizes.tune_margins:
            jobs = [(h.look, (h.TUNING, 0, mode, margin)) for margin in candidates]
            tuned = [float(found["value"].mean()) for found in study.run(f"{mode} margins", jobs)]
            margins[mode] = candidates[int(np.argmax(tuned))]
        chunks = sizes.lookahead if mode != "clairvoyant" else max(sizes.lookahead // 2, 1)
        jobs = [(h.look, (h.HELDOUT, c, mode, margins[mode])) for c in range(chunks)]
        scores[f"{mode}_lookahead"] = h.stacked(study.run(mode, jobs))["test"].numpy()
    controllers = {}
    for name, score in scores.items():
        controllers[name] = {"points": interval(score), "over_never": interval(score - scores["never"][: len(score)])}
    pairs = [("greedy_lookahead", "statistic"), ("planned_lookahead", "statistic")]
    pairs += [(f"{mode}_lookahead", rule) for mode in MARGINS for rule in ("linear", "gradmax", "probe")]
    comparisons = {}
    for better, worse in pairs:
        if better not in scores:
            continue
        count = min(len(scores[better]), len(scores[worse]))
        comparisons[f"{better} - {worse}"] = interval(scores[better][:count] - scores[worse][:count])
    rounded = {name: [round(float(s), 2) for s in score] for name, score in scores.items()}
    return {"margins": margins, "controllers": controllers, "comparisons": comparisons, "scores": rounded}
