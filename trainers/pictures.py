"""Pictures of what a policy does in a growth environment: one grown host, what was planted where, and where it looks.

matplotlib is only imported where something is drawn; see `esper.growth.chart`. Which episodes they show is decided in
`trainers.illustration`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from esper.growth.chart import INK, STYLE, Trace, lifecycle_chart
from trainers.gaze import Focus

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

DARK_INK = "#d6dbe1"
_COLUMNS = 3  # panels side by side
_MAP = "viridis"
_TEXT = ("#ffffff", "#000000")  # in cells below and above half of the scale


@dataclass(frozen=True)
class Picture:
    """One figure of a report.

    Attributes:
        name: tag and file name, without spaces.
        title, caption: what it shows, and how to read it; plain text.
        figure: the drawing.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    def png(self) -> bytes:
        """Dark on white."""
        file = io.BytesIO()
        self.figure.savefig(file, format="png")
        return file.getvalue()

    def svg(self) -> tuple[str, str]:
        """For light pages and for dark ones; without a background, and with the text as outlines, so that it looks the
        same everywhere. Drawing again gives the same text."""
        import matplotlib as mpl

        file = io.StringIO()
        with mpl.rc_context({"svg.hashsalt": self.name}):
            self.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        light = file.getvalue()
        return light, light.replace(INK, DARK_INK)


def lifecycle(trace: Trace, title: str) -> Picture:
    """One episode, under a title that says which."""
    figure = lifecycle_chart(trace, title, host="host, grown by Tamiyo")
    caption = (
        "Above, the validation loss of the host and of its twin, which is never grown. Below, what lives in each slot: "
        "the colour is the stage and the height is alpha, how much of the seed's output reaches the host. The instance "
        "is the one with the median return among those in which Tamiyo planted anything. Most environments reward "
        "accuracy, which can be better where the loss is not."
    )
    return Picture("lifecycle", "One held-out episode", caption, _settled(figure))


def plantings(counts: Tensor, kinds: Sequence[str], blueprints: Sequence[str]) -> Picture:
    """Germinations per episode by slot and blueprint, a panel for each kind of context.

    Args:
        counts: int64 [N, S, blueprints], of each episode.
        kinds: [N], kind of context of each episode.
        blueprints: names.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(sorted(kinds)))
    means = {kind: counts[torch.tensor([k == kind for k in kinds])].double().mean(0).numpy() for kind in panels}
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    slots, choices = counts.shape[1:]
    wide = max(2.3, 0.42 * choices + 0.4) * columns + 0.9
    tall = (max(0.28 * slots, 1.1) + 1.0) * lines
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(wide, tall), dpi=110, layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        top = max(float(mean.max()) for mean in means.values())
        for axes, kind in zip(grid.flat, panels, strict=False):
            image = _heat(axes, means[kind], top or 1.0)
            axes.set_title(f"{kind or 'all'} (n = {sum(k == kind for k in kinds)})")
            axes.set_xticks(range(choices), blueprints, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(slots), [str(slot) for slot in range(slots)])
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for line in grid[:, 0]:
            line.set_ylabel("slot")
        figure.colorbar(image, ax=grid, label="per episode", shrink=0.9).outline.set_visible(False)
    caption = (
        "How often Tamiyo plants each blueprint in each slot, in the mean of the n held-out episodes of each kind of "
        "context. It is not told the kind: panels that differ show that it reads it from the host's statistics."
    )
    return Picture("plantings", "What is planted where", caption, _settled(figure))


def gaze(focus: Focus) -> Picture:
    """How sharply attention chooses, by relation, layer and head."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    layers = sorted({depth for by_layer in focus.values() for depth in by_layer})
    heads = len(next(iter(next(iter(focus.values())).values())))
    relations = sorted(focus, key=lambda relation: (relation[2], relation[0], relation[1]))
    # Layers are parted by an empty column.
    values = np.full((len(relations), len(layers), heads + 1), np.nan)
    for row, relation in enumerate(relations):
        for depth, sharp in focus[relation].items():
            values[row, layers.index(depth), :heads] = sharp
    places = [layer * (heads + 1) + head for layer in range(len(layers)) for head in range(heads)]
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(3.6 + 0.5 * heads * len(layers), 1.1 + 0.27 * len(relations)), dpi=110, layout="constrained"
        )
        axes = figure.subplots()
        image = _heat(axes, values.reshape(len(relations), -1)[:, :-1], 1.0)
        names = [f"{source} \N{RIGHTWARDS ARROW} {target} ({name})" for source, name, target in relations]
        axes.set_yticks(range(len(relations)), names)
        axes.set_xticks(places, [str(head + 1) for _ in layers for head in range(heads)])
        axes.set_xlabel("head, of " + ", then of ".join(f"layer {depth + 1}" for depth in layers))
        figure.colorbar(image, label="focus", shrink=0.9).outline.set_visible(False)
    caption = (
        "How sharply each head of the GAT layers chooses among the nodes it hears from, by relation: 0 is the plain "
        "mean of all of them, 1 is a single one. It is one minus the entropy of the attention weights over that of "
        "equal weights, in the mean over observations of held-out episodes. Relations of which a node only ever has "
        "one source leave nothing to choose and are not shown; cells are empty where a layer does not compute the "
        "target."
    )
    return Picture("attention", "Where Tamiyo looks", caption, _settled(figure))


def _settled(figure: Figure) -> Figure:
    """The figure with everything in its place for good: finding the places takes longer than drawing."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _heat(axes: Axes, values: np.ndarray, top: float) -> AxesImage:
    """A map of `values` [rows, columns] between 0 and `top`, with the numbers in its cells."""
    image = axes.imshow(values, vmin=0.0, vmax=top, cmap=_MAP, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value) and value > 0:
            colour = _TEXT[int(value > top / 2)]
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=colour)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image
