"""What was decided while a network grew, why, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from esper.growth.actions import RAMPS, ActionLayout, Verb
from esper.growth.chart import Trace, lifecycle_chart


@dataclass(frozen=True)
class Decision:
    """One call of `Growth.step`.

    Attributes:
        step: its number, from 1.
        action: what was done, in words.
        validation_loss: as it was given.
        candidates: the most probable legal actions with their probabilities, if a policy decides.
        value: what the policy expects to gain from here on, in its reward; None of other controllers.
        stages, alphas, blueprints: [S], of the slots while `validation_loss` was measured.
        parameters: of the module and all its seeds, those that may yet be culled included.
        note: why nothing was asked of the controller, if so.
    """

    step: int
    action: str
    validation_loss: float
    candidates: tuple[tuple[str, float], ...]
    value: float | None
    stages: tuple[int, ...]
    alphas: tuple[float, ...]
    blueprints: tuple[str | None, ...]
    parameters: int
    note: str = ""

    def __str__(self) -> str:
        chances = ", ".join(f"{text} {100 * chance:.0f} %" for text, chance in self.candidates)
        why = self.note or chances
        return f"{self.step:4d}  loss {self.validation_loss:<8.4g} {self.action}" + (f"  ({why})" if why else "")


@dataclass
class Report:
    """The story of a network that grew.

    Attributes:
        controller: who decided.
        slots: names of the slots, in the order of the forward pass.
        host_parameters: of the module before it grew.
        decisions: one for each step.
        kept: "blueprint in slot" for each seed that is part of the module; known once it has finished.
        removed: the same of seeds that were not ready when it finished.
    """

    controller: str
    slots: list[str]
    host_parameters: int
    decisions: list[Decision] = field(default_factory=list)
    kept: list[str] | None = None
    removed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"grown by {self.controller}; slots: {', '.join(self.slots)}"]
        lines += map(str, self.decisions)
        if self.decisions:
            now = self.decisions[-1].parameters
            lines.append(f"parameters: {self.host_parameters:,} -> {now:,} (x{now / self.host_parameters:.2f})")
        if self.kept is not None:
            lines.append(f"kept: {', '.join(self.kept) or 'nothing'}")
        if self.removed:
            lines.append(f"removed, since they were not blended in when it finished: {', '.join(self.removed)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain containers, for JSON."""
        return asdict(self)

    def chart(self, path: str | PathLike[str] | None = None, title: str = "") -> Any:
        """The picture of the slots' lives below the validation loss, as a matplotlib Figure.

        Args:
            path: where it is saved, too, in the format of its suffix.
            title: above it.

        Raises:
            ValueError: no step has been taken.
        """
        steps = self.decisions
        trace = Trace(
            stage=[step.stages for step in steps],
            alpha=[step.alphas for step in steps],
            blueprint=[step.blueprints for step in steps],
            host_loss=[step.validation_loss for step in steps],
            slots=self.slots,
            first=1,  # as the report counts
        )
        figure = lifecycle_chart(trace, title, epoch="step")
        if path is not None:
            figure.savefig(Path(path))
        return figure


def decision_of(saved: dict[str, Any]) -> Decision:
    """A Decision from what `Report.to_dict` made of it, also where it has been through JSON."""
    lists = {name: tuple(saved[name]) for name in ("stages", "alphas", "blueprints")}
    candidates = tuple((text, chance) for text, chance in saved["candidates"])
    return Decision(**{**saved, **lists, "candidates": candidates})


def words(layout: ActionLayout, slots: list[str], blueprints: list[str], action: int) -> str:
    """What an action does."""
    verb, slot, choice = (int(column[action]) for column in layout.table())
    if verb == Verb.WAIT:
        return "wait"
    name = slots[slot]
    if verb == Verb.GERMINATE:
        return f"germinate {blueprints[choice]} in {name}"
    if verb == Verb.BLEND:
        return f"blend {name} over {RAMPS[choice]} epochs"
    return f"{'fossilise' if verb == Verb.FOSSILIZE else 'cull'} {name}"
