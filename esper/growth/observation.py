"""From a population's stacked statistics to a GraphBatch, without a loop over hosts, nodes or edges.

Operations are few rather than short: on this many small tensors each costs about the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esper.graph import GraphBatch, Packed
from esper.graph.schema import SCHEMA
from esper.graph.space import BOUND
from esper.growth.actions import ActionLayout
from esper.growth.growable import Growable
from esper.growth.lifecycle import Stage, is_kept, is_live
from esper.growth.sizes import log

SLOPE_SCALE = 10
"""The observation holds the slope of the log validation loss per epoch times this."""

SEEDS_SCALE = 4
"""The observation holds the germinations that are left, at most 8, over this."""

Features = dict[tuple[str, str], Tensor]
"""(node type, feature) -> float32 [n, nodes], or [n, nodes, m] for as many features from that one on."""

_SLOPE_EPOCHS = 3
_TINY = 1e-8


class Observer:
    """Builds the observation graph of every host of a population.

    Args:
        population: whose hosts are observed.
        horizon: epochs of an episode.
    """

    def __init__(self, population: Growable, horizon: int):
        self.population, self.horizon = population, horizon
        self.layout = ActionLayout(population.slots, len(population.catalogue))
        self._tables = population.tables()
        self._layout = self._tables.layout
        self._numbers = torch.arange(len(population.catalogue))
        self._stages = torch.eye(len(Stage), device=population.device)
        self._places: Tensor | None = None  # of the features that change, in x

    def __call__(self) -> GraphBatch:
        """The observation of every host after the last evaluation: N graphs, features in [-BOUND, BOUND]."""
        p, tables = self.population, self._tables
        row = tables.row(p.context.depth, p.context.width)
        node_mask, mask, x = p.moved(tables.node_mask[row]), tables.edge_mask[row], p.moved(tables.x[row])
        actions = self.layout.mask(p)
        attr = self._attributes(row, actions).mul_(mask[..., None])
        self._write(x, self._changing(row))
        x.nan_to_num_(nan=BOUND).clamp_(-BOUND, BOUND).mul_(node_mask[..., None])
        return GraphBatch.of(Packed(self._layout, x, node_mask, p.moved(attr), p.moved(mask)), p.moved(actions))

    def _attributes(self, row: Tensor, actions: Tensor) -> Tensor:
        """[n, cells, attributes] on the CPU, also where there is no edge."""
        lifecycle, layout = self.population.lifecycle, self._layout
        attr = self._tables.attr[row]
        state = torch.stack([lifecycle.alpha, lifecycle.stage / len(Stage)], dim=2)
        for name in ("reads", "writes"):
            layout.of_relation(attr, ("slot", name, "layer"))[..., :2] = state[:, None]
        layout.of_relation(attr, ("layer", "hosts", "slot"))[..., :2] = state[:, :, None]
        legal = self.layout.germinations(actions)  # [n, S, K]
        lives = lifecycle.alpha[:, :, None] * (lifecycle.blueprint[:, :, None] == self._numbers)
        fits = torch.stack([legal, lives], dim=3)
        layout.of_relation(attr, ("blueprint", "fits", "slot"))[..., ::2] = fits
        layout.of_relation(attr, ("slot", "fits", "blueprint"))[..., ::2] = fits.transpose(1, 2)
        return attr

    # ---- node features --------------------------------------------------------------------------------------------

    def _write(self, x: Tensor, features: Features) -> None:
        """Sets `features` in x [n, nodes, features]."""
        if self._places is None:
            number = torch.arange(self._layout.size * self._layout.features).view(self._layout.size, -1)
            places = []
            for (node, name), value in features.items():
                first, count = SCHEMA.feature(node, name), value.shape[2] if value.dim() == 3 else 1
                places.append(number[self._layout.nodes[node], first : first + count].flatten())
            self._places = self.population.moved(torch.cat(places))
        x.flatten(1).index_copy_(1, self._places, torch.cat([value.flatten(1) for value in features.values()], dim=1))

    def _changing(self, row: Tensor) -> Features:
        """What changes from epoch to epoch; nothing is bounded yet."""
        p, s = self.population, self.population.statistics
        trained = p.moved(p.epoch > 0).float()[:, None]  # [n, 1], 1 once a host has been trained
        # All that is a logarithm of a statistic of training, at once.
        raw = [
            s.layer_gradient_rms,
            s.layer_update_rms / (s.layer_weight_rms + _TINY),
            s.activation_backward_rms,
            s.growth_gradient,
            s.seed_gradient_rms,
            s.update_rms[:, None],
            s.train_loss[:, None],
        ]
        logs = log(torch.cat(raw, dim=1)) * trained
        gradient, update, backward, growth, seed, parameter, loss = logs.split([part.shape[1] for part in raw], dim=1)
        layer, stage, fives, known = (
            trained.expand_as(gradient),
            trained.expand_as(backward),
            5 * trained,
            s.fared_known,
        )
        return {
            **self._global(row, trained, loss),
            ("layer", "weight_rms"): s.layer_weight_rms,
            ("layer", "log_gradient_rms"): (gradient + fives) / 2,
            ("layer", "log_gradient_rms_known"): layer,
            ("layer", "log_update_ratio"): update + fives,
            ("layer", "log_update_ratio_known"): layer,
            ("layer", "gradient_signal_to_noise"): s.layer_signal_to_noise * trained,
            ("layer", "gradient_signal_to_noise_known"): layer,
            ("activation", "dead_fraction"): s.activations,  # and the four behind it
            ("activation", "log_backward_rms"): (backward + 8 * trained) / 2,
            ("activation", "log_backward_rms_known"): stage,
            ("parameter", "log_learning_rate"): p.moved(p.context.learning_rate.log10() + 2.5)[:, None],
            ("parameter", "log_update_rms"): parameter + 6 * trained,
            ("parameter", "log_update_rms_known"): trained,
            **self._slot((growth + 3 * trained) / 2, (seed + fives) / 2, stage),
            ("blueprint", "fared"): s.fared * known,
            ("blueprint", "fared_known"): known.float(),
        }

    def _global(self, row: Tensor, trained: Tensor, loss: Tensor) -> Features:
        p, s, context = self.population, self.population.statistics, self.population.context
        fraction, live = p.epoch / self.horizon, is_live(p.lifecycle.stage)
        now, before = log(s.history[:, : _SLOPE_EPOCHS + 1 : _SLOPE_EPOCHS]).split(1, dim=1)
        sloped = (s.history_length > _SLOPE_EPOCHS).float()[:, None]
        slope = (now - before) / _SLOPE_EPOCHS * SLOPE_SCALE
        told = (trained > 0) & ~s.train_loss.isnan()[:, None]  # who trains a module may not know its loss
        on_cpu = {
            "epoch_fraction": fraction,
            "remaining_fraction": 1 - fraction,
            "log_learning_rate": context.learning_rate.log10() + 2.5,
            "log_train_size": context.train_size.float().log10() - 2.5,
            "log_parameter_growth": torch.log1p(
                p.seed_parameters(is_kept(p.lifecycle.stage)) / self._tables.parameters[row]
            ),
            "extra_flops_ratio": p.extra_flops / (self.horizon * self._tables.flops[row]),
            "live_fraction": live.sum(1) / context.depth.clamp(min=1),
            "seeds_left": (context.seeds - p.germinated).clamp(max=2 * SEEDS_SCALE) / SEEDS_SCALE,
            "priced": context.priced.float(),
        }
        moved = p.moved(torch.stack(tuple(on_cpu.values()), dim=1)).split(1, dim=1)
        return {
            **{("global", name): value for name, value in zip(on_cpu, moved, strict=True)},
            ("global", "log_train_loss"): loss.where(told, 0.0),
            ("global", "log_train_loss_known"): told.float(),
            ("global", "log_validation_loss"): now,
            ("global", "generalisation_gap"): (s.history[:, 0] - s.train_loss)[:, None].where(told, 0.0),
            ("global", "generalisation_gap_known"): told.float(),
            ("global", "slope"): slope * sloped,
            ("global", "slope_known"): sloped,
        }

    def _slot(self, growth: Tensor, seed: Tensor, trained: Tensor) -> Features:
        p, s = self.population, self.population.statistics
        stage, epochs = p.moved(p.lifecycle.stage), p.moved(p.lifecycle.epochs)
        embargo = max(p.lifecycle_spec.embargo_epochs, 1)
        live = is_live(stage)
        # A seed that has just been germinated has had no gradient yet.
        driven, living = (live & (p.seed_steps > 0)).float(), live.float()
        contribution = s.contribution_known.float()
        return {
            ("slot", "is_dormant"): self._stages[stage],  # and the others
            ("slot", "alpha"): p.moved(p.lifecycle.alpha),
            ("slot", "epochs_in_stage"): epochs / self.horizon,
            ("slot", "log_growth_gradient"): growth,
            ("slot", "log_growth_gradient_known"): trained,
            ("slot", "log_seed_gradient_rms"): seed * driven,
            ("slot", "log_seed_gradient_rms_known"): driven,
            ("slot", "contribution"): s.contribution * contribution,
            ("slot", "contribution_known"): contribution,
            ("slot", "contribution_age"): s.contribution_age / self.horizon * contribution,
            ("slot", "change_since_germination"): (s.history[:, :1] - s.germination_loss) * living,
            ("slot", "change_since_germination_known"): living,
            ("slot", "embargo_left"): (embargo - epochs) / embargo * (stage == Stage.EMBARGOED),
        }
