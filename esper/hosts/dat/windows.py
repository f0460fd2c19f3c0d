"""Windows of images: cutting and joining them, and the tensors that depend on sizes alone, which all blocks share."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.attention.masks import Pool

Size = tuple[int, int]
"""Height and width in pixels."""

APART = -100.0
"""What the shift mask adds to the score of two pixels that are no neighbours. It is finite, as in the paper's network,
whose trained weights expect it."""


positions = Pool(64)
"""Of this process: offsets and indices of window shapes, each at most some 100 kB."""

masks = Pool(8)
"""Of this process: masks of image sizes, 4 MB for 64x64 pixels in windows of 8x32."""


def offsets(window: Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[(2h - 1) * (2w - 1), 2]: every offset between two pixels of a window, row by row."""
    height, width = window
    rows = torch.arange(1 - height, height, dtype=dtype, device=device)
    columns = torch.arange(1 - width, width, dtype=dtype, device=device)
    return torch.cartesian_prod(rows, columns)


def index(window: Size, device: torch.device) -> Tensor:
    """int64 [h * w, h * w]: where in `offsets` the one from the second pixel to the first is."""
    height, width = window
    rows = torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    down = rows[:, None] - rows + height - 1
    right = columns[:, None] - columns + width - 1
    return (down[:, None, :, None] * (2 * width - 1) + right[:, None, :]).reshape(height * width, height * width)


def shift_mask(size: Size, window: Size, shift: Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[windows, tokens, tokens]: APART for two pixels of a window of a rolled image that are on different sides of the
    image (Swin Transformer, arXiv 2103.14030, figure 4), else 0.

    Args:
        size: of the image, whole windows.
        window: of each.
        shift: by how much the image was rolled up and left, below `window`.
        dtype, device: of the mask.
    """
    down, right = (
        (at >= length - side).int() + (at >= length - moved).int()
        for length, side, moved in zip(size, window, shift, strict=True)
        for at in [torch.arange(length, device=device)]
    )
    region = cut((3 * down[:, None] + right)[None, :, :, None], window)[:, :, 0]
    apart = region[:, :, None] != region[:, None, :]
    return torch.zeros(apart.shape, dtype=dtype, device=device).masked_fill(apart, APART)


def cut(x: Tensor, window: Size) -> Tensor:
    """[B * windows, h * w, ...] from [B, H, W, ...]; the windows of an image lie side by side, row by row."""
    height, width = window
    batch, rows, columns = x.shape[0], x.shape[1] // height, x.shape[2] // width
    x = x.reshape(batch, rows, height, columns, width, *x.shape[3:]).transpose(2, 3)
    return x.reshape(batch * rows * columns, height * width, *x.shape[5:])


def join(x: Tensor, size: Size, window: Size) -> Tensor:
    """The inverse of `cut`: [B, H, W, ...] from [B * windows, h * w, ...]."""
    (height, width), (rows, columns) = window, (size[0] // window[0], size[1] // window[1])
    x = x.reshape(-1, rows, columns, height, width, *x.shape[2:]).transpose(2, 3)
    return x.reshape(-1, *size, *x.shape[5:])
