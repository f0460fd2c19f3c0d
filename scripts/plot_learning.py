"""Draws the learning curves in a file that scripts/seeds.py wrote, with the baselines' held-out returns as lines.

python scripts/plot_learning.py [scripts/results/digits_default.json] [--out docs/learning_curve.png]
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"never": "#7f7f7f", "random": "#d62728", "all_at_start": "#2ca02c", "plateau": "#ff7f0e"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=Path("scripts/results/digits_default.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/learning_curve.png"))
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text())
    rows = list(result["seeds"].values())
    steps = np.array([step for step, _ in rows[0]["curve"]])
    curves = np.array([[value for _, value in row["curve"]] for row in rows])
    figure, axes = plt.subplots(figsize=(7.2, 4.0), dpi=130, layout="constrained")
    for curve in curves:
        axes.plot(steps, curve, color="#1f77b4", alpha=0.3, linewidth=0.8)
    axes.plot(
        steps, curves.mean(0), color="#1f77b4", linewidth=2, label=f"Tamiyo in training, mean of {len(rows)} seeds"
    )
    held_out = result["summary"]["mean_held_out_return"]
    low, high = result["summary"]["tamiyo_interval"]
    axes.errorbar(
        [steps[-1] * 1.03],
        [held_out["tamiyo"]],
        yerr=[[held_out["tamiyo"] - low], [high - held_out["tamiyo"]]],
        color="#1f77b4",
        marker="o",
        capsize=3,
        linestyle="none",
        label="Tamiyo on held-out instances (95 % interval)",
    )
    for name, value in held_out.items():
        if name != "tamiyo":
            axes.axhline(
                value, color=COLOURS.get(name), linewidth=1, linestyle="--", label=f"{name} on held-out instances"
            )
    axes.set(
        xlabel="environment steps (training epochs of hosts)",
        ylabel="return",
        title=f"Growing on {rows[0]['environment']}",
    )
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.25)
    arguments.out.parent.mkdir(exist_ok=True)
    figure.savefig(arguments.out)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
