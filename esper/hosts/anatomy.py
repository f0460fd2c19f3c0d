"""What a module is made of, found by one forward pass: its layers in the order of their calls, and the sites of its
slots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from esper.graph import Layout
from esper.graph.schema import SCHEMA
from esper.growth.blueprints import Blueprint, Site
from esper.growth.sizes import Sizes, attributes, features
from esper.growth.topology import edge_mask, pairs
from esper.runtime.errors import ConfigError

_LAYERS: list[tuple[tuple[type[nn.Module], ...], str]] = [
    ((nn.Linear, nn.Bilinear), "linear"),
    ((nn.modules.conv._ConvNd,), "conv"),
    ((nn.MultiheadAttention,), "attention"),
    ((nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), "norm"),
    ((nn.Embedding, nn.EmbeddingBag), "embedding"),
]
_ACTIVATIONS: list[tuple[tuple[type[nn.Module], ...], str]] = [
    ((nn.ReLU, nn.ReLU6, nn.LeakyReLU), "relu"),
    ((nn.GELU,), "gelu"),
    ((nn.SiLU, nn.Hardswish), "silu"),
    ((nn.Tanh, nn.Sigmoid), "tanh"),
]
ACTIVATIONS = tuple(kind for kinds, _ in _ACTIVATIONS for kind in kinds)
"""Modules that are known as activation functions."""


@dataclass(frozen=True)
class Slot:
    """A place in a module where a seed can live: behind a submodule, the slot's stage, whose output it adds to.

    Attributes:
        name: of the submodule, as in `named_modules()`. It is called once in a forward pass, takes a tensor first and
            gives one.
        channels: the dimension of its output that counts units: -1, or 1 for images [B, C, H, W].
        causal: a token may only see itself and those before it.
    """

    name: str
    channels: int = -1
    causal: bool = False

    def rows(self, x: Tensor) -> Tensor:
        """[batch * tokens, units] from a tensor of its stage."""
        return x.movedim(self.channels, -1).flatten(0, -2)

    def unrows(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `rows`, in the shape of `like` but for the units."""
        shape = like.movedim(self.channels, -1).shape
        return rows.view(*shape[:-1], rows.shape[-1]).movedim(-1, self.channels)

    def site(self, shape: Sequence[int]) -> Site:
        """Where a seed lives that adds to tensors of a shape."""
        grid = list(shape)
        width = grid.pop(self.channels)
        return Site(width, tuple(grid[1:]) or (1,), self.causal)


@dataclass(frozen=True)
class Layer:
    """A submodule that owns parameters.

    Attributes:
        name: as in `named_modules()`; "" is the module itself.
        kind: one of `schema.LAYER_KINDS`.
        parameters: its own.
        fan: units in and out.
        flops: multiply-adds for one sample, forward.
    """

    name: str
    kind: str
    parameters: tuple[nn.Parameter, ...]
    fan: tuple[int, int]
    flops: float


@dataclass(frozen=True)
class Place:
    """What there is of a slot.

    Attributes:
        slot: its declaration.
        site: of its seeds, for the sample.
        same: whether what the stage takes has the shape of what it gives.
        around: whether it has the tokens of what it gives.
        own, after: numbers of the layers in front of it and behind it.
        activation: one of `schema.ACTIVATION_KINDS`, the last one in its stage.
    """

    slot: Slot
    site: Site
    same: bool
    around: bool
    own: int
    after: int
    activation: str


@dataclass
class Call:
    """What a forward pass did with a submodule.

    Attributes:
        started, ended: of its first call, in the order of all such moments.
        times: it was called.
        taken, given: shapes of its first positional argument and of what it gave, where these are tensors of floats.
    """

    started: int
    ended: int
    times: int
    taken: tuple[int, ...] | None
    given: tuple[int, ...] | None


Calls = dict[str, Call]
"""By the names of submodules."""


class Anatomy:
    """Layers and places of a module.

    Args:
        model: left as it is.
        slots: in the order of the forward pass.
        calls: of a forward pass, see `traced`.

    Raises:
        ConfigError: a slot is not there, is not called once, or does not give one tensor for one; names it.
    """

    def __init__(self, model: nn.Module, slots: Sequence[Slot], calls: Calls):
        modules = dict(model.named_modules())
        for slot in slots:
            if slot.name not in modules:
                near = ", ".join(name for name in modules if name and name.count(".") == slot.name.count("."))
                raise ConfigError(f"slot={slot.name}: there is no such submodule; there are {near}")
        order = sorted(calls, key=lambda name: calls[name].started)
        batch = next((call.taken[0] for call in map(calls.__getitem__, order) if call.taken), 1)
        seen: set[int] = set()
        self.calls = calls
        self.layers: list[Layer] = []
        number: dict[str, int] = {}
        for name in order:
            own = [p for p in modules[name].parameters(recurse=False) if id(p) not in seen]
            seen.update(map(id, own))
            if own:
                number[name] = len(self.layers)
                self.layers.append(_layer(name, calls[name], modules[name], own, batch))
        self.places = [self._place(slot, modules, number) for slot in slots]

    def _place(self, slot: Slot, modules: dict[str, nn.Module], number: dict[str, int]) -> Place:
        call = self.calls.get(slot.name)
        if call is None or call.times != 1:
            raise ConfigError(f"slot={slot.name}: called {call.times if call else 0} times in a forward pass, not once")
        if call.given is None or call.taken is None:
            raise ConfigError(
                f"slot={slot.name}: has to take one tensor of floats, as its first positional argument, and to give one"
            )
        calls = self.calls.items()
        before = [number[name] for name, other in calls if other.started < call.ended and name in number]
        inside = sorted((other.started, name) for name, other in calls if call.started <= other.started < call.ended)
        kinds = [kind for _, name in inside if (kind := _kind(modules[name], _ACTIVATIONS))]
        own = max(before, default=0)
        return Place(
            slot=slot,
            site=slot.site(call.given),
            same=call.taken == call.given,
            around=len(call.taken) == len(call.given) and slot.site(call.taken).grid == slot.site(call.given).grid,
            own=own,
            after=min(own + 1, len(self.layers) - 1),
            activation=kinds[-1] if kinds else "other",
        )


@torch.no_grad()
def traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Calls:
    """What a forward pass in eval mode does, whose tensors have samples along the first dimension; see `in_eval`."""
    modules = dict(model.named_modules())
    calls: Calls = {}
    clock = count()

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            call = calls.setdefault(name, Call(next(clock), 0, 0, _shape(args[0]) if args else None, None))
            call.times += 1

        return hook

    def behind(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            calls[name].given, calls[name].ended = _shape(out), next(clock)

        return hook

    handles = []
    for name, module in modules.items():
        handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(behind(name))]
    try:
        in_eval(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def in_eval(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """A forward pass in eval mode that leaves modes and torch's random numbers as they are."""
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    try:
        # Compiled in place it would compile the hooks, too.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.compiler.set_stance("force_eager"):
            model.eval()(*args, **(kwargs or {}))
    finally:
        for module, mode in training.items():
            module.training = mode


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) and value.is_floating_point() else None


def _kind(module: nn.Module, known: list[tuple[tuple[type[nn.Module], ...], str]]) -> str | None:
    return next((kind for types, kind in known if isinstance(module, types)), None)


def _layer(name: str, call: Call, module: nn.Module, own: list[nn.Parameter], batch: int) -> Layer:
    kind = _kind(module, _LAYERS) or "other"
    out = math.prod(call.given) / batch if call.given else 0.0
    if isinstance(module, nn.modules.conv._ConvNd):
        fan, a_value = (module.in_channels, module.out_channels), module.weight[0].numel()
    elif isinstance(module, nn.Linear):
        fan, a_value = (module.in_features, module.out_features), module.in_features
    elif isinstance(module, nn.Embedding):
        fan, a_value = (module.num_embeddings, module.embedding_dim), 0
    else:
        largest = max(own, key=lambda p: p.numel())
        fan, a_value = (largest.numel() // max(len(largest), 1), len(largest)), 1
        if largest.dim() < 2:
            fan = (largest.numel(), largest.numel())
    return Layer(name, kind, tuple(own), fan, out * a_value)


class ModuleTables:
    """Tables with the one row of a module; see `esper.growth.sizes.Tables`."""

    def __init__(
        self, anatomy: Anatomy, catalogue: Sequence[Blueprint], momentum: float = 0.0, weight_decay: float = 0.0
    ):
        layers, places = anatomy.layers, anatomy.places
        counts = {"layer": len(layers), "slot": len(places), "activation": len(places), "blueprint": len(catalogue)}
        self.layout = layout = Layout.of(SCHEMA, {node: counts.get(node, 1) for node in SCHEMA.nodes})
        self.node_mask = torch.ones(1, layout.size, dtype=torch.bool)
        own, after = [place.own for place in places], [place.after for place in places]
        chain = list(range(len(layers)))
        self.edge_mask = edge_mask(layout, pairs(chain, own, after, len(catalogue)))[None]
        sizes = torch.tensor([[sum(p.numel() for p in layer.parameters) for layer in layers]]).float()
        self.parameters = sizes.sum(1)
        self.flops = torch.tensor([math.fsum(layer.flops for layer in layers)])
        seeds = torch.tensor([[[float(b.parameter_count(place.site)) for b in catalogue] for place in places]])
        flops = torch.tensor([[[float(b.flops(place.site)) for b in catalogue] for place in places]])
        at = torch.arange(len(layers)) / max(len(layers) - 1, 1)
        found = Sizes(
            at=at[None],
            fans=torch.tensor([[layer.fan for layer in layers]]).float(),
            parameters=sizes,
            before=at[own][None],
            blueprint_parameters=seeds.mean(1),
            blueprint_flops=flops.mean(1),
            seed_parameters=seeds,
            flops=self.flops,
            layers=[layer.kind for layer in layers],
            activations=[place.activation for place in places],
            momentum=momentum,
            weight_decay=weight_decay,
        )
        self.x = features(layout, found, catalogue)
        self.attr = attributes(layout, found).mul_(self.edge_mask[..., None])
        self.seed_parameters, self.seed_flops = seeds[0], flops[0]  # [S, K]

    def row(self, depth: Tensor, width: Tensor) -> Tensor:
        """See Tables."""
        return torch.zeros_like(depth)
