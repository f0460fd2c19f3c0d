"""What Tamiyo was meant to reach, and whether it did. Run scripts/study_report.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from study_statistics import (
    LINEAR,
    ORDER,
    STATISTIC,
    TAMIYO,
    TIE,
    Played,
    best,
    difference,
    failed,
    improvements,
    never_right,
    normalised_gain,
    points,
)

REPAIR_GAIN, GAIN, IMPROVEMENT, LOSS, MINUTES = 0.88, 0.9, 0.65, 0.3, 60  # the bars


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
    loss, ceiling = -points(one, TAMIYO, where), one.ceiling()
    # It cannot know either what is right, since that is judged by the test split.
    other = f", `{ceiling}` itself {(-points(one, ceiling, where)).text('+.2f')}" if ceiling else ""
    return Bar(what, f"{one.name}, {len(where)} instances", loss.text("+.2f") + other, need, loss.value <= LOSS + TIE)


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


def cost_bar(cost: dict[str, Any]) -> Bar:
    need = f"at most {MINUTES} minutes with two"
    if cost.get("processes") != 2:
        return Bar("training cost", "", "", need, None)
    minutes = cost["wall_s"] / 60
    return Bar("training cost", "", f"{minutes:.0f} minutes with two processes", need, minutes <= MINUTES)


def bars(found: list[Played], cost: dict[str, Any]) -> list[Bar]:
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
    return [*lines, *each("mixture", lambda one: [failed_bar(one)]), cost_bar(cost)]
