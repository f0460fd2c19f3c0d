"""Accuracies in the end, as reports, look-aheads and rewards by accuracy count them."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.growth.population import Population

RENT = 10.0
"""Points that 100 % more parameters cost, in reports and in what look-aheads maximise."""

AVERAGED = 3  # last epochs over which validation accuracy is averaged, against the noise of single epochs


PARTS = ("validation", "test")  # of a task's data, on which accuracy is measured


class Meter:
    """Trains a population and keeps what its accuracies at the end of an episode are made of.

    Hosts that are priced are scored by the area under their accuracy curves over compute. Compute is counted in ungrown
    episodes and the area ends at 1, so that a grown host, whose epochs cost more, is done earlier. Of all others the
    validation accuracies of the last epochs are averaged.

    Args:
        population: the hosts.
        epochs: of an episode.
        reported: keep what accuracies on the test split are made of, too.

    Attributes:
        late: sum of the validation accuracies after those of the last epochs that it has trained, [N].
        counted: how many those are, [N].
        area: under the accuracy on the validation and on the test split, [N, 2].
    """

    def __init__(self, population: Population, epochs: int, reported: bool = True):
        self._population, self._epochs = population, epochs
        self._splits = PARTS if reported else PARTS[:1]
        self.late, self.counted = torch.zeros(2, population.hosts)
        self.area = torch.zeros(population.hosts, 2)

    def begin(self, where: Tensor) -> None:
        """New episodes for the hosts `where` ([m])."""
        for values in (self.late, self.counted, self.area):
            values[where] = 0

    def train_epoch(self, evaluate: bool = True) -> None:
        """One epoch of every host."""
        p = self._population
        priced = p.context.priced
        rows = priced.nonzero().squeeze(1)
        spent = self._spent(rows)
        p.train_epoch(evaluate)
        if len(rows):
            share = self._spent(rows).clamp(max=1) - spent.clamp(max=1)
            for column, split in enumerate(self._splits):
                self.area[rows, column] += share * p.accuracy(rows, split).cpu()
        # The last epoch counts in `accuracy`, once what is unfinished is gone.
        late = ((p.epoch > self._epochs - AVERAGED) & (p.epoch < self._epochs) & ~priced).nonzero().squeeze(1)
        if len(late):
            self.late[late] += p.accuracy(late, "validation").cpu()
            self.counted[late] += 1

    def _spent(self, rows: Tensor) -> Tensor:
        """Compute of the hosts `rows` so far, in ungrown episodes."""
        p = self._population
        return p.epoch[rows] / self._epochs + p.extra_flops[rows] / (self._epochs * p.host_flops()[rows])

    def accuracy(self, rows: Tensor, split: str, last: Tensor | None = None) -> Tensor:
        """[m], of the hosts `rows` ([m]), whose episodes are over, on the split "validation" or "test", in [0, 1].

        Args:
            last: their accuracies on it now, where these are known already, [m].
        """
        p = self._population
        last = p.accuracy(rows, split).cpu() if last is None else last
        area = self.area[rows, PARTS.index(split)]
        if split == "validation":
            last = (self.late[rows] + last) / (self.counted[rows] + 1)
        return torch.where(p.context.priced[rows], area, last)

    def fork(self, population: Population, rows: Tensor) -> Meter:
        """For a population of copies of the hosts `rows`, whose validation accuracy alone is wanted."""
        forked = Meter(population, self._epochs, reported=False)
        forked.load_state_dict({name: values[rows] for name, values in self.state_dict().items()})
        return forked

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors, copied."""
        return {"late": self.late.clone(), "counted": self.counted.clone(), "area": self.area.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        self.late, self.counted, self.area = (state[name].clone() for name in ("late", "counted", "area"))
