"""The whole Dual Aggregation Transformer: groups of blocks between a first convolution and an upsampler."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper.attention.selection import checked
from esper.hosts.dat.blocks import Block, Masks, shift_masks
from esper.hosts.dat.derived import Derived
from esper.hosts.dat.spec import FEATURES, DATSpec
from esper.runtime.errors import ConfigError

MEAN = (0.4488, 0.4371, 0.4040)
"""Of the red, green and blue of the images of DIV2K."""


class Group(nn.Module):
    """Blocks and a convolution beside the identity.

    Args:
        spec: of the network.
        number: which one it is.
        drops: probability with which each block is skipped.
        backend: of the attention.
    """

    def __init__(self, spec: DATSpec, number: int, drops: list[float], backend: str | None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(spec, number, i, drop, backend) for i, drop in enumerate(drops))
        self.conv = _residual(spec)

    def forward(self, x: Tensor, masks: Masks | None) -> Tensor:
        """[B, H, W, C] from the same."""
        out = x
        for block in self.blocks:
            out = block(out, masks)
        return self.conv(out.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + x


class DAT(Derived):
    """Dual Aggregation Transformer (Chen et al., arXiv 2308.03364) for image super-resolution.

    State dicts have the keys and shapes of the authors' network. Position indices, offsets and shift masks in them are
    not read, since they follow from sizes.

    Args:
        spec: the architecture, checked.
        attention: a backend of `esper.attention`; by default as `esper.attention.select` says.

    Attributes:
        mean: [channels, 1, 1], what is subtracted from images and added again.

    Raises:
        ConfigError: there is no such backend.
    """

    mean: Tensor

    def __init__(self, spec: DATSpec, attention: str | None = None):
        super().__init__()
        if attention is not None:
            checked(attention, "call")
        self.spec, self.attention = spec, attention
        dim, depth = spec.dim, spec.depth
        count = sum(depth)
        drops = [spec.drop_path * i / max(count - 1, 1) for i in range(count)]
        starts = [sum(depth[:i]) for i in range(len(depth))]
        self.conv_first = nn.Conv2d(spec.channels, dim, 3, padding=1)
        self.before_RG = nn.Sequential(nn.Identity(), nn.LayerNorm(dim))
        self.layers = nn.ModuleList(
            Group(spec, i, drops[start : start + depth[i]], attention) for i, start in enumerate(starts)
        )
        self.norm = nn.LayerNorm(dim)
        self.conv_after_body = _residual(spec)
        if spec.upsampler == "pixelshuffle":
            self.conv_before_upsample = nn.Sequential(nn.Conv2d(dim, FEATURES, 3, padding=1), nn.LeakyReLU())
            self.upsample = _steps(spec.scale)
            self.conv_last = nn.Conv2d(FEATURES, spec.channels, 3, padding=1)
        else:
            self.upsample = _shuffled(dim, spec.channels, spec.scale)
        self.register_buffer("mean", torch.empty(0), persistent=False)
        self.derive()
        self.apply(_init)

    def derive(self) -> None:
        """See Derived."""
        mean = MEAN if self.spec.channels == 3 else (0.0,) * self.spec.channels
        self.mean = torch.tensor(mean, dtype=self.mean.dtype, device=self.mean.device)[:, None, None]

    @property
    def blocks(self) -> list[Block]:
        """Of all groups, in the order of the forward pass."""
        return [block for group in self.layers for block in group.blocks]  # type: ignore[union-attr]

    def masks(self, x: Tensor) -> Masks | None:
        """What shifted blocks need for images [B, channels, H, W]; None where there are none."""
        if not any(block.kind == "shifted" for block in self.blocks):
            return None
        return shift_masks(self.spec, (x.shape[2], x.shape[3]), x.dtype, x.device)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, scale H, scale W] from [B, channels, H, W] between 0 and 1, of any height and width.

        Raises:
            ConfigError: a batch of one image in training.
        """
        if len(x) == 1 and self.blocks[0].attn.channel_interaction[2].training:  # type: ignore[union-attr,index]
            raise ConfigError(
                "batch=1: in training the batch normalisation of pooled channels needs at least 2 images; "
                "give more, or call eval()"
            )
        mean = self.mean.to(x.dtype)
        first = self.conv_first(x - mean)
        masks = self.masks(x)
        h = self.before_RG(first.permute(0, 2, 3, 1))
        for group in self.layers:
            h = group(h, masks)
        out = self.conv_after_body(self.norm(h).permute(0, 3, 1, 2)) + first
        if self.spec.upsampler == "pixelshuffle":
            out = self.conv_last(self.upsample(self.conv_before_upsample(out)))
        else:
            out = self.upsample(out)
        return out + mean


def _residual(spec: DATSpec) -> nn.Module:
    dim = spec.dim
    if spec.residual == "1conv":
        return nn.Conv2d(dim, dim, 3, padding=1)
    inner = dim // 4
    return nn.Sequential(
        nn.Conv2d(dim, inner, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(inner, inner, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(inner, dim, 3, padding=1),
    )


def _shuffled(dim: int, out: int, scale: int) -> nn.Sequential:
    """Pixel shuffle (arXiv 1609.05158)."""
    return nn.Sequential(nn.Conv2d(dim, scale**2 * out, 3, padding=1), nn.PixelShuffle(scale))


def _steps(scale: int) -> nn.Sequential:
    """By 2 as often as needed, or by 3 once."""
    factors = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
    return nn.Sequential(*(layer for factor in factors for layer in _shuffled(FEATURES, FEATURES, factor)))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
