"""What is drawn per episode and hidden from the controller. How it is drawn lives in envs."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from esper.growth.conditions import BEYOND, NEVER


@dataclass
class Context:
    """The instances of N hosts; every tensor has N as its first dimension, those of stages are [N, S].

    From `strike_epoch` on a stage is in the condition `strike` instead of `condition`. Before `shift_epoch` a host only
    meets the classes it starts with; from then on all of them, and its inputs with some features' signs flipped.
    """

    key: Tensor  # int64; init, data order and noise all follow from it
    learning_rate: Tensor  # float32
    train_size: Tensor  # int64, samples of the training pool that the host sees
    label_noise: Tensor  # float32, share of its labels that are drawn anew
    width: Tensor  # int64, units of every stage
    depth: Tensor  # int64, stages
    seeds: Tensor  # int64, germinations allowed
    priced: Tensor  # bool, scored by the area under the validation curve over compute, not by its end
    condition: Tensor  # int64 [N, S], Condition
    severity: Tensor  # float32 [N, S] in [0, 1)
    strike: Tensor  # int64 [N, S], Condition
    strike_severity: Tensor  # float32 [N, S]
    strike_epoch: Tensor  # int64 [N, S], NEVER where nothing strikes
    shift_epoch: Tensor  # int64, NEVER without a shift
    first_classes: Tensor  # int64, classes met before the shift
    flipped: Tensor  # float32, share of the input features whose sign flips at the shift

    @classmethod
    def plain(cls, key: Tensor, width: int, depth: int) -> Context:
        """Healthy hosts of one size on all the data, to be changed field by field."""
        n, device = len(key), key.device

        def full(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((n, *shape), value, dtype=dtype, device=device)

        return cls(
            key=key,
            learning_rate=full(5e-3, torch.float32),
            train_size=full(1 << 30, torch.int64),
            label_noise=full(0.0, torch.float32),
            width=full(width, torch.int64),
            depth=full(depth, torch.int64),
            seeds=full(1 << 30, torch.int64),
            priced=full(0, torch.bool),
            condition=full(0, torch.int64, depth),
            severity=full(0.0, torch.float32, depth),
            strike=full(0, torch.int64, depth),
            strike_severity=full(0.0, torch.float32, depth),
            strike_epoch=full(NEVER, torch.int64, depth),
            shift_epoch=full(NEVER, torch.int64),
            first_classes=full(1 << 30, torch.int64),
            flipped=full(0.0, torch.float32),
        )

    def __len__(self) -> int:
        return len(self.key)

    def rows(self, index: Tensor) -> Context:
        """The instances at `index`."""
        return Context(*(getattr(self, f.name)[index] for f in fields(self)))

    def put(self, index: Tensor, other: Context) -> None:
        """Replaces the instances at `index` by those of `other`."""
        for f in fields(self):
            getattr(self, f.name)[index] = getattr(other, f.name)

    @staticmethod
    def cat(parts: list[Context]) -> Context:
        return Context(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Context)))

    def without_future(self, epoch: Tensor) -> Context:
        """The same instances without the strikes and shifts that come after `epoch` [N]; a host that waits for new
        classes does so for good."""
        strike = torch.where(self.strike_epoch > epoch[:, None], NEVER, self.strike_epoch)
        coming = (self.shift_epoch > epoch) & (self.shift_epoch < NEVER)
        shift = torch.where(coming, BEYOND, self.shift_epoch)
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        return Context(**{**kept, "strike_epoch": strike, "shift_epoch": shift})
