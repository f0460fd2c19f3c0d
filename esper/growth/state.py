"""The state of a population: parameters, optimiser moments, lifecycles, contexts, and how they are saved and forked.

What is done with it (episodes, training, evaluation) lives in `population` and `epoch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from esper.growth import blueprints
from esper.growth.blueprints import Blueprint
from esper.growth.conditions import Activations, activations
from esper.growth.context import Context
from esper.growth.data import Data
from esper.growth.host import HostSpec
from esper.growth.lifecycle import Lifecycle, LifecycleSpec
from esper.growth.parameters import ParameterSpec, ParameterTable
from esper.growth.statistics import Statistics


@dataclass
class TrainingSpec:
    """How every host is trained (Adam, Kingma and Ba, arXiv 1412.6980).

    An epoch is a fixed number of minibatches, taken in the order of a fresh permutation of the host's training
    samples (and from its start again where it has fewer), so that an epoch costs the same for every host.
    """

    steps_per_epoch: int = 10
    batch_size: int = 32
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8


ENGINES = ("auto", "native", "stacked")


@dataclass(frozen=True)
class PopulationSpec:
    """What the hosts of a population have in common.

    Attributes:
        host: the architecture, at its widest and deepest.
        catalogue: names of the blueprints that may be germinated, in the order of their indices.
        data: the task.
        training: how hosts are trained.
        lifecycle: rules of the lifecycle.
        measured: collect statistics and contributions; twins and forks do without.
        engine: "native" runs one host after the other in compiled code, on CPUs only; "stacked" runs all at once as
            tensors, on any device; "auto" takes the native one where it can.
    """

    host: HostSpec
    catalogue: tuple[str, ...]
    data: Data
    training: TrainingSpec
    lifecycle: LifecycleSpec
    measured: bool = True
    engine: str = "auto"


@dataclass(frozen=True)
class _Tables:
    """What follows from specs alone: layouts of parameters, and costs at every width.

    Attributes:
        layer: [P], the layer of each entry of theta: 0 the stem, 1 .. stages, stages + 1 the head.
        in_layer: the same, one-hot: [P, layers].
        layer_sizes: float32 [width + 1, layers], parameters of each layer at each width.
        layer_flops: float32 [width + 1, layers].
        seed_sizes: int64 [width + 1, K].
        seed_flops: float32 [width + 1, K].
    """

    host: ParameterTable
    seeds: list[ParameterTable]
    seed_names: list[list[str]]
    layer: Tensor
    in_layer: Tensor
    layer_sizes: Tensor
    layer_flops: Tensor
    seed_sizes: Tensor
    seed_flops: Tensor


@cache  # every population of the same kind, forks included, reads the same tables
def _tables(host: HostSpec, catalogue: tuple[Blueprint, ...], zero_output: bool, device: torch.device) -> _Tables:
    widths = range(host.width + 1)
    table = ParameterTable(host.parameters, host.width).to(device)
    seeds = []
    for blueprint in catalogue:
        # What does not fit is never germinated, and gets room for a width of 1.
        fits = blueprint.fits(host.site)

        def specs(width: int, blueprint: Blueprint = blueprint) -> list[ParameterSpec]:
            return list(blueprint.parameters(host.site_of(width)).values())

        seeds.append(ParameterTable(specs, host.width if fits else 1, zero_output).to(device))
    layer = torch.tensor([i // 2 for i, p in enumerate(table.specs) for _ in range(p.size)])
    in_layer = F.one_hot(layer, host.layers).float()
    sizes = [[b.parameter_count(host.site_of(w)) if w else 0 for b in catalogue] for w in widths]
    flops = [[b.flops(host.site_of(w)) if w else 0 for b in catalogue] for w in widths]
    return _Tables(
        host=table,
        seeds=seeds,
        seed_names=[list(b.parameters(host.site)) for b in catalogue],
        layer=layer,
        in_layer=in_layer.to(device),
        layer_sizes=table.owned.cpu() @ in_layer,
        layer_flops=torch.tensor([host.flops(w) for w in widths], dtype=torch.float32),
        seed_sizes=torch.tensor(sizes),
        seed_flops=torch.tensor(flops, dtype=torch.float32),
    )


class PopulationState:
    """Every tensor of N hosts, their slots and their seeds.

    Args:
        spec: what they have in common.
        hosts: N.
        device: where parameters, data and statistics live. Lifecycles and contexts stay on the CPU, where decisions
            about what to run are made, so that an epoch never waits for the device.

    Raises:
        KeyError: an unknown blueprint.
    """

    def __init__(self, spec: PopulationSpec, hosts: int, device: torch.device | str = "cpu"):
        host = spec.host
        self.setup, self.spec, self.training, self.lifecycle_spec = spec, host, spec.training, spec.lifecycle
        self.catalogue: list[Blueprint] = [blueprints.get(name) for name in spec.catalogue]
        self.fits = torch.tensor([b.fits(host.site) for b in self.catalogue])  # bool [K]
        self.data = spec.data.to(device)
        self.device = torch.device(device)
        self.hosts, self.slots = hosts, host.stages
        tables = _tables(host, tuple(self.catalogue), spec.lifecycle.zero_init, self.device)
        self.table, self.seed_tables, self.seed_names = tables.host, tables.seeds, tables.seed_names
        self.layer, self.in_layer = tables.layer, tables.in_layer
        self.layer_sizes, self.layer_flops = tables.layer_sizes, tables.layer_flops
        self.seed_sizes, self.seed_flops = tables.seed_sizes, tables.seed_flops

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # [N, P] host parameters with Adam's moments; [N, slots, P_b] for the seeds of each blueprint.
        self.theta, self.exp_avg, self.exp_avg_sq = (zeros(hosts, self.table.size) for _ in range(3))
        sizes = [table.size for table in self.seed_tables]
        self.seed_theta, self.seed_exp_avg, self.seed_exp_avg_sq = (
            [zeros(hosts, self.slots, size) for size in sizes] for _ in range(3)
        )
        self.steps = zeros(hosts, dtype=torch.int64)  # optimiser steps taken by each host
        self.seed_steps = zeros(hosts, self.slots, dtype=torch.int64)
        self.epoch = torch.zeros(hosts, dtype=torch.int64)
        self.germinated = torch.zeros(hosts, dtype=torch.int64)  # in this episode
        self.lifecycle = Lifecycle.dormant(hosts, self.slots)
        pool = len(self.data.train_y)
        self.subset = zeros(hosts, pool, dtype=torch.int64)  # indices into the training pool, the host's own first
        self.labels = zeros(*self.subset.shape, *self.data.train_y.shape[1:], dtype=torch.int64)  # of `subset`, noisy
        self.first_size = torch.ones(hosts, dtype=torch.int64)  # samples of the classes met before the shift
        self.first = zeros(hosts, host.classes, dtype=torch.bool)  # those classes
        self.signs = zeros(hosts, host.inputs)  # of the input features after the shift
        self.context = Context.plain(torch.zeros(hosts, dtype=torch.int64), host.width, host.stages)
        self.extra_flops = torch.zeros(hosts)  # multiply-adds per sample, summed over epochs, culled seeds included
        self.statistics = Statistics.empty(hosts, host.layers, host.stages, len(self.catalogue), device)
        self.validation_loss = zeros(hosts)

    # ---- sizes and costs ------------------------------------------------------------------------------------------

    def layer_exists(self) -> Tensor:
        """Bool [N, layers]: which layers each host has."""
        stage = torch.arange(self.slots) < self.context.depth[:, None]
        both = torch.ones(self.hosts, 1, dtype=torch.bool)
        return torch.cat([both, stage, both], dim=1)

    def host_parameters(self) -> Tensor:
        """float32 [N]."""
        return (self.layer_sizes[self.context.width] * self.layer_exists()).sum(1)

    def host_flops(self) -> Tensor:
        """Multiply-adds for one sample, forward, without seeds: float32 [N]."""
        return (self.layer_flops[self.context.width] * self.layer_exists()).sum(1)

    def seed_parameters(self, mask: Tensor) -> Tensor:
        """Parameters of the seeds in `mask` (bool [N, slots]), summed per host: float32 [N]."""
        return (self._per_slot(self.seed_sizes) * mask).sum(1).float()

    def seed_flops_now(self, mask: Tensor) -> Tensor:
        """Multiply-adds of the seeds in `mask` (bool [N, slots]) for one sample, summed per host: float32 [N]."""
        return (self._per_slot(self.seed_flops) * mask).sum(1)

    def _per_slot(self, cost: Tensor) -> Tensor:
        return cost[self.context.width].gather(1, self.lifecycle.blueprint.clamp(min=0))

    def germinable(self) -> Tensor:
        """Bool [N, slots, K]: where a seed of each blueprint may be germinated as far as the host is concerned; the
        lifecycle has its own say."""
        slot = torch.arange(self.slots) < self.context.depth[:, None]
        left = self.germinated < self.context.seeds
        return (slot & left[:, None])[:, :, None] & self.fits

    # ---- conditions -----------------------------------------------------------------------------------------------

    def conditions(self, context: Context, epoch: Tensor) -> tuple[Tensor, Tensor]:
        """(condition, severity) of every stage in `epoch` [m], each [m, S]."""
        struck = epoch[:, None] >= context.strike_epoch
        return (
            torch.where(struck, context.strike, context.condition),
            torch.where(struck, context.strike_severity, context.severity),
        )

    def activations(self) -> Activations:
        """Of every stage in the present epoch."""
        c = self.context
        now = activations(*self.conditions(c, self.epoch), c.width, c.depth, self.spec.width)
        return now.map(self.moved)

    def gain(self) -> Tensor | None:
        """[N, inputs, 1], the factor on each input feature in the present epoch; None where it is always 1."""
        if not self.context.flipped.any():
            return None
        shifted = self.moved(self.epoch >= self.context.shift_epoch)
        return torch.where(shifted[:, None], self.signs, 1.0)[:, :, None]

    def moved(self, value: Tensor) -> Tensor:
        """`value` on the device, without waiting for it."""
        if self.device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()  # from pageable memory the copy would wait
        return value.to(self.device, non_blocking=True)

    # ---- saving and forking ---------------------------------------------------------------------------------------

    _TENSORS = (
        "theta", "exp_avg", "exp_avg_sq", "seed_theta", "seed_exp_avg", "seed_exp_avg_sq", "steps", "seed_steps",
        "epoch", "germinated", "subset", "labels", "first_size", "first", "signs", "extra_flops", "validation_loss",
    )  # fmt: skip
    _PARTS = ("lifecycle", "context", "statistics")

    def state_dict(self) -> dict[str, Any]:
        """All of the population's state as tensors in plain containers (copies)."""
        state = self._state()
        for name, value in state.items():
            if isinstance(value, dict):
                state[name] = {key: tensor.clone() for key, tensor in value.items()}
            else:
                state[name] = [v.clone() for v in value] if isinstance(value, list) else value.clone()
        return state

    def _state(self) -> dict[str, Any]:
        """As `state_dict`, but the very tensors."""
        state = {name: getattr(self, name) for name in self._TENSORS}
        return state | {part: dict(vars(getattr(self, part))) for part in self._PARTS}

    def load_state_dict(self, state: dict[str, Any], rows: Tensor | None = None) -> None:
        """Restores what `state_dict` returned, or its hosts `rows` ([N], repeats allowed).

        Raises:
            KeyError: a piece is missing; what was there before may be partly replaced.
        """

        def taken(value: Tensor) -> Tensor:
            return value.clone() if rows is None else value[rows]

        for name in self._TENSORS:
            value = state[name]
            setattr(self, name, [taken(v) for v in value] if isinstance(value, list) else taken(value))
        for part in self._PARTS:
            for key in vars(getattr(self, part)):
                setattr(getattr(self, part), key, taken(state[part][key]))
