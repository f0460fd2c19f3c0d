"""Self-attention within windows of an image."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from esper.attention import attend
from esper.growth.blueprints.attention import projections
from esper.growth.blueprints.registry import Blueprint, ParameterSpec, Site, register

WINDOW = 8


@register("window_attention")
class WindowAttention(Blueprint):
    """`softmax(Q K^T / sqrt(width) + position) V W` with one head, in windows of 8x8 tokens that do not overlap.

    As in Swin (Liu et al., arXiv 2103.14030) `position` is a learned bias per offset, so that parameters do not depend
    on the grid. A grid that is no multiple of 8 is padded at the bottom and at the right; nothing attends to padding.
    """

    mixes_tokens = True
    gated = True

    def fits(self, site: Site) -> bool:
        """Windows are cut of two dimensions, and see later tokens, too."""
        return super().fits(site) and len(site.grid) == 2 and not site.causal

    def parameters(self, site: Site) -> dict[str, ParameterSpec]:
        return {**projections(site.width), "position": ParameterSpec((1, (2 * WINDOW - 1) ** 2), init="zeros")}

    def delta(self, p: dict[str, Tensor], x: Tensor, units: Tensor, site: Site) -> Tensor:
        # Hosts of lesser width have fewer units to sum over; padding adds 0.
        scale = units.sum(-1, keepdim=True).rsqrt()
        q, k, v = (torch.bmm(x, p[name]) for name in ("q", "k", "v"))
        q = q * scale.to(q.dtype)
        # Seeds lie where heads do: then each has its own bias, which need not be copied for every window.
        bias = p["position"][:, 0, _offsets(x.device)]
        # [windows, 1, WINDOW**2], or None; each window has a token at least.
        mask = _mask(site.grid, x.device)
        windows = attend(*(_cut(y, site.grid) for y in (q, k, v)), kind="windowed", bias=bias, mask=mask, scale=1.0)
        return torch.bmm(_joined(windows, site.grid), p["w"])

    def flops(self, site: Site) -> int:
        # Asked for wherever it is in the catalogue, grids of other dimensions included.
        windows = math.prod(-(-extent // WINDOW) for extent in site.grid)
        return 4 * site.width**2 * site.tokens + 2 * site.width * windows * WINDOW**4


def _windows(grid: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of windows that cover the grid."""
    height, width = grid
    return -(-height // WINDOW), -(-width // WINDOW)


def _padded(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[..., height, width, units] with 0 at the bottom and at the right up to whole windows."""
    (rows, columns), (height, width) = _windows(grid), grid
    return functional.pad(x, (0, 0, 0, columns * WINDOW - width, 0, rows * WINDOW - height))


def _cut(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[batch * windows, m, WINDOW**2, units] from [m, batch * tokens, units]."""
    (rows, columns), (m, _, units) = _windows(grid), x.shape
    x = _padded(x.view(m, -1, *grid, units), grid).view(m, -1, rows, WINDOW, columns, WINDOW, units)
    return x.permute(1, 2, 4, 0, 3, 5, 6).reshape(-1, m, WINDOW**2, units)


def _joined(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The inverse of `_cut`, without padding."""
    (rows, columns), (_, m, _, units) = _windows(grid), x.shape
    x = x.reshape(-1, rows, columns, m, WINDOW, WINDOW, units).permute(3, 0, 1, 4, 2, 5, 6)
    x = x.reshape(m, -1, rows * WINDOW, columns * WINDOW, units)
    return x[:, :, : grid[0], : grid[1]].reshape(m, -1, units)


def _mask(grid: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Which tokens may be attended to, bool [windows, 1, WINDOW**2]; None where there is no padding."""
    if not any(extent % WINDOW for extent in grid):
        return None
    inside = torch.ones(1, *grid, 1, dtype=torch.bool, device=device)
    return _cut(inside.flatten(1, 2), grid)[:, 0, None, :, 0]


def _offsets(device: torch.device) -> Tensor:
    """[WINDOW**2, WINDOW**2]: the entry of `position` for each query and key, by rows and columns from one to the
    other."""
    steps = torch.arange(WINDOW, device=device)
    steps = steps - steps[:, None] + WINDOW - 1  # [query, key]
    entries = (2 * WINDOW - 1) * steps[:, None, :, None] + steps[None, :, None, :]
    return entries.reshape(WINDOW**2, WINDOW**2)
