"""Writes the tables and plots of docs/results.md from scripts/results/study/*.json, which scripts/study.py measured.

python scripts/study_report.py      # needs the extra `plots`

Every interval is a 95 % percentile bootstrap with a fixed generator: instances are resampled within their kind of
context, the same ones for every controller, and runs where a variant was trained more than once.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from envs.contexts import KINDS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results" / "study"
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- tables: made by scripts/study_report.py -->", "<!-- end of tables -->"

RESAMPLES = 2000
TAMIYO, NEVER, STATISTIC, LINEAR = "tamiyo", "never", "statistic", "linear"
ORACLE, LOOKAHEAD = "oracle", "lookahead"
REPAIR_GAIN, GAIN, IMPROVEMENT, LOSS = 0.88, 0.9, 0.65, 0.3  # the bars
HARMFUL = -1.0  # points below which growing has harmed an instance
TIE = 1e-6  # points; what differs by less differs by rounding
ORDER = ("mixture", "repair", "sequential", "shift", "growth", "plain")
RIVALS = 3  # baselines in the performance profile
CAPTIONS = {
    "results_points.png": "points of every controller, by kind of context",
    "results_profile.png": "performance profiles",
    "results_pareto.png": "points against parameters and FLOPs",
    "results_learning.png": "learning curves",
}
RED, GREY, BLUE, PURPLE = "#d62728", "#7f7f7f", "#1f77b4", "#9467bd"
OTHERS = (BLUE, "#2ca02c", "#ff7f0e", PURPLE, "#8c564b", "#17becf", "#e377c2", "#bcbd22", "#393b79", GREY)

Array = np.ndarray[Any, Any]


# Estimates: a figure and what it is in every resample.


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


# Tables.


def _number(value: float, form: str) -> str:
    digits = int(form[-2])
    return f"{round(value, digits) + 0.0:{form}}"  # + 0.0: no minus before a zero


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _given(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{unit}{value:{form}}"


def table(headings: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in [headings, *rows]]
    return [lines[0], "|" + "---|" * len(headings), *lines[1:], ""]


def title(one: Played, name: str) -> str:
    """With how many runs there are, and how many instances if not all were played."""
    runs, count = one.groups[name].points.shape
    notes = [f"{runs} run{'s' * (runs > 1)}"] * one.groups[name].policy
    notes += [f"first {count}"] * (count < len(one.kind))
    return (f"**{name}**" if name == TAMIYO else name) + (f" ({', '.join(notes)})" if notes else "")


def details(one: Played) -> list[str]:
    """All controllers on one set, best first."""
    headings = ["controller", "points", "Tamiyo minus it", "normalised gain", "Tamiyo better", "harmful"]
    headings += ["size", "FLOPs", "germinated", "culled", "WAIT", "WAIT, noisy"]
    rows = []
    for name in sorted(one.groups, key=lambda name: (-points(one, name).value, name)):
        group, gain = one.groups[name], normalised_gain(one, name)
        minus, better = "", ""
        if name != TAMIYO and TAMIYO in one.groups:
            minus = difference(one, TAMIYO, name).text()
            better = improvement_by_instance(one, TAMIYO, name).text(".2f")
        row = [title(one, name), points(one, name).text(), minus, gain.text(".2f") if gain else "", better]
        row += [_share(harmful(one, name))]
        row += [_given(group.account(key), ".2f", "x") for key in ("params_ratio", "flops_ratio")]
        row += [_given(group.account(key), ".1f") for key in ("germinated", "culled")]
        rows.append(row + [_share(group.account(key)) for key in ("waited", "waited_noisy")])
    label = f", {one.label}" if one.label else ""
    noisy = float((one.noise > 0).mean())
    text = f"{len(one.kind):,} instances, {_share(noisy)} of them with label noise."
    return [f"### {one.name}{label}", "", text, "", *table(headings, rows)]


@dataclass(frozen=True)
class Bar:
    """One line of the summary; `met` is None where there is nothing to judge."""

    what: str
    on: str
    figure: str
    needed: str
    met: bool | None

    def row(self) -> list[str]:
        verdict = {True: "met", False: "not met", None: "not measured" if self.needed else ""}[self.met]
        return [self.what, self.on, self.figure, self.needed, verdict]


def gain_bar(one: Played, needed: float) -> Bar:
    gain, need = normalised_gain(one, TAMIYO), f"at least {needed}"
    if gain is None:
        played = one.ceiling() is not None and TAMIYO in one.groups
        return Bar("normalised gain", one.name, "the ceiling is not clear of never" if played else "", need, None)
    return Bar("normalised gain", one.name, gain.text(".2f"), need, gain.value >= needed)


def rival_bar(one: Played, rival: str, clear: bool) -> Bar:
    """Paired: above the rival with the interval clear of 0, or just not below it."""
    what, need = f"Tamiyo minus `{rival}`", "interval above 0" if clear else "not below 0"
    if rival not in one.groups or TAMIYO not in one.groups:
        return Bar(what, one.name, "", need, None)
    gap = difference(one, TAMIYO, rival)
    return Bar(what, one.name, gap.text(), need, gap.interval[0] > TIE if clear else gap.value >= -TIE)


def clear_bar(one: Played) -> Bar:
    """Tamiyo's interval lies above that of every baseline."""
    what, need = "points, against the baseline whose interval ends highest", "intervals apart"
    if TAMIYO not in one.groups or not one.baselines():
        return Bar(what, one.name, "", need, None)
    mine = points(one, TAMIYO)
    rivals = {name: points(one, name) for name in one.baselines()}
    highest = max(rivals, key=lambda name: rivals[name].interval[1])
    figure = f"{mine.text()}, `{highest}` {rivals[highest].text()}"
    return Bar(what, one.name, figure, need, rivals[highest].interval[1] < mine.interval[0] - TIE)


def loss_bar(one: Played) -> Bar | None:
    """What Tamiyo loses where never growing is right; None if that is nowhere."""
    where = never_right(one)
    what, need = "loss where never is right", f"at most {LOSS} points"
    if not len(where):
        return None
    if TAMIYO not in one.groups:
        return Bar(what, one.name, "", need, None)
    where = where[where < len(one.shared(TAMIYO))]
    if not len(where):
        return None
    loss = -points(one, TAMIYO, where)
    return Bar(what, f"{one.name}, {len(where)} instances", loss.text("+.2f"), need, loss.value <= LOSS + TIE)


def failed_bar(one: Played) -> Bar:
    what, need = "failed runs: mean below that of the best baseline", "none"
    if TAMIYO not in one.groups or not one.baselines():
        return Bar(what, one.name, "", need, None)
    rival, runs = best(one, one.baselines()), len(one.groups[TAMIYO].points)
    seeds, count = failed(one, rival)
    named = f" (seed {', '.join(seeds)})" if seeds else ""
    return Bar(what, one.name, f"{count.text('.0f')} of {runs}{named}, best `{rival}`", need, not seeds)


def improvement_bar(found: list[Played]) -> Bar:
    """Over the baseline that Tamiyo improves on least surely."""
    what, need = (
        "probability of improvement, runs",
        f"at least {IMPROVEMENT} and interval above 0.5, for every baseline",
    )
    rows = improvements(found)
    if not rows:
        return Bar(what, "kinds of context", "", need, None)
    met = all(row.value >= IMPROVEMENT and row.interval[0] > 0.5 for row in rows.values())
    lowest = min(rows, key=lambda name: (rows[name].value, rows[name].interval[0], name))
    return Bar(what, "kinds of context", f"least over `{lowest}`: {rows[lowest].text('.2f')}", need, met)


def improvements(found: list[Played]) -> dict[str, Estimate]:
    """Probability of improvement by runs over every baseline that met Tamiyo."""
    kinds = tasks(found)
    names = sorted({name for one in found if one.training for name in one.baselines()})
    rows = {name: improvement_by_run(kinds, TAMIYO, name) for name in names}
    return {name: row for name, row in rows.items() if row is not None}


def cost_bar(training: dict[str, Any]) -> Bar:
    """What a run of Tamiyo took; there is nothing to meet."""
    runs = _by_variant(training).get(TAMIYO, [])
    figure = ""
    if runs:
        hours = [run["wall_s"] / 3600 for run in runs]
        spread = f"{np.mean(hours):.2f} h a run ({min(hours):.2f} to {max(hours):.2f})"
        figure = f"{len(runs)} runs, {spread}, {runs[0]['steps']:,} steps, {runs[0]['parameters']:,} parameters"
    return Bar("training cost", "", figure, "", None)


def bars(found: list[Played], training: dict[str, Any]) -> list[Bar]:
    """What Tamiyo was meant to reach, and whether it did."""

    def each(context: str, make: Callable[[Played], list[Bar | None]]) -> list[Bar]:
        own = [one for one in found if one.training and one.context == context]
        empty = Played(context, "", True, np.zeros(0, dtype=np.int64), np.zeros(0), {})
        return [bar for one in own or [empty] for bar in make(one) if bar is not None]

    def repair(one: Played) -> list[Bar | None]:
        return [gain_bar(one, REPAIR_GAIN), rival_bar(one, STATISTIC, True), rival_bar(one, LINEAR, False)]

    lines = each("repair", repair)
    for context in ("sequential", "shift", "mixture"):
        lines += each(context, lambda one: [gain_bar(one, GAIN), clear_bar(one)])
    lines.append(improvement_bar(found))
    for context in ORDER:
        lines += each(context, lambda one: [loss_bar(one)])
    return [*lines, *each("mixture", lambda one: [failed_bar(one)]), cost_bar(training)]


def improvement_table(found: list[Played]) -> list[str]:
    mixtures = [one for one in found if one.training and one.context == "mixture" and TAMIYO in one.groups]
    rows = []
    for name, estimate in sorted(improvements(found).items(), key=lambda item: (item[1].value, item[0])):
        each = [
            improvement_by_instance(one, TAMIYO, name).text(".2f") if name in one.groups else "" for one in mixtures
        ]
        rows.append([name, estimate.text(".2f"), *each])
    kinds = ", ".join(name for name, _, _ in tasks(found))
    headings = ["baseline", "by run, over kinds", *(f"by instance, {one.name}" for one in mixtures)]
    return [f"Kinds: {kinds}.", "", *table(headings, rows)] if rows else []


def generalisation(found: list[Played]) -> list[str]:
    """Tamiyo against the best baseline where it was not trained."""
    rows = []
    for one in found:
        if not one.training and TAMIYO in one.groups and one.baselines():
            rival = best(one, one.baselines())
            gain = normalised_gain(one, TAMIYO)
            row = [one.name, one.label, f"{len(one.shared(TAMIYO, rival)):,}", points(one, TAMIYO).text()]
            row += [f"{rival} {points(one, rival).text()}", difference(one, TAMIYO, rival).text()]
            row += [improvement_by_instance(one, TAMIYO, rival).text(".2f"), gain.text(".2f") if gain else ""]
            rows.append(row)
    headings = ["set", "what is new", "instances", "Tamiyo", "best baseline there", "Tamiyo minus it"]
    return table([*headings, "Tamiyo better", "normalised gain"], rows) if rows else []


def variants(found: list[Played]) -> list[str]:
    """Every variant against Tamiyo. Their runs are not pairs, their instances are."""
    own = [one for one in found if one.training and one.context in ("mixture", "sequential") and TAMIYO in one.groups]
    names = sorted({name for one in own for name, group in one.groups.items() if group.policy})
    rows = []
    for name in sorted(names, key=lambda name: (name != TAMIYO, name)):
        row = [name, str(max(len(one.groups[name].points) for one in own if name in one.groups))]
        for one in own:
            if name in one.groups:
                gain = normalised_gain(one, name)
                minus = "" if name == TAMIYO else difference(one, name, TAMIYO).text()
                row += [points(one, name).text(), minus, gain.text(".2f") if gain else ""]
            else:
                row += ["", "", ""]
        rows.append(row)
    parts = [f"{one.name}: {what}" for one in own for what in ("points", "minus Tamiyo", "normalised gain")]
    return table(["variant", "runs", *parts], rows) if len(rows) > 1 else []


def _by_variant(training: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for name, run in sorted(training.get("runs", {}).items()):
        found.setdefault(name.partition("/")[0], []).append(run)
    return found


def costs(training: dict[str, Any]) -> list[str]:
    rows = []
    for name, runs in _by_variant(training).items():
        hours = [run["wall_s"] / 3600 for run in runs]
        speed = float(np.mean([run["steps"] / run["wall_s"] for run in runs]))
        row = [name, str(len(runs)), f"{runs[0]['steps']:,}", f"{np.mean(hours):.2f}", f"{sum(hours):.2f}"]
        rows.append([*row, f"{speed:,.0f}", f"{runs[0]['parameters']:,}", f"`{runs[0]['command']}`"])
    headings = ["variant", "runs", "steps", "hours a run", "hours in all", "steps a second", "parameters"]
    return table([*headings, "command of the first"], rows) if rows else []


def knobs(found: list[Played], tuning: dict[str, Any]) -> list[str]:
    """How controllers were tuned, and with which knobs they played where."""
    grid, chosen = tuning.get("grid", {}), tuning.get("chosen", {})
    played: dict[tuple[str, str], list[str]] = {}
    everywhere: dict[str, int] = {}
    for one in found:
        for name, group in one.groups.items():
            given = group.accounts[0].get("knobs")
            if given and not group.policy:
                played.setdefault((name, _knobs(given)), []).append(one.name)
                everywhere[name] = everywhere.get(name, 0) + 1
    for name, given in chosen.items():
        if given and name not in everywhere:
            played[name, _knobs(given)] = []
    rows = []
    for (name, given), sets in sorted(played.items()):
        where = "every set" if sets and len(sets) == everywhere[name] else ", ".join(sets)
        rows.append([name, str(len(grid[name])) if name in grid else "", given, where])
    return table(["controller", "knobs tried", "knobs chosen", "played on"], rows) if rows else []


def _knobs(given: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(given.items()))


def section(heading: str, text: str, lines: list[str]) -> list[str]:
    """Nothing if there are no lines."""
    return [f"### {heading}", "", *([text, ""] if text else []), *lines] if lines else []


def report(found: list[Played], training: dict[str, Any], tuning: dict[str, Any], plots: list[str]) -> list[str]:
    """All lines between the markers."""
    if not found:
        return ["", "No results are here yet.", ""]
    rows = [bar.row() for bar in bars(found, training)]
    lines = ["", *section("Bars", "", table(["what", "on", "measured", "needed", "verdict"], rows))]
    lines += section("Probability of improvement over each baseline", "", improvement_table(found))
    text = "The best baseline is the one with the highest mean on that very set, chosen after the fact."
    lines += section("Generalisation", text, generalisation(found))
    lines += section("Recipes and ablations", "", variants(found))
    lines += section("Training", "", costs(training))
    for name in plots:
        lines += [f"![{CAPTIONS[name]}]({name})", ""]
    lines += [line for one in found for line in details(one)]
    return lines + section("Knobs", tuned(tuning), knobs(found, tuning))


def tuned(tuning: dict[str, Any]) -> str:
    """On how many instances: `episodes` for all knobs alike, or `rounds` of (instances, how many of the best knobs)."""
    rounds = tuning.get("rounds") or ([[tuning["episodes"], None]] if "episodes" in tuning else [])
    parts = [f"{count:,} for " + (f"the best {kept}" if kept else "all") for count, kept in rounds]
    return f"Training instances for each controller's knobs: {', '.join(parts)}." if parts else ""


def between(text: str, lines: list[str]) -> str:
    """`text` with `lines` between the markers."""
    before, rest = text.split(BEGIN)
    return before + "\n".join([BEGIN, *lines, END]) + rest.split(END)[1]


# Plots.


def _save(figure: Any, path: Path) -> str:
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    with Image.open(buffer) as drawn:  # a palette makes a file a third as large
        drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path.name


def _colour(one: Played, name: str) -> str:
    if name in (ORACLE, LOOKAHEAD):
        return GREY
    if name == TAMIYO:
        return RED
    return PURPLE if one.groups[name].policy else BLUE


def plot_points(found: list[Played], folder: Path) -> list[str]:
    """Points of every controller, one panel for the mixture and for each kind of context."""
    own = [(one.name, one, np.arange(len(one.kind))) for one in found if one.training and len(np.unique(one.kind)) > 1]
    panels = own + tasks(found)
    if not panels:
        return []
    names: dict[str, float] = {}
    for _, one, _ in panels:
        for name in one.groups:
            names.setdefault(name, points(one, name).value)
    order = sorted(names, key=lambda name: (names[name], name))
    size = (1.6 + 1.9 * len(panels), 1.2 + 0.21 * len(order))
    figure, grid = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, (heading, one, instances) in zip(grid[0], panels, strict=True):
        shown = []
        for place, name in enumerate(order):
            if name in one.groups:
                where = instances[instances < len(one.shared(name))]
                if len(where):
                    estimate = points(one, name, where)
                    shown.append((place, estimate.value, *estimate.interval, _colour(one, name)))
        places, values, low, high, colours = (list(column) for column in zip(*shown, strict=True))
        axes.hlines(places, low, high, color=colours, linewidth=1.2)
        axes.scatter(values, places, c=colours, s=12)
        axes.axvline(0, color="grey", linewidth=0.5)
        axes.grid(axis="x", alpha=0.25)
        axes.set_title(heading, fontsize=8)
        axes.tick_params(labelsize=7)
    grid[0, 0].set_yticks(range(len(order)), order)
    figure.supxlabel("points over never, 95 % intervals", fontsize=8)
    return [_save(figure, folder / "results_points.png")]


def profile(one: Played, name: str, where: Array, taus: Array) -> tuple[Array, Array, Array]:
    """Share of the instances `where` with more than `taus` points, mean over runs, and its interval, [taus] each."""
    above = one.groups[name].points[:, where, None] > taus
    weights, runs = instance_weights(one.kind[where]), run_shares(name, len(above))
    resampled = np.einsum("rs,srt->rt", runs, np.stack([weights @ run for run in above]))
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return above.mean(axis=(0, 1)), low, high


def plot_profile(found: list[Played], folder: Path) -> list[str]:
    """Performance profiles of Tamiyo, the best baselines and the look-ahead on the sets that were trained on."""
    own = [one for one in found if one.training]
    if not own:
        return []
    columns = min(3, len(own))
    size = (3.6 * columns, 2.7 * -(-len(own) // columns))
    figure, grid = plt.subplots(-(-len(own) // columns), columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(own) :]:
        axes.set_axis_off()
    for axes, one in zip(grid.flat, own, strict=False):
        rivals = sorted(one.baselines(), key=lambda name: -points(one, name).value)[:RIVALS]
        shown = [name for name in (TAMIYO, LOOKAHEAD) if name in one.groups] + rivals
        where = one.shared(*shown)
        every = np.concatenate([one.groups[name].points[:, where].ravel() for name in shown])
        low, high = np.percentile(every, [1, 99])
        taus = np.linspace(float(low), float(high), 81)
        colours = iter(OTHERS)
        for name in shown:
            share, lower, upper = profile(one, name, where, taus)
            colour = _colour(one, name) if name not in rivals else next(colours)
            style = "--" if name == LOOKAHEAD else "-"
            axes.plot(taus, share, color=colour, linestyle=style, linewidth=1.3, label=name)
            axes.fill_between(taus, lower, upper, color=colour, alpha=0.12, linewidth=0)
        axes.axvline(0, color="grey", linewidth=0.5)
        axes.set_title(f"{one.name}, {len(where):,} instances", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=6)
    figure.supxlabel("points over never", fontsize=8)
    figure.supylabel("share of instances above", fontsize=8)
    return [_save(figure, folder / "results_profile.png")]


def on_one_axis(runs: list[dict[str, Any]]) -> tuple[Array, Array]:
    """Steps [n] as far as every run of the variant went, and the runs' returns there, [runs, n]."""
    curves = [np.array(run["curve"], dtype=float).reshape(-1, 2) for run in runs if run.get("curve")]
    if not curves:
        return np.zeros(0), np.zeros((0, 0))
    steps = curves[0][:, 0]
    steps = steps[steps <= min(curve[-1, 0] for curve in curves)]
    return steps, np.array([np.interp(steps, curve[:, 0], curve[:, 1]) for curve in curves])


def plot_learning(training: dict[str, Any], folder: Path) -> list[str]:
    """Learning curves: the mean over a variant's runs, from the lowest to the highest run."""
    curves = {name: on_one_axis(runs) for name, runs in _by_variant(training).items()}
    curves = {name: curve for name, curve in curves.items() if len(curve[0])}
    if not curves:
        return []
    figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    others = [name for name in curves if name != TAMIYO]
    for name, (steps, values) in curves.items():
        colour = RED if name == TAMIYO else OTHERS[others.index(name) % len(OTHERS)]
        label = f"{name} ({len(values)} run{'s' * (len(values) > 1)})"
        width, order = (1.8, 3) if name == TAMIYO else (1.0, 2)
        axes.plot(steps / 1e6, values.mean(axis=0), color=colour, linewidth=width, zorder=order, label=label)
        axes.fill_between(steps / 1e6, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("environment steps, millions", fontsize=8)
    axes.set_ylabel("mean return in training, points", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=6, loc="lower right")
    return [_save(figure, folder / "results_learning.png")]


def front(found: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, gain) that no other beats: none costs as little and gains as much. Cheapest first."""
    kept: list[tuple[float, float]] = []
    for cost, gain in sorted(found, key=lambda pair: (pair[0], -pair[1])):
        if not kept or gain > kept[-1][1]:
            kept.append((cost, gain))
    return kept


def plot_pareto(found: list[Played], folder: Path) -> list[str]:
    """Points against parameters and against compute."""
    own = [one for one in found if one.training and one.context in ("mixture", "sequential")]
    own = own or [one for one in found if one.training][:1]
    if not own:
        return []
    figure, grid = plt.subplots(len(own), 2, figsize=(9.5, 3.6 * len(own)), squeeze=False, layout="constrained")
    for row, one in zip(grid, own, strict=True):
        for axes, key in zip(row, ("params_ratio", "flops_ratio"), strict=True):
            names = sorted(name for name, group in one.groups.items() if group.account(key) is not None)
            at = [one.groups[name].account(key) or 0.0 for name in names]
            gains = [points(one, name).value for name in names]
            for name, x, y in zip(names, at, gains, strict=True):
                marker = "*" if name == TAMIYO else "^" if name in (ORACLE, LOOKAHEAD) else "o"
                axes.plot([x], [y], marker, color=_colour(one, name), markersize=9 if name == TAMIYO else 4)
                if name == TAMIYO or not one.groups[name].policy:  # variants crowd around Tamiyo
                    axes.annotate(name, (x, y), xytext=(4, 2), textcoords="offset points", fontsize=6)
            # Ceilings train forks of the host, which no ratio counts.
            playable = [(x, y) for name, x, y in zip(names, at, gains, strict=True) if name not in (ORACLE, LOOKAHEAD)]
            axes.plot(*zip(*front(playable), strict=True), color="grey", linewidth=0.7, zorder=0)
            axes.set_xlabel(
                {"params_ratio": "parameters", "flops_ratio": "FLOPs"}[key] + " over the twin's", fontsize=8
            )
            axes.set_title(one.name, fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25)
        row[0].set_ylabel("points over never", fontsize=8)
    return [_save(figure, folder / "results_pareto.png")]


def main(results: Path = RESULTS, page: Path = PAGE) -> None:
    def read(name: str) -> dict[str, Any]:
        path = results / name
        return dict(json.loads(path.read_text())) if path.exists() else {}

    found = in_order([read_set(json.loads(path.read_text())) for path in sorted(results.glob("scores-*.json"))])
    training, folder = read("training.json"), page.parent
    plots = plot_points(found, folder) + plot_profile(found, folder) + plot_pareto(found, folder)
    plots += plot_learning(training, folder) if found else []
    page.write_text(between(page.read_text(), report(found, training, read("tuning.json"), plots)))
    print(f"{page}: {len(found)} sets of instances, {len(plots)} plots")


if __name__ == "__main__":
    main()
