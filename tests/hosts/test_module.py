"""A module that grows does what a host of a population does: the same trajectory, observations and legal actions."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.growth.actions import ActionLayout, Verb
from esper.growth.context import Context
from esper.growth.data import Data
from esper.growth.host import HostSpec
from esper.growth.lifecycle import LifecycleSpec
from esper.growth.observation import Observer
from esper.growth.population import Population
from esper.growth.state import PopulationSpec, TrainingSpec
from esper.hosts import optimizers
from esper.hosts.anatomy import Anatomy, Slot, traced
from esper.hosts.budget import Budget
from esper.hosts.module import ModuleHost
from esper.runtime.errors import ConfigError

WIDTH, STAGES, CLASSES, HORIZON = 6, 3, 3, 12
RATE, EPSILON = 0.003, 1e-3
GRIDS = {"features": (1,), "images": (3, 4)}
CATALOGUES = {
    "features": ("mlp", "glu", "low_rank", "norm", "bypass", "widen"),
    "images": ("mlp", "conv", "dilated_conv", "attention", "norm", "bypass"),
}


class Network(nn.Module):
    """The network of a HostSpec in ordinary modules."""

    def __init__(self, inputs: int, grid: tuple[int, ...]):
        super().__init__()
        self.grid = grid

        def stage() -> nn.Module:
            return nn.Linear(WIDTH, WIDTH) if grid == (1,) else nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

        self.stem = nn.Linear(inputs, WIDTH)
        self.stages = nn.ModuleList(nn.Sequential(stage(), nn.ReLU()) for _ in range(STAGES))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()  # [B, tokens, width]
        h = h[:, 0] if self.grid == (1,) else h.transpose(1, 2).unflatten(2, self.grid)
        for stage in self.stages:
            h = stage(h)
        return self.head(h if self.grid == (1,) else h.mean((2, 3)))

    def layers(self) -> list[nn.Module]:
        return [self.stem, *(stage[0] for stage in self.stages), self.head]  # type: ignore[index]

    @torch.no_grad()
    def copy(self, parameters: list[Tensor]) -> None:
        """From a population's weights [in, out] or [taps, in, out] and biases [1, out]."""
        for layer, weight, bias in zip(self.layers(), parameters[::2], parameters[1::2], strict=True):
            weight = weight.unflatten(0, (3, 3)).permute(3, 2, 0, 1) if weight.dim() == 3 else weight.T
            layer.weight.copy_(weight)  # type: ignore[operator,union-attr]
            layer.bias.copy_(bias[0])  # type: ignore[operator,union-attr]

    def flat(self) -> list[Tensor]:
        """As `copy` takes them."""
        found: list[Tensor] = []
        for layer in self.layers():
            weight: Tensor = layer.weight.detach()  # type: ignore[assignment,union-attr]
            weight = weight.permute(2, 3, 1, 0).flatten(0, 1) if weight.dim() == 4 else weight.T
            found += [weight, layer.bias.detach()[None]]  # type: ignore[union-attr,operator]
        return found


def data_of(task: str) -> Data:
    generator, grid = torch.Generator().manual_seed(1), GRIDS[task]
    tokens, inputs = int(torch.tensor(grid).prod()), 5 if task == "features" else 2

    def split(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, tokens, inputs, generator=generator)
        return x, torch.randint(CLASSES, (count,), generator=generator)

    return Data(*split(70), *split(150), *split(30), grid=grid)


class Adam(torch.optim.Optimizer):
    """Adam in the efficient order of its paper's section 2, which populations use; that of torch has another epsilon.

    Epsilon is large, since gradients that are nothing but rounding would otherwise become whole steps.
    """

    def __init__(self, parameters: object, lr: float):
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "eps": EPSILON})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                if p.grad is None:
                    continue
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                size = group["lr"] * (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
                p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt() + group["eps"], value=-size)


class Both:
    """One host in both engines."""

    def __init__(self, task: str, auto_blend: int | None = 2, key: int = 7):
        data, names = data_of(task), CATALOGUES[task]
        spec = HostSpec(data.train_x.shape[2], CLASSES, WIDTH, STAGES, data.grid)
        training = TrainingSpec(steps_per_epoch=4, batch_size=16, epsilon=EPSILON)
        lifecycle = LifecycleSpec(auto_blend=auto_blend)
        self.population = p = Population(PopulationSpec(spec, names, data, training, lifecycle, engine="stacked"), 1)
        context = Context.plain(torch.tensor([key]), WIDTH, STAGES)
        context.seeds[:], context.learning_rate[:] = 6, RATE
        p.reset(torch.tensor([0]), context)
        self.network = Network(data.train_x.shape[2], data.grid)
        self.network.copy([view[0] for view in p.table.views(p.theta)])
        self.optimizer = Adam(self.network.parameters(), lr=RATE)
        slots = [Slot(f"stages.{i}", channels=-1 if task == "features" else 1) for i in range(STAGES)]
        x, y = data.validation_x, data.validation_y

        @torch.no_grad()
        def losses(count: int | None) -> Tensor:
            return F.cross_entropy(self.network(x[:count]), y[:count], reduction="none")

        size = int(p.context.train_size[0])
        anatomy = Anatomy(self.network, slots, traced(self.network, (x[:5],)))
        budget = Budget(parameters=None, seeds=6)
        self.module = ModuleHost(self.network, anatomy, names, self.optimizer, losses, lifecycle, budget, size, key)
        self.layout = ActionLayout(STAGES, len(names))

    def epoch(self, action: int) -> None:
        p, m = self.population, self.module
        for host in (p, m):
            self.layout.execute(host, torch.tensor([action]))
        index = p.subset.gather(1, p._epoch_order().flatten(1))[0].view(4, 16)
        p.train_epoch()
        m.begin_epoch()
        total = 0.0
        for batch in index:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.network(p.data.train_x[batch]), p.data.train_y[batch])
            loss.backward()
            self.optimizer.step()
            total += float(loss.detach()) / len(index)
        m.end_epoch(total)

    def compare(self) -> None:
        p, m = self.population, self.module
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(m.validation_loss, p.validation_loss, **close)
        for ours, right in zip(self.network.flat(), p.table.views(p.theta), strict=True):
            torch.testing.assert_close(ours, right[0], **close)
        for name, value in vars(p.lifecycle).items():
            assert torch.equal(getattr(m.lifecycle, name), value), name
        for name, value in vars(p.statistics).items():
            torch.testing.assert_close(
                getattr(m.statistics, name), value, msg=lambda text, n=name: f"{n}: {text}", **close
            )
        seen, right = Observer(m, HORIZON)(), Observer(p, HORIZON)()
        assert torch.equal(seen.action_mask, right.action_mask)
        ours, theirs = seen.pack(), right.pack()
        assert torch.equal(ours.mask, theirs.mask)
        torch.testing.assert_close(ours.attr, theirs.attr, rtol=1e-5, atol=1e-6)
        for node, x in right.x.items():
            torch.testing.assert_close(seen.x[node], x, msg=lambda text, n=node: f"{n}: {text}", rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("task", GRIDS)
@pytest.mark.parametrize("auto_blend", [2, None], ids=["auto-blend", "asked to blend"])
def test_the_same_trajectory(task: str, auto_blend: int | None) -> None:
    both = Both(task, auto_blend)
    both.compare()
    generator, verbs = torch.Generator().manual_seed(3), set()
    for _ in range(HORIZON - 2):
        mask = both.layout.mask(both.population)[0]
        # Germinations are many among the actions; the others are to happen, too.
        verb = both.layout.table()[0]
        weight = mask.float() / torch.bincount(verb, minlength=len(Verb))[verb]
        action = int(torch.multinomial(weight, 1, generator=generator))
        verbs.add(int(verb[action]))
        both.epoch(action)
        both.compare()
    assert len(verbs) >= 3
    both.population.remove_unfinished(torch.tensor([True]))
    both.module.remove_unfinished()
    both.compare()


@pytest.mark.parametrize("kind", CATALOGUES["images"] + CATALOGUES["features"][1:4])
def test_every_blueprint_from_germination_to_the_end(kind: str) -> None:
    task = "images" if kind in CATALOGUES["images"] else "features"
    both, number = Both(task), CATALOGUES[task].index(kind)
    both.epoch(both.layout.index(Verb.GERMINATE, 1, number))
    for _ in range(5):
        both.epoch(0)
        both.compare()
    both.epoch(both.layout.index(Verb.FOSSILIZE, 1))
    both.compare()


def test_a_restored_module_goes_on_as_if_it_had_never_stopped() -> None:
    """Also where the seeds were germinated in another order than that of their slots, and one was culled."""
    one, other = Both("images"), Both("images")
    layout = one.layout
    actions = [layout.index(Verb.GERMINATE, slot, kind) for slot, kind in ((2, 1), (1, 4), (0, 0))]
    for action in [*actions, layout.index(Verb.CULL, 1), 0]:
        one.epoch(action)
    state, population = one.module.state_dict(), one.population.state_dict()
    trained = deepcopy([one.network.state_dict(), one.optimizer.state_dict()])
    for _ in range(3):
        one.epoch(0)
        other.epoch(0)  # to be forgotten
    other.population.load_state_dict(population)
    other.module.load_state_dict(state)
    other.network.load_state_dict(trained[0])
    other.optimizer.load_state_dict(trained[1])
    for _ in range(3):
        other.epoch(0)
    for ours, right in zip(one.network.flat(), other.network.flat(), strict=True):
        assert torch.equal(ours, right)
    assert torch.equal(Observer(one.module, HORIZON)().pack().x, Observer(other.module, HORIZON)().pack().x)


def test_released_it_is_the_module_that_it_was() -> None:
    both = Both("features")
    x = torch.randn(4, 1, 5)
    for action in (both.layout.index(Verb.GERMINATE, 0, 0), 0, 0):
        both.epoch(action)
    alone = Network(5, (1,))
    alone.load_state_dict(both.network.state_dict())
    assert not torch.equal(both.network(x), alone(x)), "the seed blends"
    both.module.release()
    assert torch.equal(both.network(x), alone(x))
    steps = both.module.seed_steps.clone()
    both.optimizer.step()
    assert torch.equal(both.module.seed_steps, steps)


class Odd(nn.Module):
    """Calls one submodule twice, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.pair = nn.Linear(3, 3), nn.Linear(3, 3), Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.twice(self.twice(x)))[0]


class Pair(nn.Module):
    """Gives two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stage", "slot=stage: there is no such submodule; there are twice, never, pair"),
        ("twice", "slot=twice: called 2 times in a forward pass, not once"),
        ("never", "slot=never: called 0 times in a forward pass, not once"),
        ("pair", "slot=pair: has to take one tensor of floats, as its first positional argument, and to give one"),
    ],
)
def test_slots_that_do_not_fit_are_named(name: str, message: str) -> None:
    odd = Odd()
    with pytest.raises(ConfigError, match=message):
        Anatomy(odd, [Slot(name)], traced(odd, (torch.zeros(2, 3),)))


def chain(network: nn.Module, names: tuple[str, ...], budget: Budget) -> ModuleHost:
    """A host of two layers with a slot behind each."""
    anatomy = Anatomy(network, [Slot("0"), Slot("1")], traced(network, (torch.zeros(2, 3),)))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def losses(count: int | None) -> Tensor:
        return network(torch.ones(2, 3)).mean(1).detach()

    return ModuleHost(network, anatomy, names, optimizer, losses, LifecycleSpec(), budget, train_size=10)


def test_what_a_slot_cannot_hold_is_not_legal() -> None:
    """A bypass reads what its stage takes, which must have the shape of what it gives; what mixes tokens needs some."""
    network = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5))
    names = ("mlp", "bypass", "attention")
    host = chain(network, names, Budget(parameters=None, seeds=1))
    assert host.germinable().tolist() == [[[True, False, False], [True, True, False]]]
    assert Observer(host, 5)().action_mask.sum() == 1 + 3


def test_what_the_budget_has_no_room_for_is_not_legal() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))  # 16 + 20 parameters, 12 + 16 multiply-adds
    names = ("norm", "bypass")  # 4 + 4 and 16 + 4 parameters; both 16 multiply-adds
    sizes = ModuleHost.germinable

    def legal(**limits: Any) -> list[list[bool]]:
        return sizes(chain(network, names, Budget(**limits)))[0].tolist()

    assert legal(parameters=1 + 20.5 / 36) == [[True, False], [True, True]]
    assert legal(parameters=1 + 19.5 / 36) == [[True, False], [True, False]]
    assert legal(parameters=None, flops=1 + 16.5 / 28) == [[True, False], [True, True]]
    assert legal(parameters=None, flops=1 + 15.5 / 28) == [[False, False], [False, False]]
    host = chain(network, names, Budget(parameters=1 + 20.5 / 36))
    layout = ActionLayout(2, 2)
    layout.execute(host, torch.tensor([layout.index(Verb.GERMINATE, 0, 0)]))
    assert host.germinable()[0].tolist() == [[True, False], [True, False]], "the first norm has its share"


@pytest.mark.parametrize(("name", "value"), [("parameters", 1.0), ("flops", 0.5), ("seeds", 0)])
def test_budgets_that_leave_no_room_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"budget.{name}={value}"):
        Budget(**{name: value})


# ---- optimisers ------------------------------------------------------------------------------------------------------


def one_step(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> None:
    optimizer.zero_grad()
    (p * torch.tensor([1.0, -2.0])).sum().backward()
    optimizer.step()


def test_squares_of_optimisers_by_hand() -> None:
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    plain = torch.optim.SGD([p], lr=0.1)
    one_step(plain, p)
    values = (3 - 0.1) ** 2 + (4 + 0.2) ** 2
    torch.testing.assert_close(optimizers.squares(plain, [[p]])[0], torch.tensor([values, 5.0, 0.05, 5.0]))
    # The running mean of Adam and that of its squares, without bias, are the gradient; the step is lr each way.
    adam = torch.optim.Adam([p], lr=0.1)
    one_step(adam, p)
    values = (2.9 - 0.1) ** 2 + (4.2 + 0.1) ** 2
    torch.testing.assert_close(optimizers.squares(adam, [[p]])[0], torch.tensor([values, 5.0, 0.02, 5.0]))
    # A buffer of 1 + 0.5 times the gradient, of which the share 1 - 0.5 is its mean: 0.75 of it.
    heavy = torch.optim.SGD([p], lr=0.1, momentum=0.5)
    for _ in range(2):
        one_step(heavy, p)
    found = optimizers.squares(heavy, [[p]])[0]
    torch.testing.assert_close(found[1:], torch.tensor([5.0, 0.01 * 2.25 * 5, 0.5625 * 5]))


def test_squares_of_large_parameters_are_estimated() -> None:
    """From entries of all rows and columns, also where these differ in size."""
    torch.manual_seed(0)
    size = 2.0 ** (torch.arange(128) % 4)
    p = nn.Parameter(torch.randn(128, 128) * size * size[:, None])
    adam = torch.optim.Adam([p], lr=0.1)
    for _ in range(3):
        adam.zero_grad()
        (p * torch.randn(128, 128) * size).sum().backward()
        adam.step()
    state = adam.state[p]
    mean, second = state["exp_avg"] / (1 - 0.9**3), state["exp_avg_sq"] / (1 - 0.999**3)
    exact = [p.square(), second, (0.1 * mean / (second.sqrt() + 1e-8)).square(), mean.square()]
    right = torch.tensor([float(value.detach().sum()) for value in exact])
    torch.testing.assert_close(optimizers.squares(adam, [[p]])[0], right, rtol=0.15, atol=0)


def test_parameters_come_and_go_and_the_others_keep_their_moments() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([a], lr=0.1, weight_decay=0.3)
    one_step(optimizer, a)
    optimizers.add(optimizer, [b], like=a)
    assert optimizer.param_groups[0]["params"] == [a, b]
    one_step(optimizer, b)
    kept = optimizer.state[a]["exp_avg"]
    optimizers.remove(optimizer, [b])
    assert len(optimizer.param_groups) == 1
    assert list(optimizer.state) == [a]
    assert optimizer.state[a]["exp_avg"] is kept
