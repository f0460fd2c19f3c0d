"""The blocks of a Dual Aggregation Transformer: attention in windows and among channels, each beside a convolution,
and gated feed-forward networks. Images are [B, H, W, C] here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.attention import attend
from esper.hosts.dat import windows
from esper.hosts.dat.derived import Derived
from esper.hosts.dat.spec import DATSpec
from esper.hosts.dat.windows import Size

Masks = tuple[Tensor, Tensor]
"""Of both window shapes: shift masks, or biases of positions."""


class PositionBias(nn.Module):
    """A network of three hidden layers from offsets to biases (CrossFormer, arXiv 2108.00154, section 3.3)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()

        def layer(out: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, out))

        self.pos_proj = nn.Linear(2, dim)
        self.pos1, self.pos2, self.pos3 = layer(dim), layer(dim), layer(heads)

    def forward(self, offsets: Tensor) -> Tensor:
        """[n, heads] from [n, 2] in pixels."""
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))


class WindowAttention(Derived):
    """Attention within windows of one shape, with a bias for each offset."""

    derived = ("rpe_biases", "relative_position_index")
    rpe_biases: Tensor
    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: Size, backend: str | None):
        super().__init__()
        self.heads, self.window, self.backend = heads, window, backend
        self.pos = PositionBias(dim // 4 // 4, heads)
        self.register_buffer("rpe_biases", torch.empty(0))
        self.register_buffer("relative_position_index", torch.empty(0, dtype=torch.int64))
        self.derive()

    def derive(self) -> None:
        """See Derived."""
        old = self.rpe_biases
        self.rpe_biases = windows.positions.get(windows.offsets, self.window, old.dtype, old.device)
        self.relative_position_index = windows.positions.get(windows.index, self.window, old.device)

    def bias(self) -> Tensor:
        """[heads, h * w, h * w], of every two pixels of a window."""
        return self.pos(self.rpe_biases).T[:, self.relative_position_index]

    def forward(self, qkv: Tensor, mask: Tensor | None, bias: Tensor) -> Tensor:
        """[B, H, W, dim] from [B, H, W, 3, dim]; `mask` is of `windows.shift_mask`."""
        q, k, v = windows.cut(qkv.unflatten(-1, (self.heads, -1)), self.window).permute(2, 0, 3, 1, 4).contiguous()
        if mask is None:
            out = attend(q, k, v, kind="windowed", bias=bias, backend=self.backend)
        else:
            out = self._masked((q, k, v), mask, bias, (qkv.shape[1], qkv.shape[2]))
        return windows.join(out.transpose(1, 2), (qkv.shape[1], qkv.shape[2]), self.window).flatten(3)

    def _masked(self, qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor, bias: Tensor, size: Size) -> Tensor:
        """[B * windows, heads, h * w, D]. Only windows in the last row or column see both sides of an image, and all of
        a row or a column alike: four masks do, where one for each window would be most of the work."""
        grid = size[0] // self.window[0], size[1] // self.window[1]
        q, k, v = (x.unflatten(0, (-1, *grid)) for x in qkv)
        masks = mask.unflatten(0, grid)
        inner, last = slice(0, -1), slice(-1, None)
        rows = []
        for row in (inner, last) if grid[0] > 1 else (last,):
            parts = []
            for column in (inner, last) if grid[1] > 1 else (last,):
                own = None if row is inner and column is inner else masks[row, column][0, 0]
                part = (x[:, row, column].flatten(0, 2) for x in (q, k, v))
                out = attend(*part, kind="windowed", bias=bias, mask=own, backend=self.backend)
                parts.append(out.unflatten(0, q[:, row, column].shape[:3]))
            rows.append(torch.cat(parts, 2))
        return torch.cat(rows, 1).flatten(0, 2)


class _Aggregation(nn.Module):
    """Attention beside a depthwise convolution of its values, each gated by a map of the other."""

    def __init__(self, spec: DATSpec):
        super().__init__()
        dim = spec.dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=spec.qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwconv = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.BatchNorm2d(dim), nn.GELU())
        self.channel_interaction = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(dim, dim // 8, 1),
            nn.BatchNorm2d(dim // 8),
            nn.GELU(),
            nn.Conv2d(dim // 8, dim, 1),
        )
        self.spatial_interaction = nn.Sequential(
            nn.Conv2d(dim, dim // 16, 1), nn.BatchNorm2d(dim // 16), nn.GELU(), nn.Conv2d(dim // 16, 1, 1)
        )

    def channel_gate(self, x: Tensor) -> Tensor:
        """[B, 1, 1, C] from [B, H, W, C]."""
        return _last(self.channel_interaction(_first(x))).sigmoid()

    def spatial_gate(self, x: Tensor) -> Tensor:
        """[B, H, W, 1] from [B, H, W, C]."""
        return _last(self.spatial_interaction(_first(x))).sigmoid()

    def convolved(self, values: Tensor) -> Tensor:
        """[B, H, W, C] from the same."""
        return _last(self.dwconv(_first(values)))


class SpatialAttention(_Aggregation, Derived):
    """Adaptive spatial attention: half of the channels in windows of one shape, half in the same turned by 90 degrees.

    Args:
        spec: of the network.
        heads: of both halves.
        shifted: whether the windows are shifted.
        backend: of the attention.
    """

    attn_mask_0: Tensor | None
    attn_mask_1: Tensor | None

    def __init__(self, spec: DATSpec, heads: int, shifted: bool, backend: str | None):
        super().__init__(spec)
        self.spec, self.shifted = spec, shifted
        shapes = (spec.split, spec.split[::-1])
        self.attns = nn.ModuleList(WindowAttention(spec.dim // 2, heads // 2, shape, backend) for shape in shapes)
        if shifted:
            self.derived = ("attn_mask_0", "attn_mask_1")
            self.derive()

    def derive(self) -> None:
        """See Derived."""
        if self.shifted:
            size, like = (self.spec.img_size,) * 2, self.proj.weight
            for name, mask in zip(self.derived, shift_masks(self.spec, size, like.dtype, like.device), strict=True):
                self.register_buffer(name, mask)

    @staticmethod
    def _fits(own: Tensor, given: Tensor) -> bool:
        return True  # masks of another img_size say nothing of the network

    def biases(self) -> Masks:
        """Of both window shapes."""
        first, second = (branch.bias() for branch in self.attns)  # type: ignore[operator]
        return first, second

    def forward(self, x: Tensor, masks: Masks | None, biases: Masks) -> Tensor:
        """[B, H, W, C] from the same; `masks` are of `shift_masks` for this size and must be given if it is shifted."""
        height, width = x.shape[1:3]
        qkv = self.qkv(x).unflatten(-1, (3, 2, -1))
        conv = self.convolved(qkv[:, :, :, 2].flatten(3))
        down, right = (-length % max(self.spec.split) for length in (height, width))
        if down or right:
            qkv = F.pad(qkv, (0, 0, 0, 0, 0, 0, 0, right, 0, down))
        branches = []
        for i, branch in enumerate(self.attns):
            part, shift = qkv[:, :, :, :, i], self.spec.shift if i == 0 else self.spec.shift[::-1]
            if self.shifted:
                assert masks is not None
                out = branch(part.roll((-shift[0], -shift[1]), (1, 2)), masks[i], biases[i]).roll(shift, (1, 2))
            else:
                out = branch(part, None, biases[i])
            branches.append(out[:, :height, :width])
        attended = torch.cat(branches, -1)
        return self.proj(attended * self.channel_gate(conv) + conv * self.spatial_gate(attended))


class ChannelAttention(_Aggregation):
    """Adaptive channel attention: every channel of a head attends to the others by how alike they are over all pixels
    (XCiT, arXiv 2106.09681, section 3.2).

    Args:
        spec: of the network.
        heads: into which the channels are parted.
        backend: of the attention.
    """

    def __init__(self, spec: DATSpec, heads: int, backend: str | None):
        super().__init__(spec)
        self.heads, self.backend = heads, backend
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def biases(self) -> None:
        """There are no positions among channels."""

    def forward(self, x: Tensor, masks: Masks | None = None, biases: Masks | None = None) -> Tensor:
        """[B, H, W, C] from the same."""
        qkv = self.qkv(x).unflatten(-1, (3, -1))
        values = qkv[:, :, :, 2]
        conv = self.convolved(values)
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (self.heads, -1)).permute(2, 0, 3, 4, 1)
        # Autocast leaves the norms, and with them what they divide, in float32.
        q, k = (F.normalize(q, dim=-1) * self.temperature).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
        out = attend(q, k, v, kind="channel", scale=1.0, backend=self.backend)
        attended = out.flatten(1, 2).transpose(1, 2).view(x.shape)
        return self.proj(attended * self.spatial_gate(conv) + conv * self.channel_gate(attended))


class SpatialGate(nn.Module):
    """Half of the channels times the other half, normalised and convolved."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] from [B, H, W, 2 dim]."""
        kept, gate = x.chunk(2, -1)
        return kept * _last(self.conv(_first(self.norm(gate))))


class FeedForward(nn.Module):
    """Spatial-gate feed-forward network."""

    def __init__(self, spec: DATSpec):
        super().__init__()
        self.fc1 = nn.Linear(spec.dim, spec.hidden)
        self.sg = SpatialGate(spec.hidden // 2)
        self.fc2 = nn.Linear(spec.hidden // 2, spec.dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] from the same."""
        return self.fc2(self.sg(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a normalisation and beside the identity.

    Args:
        spec: of the network.
        group, block: which one it is; block number `block` of its group is spatial if that is even.
        drop: probability with which an image skips attention or feed-forward network in training.
        backend: of the attention.

    Attributes:
        program: stands for `plain`, which it is called with behind the block; copies of the block have none.
    """

    def __init__(self, spec: DATSpec, group: int, block: int, drop: float, backend: str | None):
        super().__init__()
        self.drop = drop
        self.program: Callable[..., Tensor] | None = None
        heads = spec.heads_of(group)
        self.norm1 = nn.LayerNorm(spec.dim)
        self.attn: nn.Module
        if block % 2 == 0:
            self.attn = SpatialAttention(spec, heads, spec.shifted(group, block), backend)
        else:
            self.attn = ChannelAttention(spec, heads, backend)
        self.ffn = FeedForward(spec)
        self.norm2 = nn.LayerNorm(spec.dim)

    @property
    def kind(self) -> str:
        """One of "channel", "spatial" and "shifted"."""
        if isinstance(self.attn, SpatialAttention):
            return "shifted" if self.attn.shifted else "spatial"
        return "channel"

    def forward(self, x: Tensor, masks: Masks | None) -> Tensor:
        """[B, H, W, C] from the same; `masks` are of `shift_masks` for this size."""
        kept = None
        if self.training and self.drop > 0:
            # Drawn out here: one program does for blocks that are skipped more and less often.
            share = 1.0 - self.drop
            kept = x.new_empty(2, len(x), 1, 1, 1).bernoulli_(share) / share
        # Also out here: as a part of a program that adds a mask they would be gathered anew for every window.
        biases = self.attn.biases()  # type: ignore[operator]
        if self.program is None:
            return self.plain(x, masks, kept, biases)
        return self.program(self, x, masks, kept, biases)

    def plain(self, x: Tensor, masks: Masks | None, kept: Tensor | None, biases: Masks | None) -> Tensor:
        """The forward pass, all of which can be compiled.

        Args:
            x: [B, H, W, C].
            masks: see `forward`.
            kept: [2, B, 1, 1, 1], factors of attention and feed-forward network, or None for 1: stochastic depth (Huang
                et al., arXiv 1603.09382).
            biases: of positions; None where attention is among channels.
        """
        out = self.attn(self.norm1(x), masks, biases)
        x = x + (out if kept is None else out * kept[0])
        out = self.ffn(self.norm2(x))
        return x + (out if kept is None else out * kept[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "program": None}


def shift_masks(spec: DATSpec, size: Size, dtype: torch.dtype, device: torch.device) -> Masks:
    """Of both window shapes for an image that is padded to whole windows; shared, so not to be written to."""
    side = max(spec.split)
    padded = size[0] + -size[0] % side, size[1] + -size[1] % side
    first = windows.masks.get(windows.shift_mask, padded, spec.split, spec.shift, dtype, device)
    second = windows.masks.get(windows.shift_mask, padded, spec.split[::-1], spec.shift[::-1], dtype, device)
    return first, second


def _first(x: Tensor) -> Tensor:
    """[B, C, H, W] from [B, H, W, C]."""
    return x.permute(0, 3, 1, 2)


def _last(x: Tensor) -> Tensor:
    """[B, H, W, C] from [B, C, H, W]."""
    return x.permute(0, 2, 3, 1)
