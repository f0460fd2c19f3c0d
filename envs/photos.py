"""Photographs that registry packages ship, in splits that share no photo, and what image super-resolution needs of
them: crops, bicubic scaling and PSNR. Nothing is downloaded at run time."""

from __future__ import annotations

import math
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from esper.runtime.errors import ConfigError

SPLITS = {
    "train": ("astronaut", "coffee", "motorcycle_left", "rocket", "brick", "grass", "gravel"),
    "validation": ("chelsea", "camera"),
    "test": ("china", "flower"),
}
"""Names of the photos."""

_STEP = 12  # heights and widths are multiples of it: of every scale (2, 3, 4) of the papers

# The package and the file in it. Those of scikit-image (BSD-3) are CC0 or in the public domain, says skimage.data, but
# for motorcycle_left (Middlebury stereo benchmark, Scharstein et al., GCPR 2014), whose licence it does not name. Those
# of scikit-learn (BSD-3) are CC BY 2.0: china.jpg by danielbuechele, flower.jpg by vultilion.
_FILES = {
    **{
        name: ("scikit-image", f"skimage/data/{name}.png")
        for name in ("astronaut", "coffee", "motorcycle_left", "brick", "grass", "gravel", "chelsea", "camera")
    },
    "rocket": ("scikit-image", "skimage/data/rocket.jpg"),
    "china": ("scikit-learn", "sklearn/datasets/images/china.jpg"),
    "flower": ("scikit-learn", "sklearn/datasets/images/flower.jpg"),
}

_LUMA = (65.481, 128.553, 24.966)  # of R, G and B in [0, 1]; ITU-R BT.601 with Y from 16 to 235
_PEAK = 255.0


def _file(name: str) -> Path:
    """Of the photo; its package is not imported, which would take seconds."""
    package, file = _FILES[name]
    try:
        installed = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"{Path(file).name} comes with {package}, which is not installed; pip install {package}"
        ) from None
    path = Path(str(installed.locate_file(file)))
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing: {package} {installed.version} does not ship it; "
            f"pip install --force-reinstall {package}, or another version of it"
        )
    return path


@cache
def load(split: str) -> list[Tensor]:
    """The photos of a split, each float32 [3, H, W] in [0, 1]; grey ones have three equal channels.

    H and W are multiples of 12: what is over is cut at the bottom and at the right. The list is kept: don't write to
    it.

    Raises:
        KeyError: no such split; the message lists those there are.
        ConfigError: a package that ships a photo is not installed, or its version has no such file.
    """
    if split not in SPLITS:
        raise KeyError(f"unknown split {split!r}; available: {', '.join(SPLITS)}")
    return [_photo(name) for name in SPLITS[split]]


def _photo(name: str) -> Tensor:
    with Image.open(_file(name)) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
    height, width = (extent - extent % _STEP for extent in pixels.shape[:2])
    return pixels[:height, :width].permute(2, 0, 1).contiguous().float() / 255


def crops(photos: list[Tensor], count: int, size: int, scale: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random crops for training: of any of the photos, at any place, flipped and turned by quarters at random.

    Args:
        photos: each [3, H, W] in [0, 1].
        count: how many crops.
        size: side of the low resolution, in pixels.
        scale: of the high resolution to the low one.
        generator: of the CPU; fixes the crops.

    Returns:
        low [count, 3, size, size] and high [count, 3, size * scale, size * scale], in [0, 1].

    Raises:
        ConfigError: a photo is smaller than a crop.
    """
    side = _side(photos, size, scale)
    high = []
    for which, down, right, flip, turns in torch.rand(count, 5, generator=generator, dtype=torch.float64).tolist():
        photo = photos[int(which * len(photos))]
        top, left = (int(x * (extent - side + 1)) for x, extent in zip((down, right), photo.shape[1:], strict=True))
        crop = _cut(photo, top, left, side)
        high.append(torch.rot90(crop.flip(2) if flip < 0.5 else crop, int(4 * turns), (1, 2)))
    return _pairs(high, size)


def grid(photos: list[Tensor], count: int, size: int, scale: int) -> tuple[Tensor, Tensor]:
    """Crops that lie evenly over the photos, for validation and test: always the same, neither flipped nor turned.

    Arguments, results and errors are those of `crops`. Each photo gets its share of them, in rows from border to
    border; crops overlap where there are too many of them.
    """
    side = _side(photos, size, scale)
    high = []
    for photo, share in zip(photos, _shares(count, len(photos)), strict=True):
        height, width = photo.shape[1:]
        rows = min(max(round(math.sqrt(share * height / width)), 1), share)
        for top, columns in zip(_spread(height - side, rows), _shares(share, rows), strict=True):
            high += [_cut(photo, top, left, side) for left in _spread(width - side, columns)]
    return _pairs(high, size)


def _side(photos: list[Tensor], size: int, scale: int) -> int:
    """Of the high resolution, checked."""
    side = size * scale
    height, width = (min(photo.shape[axis] for photo in photos) for axis in (1, 2))
    if side > min(height, width):
        raise ConfigError(
            f"crops of {size} x {size} pixels at scale {scale} need photos of {side} x {side}; the smallest here are "
            f"{height} high and {width} wide"
        )
    return side


def _cut(photo: Tensor, top: int, left: int, side: int) -> Tensor:
    return photo[:, top : top + side, left : left + side]


def _shares(count: int, parts: int) -> list[int]:
    """`count` in `parts` parts that differ by one at most."""
    return [count // parts + (part < count % parts) for part in range(parts)]


def _spread(room: int, count: int) -> list[int]:
    """`count` offsets from 0 to `room`; a single one in the middle."""
    return [room // 2] if count == 1 else [round(i * room / (count - 1)) for i in range(count)]


def _pairs(high: list[Tensor], size: int) -> tuple[Tensor, Tensor]:
    whole = torch.stack(high)
    return _resized(whole, size, size), whole


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    resized = functional.interpolate(images, (height, width), mode="bicubic", antialias=True)
    return resized.clamp(0.0, 1.0)


def bicubic(low: Tensor, scale: int) -> Tensor:
    """[n, 3, H * scale, W * scale] from [n, 3, H, W], both in [0, 1]: the baseline of the super-resolution papers.

    The kernel is theirs, that of Keys (IEEE Trans. ASSP 29(6), 1981) with a = -0.5; without `antialias` torch takes
    a = -0.75.
    """
    return _resized(low, low.shape[2] * scale, low.shape[3] * scale)


def psnr_y(a: Tensor, b: Tensor, border: int) -> Tensor:
    """[n] peak signal-to-noise ratios in dB of the luma alone, as the super-resolution papers report them; inf where
    both are equal. Values are not rounded to 8 bits.

    Args:
        a, b: [n, 3, H, W], R, G and B in [0, 1].
        border: pixels that are left out at each side; the papers leave out as many as the scale.

    Raises:
        ValueError: the shapes differ, or nothing is left within the border.
    """
    if a.shape != b.shape:
        raise ValueError(f"images of {tuple(a.shape)} and {tuple(b.shape)} do not compare")
    height, width = a.shape[2:]
    if border < 0 or 2 * border >= min(height, width):
        raise ValueError(f"a border of {border} leaves nothing of {height} x {width} pixels")
    # Y = 16 + luma: the 16 cancels out.
    difference = (a.float() - b.float())[:, :, border : height - border, border : width - border]
    luma = (difference * difference.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1)
    return 10 * torch.log10(_PEAK**2 / luma.square().mean((1, 2)))
