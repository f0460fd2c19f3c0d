"""Draws one grown host over time: its validation loss beside its twin's, and what lived in each slot.

python scripts/plot_episode.py RUN_DIR [--instance 0] [--out docs/grown_host.png]
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import torch

from envs.config import EnvConfig, saved_config
from envs.growth_env import GrowthEnv
from esper.growth.lifecycle import NO_BLUEPRINT, Stage
from esper.tamiyo.actor import Actor
from esper.tamiyo.loading import load_state, policy_of

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

COLOURS = {
    Stage.TRAINING: "#9ecae1",
    Stage.BLENDING: "#fdae6b",
    Stage.HOLDING: "#74c476",
    Stage.FOSSILIZED: "#31a354",
    Stage.EMBARGOED: "#bdbdbd",
}


def play(run: str, instance: int) -> tuple[EnvConfig, dict[str, list]]:
    """One held-out episode of the most probable actions; what happened at each epoch."""
    _, state = load_state(run)
    config = saved_config(state["config"]["env"])
    env = GrowthEnv(config, 1, split="heldout", autoreset=False)
    actor = Actor(policy_of(state), deterministic=True)
    graph = env.reset(torch.tensor([instance]))
    population = env.population
    trace: dict[str, list] = {"host": [], "twin": [], "stage": [], "alpha": [], "blueprint": []}

    def note() -> None:
        host, twin = population.validation_loss.tolist()
        trace["host"].append(host)
        trace["twin"].append(twin)
        for name in ("stage", "alpha", "blueprint"):
            trace[name].append(getattr(population.lifecycle, name)[0].tolist())

    note()
    for _ in range(config.epochs):
        graph, *_ = env.step(actor(graph).actions.clone())
        note()
    return config, trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run directory or a checkpoint file")
    parser.add_argument("--instance", type=int, default=0, help="number of the held-out instance")
    parser.add_argument("--out", type=Path, default=Path("docs/grown_host.png"))
    arguments = parser.parse_args()
    config, trace = play(arguments.run, arguments.instance)
    epochs = range(len(trace["host"]))
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7.2, 4.6), dpi=130, sharex=True, layout="constrained", height_ratios=(3, 2)
    )
    above.plot(epochs, trace["twin"], color="#7f7f7f", label="twin, never grown")
    above.plot(epochs, trace["host"], color="#1f77b4", linewidth=2, label="host, grown by Tamiyo")
    above.set(ylabel="validation loss (nats)", title=f"{config.name}, held-out instance {arguments.instance}")
    above.legend(fontsize=8)
    above.grid(alpha=0.25)
    slots = config.host.stages
    for epoch in epochs:
        for slot in range(slots):
            stage = Stage(trace["stage"][epoch][slot])
            if stage == Stage.DORMANT:
                continue
            alpha, kind = trace["alpha"][epoch][slot], trace["blueprint"][epoch][slot]
            # A seed in TRAINING has alpha 0; a thin bar still shows that it is there.
            below.bar(epoch, 0.15 + 0.7 * alpha, width=1.0, bottom=slot - 0.42, color=COLOURS[stage])
            planted = epoch == 0 or trace["blueprint"][epoch - 1][slot] != kind
            if kind != NO_BLUEPRINT and planted:
                below.text(epoch - 0.4, slot + 0.12, config.blueprints[kind], fontsize=8, va="center")
    below.set(
        xlabel="epoch", ylabel="slot", yticks=range(slots), ylim=(-0.5, slots - 0.5), xlim=(-0.6, len(epochs) - 0.4)
    )
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    patches = [Patch(color=colour, label=stage.name.lower()) for stage, colour in COLOURS.items()]
    below.legend(handles=patches, fontsize=7, ncols=len(patches), loc="upper center", bbox_to_anchor=(0.5, -0.28))
    arguments.out.parent.mkdir(exist_ok=True)
    figure.savefig(arguments.out)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
