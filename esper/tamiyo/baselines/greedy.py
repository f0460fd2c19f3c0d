"""Controllers that grow where one statistic is largest, and the one that tries before it keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.graph import GraphBatch
from esper.growth.actions import Verb
from esper.tamiyo.baselines.base import Grower, best_slot, column, germinable, layout, register


@dataclass
class GreedyKnobs:
    """Knobs of the rules that follow one statistic."""

    blueprint: str = "bypass"
    threshold: float = 0.0  # of the statistic, below which nothing is germinated
    first: int = 3
    every: int = 3  # epochs between two decisions


class _Greedy(Grower):
    """One blueprint, in the free slot where a statistic is largest, if it passes the threshold."""

    def __init__(self, knobs: GreedyKnobs, blueprint: int, ramp: int):
        super().__init__(ramp, knobs.first, knobs.every)
        self.knobs, self._blueprint = knobs, blueprint

    def statistic(self, graph: GraphBatch) -> Tensor:
        """[N, slots]."""
        raise NotImplementedError

    def choose(self, graph: GraphBatch) -> tuple[Tensor, Tensor, Tensor]:
        best, slot = best_slot(self.statistic(graph), germinable(graph)[:, :, self._blueprint])
        return best > self.knobs.threshold, slot, torch.full_like(slot, self._blueprint)


@dataclass
class StatisticKnobs(GreedyKnobs):
    """Knobs of `statistic`."""

    threshold: float = 0.7


@register("statistic", StatisticKnobs)
class Statistic(_Greedy):
    """The one-statistic rule: bypass the stage with most zero-derivative units."""

    def statistic(self, graph: GraphBatch) -> Tensor:
        return column(graph, "activation", "zero_derivative_fraction")


@dataclass
class GradientKnobs(GreedyKnobs):
    """Knobs of `gradient_norm` and `gradmax`."""

    threshold: float = -10.0


@register("gradient_norm", GradientKnobs)
class GradientNorm(_Greedy):
    """Where the gradient of the stage's own weights is largest."""

    def statistic(self, graph: GraphBatch) -> Tensor:
        packed, gradient = graph.pack(), column(graph, "layer", "log_gradient_rms")
        reads = packed.layout.of_relation(packed.mask, ("slot", "reads", "layer"))  # [N, layers, slots]
        return gradient[:, :, None].masked_fill(~reads, -torch.inf).amax(1)


@register("gradmax", GradientKnobs)
class GradMax(_Greedy):
    """Where new units would have the largest gradient (GradMax's score, Evci et al., arXiv 2201.05125)."""

    def statistic(self, graph: GraphBatch) -> Tensor:
        return column(graph, "slot", "log_growth_gradient")


@dataclass
class ProbeKnobs(GreedyKnobs):
    """Knobs of `probe`."""

    threshold: float = -10.0  # of GradMax's score, by which it chooses what to try
    probation: int = 6  # epochs from germination to the verdict
    keep: float = 0.0  # contribution, in nats of validation loss, below which the seed is culled


@register("probe", ProbeKnobs)
class Probe(GradMax):
    """Probe-then-keep: tries a seed for some epochs and culls it unless the validation loss is lower with it."""

    def __init__(self, knobs: ProbeKnobs, blueprint: int, ramp: int):
        self._probation, self._keep = knobs.probation, knobs.keep
        super().__init__(knobs, blueprint, ramp)

    def begin(self, hosts: int) -> None:
        super().begin(hosts)
        self._age = torch.zeros(hosts, 0, dtype=torch.int64)

    def act(self, graph: GraphBatch) -> Tensor:
        actions = super().act(graph)
        slots = graph.x["slot"].shape[1]
        lives = (column(graph, "slot", "is_dormant") + column(graph, "slot", "is_embargoed") == 0).cpu()
        if not self._age.shape[1]:
            self._age = torch.zeros(len(graph), slots, dtype=torch.int64)
        self._age = torch.where(lives & graph.node_mask["slot"].cpu(), self._age + 1, 0)
        judged = (self._age == self._probation).to(graph.device)
        known = column(graph, "slot", "contribution_known") > 0
        failed = judged & known & (column(graph, "slot", "contribution") <= self._keep)
        verbs, place, _ = (values.to(graph.device) for values in layout(graph).table())
        cull = graph.action_mask & (verbs == Verb.CULL) & failed[:, place]
        return torch.where(cull.any(1), cull.int().argmax(1), actions)
