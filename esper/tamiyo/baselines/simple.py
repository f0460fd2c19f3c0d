"""Controllers that hardly look: never, random, fixed schedules, and the plateau rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.graph import GraphBatch
from esper.growth.actions import WAIT
from esper.growth.observation import SLOPE_SCALE
from esper.tamiyo.baselines.base import Grower, column, germinable, germination, register


@register("never")
class Never:
    """Never grows: the twin itself."""

    def begin(self, hosts: int) -> None:
        pass

    def act(self, graph: GraphBatch) -> Tensor:
        return torch.full((len(graph),), WAIT, device=graph.device)


@register("random")
class Random:
    """Uniform over the legal actions."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def begin(self, hosts: int) -> None:
        pass

    def act(self, graph: GraphBatch) -> Tensor:
        weights = graph.action_mask.float().cpu()
        return torch.multinomial(weights, 1, generator=self._generator).squeeze(1).to(graph.device)


def first_free(graph: GraphBatch, blueprint: int) -> Tensor:
    """[N], the first slot in which the blueprint may be germinated; 0 where there is none."""
    return germinable(graph)[:, :, blueprint].int().argmax(1)


@dataclass
class AllAtStartKnobs:
    """Knobs of `all_at_start`."""

    blueprint: str = "mlp"


@register("all_at_start", AllAtStartKnobs)
class AllAtStart(Grower):
    """Fills every slot with one blueprint as early as one action per epoch allows, and keeps what it planted."""

    def __init__(self, knobs: AllAtStartKnobs, blueprint: int, ramp: int):
        super().__init__(ramp)
        self._blueprint = blueprint

    def choose(self, graph: GraphBatch) -> tuple[Tensor, Tensor, Tensor]:
        slot = first_free(graph, self._blueprint)
        return torch.ones_like(slot, dtype=torch.bool), slot, torch.full_like(slot, self._blueprint)


@dataclass
class PeriodicKnobs:
    """Knobs of `periodic`."""

    blueprint: str = "mlp"
    first: int = 3
    every: int = 6  # epochs between two germinations


@register("periodic", PeriodicKnobs)
class Periodic(AllAtStart):
    """Germinates one blueprint in the next free slot every few epochs."""

    def __init__(self, knobs: PeriodicKnobs, blueprint: int, ramp: int):
        Grower.__init__(self, ramp, knobs.first, knobs.every)
        self._blueprint = blueprint


@dataclass
class BestFixedKnobs:
    """Knobs of `best_fixed`."""

    blueprint: str = "mlp"
    slot: int = 0
    epoch: int = 3


@register("best_fixed", BestFixedKnobs)
class BestFixed(Grower):
    """The same germination in every host: one slot, one blueprint, one epoch."""

    def __init__(self, knobs: BestFixedKnobs, blueprint: int, ramp: int):
        super().__init__(ramp, knobs.epoch, every=1 << 30)
        self._slot, self._blueprint = knobs.slot, blueprint

    def choose(self, graph: GraphBatch) -> tuple[Tensor, Tensor, Tensor]:
        slot = torch.full((len(graph),), min(self._slot, graph.x["slot"].shape[1] - 1), device=graph.device)
        return torch.ones_like(slot, dtype=torch.bool), slot, torch.full_like(slot, self._blueprint)


@dataclass
class PlateauKnobs:
    """Knobs of `plateau`."""

    blueprint: str = "mlp"
    slope: float = -0.02  # grow when the log validation loss falls by less than this per epoch
    patience: int = 3  # epochs between two germinations


@register("plateau", PlateauKnobs)
class Plateau(Grower):
    """Germinates in the next free slot when the validation loss has stopped falling."""

    def __init__(self, knobs: PlateauKnobs, blueprint: int, ramp: int):
        self.knobs, self._blueprint = knobs, blueprint
        super().__init__(ramp)

    def begin(self, hosts: int) -> None:
        super().begin(hosts)
        self._since = torch.full((hosts,), self.knobs.patience)

    def choose(self, graph: GraphBatch) -> tuple[Tensor, Tensor, Tensor]:
        slope = column(graph, "global", "slope").squeeze(1) / SLOPE_SCALE
        known = column(graph, "global", "slope_known").squeeze(1) > 0
        self._since = self._since.to(graph.device)
        when = known & (slope > self.knobs.slope) & (self._since >= self.knobs.patience)
        slot = first_free(graph, self._blueprint)
        kind = torch.full_like(slot, self._blueprint)
        legal = graph.action_mask.gather(1, germination(graph, slot, kind)[:, None]).squeeze(1)
        self._since = (self._since + 1).masked_fill(when & legal, 0)
        return when, slot, kind
