"""What was played in the study, and its statistics. Run scripts/study_report.py.

Every interval is a 95 % percentile bootstrap with a fixed generator: instances are resampled within their kind of
context, the same ones for every controller, and runs where a variant was trained more than once.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from envs.contexts import KINDS

RESAMPLES = 2000
TAMIYO, STATISTIC, LINEAR = "tamiyo", "statistic", "linear"
ORACLE, LOOKAHEAD = "oracle", "lookahead"
HARMFUL = -1.0  # points below which growing has harmed an instance
TIE = 1e-6  # points; what differs by less differs by rounding
ORDER = ("mixture", "repair", "sequential", "shift", "growth", "plain")

Array = np.ndarray[Any, Any]


# Estimates: a figure and what it is in every resample.


def _number(value: float, form: str) -> str:
    digits = int(form[-2])
    return f"{round(value, digits) + 0.0:{form}}"  # + 0.0: no minus before a zero


@dataclass(frozen=True)
class Estimate:
    """A figure, and its value in every resample ([RESAMPLES]); two that share resamples are subtracted as pairs."""

    value: float
    resampled: Array

    @property
    def interval(self) -> tuple[float, float]:
        """95 % percentile interval."""
        low, high = np.percentile(self.resampled, [2.5, 97.5])
        return float(low), float(high)

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.resampled - other.resampled)

    def __truediv__(self, other: Estimate) -> Estimate:
        return Estimate(self.value / other.value, self.resampled / other.resampled)

    def __neg__(self) -> Estimate:
        return Estimate(-self.value, -self.resampled)

    def text(self, form: str = "+.1f") -> str:
        return f"{_number(self.value, form)} [{', '.join(_number(end, form) for end in self.interval)}]"


def iqm(x: Array, axis: int = -1) -> Array:
    """Interquartile mean, the mean of the middle half (Agarwal et al., arXiv 2108.13264); of fewer than 4, the mean."""
    cut = x.shape[axis] // 4
    middle = range(cut, x.shape[axis] - cut)
    return np.asarray(np.take(np.sort(x, axis=axis), middle, axis=axis).mean(axis=axis))


@lru_cache(maxsize=32)
def _instance_weights(kinds: bytes) -> Array:
    kind = np.frombuffer(kinds, dtype=np.int64)
    rng = np.random.default_rng(0)
    weights = np.zeros((RESAMPLES, len(kind)))
    for one in np.unique(kind):
        own = np.flatnonzero(kind == one)
        drawn = rng.integers(len(own), size=(RESAMPLES, len(own)))
        places = drawn + len(own) * np.arange(RESAMPLES)[:, None]
        weights[:, own] = np.bincount(places.ravel(), minlength=weights[:, own].size).reshape(RESAMPLES, -1)
    weights /= len(kind)
    weights.flags.writeable = False
    return weights


def instance_weights(kind: Array) -> Array:
    """Share of each instance in every resample, [RESAMPLES, instances]; kinds keep their shares."""
    return _instance_weights(np.ascontiguousarray(kind, dtype=np.int64).tobytes())


def run_draws(name: str, runs: int) -> Array:
    """Runs of the variant `name` in every resample, [RESAMPLES, runs]. Variants are drawn independently."""
    return np.random.default_rng([1, zlib.crc32(name.encode())]).integers(runs, size=(RESAMPLES, runs))


def run_shares(name: str, runs: int) -> Array:
    """Share of each run in every resample, [RESAMPLES, runs]."""
    return np.asarray((run_draws(name, runs)[:, :, None] == np.arange(runs)).mean(axis=1))


# What was played.


@dataclass(frozen=True)
class Group:
    """The runs of a variant; a controller that is not trained by Simic is its own single run."""

    name: str
    seeds: list[str]
    """Of the runs of a policy; empty for all others."""
    points: Array
    """[runs, instances]."""
    accounts: list[dict[str, Any]]
    """What the file says of each run."""

    @property
    def policy(self) -> bool:
        """Whether this was trained as Tamiyo is."""
        return bool(self.seeds)

    def account(self, key: str) -> float | None:
        """Mean over runs."""
        values = [row[key] for row in self.accounts if row.get(key) is not None]
        return float(np.mean(values)) if values else None


@dataclass(frozen=True, eq=False)  # compared by identity, so that results can be remembered
class Played:
    """One set of instances, and all who played it."""

    name: str
    label: str
    training: bool
    kind: Array
    noise: Array
    groups: dict[str, Group]

    @property
    def context(self) -> str:
        return self.name.split("/")[-1]

    def baselines(self) -> list[str]:
        """All but trained policies and ceilings."""
        return [name for name, group in self.groups.items() if not group.policy and name not in (ORACLE, LOOKAHEAD)]

    def shared(self, *names: str) -> Array:
        """The instances that all of these played: the first ones of the set."""
        return np.arange(min(self.groups[name].points.shape[1] for name in names))

    def ceiling(self) -> str | None:
        """The best single germination where a host needs one at most, the look-ahead elsewhere; None if not played."""
        name = ORACLE if np.all(self.kind == KINDS.index("repair")) else LOOKAHEAD
        return name if name in self.groups else None


def read_set(data: dict[str, Any]) -> Played:
    """A file of scores; runs `VARIANT/SEED` are gathered by variant."""
    kind, noise = np.array(data["kind"], dtype=np.int64), np.array(data["label_noise"], dtype=float)
    runs: dict[str, list[dict[str, Any]]] = {}
    seeds: dict[str, list[str]] = {}
    for name, row in sorted(data["controllers"].items()):
        variant, _, seed = name.partition("/")
        runs.setdefault(variant, []).append(row)
        seeds.setdefault(variant, []).extend([seed] if seed else [])
        if not 0 < len(row["points"]) <= len(kind) or not np.all(np.isfinite(row["points"])):
            raise ValueError(f"{data['set']}: {name} needs a finite score for each of 1 to {len(kind)} instances")
    groups = {}
    for variant, rows in runs.items():
        count = min(len(row["points"]) for row in rows)
        points = np.array([row["points"][:count] for row in rows], dtype=float)
        groups[variant] = Group(variant, seeds[variant], points, rows)
    return Played(data["set"], data.get("label", ""), data["role"] == "training", kind, noise, groups)


def in_order(found: list[Played]) -> list[Played]:
    """Training sets first, by context; then by name."""

    def place(one: Played) -> tuple[bool, int, str]:
        return not one.training, ORDER.index(one.context) if one.context in ORDER else len(ORDER), one.name

    return sorted(found, key=place)


Task = tuple[str, Played, Array]
"""A name, a set, and some of its instances."""


def tasks(found: list[Played]) -> list[Task]:
    """The kinds of context that were trained on: a set of one kind, else that kind's instances in the mixture."""
    own = [one for one in found if one.training]
    result: list[Task] = [(one.name, one, np.arange(len(one.kind))) for one in own if len(np.unique(one.kind)) == 1]
    names = {name for name, _, _ in result}
    for one in own:
        kinds = np.unique(one.kind)
        if len(kinds) > 1:
            for kind in kinds:
                name = f"{one.name.rpartition('/')[0]}/{KINDS[kind]}".lstrip("/")
                if name not in names:
                    result.append((f"{name} in {one.context}", one, np.flatnonzero(one.kind == kind)))
    return result


def by_variant(training: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for name, run in sorted(training.get("runs", {}).items()):
        found.setdefault(name.partition("/")[0], []).append(run)
    return found


# Statistics.


def run_means(one: Played, name: str, where: Array) -> tuple[Array, Array]:
    """Mean points of each run on the instances `where`: [runs], and in every resample, [RESAMPLES, runs]."""
    return _run_means(one, name, np.asarray(where, dtype=np.int64).tobytes())


@lru_cache(maxsize=4096)
def _run_means(one: Played, name: str, where: bytes) -> tuple[Array, Array]:
    instances = np.frombuffer(where, dtype=np.int64)
    points = one.groups[name].points[:, instances]
    return points.mean(axis=1), instance_weights(one.kind[instances]) @ points.T


def over_runs(name: str, means: Array, resampled: Array) -> Estimate:
    """IQM over runs of `means` ([runs]) and of its resamples ([RESAMPLES, runs])."""
    drawn = np.take_along_axis(resampled, run_draws(name, len(means)), axis=1)
    return Estimate(float(iqm(means)), iqm(drawn))


def points(one: Played, name: str, where: Array | None = None) -> Estimate:
    """IQM over runs of the mean over instances."""
    return over_runs(name, *run_means(one, name, one.shared(name) if where is None else where))


def difference(one: Played, first: str, second: str) -> Estimate:
    """Points of the first less those of the second, on the instances that both played."""
    where = one.shared(first, second)
    return points(one, first, where) - points(one, second, where)


def normalised_gain(one: Played, name: str) -> Estimate | None:
    """0 for never, 1 for the ceiling, on the ceiling's instances; None without a ceiling clearly above never."""
    ceiling = one.ceiling()
    if ceiling is None or name not in one.groups:
        return None
    where = one.shared(name, ceiling)
    whole = points(one, ceiling, where)
    return points(one, name, where) / whole if whole.interval[0] > 0 else None


def wins(first: Array, second: Array) -> Array:
    """1 where the first is more, 1/2 where they tie, 0 elsewhere."""
    gap = first - second
    return np.where(np.abs(gap) < TIE, 0.5, gap > 0)


def _over_pairs(first: Group, second: Group, won: Array, resampled: Array) -> Estimate:
    """Mean over pairs of runs of `won` ([first, second]) and of its resamples ([RESAMPLES, first, second])."""
    shares = [run_shares(group.name, len(group.points)) for group in (first, second)]
    return Estimate(float(won.mean()), np.einsum("rab,ra,rb->r", resampled, *shares))


def improvement_by_instance(one: Played, first: str, second: str) -> Estimate:
    """Share of instances on which a run of the first scores higher than one of the second; ties count half."""
    where = one.shared(first, second)
    a, b = one.groups[first], one.groups[second]
    won = wins(a.points[:, None, where], b.points[None, :, where])
    weights = instance_weights(one.kind[where])
    resampled = (weights @ won.reshape(-1, len(where)).T).reshape(RESAMPLES, *won.shape[:2])
    return _over_pairs(a, b, won.mean(axis=2), resampled)


def improvement_by_run(kinds: list[Task], first: str, second: str) -> Estimate | None:
    """Probability that a run of the first has the higher mean than one of the second on a kind of context (Agarwal et
    al.), mean over kinds. A resample draws one list of runs for all kinds, since one run plays them all."""
    parts = []
    for _, one, instances in kinds:
        if first in one.groups and second in one.groups:
            where = instances[instances < len(one.shared(first, second))]
            if len(where):
                a, b = run_means(one, first, where), run_means(one, second, where)
                won = wins(a[0][:, None], b[0][None])
                resampled = wins(a[1][:, :, None], b[1][:, None])
                parts.append(_over_pairs(one.groups[first], one.groups[second], won, resampled))
    if not parts:
        return None
    resampled = np.mean([part.resampled for part in parts], axis=0)
    return Estimate(float(np.mean([part.value for part in parts])), resampled)


def improvements(found: list[Played]) -> dict[str, Estimate]:
    """Probability of improvement by runs over every baseline that met Tamiyo."""
    kinds = tasks(found)
    names = sorted({name for one in found if one.training for name in one.baselines()})
    rows = {name: improvement_by_run(kinds, TAMIYO, name) for name in names}
    return {name: row for name, row in rows.items() if row is not None}


def harmful(one: Played, name: str) -> float:
    """Share of instances that end more than a point below never."""
    return float((one.groups[name].points < HARMFUL).mean())


def best(one: Played, names: list[str]) -> str:
    """The highest mean on this very set, which flatters it."""
    return max(names, key=lambda name: points(one, name).value)


def never_right(one: Played) -> Array:
    """Instances on which the ceiling gains nothing; plain ones where there is no ceiling."""
    ceiling = one.ceiling()
    if ceiling is None:
        return np.flatnonzero(one.kind == KINDS.index("plain"))
    return np.flatnonzero(one.groups[ceiling].points[0] <= 0)


def failed(one: Played, rival: str) -> tuple[list[str], Estimate]:
    """Seeds of Tamiyo's runs whose mean is below the rival's, and how many those are."""
    where = one.shared(TAMIYO, rival)
    mine, theirs = run_means(one, TAMIYO, where), run_means(one, rival, where)
    below, resampled = mine[0] < theirs[0].mean() - TIE, mine[1] < theirs[1].mean(axis=1, keepdims=True) - TIE
    drawn = np.take_along_axis(resampled, run_draws(TAMIYO, len(below)), axis=1)
    seeds = [seed for seed, low in zip(one.groups[TAMIYO].seeds, below, strict=True) if low]
    return seeds, Estimate(float(below.sum()), drawn.sum(axis=1))
