"""The ungrown twins that rewards compare with, each trained once per context and remembered.

A twin has its host's context and key, so its whole episode is known from them alone. Twins are trained side by side
when an episode starts; controllers that meet the same instances meet the same twins.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict

import torch
from torch import Tensor

from envs.points import PARTS, Meter
from esper.growth.context import Context
from esper.growth.population import Population
from esper.growth.state import PopulationSpec

log = logging.getLogger(__name__)

COLUMNS = 5  # of an episode besides its epochs

_BATCH = 256  # twins trained side by side
_LONG_S = 2.0  # what takes longer is announced, the first time


class Twins:
    """Episodes without growth.

    Args:
        kind: what they are trained in; twins of simulated hosts are simulated too.
        spec: what hosts have in common.
        epochs: of an episode.
        device: where they are trained.
        capacity: episodes remembered; the oldest are forgotten first.
    """

    def __init__(
        self,
        kind: type[Population],
        spec: PopulationSpec,
        epochs: int,
        device: torch.device | str,
        capacity: int = 20_000,
    ):
        self._kind = kind
        self._spec = PopulationSpec(**{**vars(spec), "measured": False})
        self._epochs, self._device, self._capacity = epochs, device, capacity
        # One tensor: one for each episode would take several times the memory of what is in it.
        self._episodes = torch.zeros(capacity, epochs + COLUMNS)
        self._places: OrderedDict[int, int] = OrderedDict()  # key -> row, oldest first

    def __call__(self, context: Context) -> Tensor:
        """float32 [m, epochs + 5] on the CPU: validation losses at the start and after each epoch, then the accuracies
        at the end on the validation and the test split, and those of `points.Meter`. From the epoch on in which a twin
        diverges, its losses are inf, and its accuracies of `Meter` are 0.

        Contexts with the same key must be equal, as those drawn for one environment are.
        """
        keys = context.key.tolist()
        episodes = torch.zeros(len(keys), self._epochs + COLUMNS)
        missing = [row for row, key in enumerate(keys) if key not in self._places]
        known = [row for row, key in enumerate(keys) if key in self._places]
        episodes[known] = self._episodes[[self._places[keys[row]] for row in known]]
        for first in range(0, len(missing), _BATCH):
            rows = missing[first : first + _BATCH]
            episodes[rows] = self._train(context.rows(torch.tensor(rows)))
        for row in missing:
            if keys[row] in self._places:  # asked for twice
                continue
            place = self._places.popitem(last=False)[1] if len(self._places) == self._capacity else len(self._places)
            self._places[keys[row]] = place
            self._episodes[place] = episodes[row]
        return episodes

    def _train(self, context: Context) -> Tensor:
        population, everyone = self._kind(self._spec, len(context), self._device), torch.arange(len(context))
        population.reset(everyone, context)
        start = population.validation_loss.cpu().nan_to_num(nan=torch.inf, posinf=torch.inf)
        losses, lost = [start], torch.zeros(len(context), dtype=torch.bool)
        meter = Meter(population, self._epochs)
        began = time.perf_counter()
        for epoch in range(self._epochs):
            meter.train_epoch()
            if epoch == 0 and not self._places:
                expected = self._epochs * (time.perf_counter() - began)
                if expected > _LONG_S:
                    log.info("training the twins of the first %d hosts (about %.0f s) ...", len(context), expected)
            lost |= population.diverged()
            losses.append(population.validation_loss.cpu().masked_fill(lost, torch.inf))
        accuracies = [population.accuracy(everyone, split).cpu() for split in PARTS]
        known = list(zip(PARTS, accuracies, strict=True))
        accuracies += [meter.accuracy(everyone, split, last).masked_fill(lost, 0.0) for split, last in known]
        return torch.stack(losses + accuracies, dim=1)


_SHARED: dict[str, Twins] = {}


def shared(
    kind: type[Population], spec: PopulationSpec, epochs: int, device: torch.device | str, identity: str
) -> Twins:
    """The twins of this process for environments of the same `identity`, which says all that twins depend on."""
    return _SHARED.setdefault(f"{identity}@{device}", Twins(kind, spec, epochs, device))
