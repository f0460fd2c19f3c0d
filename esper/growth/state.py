"""The state of a population: parameters, optimiser moments, lifecycles, contexts, and how they are saved.

What is done with it (episodes, training, evaluation) lives in `population` and `epoch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from esper.growth import blueprints
from esper.growth.blueprints import Blueprint
from esper.growth.host import HostSpec
from esper.growth.lifecycle import Lifecycle, LifecycleSpec
from esper.growth.parameters import views
from esper.growth.statistics import Statistics


@dataclass(frozen=True)
class Data:
    """A task's tensors: features [n, inputs] float32 and labels [n] int64, for each split."""

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: torch.device | str) -> Data:
        return Data(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


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


@dataclass
class Context:
    """What is hidden and drawn per episode, stacked over hosts: each [N]."""

    key: Tensor  # int64; init, data order and noise all follow from it
    learning_rate: Tensor  # float32
    train_size: Tensor  # int64, samples of the training pool that the host sees
    label_noise: Tensor  # float32, share of its labels that are drawn anew


class PopulationState:
    """Every tensor of N hosts of one architecture, their slots and their seeds; see Population for the arguments."""

    def __init__(
        self,
        spec: HostSpec,
        catalogue: list[str],
        data: Data,
        training: TrainingSpec,
        lifecycle: LifecycleSpec,
        hosts: int,
        observed: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self.spec, self.training, self.lifecycle_spec = spec, training, lifecycle
        self.catalogue: list[Blueprint] = [blueprints.get(name) for name in catalogue]
        self.data = data.to(device)
        self.device = torch.device(device)
        self.hosts, self.slots = hosts, spec.stages
        self.observed = hosts if observed is None else observed

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # [N, P] host parameters with Adam's moments; [N, slots, P_b] for the seeds of each blueprint.
        sizes = [b.parameter_count(spec.width) for b in self.catalogue]
        self.theta, self.exp_avg, self.exp_avg_sq = (zeros(hosts, spec.parameter_count) for _ in range(3))
        self.seed_theta, self.seed_exp_avg, self.seed_exp_avg_sq = (
            [zeros(hosts, self.slots, size) for size in sizes] for _ in range(3)
        )
        self.steps = zeros(hosts, dtype=torch.int64)  # optimiser steps taken by each host
        self.seed_steps = zeros(hosts, self.slots, dtype=torch.int64)
        self.epoch = zeros(hosts, dtype=torch.int64)
        self.lifecycle = Lifecycle.dormant(hosts, self.slots, device)
        pool = len(self.data.train_y)
        self.subset = zeros(hosts, pool, dtype=torch.int64)  # indices into the training pool, the host's own first
        self.labels = zeros(hosts, pool, dtype=torch.int64)  # of `subset`, with the host's label noise
        self.context = Context(
            key=zeros(hosts, dtype=torch.int64),
            learning_rate=zeros(hosts),
            train_size=zeros(hosts, dtype=torch.int64) + 1,
            label_noise=zeros(hosts),
        )
        self.extra_flops = zeros(hosts)  # multiply-adds per sample, summed over epochs, culled seeds included
        self.statistics = Statistics.empty(self.observed, spec, len(self.catalogue), device)
        self.validation_loss = zeros(hosts)

        self.host_specs = spec.parameters()
        self.seed_specs = [list(b.parameters(spec.width).values()) for b in self.catalogue]
        self._seed_names = [list(b.parameters(spec.width)) for b in self.catalogue]
        self.seed_flops = torch.tensor([b.flops(spec.width) for b in self.catalogue], device=device)
        self.seed_sizes = torch.tensor(sizes, device=device)
        layer = [i // 2 for i, p in enumerate(self.host_specs) for _ in range(p.size)]
        self.layer_of = F.one_hot(torch.tensor(layer, device=device), len(spec.layers)).float()
        self.layer_of /= self.layer_of.sum(0)  # [P, layers]: averages over a layer's parameters

    def seed_views(self, kind: int, flat: Tensor) -> dict[str, Tensor]:
        """The parameters of m seeds of blueprint number `kind` by name, as views of flat [m, P_b]."""
        return dict(zip(self._seed_names[kind], views(self.seed_specs[kind], flat), strict=True))

    _STATE = (
        "theta", "exp_avg", "exp_avg_sq", "seed_theta", "seed_exp_avg", "seed_exp_avg_sq", "steps", "seed_steps",
        "epoch", "subset", "labels", "extra_flops", "validation_loss",
    )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """All of the population's state as tensors in plain containers (copies)."""
        state: dict[str, Any] = {}
        for name in self._STATE:
            value = getattr(self, name)
            state[name] = [v.clone() for v in value] if isinstance(value, list) else value.clone()
        for part in ("lifecycle", "context", "statistics"):
            state[part] = {k: v.clone() for k, v in vars(getattr(self, part)).items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            KeyError: a piece is missing; what was there before may be partly replaced.
        """
        for name in self._STATE:
            value = state[name]
            setattr(self, name, [v.clone() for v in value] if isinstance(value, list) else value.clone())
        for part in ("lifecycle", "context", "statistics"):
            for key in vars(getattr(self, part)):
                setattr(getattr(self, part), key, state[part][key].clone())
