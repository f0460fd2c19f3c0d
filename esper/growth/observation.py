"""From a population's stacked statistics to a GraphBatch, without a loop over hosts, nodes or edges.

The topology follows from the host's architecture alone, so it is made once and expanded over the hosts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from esper.graph import Edges, GraphBatch
from esper.graph.schema import ACTIVATION_KINDS, LAYER_KINDS, SCHEMA, Relation
from esper.graph.space import BOUND
from esper.growth.actions import ActionLayout
from esper.growth.lifecycle import Event, Stage, is_kept, is_live, legal
from esper.growth.population import Population

SLOPE_SCALE = 10
"""The observation holds the slope of the log validation loss per epoch times this."""

_SLOPE_EPOCHS = 3
_TINY = 1e-8


def _log(x: Tensor) -> Tensor:
    return x.clamp(min=_TINY).log()


def _pairs(pairs: list[tuple[int, int]]) -> Tensor:
    """int64 [2, E] from (source, target) pairs, sorted by target, then source."""
    return torch.tensor(sorted(pairs, key=lambda pair: pair[::-1]), dtype=torch.int64).reshape(-1, 2).T


class Observer:
    """Builds the observation graph of the observed hosts of one population.

    Args:
        population: whose hosts are observed.
        horizon: epochs of an episode.
    """

    def __init__(self, population: Population, horizon: int):
        self.population, self.horizon = population, horizon
        spec, device = population.spec, population.device
        self.layout = ActionLayout(population.slots, len(population.catalogue))
        stages, layers, kinds = spec.stages, len(spec.layers), len(population.catalogue)
        fans = torch.tensor(spec.layers, dtype=torch.float32)
        sizes = fans[:, 0] * fans[:, 1] + fans[:, 1]
        every = {"layer": layers, "activation": stages, "parameter": 1, "slot": stages, "blueprint": kinds}
        pairs: dict[Relation, list[tuple[int, int]]] = {
            ("layer", "feeds", "layer"): [(i, i + 1) for i in range(stages)],
            ("layer", "feeds", "activation"): [(i, i) for i in range(stages)],
            ("activation", "feeds", "layer"): [(i, i + 1) for i in range(stages)],
            ("parameter", "tunes", "layer"): [(0, i) for i in range(layers)],
            ("slot", "reads", "layer"): [(i, i) for i in range(stages)],
            ("slot", "writes", "layer"): [(i, i + 1) for i in range(stages)],
            ("layer", "hosts", "slot"): [(i + side, i) for i in range(stages) for side in (0, 1)],
            ("slot", "precedes", "slot"): [(i, j) for j in range(stages) for i in range(j)],
            ("blueprint", "fits", "slot"): [(k, s) for s in range(stages) for k in range(kinds)],
            ("slot", "fits", "blueprint"): [(s, k) for s in range(stages) for k in range(kinds)],
            **{("global", "writes", node): [(0, i) for i in range(count)] for node, count in every.items()},
            **{(node, "informs", "global"): [(i, 0) for i in range(count)] for node, count in every.items()},
        }
        self._index = {relation: _pairs(pairs[relation]).to(device) for relation in SCHEMA.relations}
        seed_sizes = torch.tensor([b.parameter_count(spec.width) for b in population.catalogue], dtype=torch.float32)
        flags = [[b.mixes_tokens, b.gated, b.residual, b.widens] for b in population.catalogue]
        flops = torch.tensor([b.flops(spec.width) for b in population.catalogue], dtype=torch.float32)
        self._relative_cost = torch.log1p(seed_sizes / spec.parameter_count).to(device)  # [K]
        self._blueprint_static = torch.cat(
            [
                _log(seed_sizes / spec.parameter_count)[:, None],
                _log(flops / spec.flops)[:, None],
                torch.tensor(flags, dtype=torch.float32),
            ],
            dim=1,
        ).to(device)  # [K, 6]
        linear = F.one_hot(torch.tensor(LAYER_KINDS.index("linear")), len(LAYER_KINDS)).float()
        self._layer_static = torch.cat(
            [
                (torch.arange(layers) / (layers - 1))[:, None],
                linear.expand(layers, -1),
                _log(fans) / math.log(64),
                _log(sizes)[:, None] / math.log(1000),
            ],
            dim=1,
        ).to(device)  # [L, 1 + kinds + 3]
        relu = F.one_hot(torch.tensor(ACTIVATION_KINDS.index("relu")), len(ACTIVATION_KINDS)).float()
        self._activation_static = relu.expand(stages, -1).to(device)
        self._static_attr = self._static_attributes(fans, sizes)

    def _static_attributes(self, fans: Tensor, sizes: Tensor) -> dict[Relation, Tensor]:
        """Attributes [E, D] of the relations that training does not change."""
        device, layers = self.population.device, len(fans)
        log_ratio = _log(fans[:, 1] / fans[:, 0])
        attributes = {}
        for relation in SCHEMA.relations:
            source, target = self._index[relation].cpu()
            if relation == ("layer", "feeds", "layer"):
                gap = (target - source) / (layers - 1)
                value = torch.stack([gap, log_ratio[target], torch.zeros_like(gap)], dim=1)
            elif relation == ("layer", "feeds", "activation"):
                value = torch.stack([source / (layers - 1), log_ratio[source]], dim=1)
            elif relation == ("activation", "feeds", "layer"):
                value = torch.stack([target / (layers - 1), log_ratio[target]], dim=1)
            elif relation == ("parameter", "tunes", "layer"):
                value = (sizes / sizes.sum())[target][:, None]
            elif relation == ("slot", "precedes", "slot"):
                value = ((target - source) / (layers - 1))[:, None]
            elif relation[0] == "global" or relation[2] == "global":
                value = torch.ones(source.shape[0], 1)
            else:
                continue
            attributes[relation] = value.to(device)
        return attributes

    def __call__(self) -> GraphBatch:
        """The observation of every observed host, after the last evaluation: N graphs, features in [-BOUND, BOUND]."""
        n, lifecycle = self.population.observed, self.population.lifecycle
        stage, alpha, kind = (t[:n] for t in (lifecycle.stage, lifecycle.alpha, lifecycle.blueprint))
        x = {
            "global": self._global(n),
            "layer": self._layer(n),
            "activation": self._activation(n),
            "parameter": self._parameter(n),
            "slot": self._slot(n),
            "blueprint": self._blueprint(n),
        }
        x = {node: value.nan_to_num(nan=BOUND).clamp(-BOUND, BOUND) for node, value in x.items()}
        node_mask = {
            node: torch.ones(value.shape[:2], dtype=torch.bool, device=value.device) for node, value in x.items()
        }
        scaled_stage = stage / len(Stage)
        germinable = legal(stage, Event.GERMINATE).float()
        edges = {}
        for relation in SCHEMA.relations:
            source, target = self._index[relation]
            if relation in self._static_attr:
                attr = self._static_attr[relation].expand(n, -1, -1)
            elif "blueprint" in relation:
                slot, blueprint = (target, source) if relation[0] == "blueprint" else (source, target)
                lives_here = alpha[:, slot] * (kind[:, slot] == blueprint)
                cost = self._relative_cost[blueprint].expand(n, -1)
                attr = torch.stack([germinable[:, slot], cost, lives_here], dim=2)
            else:
                slot = target if relation[2] == "slot" else source
                attr = torch.stack([alpha[:, slot], scaled_stage[:, slot]], dim=2)
            shape = (n, len(source))
            mask = torch.ones(shape, dtype=torch.bool, device=attr.device)
            edges[relation] = Edges(source.expand(shape), target.expand(shape), attr, mask)
        return GraphBatch(x, node_mask, edges, self.layout.mask(stage))

    # ---- node features, in the order of the schema ----------------------------------------------------------------

    def _global(self, n: int) -> Tensor:
        p, s = self.population, self.population.statistics
        fraction = p.epoch[:n] / self.horizon
        trained = (p.epoch[:n] > 0).float()
        validation, log_validation = s.history[:, 0], _log(s.history[:, 0])
        sloped = (s.history_length > _SLOPE_EPOCHS).float()
        slope = (log_validation - _log(s.history[:, _SLOPE_EPOCHS])) / _SLOPE_EPOCHS * SLOPE_SCALE
        stage = p.lifecycle.stage
        kept = p.seed_parameters(is_kept(stage))[:n]
        columns = [
            fraction,
            1 - fraction,
            _log(s.train_loss) * trained,
            trained,
            log_validation,
            (validation - s.train_loss) * trained,
            trained,
            slope * sloped,
            sloped,
            p.context.learning_rate[:n].log10() + 2.5,
            p.context.train_size[:n].log10() - 2.5,
            torch.log1p(kept / p.spec.parameter_count),
            p.extra_flops[:n] / (self.horizon * p.spec.flops),
            is_live(stage[:n]).float().mean(1),
        ]
        return torch.stack(columns, dim=1)[:, None]

    def _layer(self, n: int) -> Tensor:
        s = self.population.statistics
        trained = (self.population.epoch[:n] > 0).float()[:, None].expand_as(s.layer_gradient_rms)
        columns = [
            s.layer_weight_rms,
            (_log(s.layer_gradient_rms) + 5) / 2 * trained,
            trained,
            (_log(s.layer_update_rms / s.layer_weight_rms.clamp(min=_TINY)) + 5) / 2 * trained,
            trained,
            s.layer_signal_to_noise * trained,
            trained,
        ]
        return torch.cat([self._layer_static.expand(n, -1, -1), torch.stack(columns, dim=2)], dim=2)

    def _activation(self, n: int) -> Tensor:
        s = self.population.statistics
        trained = (self.population.epoch[:n] > 0).float()[:, None].expand_as(s.activation_backward_rms)
        backward = (_log(s.activation_backward_rms) + 8) / 2 * trained
        return torch.cat(
            [
                self._activation_static.expand(n, -1, -1),
                s.activations,
                torch.stack([backward, trained], dim=2),
            ],
            dim=2,
        )

    def _parameter(self, n: int) -> Tensor:
        p = self.population
        trained = (p.epoch[:n] > 0).float()
        constant = torch.ones_like(trained)
        columns = [
            p.context.learning_rate[:n].log10() + 2.5,
            constant * p.training.beta1,
            constant * 0.0,
            (_log(p.statistics.update_rms) + 6) * trained,
            trained,
            constant * math.log(p.spec.parameter_count) / math.log(1000),
        ]
        return torch.stack(columns, dim=1)[:, None]

    def _slot(self, n: int) -> Tensor:
        p, s = self.population, self.population.statistics
        stage, epochs = p.lifecycle.stage[:n], p.lifecycle.epochs[:n]
        embargo = max(p.lifecycle_spec.embargo_epochs, 1)
        # A seed that has just been germinated has had no gradient yet.
        driven = (is_live(stage) & (p.seed_steps[:n] > 0)).float()
        live = is_live(stage).float()
        contribution = s.contribution_known.float()
        columns = [
            p.lifecycle.alpha[:n],
            epochs / self.horizon,
            (_log(s.seed_gradient_rms) + 5) / 2 * driven,
            driven,
            s.contribution * contribution,
            contribution,
            s.contribution_age / self.horizon * contribution,
            (s.history[:, :1] - s.germination_loss) * live,
            live,
            (embargo - epochs) / embargo * (stage == Stage.EMBARGOED),
        ]
        return torch.cat([F.one_hot(stage, len(Stage)).float(), torch.stack(columns, dim=2)], dim=2)

    def _blueprint(self, n: int) -> Tensor:
        s = self.population.statistics
        known = s.fared_known.float()
        return torch.cat(
            [self._blueprint_static.expand(n, -1, -1), torch.stack([s.fared * known, known], dim=2)], dim=2
        )
