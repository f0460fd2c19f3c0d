"""What a Dual Aggregation Transformer is made of, and the presets that have names."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from esper.runtime.errors import ConfigError

RESIDUALS = ("1conv", "3conv")
UPSAMPLERS = ("pixelshuffle", "pixelshuffledirect")
FEATURES = 64
"""Channels of the upsampler "pixelshuffle"."""


@dataclass(frozen=True)
class DATSpec:
    """An architecture.

    Attributes:
        scale: factor from the input's height and width to the output's.
        dim: channels of the blocks.
        depth: blocks of each group; even ones attend in space, odd ones among channels.
        heads: of every group, or of each; half of them go to each of the two window shapes.
        split: height and width of the windows in pixels; in the second half of the channels width and height.
        expansion: channels inside a feed-forward network over `dim`, before its gate halves them.
        residual: convolutions at the end of a group: "1conv", or "3conv" with a bottleneck.
        upsampler: "pixelshuffle" by steps of 2 (or one of 3), or "pixelshuffledirect" in one step.
        drop_path: probability with which the last block is skipped in training; it rises linearly from 0 at the first.
        qkv_bias: whether queries, keys and values have biases.
        channels: of images.
        img_size: height and width in pixels for which a state dict holds shift masks; any other size works as well.
    """

    scale: int = 4
    dim: int = 180
    depth: tuple[int, ...] = (6,) * 6
    heads: int | tuple[int, ...] = 6
    split: tuple[int, int] = (8, 32)
    expansion: float = 4.0
    residual: str = "1conv"
    upsampler: str = "pixelshuffle"
    drop_path: float = 0.1
    qkv_bias: bool = True
    channels: int = 3
    img_size: int = 64

    @property
    def shift(self) -> tuple[int, int]:
        """By how many pixels the windows of shifted blocks are moved up and left."""
        return self.split[0] // 2, self.split[1] // 2

    @property
    def hidden(self) -> int:
        """Channels inside a feed-forward network."""
        return int(self.dim * self.expansion)

    def heads_of(self, group: int) -> int:
        return self.heads if isinstance(self.heads, int) else self.heads[group]

    @staticmethod
    def shifted(group: int, block: int) -> bool:
        """Whether a block shifts its windows: every other spatial block, in turn with the neighbouring groups."""
        return block % 4 == (2 if group % 2 == 0 else 0)

    def check(self) -> DATSpec:
        """Itself.

        Raises:
            ConfigError: it cannot be built; names the first such key.
        """
        for key, what in (("depth", "the number of blocks of each group"), ("split", "two whole numbers")):
            _require(isinstance(getattr(self, key), tuple), key, getattr(self, key), f"give {what}")
        sizes = ("scale", "dim", "channels", "img_size")
        for key, value in [*((key, getattr(self, key)) for key in sizes), *(("depth", n) for n in self.depth)]:
            _require(_whole(value) and value > 0, key, value, "must be a whole number above 0")
        _require(len(self.depth) > 0, "depth", self.depth, "needs at least one group")
        _require(self.upsampler in UPSAMPLERS, "upsampler", self.upsampler, f"choose one of {', '.join(UPSAMPLERS)}")
        _require(self.residual in RESIDUALS, "residual", self.residual, f"choose one of {', '.join(RESIDUALS)}")
        steps = self.upsampler != "pixelshuffle" or self.scale == 3 or self.scale & (self.scale - 1) == 0
        _require(steps, "scale", self.scale, "choose 3 or a power of 2, or upsampler=pixelshuffledirect")
        # The networks of the position bias are dim // 32 wide.
        _require(self.dim >= 32 and self.dim % 2 == 0, "dim", self.dim, "must be even and at least 32")
        many = isinstance(self.heads, tuple)
        _require(
            not many or len(self.heads) == len(self.depth),  # type: ignore[arg-type]
            "heads", self.heads, f"give one number, or one for each of the {len(self.depth)} groups of depth",
        )  # fmt: skip
        for group in range(len(self.depth)):
            heads = self.heads_of(group)
            fits = _whole(heads) and heads > 0 and heads % 2 == 0 and self.dim % heads == 0
            _require(fits, "heads", self.heads, f"every number must be even, above 0 and divide dim={self.dim}")
        fits = len(self.split) == 2 and all(_whole(side) and side >= 2 for side in self.split)
        fits = fits and max(self.split) % min(self.split) == 0
        _require(fits, "split", self.split, "give two whole numbers of at least 2, of which one divides the other")
        high = max(self.split)
        _require(self.img_size % high == 0, "img_size", self.img_size, f"must be a multiple of {high}, see split")
        even = self.hidden >= 2 and self.hidden % 2 == 0
        _require(
            even, "expansion", self.expansion, f"dim={self.dim} times it must be even and above 0, not {self.hidden}"
        )
        _require(0 <= self.drop_path < 1, "drop_path", self.drop_path, "must be at least 0 and below 1")
        return self


_S = DATSpec(split=(8, 16), expansion=2.0)
_LIGHT = DATSpec(expansion=2.0, residual="3conv", upsampler="pixelshuffledirect")

PRESETS = {
    "dat": DATSpec(),
    "dat_s": _S,
    "dat_2": replace(_S, split=(8, 32)),
    "dat_light": replace(_LIGHT, dim=60, depth=(18,)),
    "tiny": replace(_LIGHT, dim=96, depth=(2, 2), split=(8, 8), drop_path=0.0),
}
"""Those of the paper (arXiv 2308.03364, section 4.1), and one small enough to be trained on a CPU.

dim // 32 is the width of the networks of the position bias. Behind a normalisation over less than 3 units they have
all but nothing to say about positions, which is so in `dat_light`.
"""


def spec_of(name: str, scale: int = 4, **changes: Any) -> DATSpec:
    """A preset with other fields.

    Args:
        name: one of PRESETS.
        scale: see DATSpec.
        changes: fields of DATSpec.

    Raises:
        ConfigError: there is no such preset or field, or the result cannot be built; says what can.
    """
    if name not in PRESETS:
        raise ConfigError(f"dat.name={name}: choose one of {', '.join(PRESETS)}")
    known = [field.name for field in fields(DATSpec)]
    for key, value in changes.items():
        _require(key in known, key, value, f"there is no such key; choose one of {', '.join(known)}")
    changes = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
    return replace(PRESETS[name], scale=scale, **changes).check()


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(fits: bool, key: str, value: object, what: str) -> None:
    if not fits:
        raise ConfigError(f"dat.{key}={value}: {what}")
