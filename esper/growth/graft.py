"""Which seeds run in a forward pass of M rows of hosts, and how they are added to their slots.

The seeds of a blueprint are one block of parameters whatever slots they live in, and those of one (slot, blueprint) run
together. A slot gathers the inputs of all its seeds at once and adds what they say at once: at these sizes every
operation costs more than its arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from esper.growth.state import PopulationState


class _Take(torch.autograd.Function):
    """Rows of x; nothing flows back from those at the places `alone`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, alone: Tensor) -> Tensor:
        ctx.save_for_backward(index, alone)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        index, alone = ctx.saved_tensors
        blank = gradients[0].new_zeros(ctx.shape)
        # Filled, not multiplied by 0: a seed that has diverged must not reach its host.
        return blank.index_add_(0, index, gradients[0].index_fill(0, alone, 0.0)), None, None


class _Scale(torch.autograd.Function):
    """`delta * factor`, 0 at the places `alone`, with the gradient of `delta * through`."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, factor: Tensor, through: Tensor, alone: Tensor) -> Tensor:
        ctx.save_for_backward(through)
        return (delta * factor).index_fill_(0, alone, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0] * ctx.saved_tensors[0], None, None, None


class _Slot(NamedTuple):
    """The seeds of one slot: those that read the stage's output, then those that read its input."""

    groups: list[tuple[int, int]]  # (block, piece of the block)
    counts: tuple[list[int], list[int]]  # rows of each group, for the two sides
    from_output: Tensor | None  # rows [m]
    from_input: Tensor | None
    rows: Tensor  # [m] of all of them
    units: list[Tensor]  # [m, 1, width] per group
    factor: Tensor  # [m, 1, width], alpha on the units that the host has
    through: Tensor | None  # the same for the gradient, where it differs
    alone: list[Tensor | None]  # places of isolated seeds among outputs, inputs and all rows; None where there are none


class Grafts:
    """The seeds of M rows of hosts.

    Args:
        population: whose.
        hosts: int64 [M], repeats allowed.
        kinds: int64 [M, slots], the blueprint that runs there; negative where none does.
        alpha: float32 [M, slots].
        isolated: bool [M, slots] or None; where a seed learns beside the host: it adds 0 and nothing flows back into
            the host, but the seed's gradient is as if alpha were 1 (a straight-through gradient).
    """

    def __init__(
        self, population: PopulationState, hosts: Tensor, kinds: Tensor, alpha: Tensor, isolated: Tensor | None = None
    ):
        self.population = p = population
        owned = torch.arange(p.spec.width) < p.context.width[hosts][:, None]
        # Sorted by slot within a block, so that each (slot, blueprint) is one piece of it.
        self.blocks: list[tuple[int, Tensor, Tensor, list[int]]] = []  # (blueprint, hosts, slots, pieces)
        places: list[list[tuple[int, int, Tensor]]] = [[] for _ in range(p.slots)]
        for kind in range(len(p.catalogue)):
            slots, rows = torch.eq(kinds.T, kind).nonzero(as_tuple=True)
            if not len(rows):
                continue
            pieces = torch.bincount(slots, minlength=p.slots).tolist()
            for slot, part in enumerate(rows.split(pieces)):
                if len(part):
                    number = sum(count > 0 for count in pieces[:slot])
                    places[slot].append((len(self.blocks), number, part))
            self.blocks.append((kind, p.moved(hosts[rows]), p.moved(slots), [count for count in pieces if count]))
        self._slots: list[_Slot | None] = [
            self._slot(slot, groups, owned, alpha, isolated) if groups else None for slot, groups in enumerate(places)
        ]

    def _slot(
        self,
        slot: int,
        groups: list[tuple[int, int, Tensor]],
        owned: Tensor,
        alpha: Tensor,
        isolated: Tensor | None,
    ) -> _Slot:
        p = self.population
        moved = p.moved
        reads_source = [p.catalogue[self.blocks[block][0]].reads_source for block, _, _ in groups]
        order = sorted(range(len(groups)), key=lambda g: reads_source[g])
        groups = [groups[g] for g in order]
        sides = [
            [rows for (_, _, rows), source in zip(groups, sorted(reads_source), strict=True) if source is side]
            for side in (False, True)
        ]
        picked = [torch.cat(side) if side else None for side in sides]
        rows = torch.cat([side for side in picked if side is not None])
        units = owned[rows, None].float()
        factor = alpha[rows, slot, None, None] * units
        through: Tensor | None = None
        alone: list[Tensor | None] = [None, None, None]
        if isolated is not None and isolated[rows, slot].any():
            apart = isolated[:, slot]
            through = moved(torch.maximum(apart[rows, None, None].float(), alpha[rows, slot, None, None]) * units)
            alone = [None if at is None else moved(apart[at].nonzero().squeeze(1)) for at in (*picked, rows)]
        return _Slot(
            groups=[(block, piece) for block, piece, _ in groups],
            counts=([len(part) for part in sides[0]], [len(part) for part in sides[1]]),
            from_output=None if picked[0] is None else moved(picked[0]),
            from_input=None if picked[1] is None else moved(picked[1]),
            rows=moved(rows),
            units=list(moved(units).split([len(part) for _, _, part in groups])),
            factor=moved(factor),
            through=through,
            alone=alone,
        )

    def gathered(self, per_blueprint: list[Tensor]) -> list[Tensor]:
        """The seeds' rows [m, P_b] of each block from [N, slots, P_b] per blueprint."""
        return [per_blueprint[kind][hosts, slots] for kind, hosts, slots, _ in self.blocks]

    def use(self, blocks: list[list[list[Tensor]]]) -> None:
        """Sets the parameters of each block: of each parameter its pieces, one per slot, each [m, *shape]."""
        names = [self.population.seed_names[kind] for kind, _, _, _ in self.blocks]
        self._parameters = [
            [dict(zip(keys, piece, strict=True)) for piece in zip(*parameters, strict=True)]
            for keys, parameters in zip(names, blocks, strict=True)
        ]

    def use_rows(self, per_blueprint: list[Tensor]) -> None:
        """Sets the parameters from [N, slots, P_b] per blueprint."""
        tables = self.population.seed_tables
        self.use(
            [
                [view.split(pieces) for view in tables[kind].views(flat)]
                for (kind, _, _, pieces), flat in zip(self.blocks, self.gathered(per_blueprint), strict=True)
            ]
        )

    def __call__(self, slot: int, h: Tensor, source: Tensor) -> Tensor:
        """Adds the seeds of `slot` to its stage's output h; `source` is the stage's input; all [M, rows, width]."""
        plan = self._slots[slot]
        if plan is None:
            return h
        site, catalogue = self.population.spec.site, self.population.catalogue
        fed: list[Tensor] = []
        sides = zip((h, source), (plan.from_output, plan.from_input), plan.alone[:2], plan.counts, strict=True)
        for x, index, alone, counts in sides:
            if index is not None:
                taken = x.index_select(0, index) if alone is None else _Take.apply(x, index, alone)
                fed += taken.split(counts)
        deltas = [
            catalogue[self.blocks[block][0]].delta(self._parameters[block][piece], x, units, site)
            for (block, piece), x, units in zip(plan.groups, fed, plan.units, strict=True)
        ]
        delta = torch.cat(deltas) if len(deltas) > 1 else deltas[0]
        if plan.through is None:
            added = delta * plan.factor
        else:
            added = _Scale.apply(delta, plan.factor, plan.through, plan.alone[2])
        return h.index_add(0, plan.rows, added)
