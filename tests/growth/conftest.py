"""A toy population, and the same thing said slowly: one host at a time in plain torch."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.growth.actions import ActionLayout
from esper.growth.host import HostSpec
from esper.growth.lifecycle import Event, LifecycleSpec, Stage
from esper.growth.population import Population
from esper.growth.state import Context, Data, TrainingSpec

CATALOGUE = ["mlp", "glu", "low_rank", "norm"]
WEIGHTS = (2, 4, 4, 1, 1)  # WAIT, GERMINATE, BLEND, FOSSILIZE, CULL: so that many seeds live long


class SlowHost:
    """Host `host` of a population as separate tensors, with seeds as nn.Modules and torch.optim.Adam.

    Reads the population's starting values, batches and lifecycle; shares no arithmetic with it.
    """

    def __init__(self, population: Population, host: int):
        self.population, self.host = population, host
        self.body = self.module_from(population.theta[host])
        self.seeds: dict[int, nn.Module] = {}
        self.optimisers: dict[int, torch.optim.Adam] = {}
        self.optimiser = self.adam(self.body)
        self.signals: list[Tensor] = []
        self.loss = float("nan")

    def adam(self, module: nn.Module) -> torch.optim.Adam:
        rate = float(self.population.context.learning_rate[self.host])
        return torch.optim.Adam(module.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8)

    def module_from(self, flat: Tensor) -> nn.ModuleList:
        spec, at = self.population.spec, 0
        widths = [spec.inputs] + [spec.width] * spec.stages + [spec.classes]
        layers = nn.ModuleList()
        for fan_in, fan_out in pairwise(widths):
            layer = nn.Linear(fan_in, fan_out)
            with torch.no_grad():
                layer.weight.copy_(flat[at : at + fan_in * fan_out].view(fan_in, fan_out).T)
                layer.bias.copy_(flat[at + fan_in * fan_out : at + fan_in * fan_out + fan_out])
            at += fan_in * fan_out + fan_out
            layers.append(layer)
        assert at == len(flat)
        return layers

    @staticmethod
    def flat(module: nn.Module, of=lambda p: p) -> Tensor:
        """Parameters in the population's order: a Linear's weight is stored [in, out]."""
        values = [of(p).detach() for p in module.parameters()]
        return torch.cat([(v.T if v.ndim == 2 else v).reshape(-1) for v in values])

    def seed_from(self, kind: int, flat: Tensor) -> nn.Module:
        seed = Seed(CATALOGUE[kind], self.population.spec.width)
        at = 0
        with torch.no_grad():
            for p in seed.parameters():
                part = flat[at : at + p.numel()]
                p.copy_(part.view(p.shape[1], p.shape[0]).T if p.ndim == 2 else part)
                at += p.numel()
        assert at == len(flat)
        return seed

    def stages(self) -> list[Stage]:
        return [Stage(s) for s in self.population.lifecycle.stage[self.host].tolist()]

    def alphas(self, ahead: int) -> list[float]:
        """Alpha in each slot, worked out from the stage; `ahead` = 1 for the coming epoch, 0 for now."""
        life, alphas = self.population.lifecycle, []
        for slot, stage in enumerate(self.stages()):
            done, ramp = int(life.epochs[self.host, slot]) + ahead, int(life.ramp[self.host, slot])
            alphas.append({Stage.BLENDING: done / ramp, Stage.HOLDING: 1.0, Stage.FOSSILIZED: 1.0}.get(stage, 0.0))
        return alphas

    def sync(self) -> None:
        """Takes over new seeds from the population and forgets the culled ones."""
        for slot, stage in enumerate(self.stages()):
            if stage in (Stage.DORMANT, Stage.EMBARGOED):
                self.seeds.pop(slot, None)
            elif slot not in self.seeds:
                kind = int(self.population.lifecycle.blueprint[self.host, slot])
                self.seeds[slot] = self.seed_from(kind, self.population.seed_theta[kind][self.host, slot])
                self.optimisers[slot] = self.adam(self.seeds[slot])

    def forward(self, x: Tensor, alphas: list[float]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits, and each slot's input and output; a seed with alpha 0 is left out."""
        h, inputs, outputs = x, [], []
        for slot in range(len(self.body) - 1):
            h = self.body[slot](h).relu()
            inputs.append(h)
            # `h * 1` is a tensor of its own, whose gradient a seed in TRAINING learns from.
            h = h + alphas[slot] * self.seeds[slot](h) if alphas[slot] > 0 else h * 1
            outputs.append(h)
        return self.body[-1](h), inputs, outputs

    def epoch(self) -> None:
        """One epoch of this host; call it before the population's `train_epoch`."""
        p, k = self.population, self.host
        self.sync()
        alphas, losses = self.alphas(ahead=1), []
        for batch in p._epoch_order()[k]:
            x, y = p.data.train_x[p.subset[k, batch]], p.labels[k, batch]
            logits, inputs, outputs = self.forward(x, alphas)
            loss = F.cross_entropy(logits, y)
            for optimiser in (self.optimiser, *(self.optimisers[s] for s in self.seeds)):
                optimiser.zero_grad()
            self.signals = list(torch.autograd.grad(loss, inputs, retain_graph=True))
            arriving = torch.autograd.grad(loss, outputs, retain_graph=True)
            loss.backward()
            for slot, stage in enumerate(self.stages()):
                if stage == Stage.TRAINING:
                    (self.seeds[slot](inputs[slot].detach()) * arriving[slot]).sum().backward()
            self.optimiser.step()
            for slot in self.seeds:
                self.optimisers[slot].step()
            losses.append(float(loss.detach()))
        self.loss = sum(losses) / len(losses)

    @torch.no_grad()
    def validation_loss(self, alphas: list[float]) -> float:
        data = self.population.data
        return float(F.cross_entropy(self.forward(data.validation_x, alphas)[0], data.validation_y))


class Seed(nn.Module):
    """A seed in plain torch.nn, with parameters in the blueprint's order."""

    def __init__(self, name: str, width: int):
        super().__init__()
        self.name = name
        if name == "mlp":
            self.parts = nn.ModuleList([nn.Linear(width, 2 * width), nn.Linear(2 * width, width)])
        elif name == "glu":
            self.parts = nn.ModuleList(
                [nn.Linear(width, 2 * width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)]
            )
        elif name == "low_rank":
            self.parts = nn.ModuleList([nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)])
        else:
            self.parts = nn.ModuleList([nn.LayerNorm(width)])

    def forward(self, h: Tensor) -> Tensor:
        if self.name == "mlp":
            return self.parts[1](F.relu(self.parts[0](h)))
        if self.name == "glu":
            return self.parts[2](F.glu(torch.cat([self.parts[0](h), self.parts[1](h)], dim=-1)))
        if self.name == "low_rank":
            return self.parts[1](self.parts[0](h))
        return self.parts[0](h) - h


class Toy:
    """Small populations on made-up data."""

    CATALOGUE = CATALOGUE
    SlowHost, Seed = SlowHost, Seed

    @staticmethod
    def data(train: int = 60, validation: int = 40, inputs: int = 5, classes: int = 3) -> Data:
        g = torch.Generator().manual_seed(train + validation)

        def split(n: int) -> tuple[Tensor, Tensor]:
            return torch.randn(n, inputs, generator=g), torch.randint(classes, (n,), generator=g)

        return Data(*split(train), *split(validation), *split(24))

    @staticmethod
    def context(keys: list[int]) -> Context:
        """A context for each key that depends on the key alone."""
        k = torch.tensor(keys)
        return Context(k * 7919, 0.004 + 0.002 * (k % 3), 20 + 7 * (k % 5), 0.1 * (k % 3))

    @classmethod
    def population(
        cls,
        keys: list[int],
        data: Data | None = None,
        width: int = 4,
        stages: int = 3,
        steps: int = 4,
        batch: int = 8,
        auto_blend: int | None = None,
        observed: int | None = None,
    ) -> Population:
        data = data or cls.data()
        spec = HostSpec(data.train_x.shape[1], int(data.train_y.max()) + 1, width, stages)
        rules = LifecycleSpec(embargo_epochs=2, auto_blend=auto_blend, auto_ramp=3)
        p = Population(spec, CATALOGUE, data, TrainingSpec(steps, batch), rules, len(keys), observed)
        p.reset(torch.arange(len(keys)), cls.context(keys))
        return p

    @staticmethod
    def layout(population: Population) -> ActionLayout:
        return ActionLayout(population.slots, len(population.catalogue))

    @classmethod
    def act(cls, population: Population, keys: list[int], tag: object = 0) -> None:
        """A random legal verb, then one of its actions, for each host: drawn from key, tag and epoch only."""
        layout = cls.layout(population)
        verbs = layout.table()[0].tolist()
        mask, actions = layout.mask(population.lifecycle.stage[: len(keys)]), []
        for host, key in enumerate(keys):
            dice = random.Random(f"{key} {tag} {int(population.epoch[host])}")
            legal = mask[host].nonzero().flatten().tolist()
            verb = dice.choice([v for v in sorted({verbs[a] for a in legal}) for _ in range(WEIGHTS[v])])
            actions.append(dice.choice([a for a in legal if verbs[a] == verb]))
        layout.execute(population, torch.tensor(actions))

    @classmethod
    def walk(cls, population: Population, keys: list[int], epochs: int, tag: object = 0) -> None:
        for _ in range(epochs):
            cls.act(population, keys, tag)
            population.train_epoch()

    @staticmethod
    def at(population: Population, host: int, slot: int) -> Tensor:
        where = torch.zeros(population.hosts, population.slots, dtype=torch.bool)
        where[host, slot] = True
        return where

    @classmethod
    def plant(cls, population: Population, host: int, slot: int, kind: int) -> None:
        population.germinate(cls.at(population, host, slot), torch.full((population.hosts, population.slots), kind))

    @staticmethod
    def leaves(state: object, path: str = "") -> dict[str, Tensor]:
        """A nested state as {path: tensor}."""
        if isinstance(state, Tensor):
            return {path: state}
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in items for k, v in Toy.leaves(value, f"{path}/{key}").items()}

    @classmethod
    def hold(cls, p, host, slot, kind, seed=0):
        """A seed in HOLDING with random parameters, also where a blueprint starts at zeros or ones."""
        cls.plant(p, host, slot, kind)
        g = torch.Generator().manual_seed(100 * host + 10 * slot + kind + seed)
        row = p.seed_theta[kind][host, slot]
        p.seed_theta[kind][host, slot] = row + 0.3 * torch.randn(row.shape, generator=g)
        p.lifecycle.blend(cls.at(p, host, slot), 1)
        p.lifecycle.fire(Event.RAMPED, cls.at(p, host, slot))
        p.lifecycle.alpha[host, slot] = 1.0

    @classmethod
    def differences(cls, a: object, b: object, rows: tuple[int, int] | None = None) -> list[str]:
        """Paths of the tensors that are not bitwise equal (NaNs apart); `rows` compares one host of each."""
        left, right = cls.leaves(a), cls.leaves(b)
        assert left.keys() == right.keys()
        if rows is not None:
            left = {k: v[rows[0]] for k, v in left.items()}
            right = {k: v[rows[1]] for k, v in right.items()}
        return [k for k in left if not torch.equal(left[k], right[k])]


@pytest.fixture(scope="session")
def toy() -> type[Toy]:
    return Toy
