"""Writes the tables and plots of docs/environments.md from scripts/results/headroom/*.json.

python scripts/headroom_report.py      # needs the extra `plots`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results" / "headroom"
PAGE = ROOT / "docs" / "environments.md"
BEGIN, END = "<!-- tables: made by scripts/headroom_report.py -->", "<!-- end of tables -->"


def figure(row: dict[str, float] | None, sign: bool = True) -> str:
    if row is None:
        return ""
    if sign:
        return f"{row['mean']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"
    return f"{row['mean']:.1f}"


def table(headings: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in [headings, *rows]]
    return [lines[0], "|" + "---|" * len(headings), *lines[1:], ""]


def over_never(controllers: dict[str, Any], name: str) -> dict[str, float] | None:
    """Of a look-ahead, if it was played."""
    return controllers[name]["over_never"] if name in controllers else None


def summary(found: list[dict[str, Any]]) -> list[str]:
    rows = []
    for one in found:
        oracle, controllers = one["oracle"], one["controllers"]
        others = ("large", "never")
        baselines = {n: r for n, r in controllers.items() if not n.endswith("lookahead") and n not in others}
        best = max(baselines, key=lambda n: baselines[n]["over_never"]["mean"])
        rows.append(
            [
                one["instances"],
                figure(controllers["never"]["points"], sign=False),
                figure(controllers["large"]["over_never"]),
                f"{best} {baselines[best]['over_never']['mean']:+.1f}",
                figure(over_never(controllers, "greedy_lookahead")),
                figure(over_never(controllers, "planned_lookahead")),
                figure(over_never(controllers, "clairvoyant_lookahead")),
                figure(oracle["oracle_minus_best_fixed"]),
                f"{100 * oracle['never_right']:.0f} %",
            ]
        )
    headings = ["instances", "never", "large", "best controller", "look-ahead, greedy", "look-ahead, planned"]
    headings += ["clairvoyant", "oracle of one - best fixed", "never right"]
    return table(headings, rows)


def details(one: dict[str, Any]) -> list[str]:
    lines = [f"### {one['instances']}", ""]
    order = sorted(one["controllers"].items(), key=lambda item: -item[1]["over_never"]["mean"])
    rows = []
    for name, row in order:
        knobs = one["knobs"].get(name, {})
        if name.endswith("_lookahead"):
            knobs = {"margin": one["margins"][name.removesuffix("_lookahead")]}
        given = ", ".join(f"{key} {value}" for key, value in knobs.items())
        rows.append([name, figure(row["points"], False), figure(row["over_never"]), str(row["points"]["n"]), given])
    lines += table(["controller", "points", "over never", "instances", "knobs"], rows)
    pairs = [[name, figure(row), str(row["n"])] for name, row in one["comparisons"].items()]
    lines += table(["difference, paired", "points", "instances"], pairs)
    oracle = one["oracle"]
    rows = []
    for kind, row in oracle["by_defect"].items():
        wants = ", ".join(f"{b} {c}" for b, c in sorted(row["wants"].items(), key=lambda item: -item[1]))
        rows.append([kind, str(row["instances"]), f"{row['oracle']:+.1f}", f"{row['best_fixed']:+.1f}", wants])
    lines += [f"One germination at the first decision (oracle {figure(oracle['oracle_gain'])}), by defect:", ""]
    lines += table(["defect", "instances", "oracle", "best fixed", "what the oracle plants"], rows)
    scorers = oracle["scorers"]
    lines += [
        f"Supervised scorers on the observation's features ({scorers['episodes']} labelled germinations): "
        + "; ".join(
            f"{name} {figure(scorers[name]['gain'])}, {100 * scorers[name]['share_of_oracle']:.0f} % of the oracle"
            for name in ("linear", "neural")
        )
        + ".",
        "",
    ]
    return lines


def curves(found: list[dict[str, Any]]) -> None:
    """Gain of the linear scorer over the number of labelled germinations."""
    axes = plt.figure(figsize=(8, 5)).gca()
    for one in found:
        curve = one["oracle"]["learning_curve"]
        if len(curve) > 2:
            share = one["oracle"]["oracle_gain"]["mean"]
            points = [100 * row["mean"] / share for row in curve]
            axes.plot([row["episodes"] for row in curve], points, marker="o", label=one["instances"])
    axes.set(xscale="log", xlabel="labelled germinations", ylabel="% of the oracle's gain", title="Linear scorer")
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.legend(fontsize=6, ncols=2)
    axes.figure.savefig(ROOT / "docs" / "headroom_curves.png", dpi=110, bbox_inches="tight")


def bars(found: list[dict[str, Any]]) -> None:
    """Points over never of the main controllers, for each kind of context one group per task."""
    names = ["random", "best_fixed", "statistic", "gradmax", "linear", "greedy_lookahead", "planned_lookahead"]
    kinds = sorted({one["instances"].split("/")[1] for one in found})
    figure, grid = plt.subplots(len(kinds), figsize=(9, 2.6 * len(kinds)), squeeze=False)
    for axes, kind in zip(grid.flat, kinds, strict=True):
        own = [one for one in found if one["instances"].endswith(f"/{kind}")]
        for place, name in enumerate(names):
            played = [(group, one) for group, one in enumerate(own) if name in one["controllers"]]
            rows = [one["controllers"][name]["over_never"] for _, one in played]
            at = [group + (place - len(names) / 2) * 0.12 for group, _ in played]
            low = [row["mean"] - row["low"] for row in rows]
            high = [row["high"] - row["mean"] for row in rows]
            axes.bar(at, [row["mean"] for row in rows], 0.11, yerr=[low, high], label=name, error_kw={"linewidth": 0.7})
        axes.set_xticks(range(len(own)), [one["instances"].split("/")[0] for one in own], fontsize=8)
        axes.set_title(kind, fontsize=9)
        axes.axhline(0, color="grey", linewidth=0.5)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="upper center", fontsize=7, ncols=len(names))
    figure.supylabel("test points over never, net of rent", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(ROOT / "docs" / "headroom.png", dpi=100)


def main() -> None:
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    lines = [BEGIN, "", *summary(found)]
    lines += ["![points over never](headroom.png)", "", "![learning curve](headroom_curves.png)", ""]
    lines += [line for one in found for line in details(one)]
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + "\n".join([*lines, END]) + rest.split(END)[1])
    bars(found)
    curves(found)
    print(f"{PAGE}: {len(found)} environments")


if __name__ == "__main__":
    main()
