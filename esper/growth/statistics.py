"""What a population measures of itself once an epoch, stacked over hosts. The controller sees nothing else."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from esper.growth.host import HostSpec
from esper.growth.lifecycle import Lifecycle, is_live

HISTORY = 4  # validation losses kept: the newest and the three before it
ACTIVATION_STATISTICS = ("dead_fraction", "zero_derivative_fraction", "mean", "std", "effective_rank")


@dataclass
class Statistics:
    """Statistics of n hosts with L layers, S slots (and hidden layers) and K blueprints.

    Losses are mean cross-entropies in nats. What comes from training is only known once `history_length` > 1.
    """

    history: Tensor  # [n, HISTORY] validation losses, newest first
    history_length: Tensor  # int64 [n], validation losses recorded in this episode
    train_loss: Tensor  # [n], mean over the epoch's minibatches
    layer_weight_rms: Tensor  # [n, L]
    layer_gradient_rms: Tensor  # [n, L]
    layer_update_rms: Tensor  # [n, L], of the last optimiser update
    layer_signal_to_noise: Tensor  # [n, L], RMS of the mean gradient over RMS of the gradient, in [0, 1]
    update_rms: Tensor  # [n], over all parameters
    activations: Tensor  # [n, S, len(ACTIVATION_STATISTICS)], on the validation split
    activation_backward_rms: Tensor  # [n, S], gradient of the loss with respect to the activations
    seed_gradient_rms: Tensor  # [n, S]
    contribution: Tensor  # [n, S], validation loss with alpha = 0 minus as is
    contribution_known: Tensor  # bool [n, S]
    contribution_age: Tensor  # int64 [n, S], epochs since it was measured
    germination_loss: Tensor  # [n, S], validation loss when the slot's seed was germinated
    fared: Tensor  # [n, K], change of validation loss since germination of the blueprint's seeds, averaged, last known
    fared_known: Tensor  # bool [n, K]

    @classmethod
    def empty(cls, hosts: int, spec: HostSpec, blueprints: int, device: torch.device | str = "cpu") -> Statistics:
        """Nothing measured yet."""
        shapes: dict[str, tuple[int, ...]] = {
            "history": (HISTORY,),
            "activations": (spec.stages, len(ACTIVATION_STATISTICS)),
            **dict.fromkeys(("history_length", "train_loss", "update_rms"), ()),
            **dict.fromkeys(("fared", "fared_known"), (blueprints,)),
        }
        values = {}
        for field in fields(cls):
            default = (len(spec.layers),) if field.name.startswith("layer_") else (spec.stages,)
            dtype = torch.float32
            if field.name.endswith("_known"):
                dtype = torch.bool
            elif field.name in ("history_length", "contribution_age"):
                dtype = torch.int64
            values[field.name] = torch.zeros((hosts, *shapes.get(field.name, default)), dtype=dtype, device=device)
        return cls(**values)

    def reset(self, hosts: Tensor) -> None:
        """Forgets what was measured of `hosts` (int64 [m])."""
        for field in fields(self):
            getattr(self, field.name)[hosts] = 0

    def germinated(self, where: Tensor, validation_loss: Tensor) -> None:
        """Notes the loss [n] at which the seeds in `where` (bool [n, S]) start."""
        self.germination_loss = torch.where(where, validation_loss[:, None], self.germination_loss)
        self.contribution_known &= ~where

    def age_contributions(self, stage: Tensor) -> None:
        """One epoch has passed; contributions of slots without a live seed (stage [n, S]) are forgotten."""
        self.contribution_age += 1
        self.contribution_known &= is_live(stage)

    def revise_validation(self, hosts: Tensor, loss: Tensor, stage: Tensor) -> None:
        """Replaces the newest validation loss of `hosts` [m], after seeds of theirs were removed (stage [N, S])."""
        self.history[hosts, 0] = loss
        self.contribution_known[hosts] &= is_live(stage[hosts])

    def record_validation(self, hosts: Tensor, loss: Tensor, lifecycle: Lifecycle) -> None:
        """Adds the validation loss [m] of `hosts` [m] and updates how each blueprint has fared."""
        self.history[hosts] = torch.cat([loss[:, None], self.history[hosts, :-1]], dim=1)
        self.history_length[hosts] += 1
        blueprints = torch.arange(self.fared.shape[1], device=loss.device)
        lives = lifecycle.blueprint[hosts][:, :, None] == blueprints  # [m, S, K]
        count = lives.sum(1)
        change = ((loss[:, None] - self.germination_loss[hosts])[:, :, None] * lives).sum(1) / count.clamp(min=1)
        self.fared[hosts] = torch.where(count > 0, change, self.fared[hosts])
        self.fared_known[hosts] |= count > 0


def activation_statistics(h: Tensor) -> Tensor:
    """[n, S, len(ACTIVATION_STATISTICS)] of ReLU outputs h [n, S, samples, width].

    A unit is dead if it is 0 on every sample. The effective rank is the participation ratio of the covariance's
    eigenvalues, tr(C)^2 / tr(C^2), over the width: 1 where all units vary alike and independently.
    """
    off = h <= 0
    mean = h.mean(2, keepdim=True)
    centred = h - mean
    covariance = centred.transpose(2, 3) @ centred / h.shape[2]
    trace = covariance.diagonal(dim1=2, dim2=3).sum(-1)
    # Total variance: within the units, from the trace, plus between their means.
    std = (trace / h.shape[3] + mean.squeeze(2).var(-1, correction=0)).sqrt()
    rank = trace.square() / covariance.square().sum((2, 3)).clamp(min=1e-12) / h.shape[3]
    return torch.stack(
        [
            off.all(2).float().mean(-1),
            off.float().mean((2, 3)),
            mean.mean((2, 3)),
            std,
            rank,
        ],
        dim=-1,
    )
