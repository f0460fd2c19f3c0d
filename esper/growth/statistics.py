"""What a population measures of itself once an epoch, stacked over hosts. The controller sees nothing else."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from esper.growth.host import Trace
from esper.growth.lifecycle import is_live

HISTORY = 4  # validation losses kept: the newest and the three before it
ACTIVATION_STATISTICS = ("dead_fraction", "zero_derivative_fraction", "mean", "std", "effective_rank")

SAMPLES = 128
"""Samples of the validation split that contributions are measured on."""


def statistics_samples(tokens: int) -> int:
    """Samples of the validation split that activation statistics are measured on: up to 4 * SAMPLES tokens."""
    return max(SAMPLES * min(tokens, 4) // tokens, 1)


@dataclass
class Statistics:
    """Statistics of n hosts with L layers, S slots (and stages) and K blueprints.

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
    activation_backward_rms: Tensor  # [n, S], gradient of the loss with respect to the stages' outputs
    growth_gradient: Tensor  # [n, S], see `growth_gradient`
    seed_gradient_rms: Tensor  # [n, S]
    contribution: Tensor  # [n, S], validation loss with alpha = 0 minus as is
    contribution_known: Tensor  # bool [n, S]
    contribution_age: Tensor  # int64 [n, S], epochs since it was measured
    germination_loss: Tensor  # [n, S], validation loss when the slot's seed was germinated
    fared: Tensor  # [n, K], change of validation loss since germination of the blueprint's seeds, averaged, last known
    fared_known: Tensor  # bool [n, K]

    @classmethod
    def empty(
        cls, hosts: int, layers: int, slots: int, blueprints: int, device: torch.device | str = "cpu"
    ) -> Statistics:
        """Nothing measured yet."""
        shapes: dict[str, tuple[int, ...]] = {
            "history": (HISTORY,),
            "activations": (slots, len(ACTIVATION_STATISTICS)),
            **dict.fromkeys(("history_length", "train_loss", "update_rms"), ()),
            **dict.fromkeys(("fared", "fared_known"), (blueprints,)),
        }
        values = {}
        for field in fields(cls):
            default = (layers,) if field.name.startswith("layer_") else (slots,)
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

    def record_validation(self, hosts: Tensor, loss: Tensor, blueprint: Tensor) -> None:
        """Adds the validation loss [m] of `hosts` [m] and updates how each blueprint has fared (blueprint [m, S])."""
        self.history[hosts] = torch.cat([loss[:, None], self.history[hosts, :-1]], dim=1)
        self.history_length[hosts] += 1
        blueprints = torch.arange(self.fared.shape[1], device=loss.device)
        lives = blueprint[:, :, None] == blueprints  # [m, S, K]
        count = lives.sum(1)
        change = ((loss[:, None] - self.germination_loss[hosts])[:, :, None] * lives).sum(1) / count.clamp(min=1)
        self.fared[hosts] = torch.where(count > 0, change, self.fared[hosts])
        self.fared_known[hosts] |= count > 0


def activation_statistics(trace: Trace, width: Tensor) -> Tensor:
    """[n, S, len(ACTIVATION_STATISTICS)] of the n hosts of a trace without gradients, whose widths are [n].

    A unit is dead if its derivative is 0 on every sample; units that a stage has lost are. The effective rank is the
    participation ratio of the covariance's eigenvalues, tr(C)^2 / tr(C^2), over the width: 1 where all units vary alike
    and independently.
    """
    slope = torch.stack(trace.slopes, dim=1)  # [n, S, rows, W]
    h = torch.stack([output[:, : slope.shape[2]] for output in trace.outputs], dim=1)
    steep = torch.ne(slope, 0, out=torch.empty_like(slope)).mean(2)  # [n, S, W], as floats: booleans are slow
    units = width[:, None].float()
    mean = h.mean(2)
    centred = h - mean[:, :, None]
    covariance = centred.transpose(2, 3) @ centred / h.shape[2]
    trace_ = covariance.diagonal(dim1=2, dim2=3).sum(-1)
    level = mean.sum(-1) / units
    # Padding units are 0 throughout, so that sums over all units are sums over the host's own. The variance is that
    # within the units, from the trace, plus that between their means.
    between = (mean.square().sum(-1) / units - level.square()).clamp(min=0)
    rank = trace_.square() / covariance.square().sum((2, 3)).clamp(min=1e-12) / units
    return torch.stack(
        [
            1 - (steep > 0).float().sum(-1) / units,
            1 - steep.sum(-1) / units,
            level,
            (trace_ / units + between).sqrt(),
            rank,
        ],
        dim=-1,
    )


def growth_gradient(sources: list[Tensor], signals: list[Tensor]) -> Tensor:
    """[n, S], the Frobenius norm of the loss's gradient with respect to a new linear map around each stage.

    That norm is what GradMax maximises over new neurons, for as many neurons as there are units (Evci et al.,
    arXiv 2201.05125, equation 8).

    Args:
        sources: inputs of the stages, each [n, rows, width].
        signals: gradients of the mean loss with respect to their outputs, each [n, rows, width].
    """
    norms = [
        torch.bmm(source.transpose(1, 2), signal).square().sum((1, 2)).sqrt()
        for source, signal in zip(sources, signals, strict=True)
    ]
    return torch.stack(norms, dim=1)
