"""A picture of one network that grows: its loss over time, and what lived in each slot.

For hosts of the environments and for networks of users alike. matplotlib is only imported where something is drawn, and
only its figures: nothing here touches pyplot, a display or global settings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esper.growth.lifecycle import Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart also by those who do not see red and green alike (Okabe and Ito), on white and on black.
COLOURS = {
    Stage.TRAINING: "#56b4e9",
    Stage.BLENDING: "#e69f00",
    Stage.HOLDING: "#009e73",
    Stage.FOSSILIZED: "#0072b2",
    Stage.EMBARGOED: "#999999",
}
INK = "#1f2328"
"""Of all text and lines; whoever shows a figure on a dark page replaces it there."""

STYLE: dict[Any, Any] = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "grid.alpha": 0.25,
}
"""matplotlib's settings for every figure of Esper's, to be used with `matplotlib.rc_context`."""

_HOST, _TWIN = "#d55e00", "#8c8c8c"
_THIN, _TALL = 0.10, 0.62  # heights of a seed at alpha 0 and 1; a row is 1 high, its names stand above the seeds
_BASE = 0.45  # where seeds stand, below the middle of a row


@dataclass(frozen=True)
class Trace:
    """What happened to one network, at E moments (usually 0, 1, ... epochs of training) in S slots.

    Attributes:
        stage: [E][S], Stage of every slot.
        alpha: [E][S], in [0, 1].
        blueprint: [E][S], name of what lives in a slot, None where nothing does.
        host_loss: [E], what is plotted of the network; gaps where it is not finite.
        twin_loss: [E], of the same network that was never grown, if there is one.
        slots: [S], names of the slots; by default their numbers.
        first: number of the first moment, on the axis of time.
    """

    stage: Sequence[Sequence[int]]
    alpha: Sequence[Sequence[float]]
    blueprint: Sequence[Sequence[str | None]]
    host_loss: Sequence[float]
    twin_loss: Sequence[float] | None = None
    slots: Sequence[str] | None = None
    first: int = 0

    def names(self) -> list[str]:
        """[S], of the slots.

        Raises:
            ValueError: there is no moment or no slot, or the lengths do not agree.
        """
        moments, count = len(self.host_loss), len(self.stage[0]) if self.stage else 0
        if not moments or not count:
            raise ValueError("a trace needs at least one moment and one slot")
        if self.twin_loss is not None and len(self.twin_loss) != moments:
            raise ValueError(f"twin_loss has {len(self.twin_loss)} moments, host_loss has {moments}")
        for name in ("stage", "alpha", "blueprint"):
            rows = getattr(self, name)
            if len(rows) != moments or any(len(row) != count for row in rows):
                raise ValueError(f"{name} must be [{moments}][{count}], as host_loss and the first row of stage say")
        names = list(self.slots) if self.slots is not None else [str(slot) for slot in range(count)]
        if len(names) != count:
            raise ValueError(f"slots has {len(names)} names for {count} slots")
        return names


def lifecycle_chart(
    trace: Trace,
    title: str = "",
    loss: str = "validation loss",
    host: str = "grown",
    twin: str = "twin, never grown",
    epoch: str = "epoch",
) -> Figure:
    """Losses above; below, a row for each slot, in which the colour is the stage and the height is alpha.

    Args:
        trace: what is drawn.
        title: above everything.
        loss: name of the upper axis.
        host, twin: names of the two curves.
        epoch: name of the axis of time.

    Raises:
        ValueError: the trace has nothing to draw, or its lengths do not agree.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    names = trace.names()
    # A row has room for a name above its seeds; many slots get less each.
    rows = 0.36 * len(names) if len(names) <= 24 else 8.6
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 3.3 + rows), dpi=110, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 0.3 + rows))
        _draw_losses(above, trace, host, twin)
        above.set(ylabel=loss, title=title)
        _draw_slots(below, trace, small=len(names) > 24)
        below.set(xlabel=epoch, ylabel="slot", xlim=(trace.first - 0.6, trace.first + len(trace.host_loss) - 0.4))
        below.set_yticks(range(len(names)), names)
        below.set_ylim(len(names) - 0.5, -0.5)  # the first slot on top
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        patches = [Patch(color=colour, label=stage.name.lower()) for stage, colour in COLOURS.items()]
        figure.legend(handles=patches, ncols=len(patches), loc="outside lower center")
    return figure


def _draw_losses(axes: Axes, trace: Trace, host: str, twin: str) -> None:
    moments = range(trace.first, trace.first + len(trace.host_loss))
    marker = "o" if len(moments) == 1 else ""  # a line of one point cannot be seen
    if trace.twin_loss is not None:
        axes.plot(moments, _finite(trace.twin_loss), color=_TWIN, marker=marker, label=twin)
    axes.plot(moments, _finite(trace.host_loss), color=_HOST, marker=marker, linewidth=2, label=host)
    axes.legend()
    axes.grid()


def _draw_slots(axes: Axes, trace: Trace, small: bool) -> None:
    from matplotlib.collections import PolyCollection

    corners, colours = [], []
    for slot in range(len(trace.stage[0])):
        axes.axhline(slot + _BASE, color=INK, alpha=0.15, linewidth=0.8, zorder=0)
    for first, last, slot in _runs(trace):
        stage, kind = Stage(trace.stage[first][slot]), trace.blueprint[first][slot]
        # Rows are numbered downwards, and seeds grow upwards.
        base = slot + _BASE
        top = base - _THIN - (_TALL - _THIN) * trace.alpha[first][slot]
        left, right = trace.first + first - 0.5, trace.first + last + 0.5
        corners.append([(left, base), (left, top), (right, top), (right, base)])
        colours.append(COLOURS[stage])
        planted = first == 0 or trace.blueprint[first - 1][slot] != kind
        if kind is not None and planted:
            axes.text(left, base - _TALL - 0.03, kind, fontsize=5 if small else 7.5, va="bottom")
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors="none"), autolim=False)


def _runs(trace: Trace) -> Iterator[tuple[int, int, int]]:
    """(first moment, last moment, slot) of every stretch in which a slot that is not empty stays as it is."""
    for slot in range(len(trace.stage[0])):
        states = [
            (stage[slot], alpha[slot], kind[slot])
            for stage, alpha, kind in zip(trace.stage, trace.alpha, trace.blueprint, strict=True)
        ]
        first = 0
        for moment in range(1, len(states) + 1):
            if moment == len(states) or states[moment] != states[first]:
                if states[first][0] != Stage.DORMANT:
                    yield first, moment - 1, slot
                first = moment


def _finite(values: Sequence[float]) -> list[float]:
    return [value if math.isfinite(value) else math.nan for value in values]
