"""Convolution of stacked hosts over a small grid of tokens, each host with a kernel of its own.

Grouped convolutions of a framework are slow at these sizes. Where there are few tokens for the kernel's taps, the
kernel is expanded by a constant matrix of shifts into the dense (Toeplitz) matrix between all tokens, so that a
convolution is one batched product; elsewhere the neighbours of each token are gathered side by side (im2col). Forward
and backward of 32 hosts with 8 channels, batch 32, one thread: 2.1 against 4.3 ms on a 4x4 grid with 9 taps, but 3.5
against 1.7 ms on 20 tokens with 3 taps.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

DENSE_TOKENS_PER_TAP = 2


class Convolution:
    """Offsets and neighbours of one kernel on one grid.

    Args:
        grid: how the tokens lie, (length,) or (height, width).
        kernel: extent of the kernel along each axis.
        dilation: distance between its taps.
        causal: one axis only; the taps look back.
    """

    def __init__(self, grid: tuple[int, ...], kernel: int, dilation: int, causal: bool):
        self.tokens = 1
        for extent in grid:
            self.tokens *= extent
        reach = range(kernel)
        offsets = list(
            product(*[[(i - (kernel - 1 if causal else kernel // 2)) * dilation for i in reach]] * len(grid))
        )
        self.taps = len(offsets)
        coordinates = list(product(*map(range, grid)))
        index = {coordinate: token for token, coordinate in enumerate(coordinates)}
        # [tokens, taps]: the neighbour at each tap; `tokens` stands for the zero beyond the edge.
        self.neighbour = torch.tensor(
            [
                [index.get(tuple(c + o for c, o in zip(at, offset, strict=True)), self.tokens) for offset in offsets]
                for at in coordinates
            ]
        )
        self.dense = self.tokens <= DENSE_TOKENS_PER_TAP * self.taps
        # [tokens in * tokens out, taps]: 1 at the tap that joins the two.
        shift = torch.zeros(self.tokens + 1, self.tokens, self.taps)
        for token, row in enumerate(self.neighbour.tolist()):
            shift[row, token, range(self.taps)] = 1.0
        self.shift = shift[:-1].flatten(0, 1)

    @cache  # noqa: B019 - as long-lived as `convolution` keeps them
    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The shifts and the neighbours in one row, copied to a device once."""
        return self.shift.to(device), self.neighbour.flatten().to(device)

    def __call__(self, h: Tensor, weight: Tensor) -> Tensor:
        """Convolves.

        Args:
            h: [M, batch * tokens, inputs].
            weight: [M, taps, inputs, outputs].

        Returns:
            [M, batch * tokens, outputs].
        """
        hosts, rows, inputs = h.shape
        outputs, tokens = weight.shape[-1], self.tokens
        if self.dense:
            between = torch.bmm(self._on(h.device)[0].expand(hosts, -1, -1), weight.flatten(2))
            toeplitz = between.view(hosts, tokens, tokens, inputs, outputs).transpose(2, 3)
            toeplitz = toeplitz.reshape(hosts, tokens * inputs, tokens * outputs)
            return torch.bmm(h.reshape(hosts, -1, tokens * inputs), toeplitz).view(hosts, rows, outputs)
        padded = torch.nn.functional.pad(h.view(hosts, -1, tokens, inputs), (0, 0, 0, 1))
        gathered = padded.index_select(2, self._on(h.device)[1])
        return torch.bmm(gathered.view(hosts, rows, self.taps * inputs), weight.flatten(1, 2))


@cache
def convolution(grid: tuple[int, ...], kernel: int = 3, dilation: int = 1, causal: bool = False) -> Convolution:
    """The shared Convolution for these arguments."""
    return Convolution(grid, kernel, dilation, causal)
