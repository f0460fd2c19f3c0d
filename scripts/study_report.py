"""Writes the tables and plots of docs/results.md from scripts/results/study/*.json, which scripts/study.py measured.

    python scripts/study_report.py

study_statistics.py says how intervals are made, study_bars.py what Tamiyo was meant to reach; study_plots.py draws.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from study_bars import bars
from study_plots import CAPTIONS, plot_learning, plot_pareto, plot_points, plot_profile
from study_statistics import (
    TAMIYO,
    Played,
    best,
    by_variant,
    difference,
    harmful,
    improvement_by_instance,
    improvements,
    in_order,
    normalised_gain,
    points,
    read_set,
    tasks,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results" / "study"
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- tables: made by scripts/study_report.py -->", "<!-- end of tables -->"


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
    headings += ["size", "extra FLOPs", "germinated", "culled", "WAIT", "WAIT, noisy"]
    rows = []
    for name in sorted(one.groups, key=lambda name: (-points(one, name).value, name)):
        group, gain = one.groups[name], normalised_gain(one, name)
        minus, better = "", ""
        if name != TAMIYO and TAMIYO in one.groups:
            minus = difference(one, TAMIYO, name).text()
            better = improvement_by_instance(one, TAMIYO, name).text(".2f")
        row = [title(one, name), points(one, name).text(), minus, gain.text(".2f") if gain else "", better]
        row += [_share(harmful(one, name))]
        row += [_given(group.account("params_ratio"), ".2f", "x"), _share(group.account("flops_ratio"))]
        row += [_given(group.account(key), ".1f") for key in ("germinated", "culled")]
        rows.append(row + [_share(group.account(key)) for key in ("waited", "waited_noisy")])
    label = f", {one.label}" if one.label else ""
    noisy = float((one.noise > 0).mean())
    text = f"{len(one.kind):,} instances, {_share(noisy)} of them with label noise."
    return [f"### {one.name}{label}", "", text, "", *table(headings, rows)]


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


def variants(played: list[Played], reference: str) -> list[str]:
    """Every variant against one of them. Their runs are not pairs, their instances are."""
    own = [one for one in played if reference in one.groups]
    names = sorted({name for one in own for name, group in one.groups.items() if group.policy})
    rows = []
    for name in sorted(names, key=lambda name: (name != reference, name)):
        row = [name, str(max(len(one.groups[name].points) for one in own if name in one.groups))]
        for one in own:
            known = name in one.groups
            minus = known and name != reference
            row += [points(one, name).text() if known else "", difference(one, name, reference).text() if minus else ""]
        rows.append(row)
    parts = [f"{one.name}: {what}" for one in own for what in ("points", f"minus {reference}")]
    return table(["variant", "runs", *parts], rows) if len(rows) > 1 else []


def costs(training: dict[str, Any]) -> list[str]:
    rows = []
    for name, runs in by_variant(training).items():
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


def report(
    found: list[Played],
    ablated: list[Played],
    recipes: list[Played],
    training: dict[str, Any],
    tuning: dict[str, Any],
    cost: dict[str, Any],
    plots: list[str],
) -> list[str]:
    """All lines between the markers."""
    if not found:
        return ["", "No results are here yet.", ""]
    rows = [bar.row() for bar in bars(found, cost)]
    lines = ["", *section("Bars", "", table(["what", "on", "measured", "needed", "verdict"], rows))]
    lines += section("Probability of improvement over each baseline", "", improvement_table(found))
    text = "The best baseline is the one with the highest mean on that very set, chosen after the fact."
    lines += section("Generalisation", text, generalisation(found))
    lines += section("Ablations of the recipe in short", "", variants(ablated, "short"))
    lines += section("Other recipes at full length", "", variants(recipes, TAMIYO))
    lines += section("Training", "", costs(training))
    for name in plots:
        lines += [f"![{CAPTIONS[name]}]({name})", ""]
    lines += [line for one in found for line in details(one)]
    return lines + section("Knobs", tuned(tuning), knobs(found, tuning))


def tuned(tuning: dict[str, Any]) -> str:
    """On how many instances: `rounds` of (instances, how many of the best knobs; None for all)."""
    rounds = tuning.get("rounds", [])
    parts = [f"{count:,} for " + (f"the best {kept}" if kept else "all") for count, kept in rounds]
    return f"Training instances for each controller's knobs: {', '.join(parts)}." if parts else ""


def between(text: str, lines: list[str]) -> str:
    """`text` with `lines` between the markers."""
    before, rest = text.split(BEGIN)
    return before + "\n".join([BEGIN, *lines, END]) + rest.split(END)[1]


def main(results: Path = RESULTS, page: Path = PAGE) -> None:
    def read(name: str) -> dict[str, Any]:
        path = results / name
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def sets(kind: str) -> list[Played]:
        return in_order([read_set(json.loads(path.read_text())) for path in sorted(results.glob(f"{kind}-*.json"))])

    found, ablated, recipes = sets("scores"), sets("ablations"), sets("recipes")
    training, folder = read("training.json"), page.parent
    plots = plot_points(found, folder) + plot_profile(found, folder) + plot_pareto(found, folder)
    plots += plot_learning(training, folder) if found else []
    lines = report(found, ablated, recipes, training, read("tuning.json"), read("cost.json"), plots)
    page.write_text(between(page.read_text(), lines))
    print(f"{page}: {len(found)} sets of instances, {len(plots)} plots")


if __name__ == "__main__":
    main()
