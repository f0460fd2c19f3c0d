"""What a backend computes: attention of one query, key and value tensor each, or along the edges of graphs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esper.attention import masks
from esper.attention.masks import arena


class Inputs(NamedTuple):
    """`softmax(scale * q k^T + bias + mask) v`, 0 for queries without any key to attend to.

    Attributes:
        q: [B, heads, queries, D].
        k: [B, heads, keys, D].
        v: [B, heads, keys, Dv].
        mask: [b, 1 or heads, 1 or queries, keys], boolean or additive, or None; b divides B, and row i has mask i % b.
        bias: [1 or B, 1 or heads, queries, keys] or None.
        causal: whether query i attends to the keys 0 to i alone.
        scale: of the products.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    causal: bool
    scale: float

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> Inputs:
        """Checked; see `esper.attention.attend`.

        Raises:
            ValueError: shapes or dtypes do not fit; names them.
        """
        batch, heads, queries, size = q.shape
        keys = k.shape[2]
        if k.shape != (batch, heads, keys, size) or v.shape[:3] != (batch, heads, keys):
            raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: they must be of one dtype")
        if mask is not None:
            # [windows, queries, keys] has no heads.
            mask = mask[:, None] if mask.dim() == 3 else mask[(None,) * (4 - mask.dim())]
            fits = mask.shape[1] in (1, heads) and mask.shape[2] in (1, queries) and mask.shape[3] == keys
            if not fits or batch % mask.shape[0]:
                raise ValueError(f"mask {tuple(mask.shape)} does not fit {batch} x {heads} x {queries} x {keys}")
        if bias is not None:
            bias = bias[(None,) * (4 - bias.dim())]
            if bias.dtype == torch.bool:
                raise ValueError("a position bias is added to the scores; pass what is boolean as mask")
            if bias.shape[0] not in (1, batch) or bias.shape[1] not in (1, heads) or bias.shape[2:] != (queries, keys):
                raise ValueError(f"bias {tuple(bias.shape)} does not fit {batch} x {heads} x {queries} x {keys}")
        return cls(q, k, v, mask, bias, causal, size**-0.5 if scale is None else scale)

    def added(self, dtype: torch.dtype) -> Tensor | None:
        """Mask, bias and causal mask as one tensor [b, 1 or heads, 1 or queries, keys] in `dtype` that is added to the
        scores; None where there is nothing to add."""
        total = None if self.bias is None else self.bias.to(dtype)
        if self.mask is not None:
            mask = masks.additive(self.mask, dtype)
            if total is not None and total.shape[0] > mask.shape[0] > 1:
                mask = mask.repeat(total.shape[0] // mask.shape[0], 1, 1, 1)
            total = mask if total is None else total + mask
        if self.causal:
            queries, keys, device = self.q.shape[2], self.k.shape[2], self.q.device
            if torch.compiler.is_compiling():
                triangle = masks.causal(queries, keys, dtype, device)
            else:
                triangle = arena.causal(queries, keys, dtype, device)
            total = triangle[None, None] if total is None else total + triangle
        return total


class Edges(NamedTuple):
    """Edges between padded nodes of `graphs` graphs.

    Attributes:
        source: int64 [E], rows among graphs x sources.
        target: int64 [E], rows among graphs x targets.
        graphs: how many.
        sources, targets: nodes of each, padding included.
        parallel: whether two nodes may share more than one edge.
    """

    source: Tensor
    target: Tensor
    graphs: int
    sources: int
    targets: int
    parallel: bool

    @classmethod
    def of(cls, source: Tensor, target: Tensor, graphs: int, sources: int, targets: int) -> Edges:
        """Finds out whether there are parallel edges."""
        edges = cls(source, target, graphs, sources, targets, False)
        return edges._replace(parallel=len(edges.cells().unique()) < len(source))

    def cells(self) -> Tensor:
        """int64 [E], rows among graphs x targets x sources."""
        return self.target * self.sources + self.source % self.sources

    @property
    def density(self) -> float:
        """Edges over possible edges."""
        return len(self.source) / max(self.graphs * self.sources * self.targets, 1)

    def scores(self, scores: Tensor) -> Tensor:
        """[graphs, heads, targets, sources] from [E, heads]; -inf where there is no edge. Parallel edges are merged by
        logsumexp, which is exact where the values are those of their source."""
        cells = self.graphs * self.targets * self.sources
        cell = self.cells()
        spread = scores.T.contiguous()  # [heads, E]
        blank = spread.new_full((len(spread), cells), -torch.inf)
        if self.parallel:
            index = cell.expand_as(spread)
            top = blank.scatter_reduce(1, index, spread.detach(), "amax")
            total = torch.zeros_like(blank).index_add(1, cell, (spread - top.gather(1, index)).exp())
            full = total.log() + top  # -inf where there is no edge
        else:
            full = blank.index_copy(1, cell, spread)
        return full.view(-1, self.graphs, self.targets, self.sources).transpose(0, 1)
