"""Small populations on made-up data."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from esper.growth.actions import ActionLayout
from esper.growth.conditions import NEVER, STRIKES, Condition
from esper.growth.context import Context
from esper.growth.data import Data
from esper.growth.host import HostSpec
from esper.growth.lifecycle import Event, LifecycleSpec
from esper.growth.population import Population
from esper.growth.state import PopulationSpec, TrainingSpec

from .reference import Seed, SlowHost, cut

CATALOGUE = ("mlp", "glu", "low_rank", "norm", "bypass", "widen", "conv", "dilated_conv", "attention")
MIXERS = ("conv", "dilated_conv", "attention")
WEIGHTS = (2, 4, 4, 1, 1)  # WAIT, GERMINATE, BLEND, FOSSILIZE, CULL: so that many seeds live long


class Toy:
    """Makes small populations and drives them."""

    engine = "auto"
    CATALOGUE, MIXERS = CATALOGUE, MIXERS
    SlowHost, Seed, cut = SlowHost, Seed, staticmethod(cut)

    # grid, causal, inputs, labels per token
    TASKS: ClassVar = {
        "mlp": ((1,), False, 5, False),
        "grid": ((3, 2), False, 2, False),
        "sequence": ((5,), False, 2, False),
        "causal": ((5,), True, 2, True),
        "gathered": ((9,), True, 2, False),  # more tokens than a dense convolution is made for
    }

    @classmethod
    def data(cls, task: str = "mlp", train: int = 60, validation: int = 40, inputs: int = 0, classes: int = 3) -> Data:
        grid, causal, features, per_token = cls.TASKS[task]
        g = torch.Generator().manual_seed(train + validation)
        tokens = int(torch.tensor(grid).prod())

        def split(n: int) -> tuple[Tensor, Tensor]:
            x = torch.randn(n, tokens, inputs or features, generator=g)
            return x, torch.randint(classes, (n, tokens) if per_token else (n,), generator=g)

        return Data(*split(train), *split(validation), *split(24), grid=grid, causal=causal)

    @staticmethod
    def context(keys: list[int], width: int = 4, stages: int = 3, mixed: bool = False) -> Context:
        """A context for each key that depends on the key alone; `mixed` ones differ in everything there is."""
        k = torch.tensor(keys)
        c = Context.plain(k * 7919, width, stages)
        c.learning_rate = 0.004 + 0.002 * (k % 3)
        c.train_size = 20 + 7 * (k % 5)
        c.label_noise = 0.1 * (k % 3)
        if not mixed:
            return c
        for row, key in enumerate(keys):
            dice = random.Random(key)
            c.width[row], c.depth[row] = dice.randint(max(2, width - 3), width), dice.randint(1, stages)
            c.seeds[row], c.priced[row] = dice.randint(3, 12), dice.random() < 0.5
            for stage in range(stages):
                c.condition[row, stage], c.severity[row, stage] = dice.randrange(10), dice.random()
                c.strike[row, stage], c.strike_severity[row, stage] = dice.choice(STRIKES), dice.random()
                if dice.random() < 0.4:
                    c.strike_epoch[row, stage] = dice.randint(1, 5)
            if dice.random() < 0.5:
                c.shift_epoch[row], c.first_classes[row] = dice.randint(1, 5), dice.randint(1, 3)
                c.flipped[row] = dice.random()
        return c

    @classmethod
    def spec(
        cls,
        task: str = "mlp",
        data: Data | None = None,
        width: int = 4,
        stages: int = 3,
        steps: int = 4,
        batch: int = 8,
        measured: bool = True,
        **lifecycle: int | bool | None,
    ) -> PopulationSpec:
        data = data or cls.data(task)
        host = HostSpec(
            data.train_x.shape[2], data.classes, width, stages, data.grid, data.causal, data.train_y.ndim == 2
        )
        rules = LifecycleSpec(**{"embargo_epochs": 2, "auto_blend": None, "auto_ramp": 3} | lifecycle)
        return PopulationSpec(host, CATALOGUE, data, TrainingSpec(steps, batch), rules, measured, cls.engine)

    @classmethod
    def population(
        cls, keys: list[int], *args, mixed: bool = False, context: Context | None = None, **kw
    ) -> Population:
        spec = cls.spec(*args, **kw)
        p = Population(spec, len(keys))
        p.reset(torch.arange(len(keys)), context or cls.context(keys, spec.host.width, spec.host.stages, mixed))
        return p

    # ---- acting ---------------------------------------------------------------------------------------------------

    @staticmethod
    def layout(population: Population) -> ActionLayout:
        return ActionLayout(population.slots, len(population.catalogue))

    @classmethod
    def act(cls, population: Population, keys: list[int], tag: object = 0) -> None:
        """A random legal verb, then one of its actions, for each host: drawn from key, tag and epoch only."""
        layout = cls.layout(population)
        verbs = layout.table()[0].tolist()
        mask, actions = layout.mask(population), []
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

    @staticmethod
    def kind(name: str | int) -> int:
        return CATALOGUE.index(name) if isinstance(name, str) else name

    @classmethod
    def plant(cls, p: Population, host: int, slot: int, kind: str | int) -> None:
        """A seed in TRAINING."""
        p.germinate(cls.at(p, host, slot), torch.full((p.hosts, p.slots), cls.kind(kind)))

    @classmethod
    def scatter(cls, p: Population, host: int, slot: int, kind: str | int, seed: int = 0) -> None:
        """Moves a seed's parameters away from where they start, also where that is at zeros or ones."""
        kind = cls.kind(kind)
        g = torch.Generator().manual_seed(100 * host + 10 * slot + kind + 1000 * seed)
        row = p.seed_theta[kind][host, slot]
        owned = p.seed_tables[kind].owned[p.context.width[host]]
        p.seed_theta[kind][host, slot] = row + 0.3 * torch.randn(row.shape, generator=g) * owned

    @classmethod
    def hold(cls, p: Population, host: int, slot: int, kind: str | int) -> None:
        """A seed in HOLDING with scattered parameters."""
        cls.plant(p, host, slot, kind)
        cls.scatter(p, host, slot, kind)
        p.lifecycle.blend(cls.at(p, host, slot), 1)
        p.lifecycle.fire(Event.RAMPED, cls.at(p, host, slot))
        p.lifecycle.alpha[host, slot] = 1.0

    @classmethod
    def fitting(cls, task: str) -> list[str]:
        return [name for name in CATALOGUE if task != "mlp" or name not in MIXERS]

    @classmethod
    def exact(cls, p: Population, host: int) -> Population:
        """A population of exactly the size of one host of p, in that host's present state."""
        one = SlowHost(p, host)
        w, d = one.width, one.depth
        layers = [*range(d + 1), p.spec.stages + 1]

        def fitted(value: Tensor) -> Tensor:
            return value[host : host + 1, :d] if value.shape[1:2] == (p.slots,) else value[host : host + 1]

        q = Population(replace(p.setup, host=replace(p.spec, width=w, stages=d)), 1)
        q.reset(torch.arange(1), Context(*(fitted(value) for value in vars(p.context).values())))
        for name in ("theta", "exp_avg", "exp_avg_sq"):
            parts = cut(getattr(p, name)[host], one.wide, one.shapes(w))
            getattr(q, name)[0] = torch.cat([parts[i].flatten() for i in one.kept])
            for kind, blueprint in enumerate(p.catalogue):
                seed = Seed(blueprint.name, w, p.spec.grid, p.spec.causal)
                for slot in range(d if p.fits[kind] else 0):
                    flat = getattr(p, f"seed_{name}")[kind][host, slot]
                    parts = cut(flat, seed.shapes(p.spec.width), seed.shapes(w))
                    getattr(q, f"seed_{name}")[kind][0, slot] = torch.cat([part.flatten() for part in parts])
        for name in ("steps", "epoch", "germinated", "extra_flops", "validation_loss", "seed_steps"):
            setattr(q, name, fitted(getattr(p, name)).clone())
        for name, value in vars(p.lifecycle).items():
            setattr(q.lifecycle, name, fitted(value).clone())
        for name, value in vars(p.statistics).items():
            row = value[host : host + 1]
            stages = name.startswith(("activation", "seed_", "growth_", "contribution", "germination_"))
            row = row[:, layers] if name.startswith("layer_") else row[:, :d] if stages else row
            setattr(q.statistics, name, row.clone())
        return q

    # ---- comparing ------------------------------------------------------------------------------------------------

    @staticmethod
    def leaves(state: object, path: str = "") -> dict[str, Tensor]:
        """A nested state as {path: tensor}."""
        if isinstance(state, Tensor):
            return {path: state}
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in items for k, v in Toy.leaves(value, f"{path}/{key}").items()}

    @classmethod
    def differences(cls, a: object, b: object, rows: tuple[int, int] | None = None) -> list[str]:
        """Paths of the tensors that are not bitwise equal (NaNs are equal); `rows` compares one host of each."""
        left, right = cls.leaves(a), cls.leaves(b)
        assert left.keys() == right.keys()
        if rows is not None:
            left = {k: v[rows[0]] for k, v in left.items()}
            right = {k: v[rows[1]] for k, v in right.items()}
        return [k for k in left if not torch.equal(cls.bits(left[k]), cls.bits(right[k]))]

    @staticmethod
    def bits(value: Tensor) -> Tensor:
        """Comparable by torch.equal: NaN equals NaN."""
        if not value.is_floating_point():
            return value
        return torch.stack([value.nan_to_num(0.0), value.isnan().to(value.dtype)])

    @staticmethod
    def condition(context: Context, row: int, stage: int, kind: Condition, severity: float = 0.5) -> Context:
        context.condition[row, stage], context.severity[row, stage] = kind, severity
        return context

    @staticmethod
    def strike(context: Context, row: int, stage: int, kind: Condition, epoch: int, severity: float = 0.5) -> Context:
        assert epoch < NEVER
        context.strike[row, stage], context.strike_severity[row, stage] = kind, severity
        context.strike_epoch[row, stage] = epoch
        return context


class Stacked(Toy):
    engine = "stacked"


@pytest.fixture(scope="session", params=[Toy, Stacked], ids=["native", "stacked"])
def toy(request: pytest.FixtureRequest) -> type[Toy]:
    """Every test that uses it runs on both engines."""
    return request.param
