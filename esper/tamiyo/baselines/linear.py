"""The linear scorer: what a germination is worth, as a linear function of what is seen of its slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.graph import GraphBatch
from esper.tamiyo.baselines.base import Grower, column, germinable, register

_ACTIVATION = ("dead_fraction", "zero_derivative_fraction", "mean", "std", "effective_rank", "log_backward_rms")
_LAYER = ("weight_rms", "log_gradient_rms", "log_update_ratio", "gradient_signal_to_noise")
_SLOT = ("log_growth_gradient", "alpha", "contribution")
_GLOBAL = (
    "epoch_fraction",
    "log_train_loss",
    "log_validation_loss",
    "generalisation_gap",
    "slope",
    "log_learning_rate",
    "log_train_size",
    "log_parameter_growth",
    "live_fraction",
    "seeds_left",
)


def features(graph: GraphBatch) -> Tensor:
    """[N, slots, F]: of each slot its stage's activation, its layer and the next, how they differ from the mean over
    the host's slots and from the next slot, its depth, the globals, and 1."""
    stage = [column(graph, "activation", name) for name in _ACTIVATION]
    # The logarithms of scales tell a stage of tiny range from others.
    stage += [(column(graph, "activation", "std").clamp(min=1e-4)).log()]
    stage += [column(graph, "slot", name) for name in _SLOT]
    for name in _LAYER:
        values = column(graph, "layer", name)
        stage += [values[:, 1:-1], _next(values)[:, 1:-1]]
    exists = graph.node_mask["slot"][:, :, None].float()
    own = torch.stack(stage, dim=2) * exists
    mean = own.sum(1, keepdim=True) / exists.sum(1, keepdim=True).clamp(min=1)
    after = torch.cat([own[:, 1:], torch.zeros_like(own[:, :1])], dim=1)
    depth = column(graph, "layer", "depth_fraction")[:, 1:-1, None]
    whole = torch.stack([column(graph, "global", name).squeeze(1) for name in _GLOBAL], dim=1)
    spread = whole[:, None].expand(-1, own.shape[1], -1)
    parts = [own, own - mean, own - after, depth, depth.square(), spread, torch.ones_like(depth)]
    return torch.cat(parts, dim=2) * exists


def _next(values: Tensor) -> Tensor:
    """Of each layer the values of the one behind it; for the last stage of a shallow host that is padding, 0."""
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)


@dataclass
class LinearKnobs:
    """Knobs of `linear`; its weights are stored with the package."""

    threshold: float = 2.0  # points of accuracy that a germination must promise
    first: int = 3
    every: int = 3


@register("linear", LinearKnobs)
class Linear(Grower):
    """Germinates the slot and blueprint with the largest score, if it passes the threshold.

    Args:
        knobs: its knobs.
        weights: [blueprints, F], for `features`.
        ramp: as for Grower.
    """

    def __init__(self, knobs: LinearKnobs, weights: Tensor, ramp: int):
        super().__init__(ramp, knobs.first, knobs.every)
        self.knobs, self.weights = knobs, weights

    def score(self, graph: GraphBatch) -> Tensor:
        """[N, slots, blueprints]."""
        return features(graph) @ self.weights.T.to(graph.device)

    def choose(self, graph: GraphBatch) -> tuple[Tensor, Tensor, Tensor]:
        legal = germinable(graph)
        best, flat = self.score(graph).masked_fill(~legal, -torch.inf).flatten(1).max(1)
        return best > self.knobs.threshold, flat // legal.shape[2], flat % legal.shape[2]
