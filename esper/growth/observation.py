"""From a population's stacked statistics to a GraphBatch, without a loop over hosts, nodes or edges."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from esper.graph import GraphBatch, Layout, Packed
from esper.graph.schema import ACTIVATION_KINDS, LAYER_KINDS, SCHEMA
from esper.graph.space import BOUND
from esper.growth.actions import ActionLayout
from esper.growth.lifecycle import Event, Stage, is_kept, is_live, legal
from esper.growth.population import Population
from esper.growth.topology import edge_masks, nodes

SLOPE_SCALE = 10
"""The observation holds the slope of the log validation loss per epoch times this."""

SEEDS_SCALE = 4
"""The observation holds the germinations that are left, at most 8, over this."""

_SLOPE_EPOCHS = 3
_TINY = 1e-8


def _log(x: Tensor) -> Tensor:
    return x.clamp(min=_TINY).log()


class Observer:
    """Builds the observation graph of every host of a population.

    Args:
        population: whose hosts are observed.
        horizon: epochs of an episode.
    """

    def __init__(self, population: Population, horizon: int):
        self.population, self.horizon = population, horizon
        p, spec = population, population.spec
        self.layout = ActionLayout(p.slots, len(p.catalogue))
        self._layout = Layout.of(SCHEMA, nodes(p.slots, len(p.catalogue)))
        self._edge_masks = edge_masks(self._layout)
        widths = range(spec.width + 1)
        self._fans = torch.tensor([spec.fans(max(w, 1)) for w in widths], dtype=torch.float32)  # [width + 1, L, 2]
        flags = [[b.mixes_tokens, b.gated, b.residual, b.widens] for b in p.catalogue]
        self._flags = torch.tensor(flags, dtype=torch.float32)  # [K, 4]
        kinds = ["linear" if spec.taps == 1 else "conv"] * spec.layers
        kinds[0] = kinds[-1] = "linear"
        index = torch.tensor([LAYER_KINDS.index(kind) for kind in kinds])
        self._layer_kinds = F.one_hot(index, len(LAYER_KINDS)).float()
        relu = F.one_hot(torch.tensor(ACTIVATION_KINDS.index("relu")), len(ACTIVATION_KINDS)).float()
        self._activation_kinds = relu.expand(p.slots, -1)
        self._numbers = torch.arange(len(p.catalogue))
        self._fixed = self._fixed_attributes()

    def __call__(self) -> GraphBatch:
        """The observation of every host after the last evaluation: N graphs, features in [-BOUND, BOUND]."""
        p = self.population
        n, depth, width = p.hosts, p.context.depth, p.context.width
        self._exists = p.layer_exists()  # bool [n, L]
        self._sizes = p.layer_sizes[width] * self._exists  # [n, L] parameters
        self._at = self._depths(depth)  # [n, L]
        features = {
            "global": self._global(),
            "layer": self._layer(),
            "activation": self._activation(),
            "parameter": self._parameter(),
            "slot": self._slot(),
            "blueprint": self._blueprint(),
        }
        stage, one = self._exists[:, 1:-1], torch.ones(n, 1, dtype=torch.bool)
        exists = {"layer": self._exists, "activation": stage, "slot": stage}
        exists["blueprint"] = one.expand(-1, len(p.catalogue))
        node_mask = torch.cat([exists.get(node, one) for node in self._layout.counts], dim=1)
        x = torch.zeros(n, self._layout.size, self._layout.features, device=p.device)
        for node, value in features.items():
            x[:, self._layout.nodes[node], : value.shape[2]] = value
        node_mask = p.moved(node_mask)
        x = x.nan_to_num_(nan=BOUND).clamp_(-BOUND, BOUND).mul_(node_mask[..., None])
        mask = self._edge_masks[depth]
        attr = self._attributes().mul_(mask[..., None])
        packed = Packed(self._layout, x, node_mask, p.moved(attr), p.moved(mask))
        return GraphBatch.of(packed, p.moved(self.layout.mask(p)))

    def _depths(self, depth: Tensor) -> Tensor:
        """[n, L], how deep each layer sits: 0 for the stem, 1 for the head."""
        layer = torch.arange(self.population.spec.layers)
        at = layer / (depth[:, None] + 1)
        return torch.where(layer == len(layer) - 1, 1.0, at)

    def _put(self, attr: Tensor, source: str, name: str, target: str, *columns: Tensor | None) -> None:
        """Sets attributes of a relation in attr [n, cells, attributes]; each column is [n, targets, sources], or what
        broadcasts to it, or None for one that is left as it is."""
        own = self._layout.of_relation(attr, (source, name, target))
        for number, column in enumerate(columns):
            if column is not None:
                own[..., number] = column

    def _fixed_attributes(self) -> Tensor:
        """[depths * widths, cells, attributes], what follows from the size of a host alone, for every size there is."""
        p = self.population
        depths, widths = torch.arange(p.slots + 1), torch.arange(p.spec.width + 1)
        depth, width = (grid.flatten() for grid in torch.meshgrid(depths, widths, indexing="ij"))
        stage = torch.arange(p.slots) < depth[:, None]
        ends = torch.ones(len(depth), 1, dtype=torch.bool)
        sizes = p.layer_sizes[width] * torch.cat([ends, stage, ends], dim=1)
        at, fans = self._depths(depth), self._fans[width]
        ratio = _log(fans[:, :, 1] / fans[:, :, 0])
        whole = sizes.sum(1, keepdim=True)
        cost = torch.log1p(p.seed_sizes[width] / whole)[:, None].expand(-1, p.slots, -1)  # [sizes, S, K]
        attr = torch.zeros(len(depth), self._layout.cells, self._layout.attributes)
        self._put(attr, "layer", "feeds", "layer", at[:, :, None] - at[:, None], ratio[:, :, None])
        self._put(attr, "layer", "feeds", "activation", at[:, None], ratio[:, None])
        self._put(attr, "activation", "feeds", "layer", at[:, :, None], ratio[:, :, None])
        self._put(attr, "parameter", "tunes", "layer", (sizes / whole)[:, :, None])
        before = at[:, 1:-1]  # of the layer in front of each slot
        self._put(attr, "slot", "precedes", "slot", before[:, :, None] - before[:, None])
        self._put(attr, "blueprint", "fits", "slot", None, cost)
        self._put(attr, "slot", "fits", "blueprint", None, cost.transpose(1, 2))
        for node in self._layout.counts:
            if node != "global":
                self._put(attr, "global", "writes", node, torch.ones(()))
                self._put(attr, node, "informs", "global", torch.ones(()))
        return attr.nan_to_num(nan=0.0).clamp(-BOUND, BOUND)

    def _attributes(self) -> Tensor:
        """[n, cells, attributes] on the CPU, also where there is no edge."""
        p, lifecycle = self.population, self.population.lifecycle
        stage, alpha, kind = lifecycle.stage, lifecycle.alpha, lifecycle.blueprint
        attr = self._fixed[p.context.depth * (p.spec.width + 1) + p.context.width]
        state = torch.stack([alpha, stage / len(Stage)], dim=2)
        for name in ("reads", "writes"):
            self._layout.of_relation(attr, ("slot", name, "layer"))[..., :2] = state[:, None]
        self._layout.of_relation(attr, ("layer", "hosts", "slot"))[..., :2] = state[:, :, None]
        legal_here = (legal(stage, Event.GERMINATE)[:, :, None] & p.germinable()).float()
        lives_here = alpha[:, :, None] * (kind[:, :, None] == self._numbers)  # [n, S, K]
        self._put(attr, "blueprint", "fits", "slot", legal_here, None, lives_here)
        both = legal_here.transpose(1, 2), None, lives_here.transpose(1, 2)
        self._put(attr, "slot", "fits", "blueprint", *both)
        return attr

    # ---- node features, in the order of the schema ----------------------------------------------------------------

    def _known(self) -> Tensor:
        """float32 [n, 1]: 1 once a host has been trained."""
        return self.population.moved((self.population.epoch > 0).float())[:, None]

    def _global(self) -> Tensor:
        p, s = self.population, self.population.statistics
        fraction = p.epoch / self.horizon
        trained = self._known().squeeze(1)
        validation, log_validation = s.history[:, 0], _log(s.history[:, 0])
        sloped = (s.history_length > _SLOPE_EPOCHS).float()
        slope = (log_validation - _log(s.history[:, _SLOPE_EPOCHS])) / _SLOPE_EPOCHS * SLOPE_SCALE
        stage, context = p.lifecycle.stage, p.context
        size = self._sizes.sum(1)
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
            context.learning_rate.log10() + 2.5,
            context.train_size.float().log10() - 2.5,
            torch.log1p(p.seed_parameters(is_kept(stage)) / size),
            p.extra_flops / (self.horizon * p.host_flops()),
            is_live(stage).sum(1) / context.depth.clamp(min=1),
            (context.seeds - p.germinated).clamp(max=2 * SEEDS_SCALE) / SEEDS_SCALE,
            context.priced.float(),
        ]
        return torch.stack([p.moved(column) for column in columns], dim=1)[:, None]

    def _layer(self) -> Tensor:
        p, s = self.population, self.population.statistics
        trained = self._known().expand_as(s.layer_gradient_rms)
        fans = self._fans[p.context.width]
        fixed = [
            self._at[:, :, None],
            self._layer_kinds.expand(p.hosts, -1, -1),
            _log(fans) / math.log(64),
            _log(self._sizes)[:, :, None] / math.log(1000),
        ]
        columns = [
            s.layer_weight_rms,
            (_log(s.layer_gradient_rms) + 5) / 2 * trained,
            trained,
            (_log(s.layer_update_rms / (s.layer_weight_rms + _TINY)) + 5) * trained,
            trained,
            s.layer_signal_to_noise * trained,
            trained,
        ]
        return torch.cat([p.moved(torch.cat(fixed, dim=2)), torch.stack(columns, dim=2)], dim=2)

    def _activation(self) -> Tensor:
        p, s = self.population, self.population.statistics
        trained = self._known().expand_as(s.activation_backward_rms)
        backward = (_log(s.activation_backward_rms) + 8) / 2 * trained
        kinds = p.moved(self._activation_kinds).expand(p.hosts, -1, -1)
        return torch.cat([kinds, s.activations, torch.stack([backward, trained], dim=2)], dim=2)

    def _parameter(self) -> Tensor:
        p = self.population
        trained = self._known().squeeze(1)
        constant = torch.ones_like(trained)
        columns = [
            p.moved(p.context.learning_rate.log10() + 2.5),
            constant * p.training.beta1,
            constant * 0.0,
            (_log(p.statistics.update_rms) + 6) * trained,
            trained,
            p.moved(_log(self._sizes.sum(1)) / math.log(1000)),
        ]
        return torch.stack(columns, dim=1)[:, None]

    def _slot(self) -> Tensor:
        p, s = self.population, self.population.statistics
        stage, epochs = p.moved(p.lifecycle.stage), p.moved(p.lifecycle.epochs)
        embargo = max(p.lifecycle_spec.embargo_epochs, 1)
        # A seed that has just been germinated has had no gradient yet.
        driven = (is_live(stage) & (p.seed_steps > 0)).float()
        live = is_live(stage).float()
        contribution = s.contribution_known.float()
        trained = self._known().expand_as(live)
        columns = [
            p.moved(p.lifecycle.alpha),
            epochs / self.horizon,
            (_log(s.growth_gradient) + 3) / 2 * trained,
            trained,
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

    def _blueprint(self) -> Tensor:
        p, s = self.population, self.population.statistics
        width = p.context.width
        sizes = _log(p.seed_sizes[width] / self._sizes.sum(1, keepdim=True))
        flops = _log(p.seed_flops[width] / p.host_flops()[:, None])
        fixed = torch.cat([torch.stack([sizes, flops], dim=2), self._flags.expand(p.hosts, -1, -1)], dim=2)
        known = s.fared_known.float()
        return torch.cat([p.moved(fixed), torch.stack([s.fared * known, known], dim=2)], dim=2)
