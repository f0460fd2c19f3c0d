"""Where in a module seeds can live."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from esper.hosts.anatomy import ACTIVATIONS, Calls, Slot
from esper.runtime.errors import ConfigError

Slots = str | Sequence[str | Slot] | Callable[[nn.Module], Sequence[str | Slot]]
"""AUTO, names of submodules (or whole Slots), or a function of the module that gives such."""

AUTO = "auto"
MOST = 16
"""Slots that `auto` takes at most: of more, as many at equal distances."""

_FEW = 3  # blocks below which those inside them are taken
_CONTAINERS = nn.Sequential | nn.ModuleList | nn.ModuleDict
_CONVOLUTIONS = nn.modules.conv._ConvNd
_FIRST = (_CONVOLUTIONS, nn.modules.batchnorm._NormBase, nn.GroupNorm)  # these count units in dimension 1


def named(model: nn.Module, slots: Slots) -> list[str | Slot] | None:
    """What the user has named, None for AUTO.

    Raises:
        ConfigError: a name is not that of a submodule.
    """
    if isinstance(slots, str):
        if slots == AUTO:
            return None
        raise ConfigError(f"slots={slots}: give {AUTO}, a list of names of submodules, or a function that gives one")
    given: Any = list(slots(model) if callable(slots) else slots)
    modules = dict(model.named_modules())
    for slot in given:
        name = slot.name if isinstance(slot, Slot) else slot
        if not isinstance(name, str) or name not in modules or not name:
            near = ", ".join(other for other in list(modules)[1:40])
            raise ConfigError(f"slots: {name!r} is no submodule; there are {near}{' ...' if len(modules) > 40 else ''}")
    if not given:
        raise ConfigError("slots=[]: name at least one submodule")
    return given


def found(model: nn.Module, given: list[str | Slot] | None, calls: Calls) -> list[Slot]:
    """The slots, in the order of the forward pass.

    `auto` takes, of what is called once with one tensor of samples and gives one, and is followed by more layers:
    the repeated blocks of containers; else the modules that give what they take in shape; else activation functions;
    else linear and convolutional layers.

    Raises:
        ConfigError: nothing was found, or a named one cannot be a slot.
    """
    places = _Places(model, calls)
    if given is None:
        names = places.auto()
        if not names:
            raise ConfigError(
                "slots=auto: no place was found for a seed; name submodules that take one tensor and give one, with "
                "samples along the first dimension"
            )
        given = [*names]
    slots = [slot if isinstance(slot, Slot) else Slot(slot, places.channels(slot)) for slot in given]
    return sorted(slots, key=lambda slot: calls[slot.name].ended if slot.name in calls else -1)


class _Places:
    def __init__(self, model: nn.Module, calls: Calls):
        self.modules, self.calls = dict(model.named_modules()), calls
        self.layers = [
            name
            for name in sorted(calls, key=lambda name: calls[name].started)
            if any(True for _ in self.modules[name].parameters(recurse=False))
        ]
        taken = [call.taken for call in calls.values() if call.taken]
        self.batch = taken[0][0] if taken else 0

    def auto(self) -> list[str]:
        """Names of submodules."""
        blocks = self._blocks()
        same = self._outermost(
            [name for name in self._usable() if self._has_layers(name) and not self._leaf(name) and self._same(name)]
        )
        modules = self.modules
        active = [name for name in self._usable() if isinstance(modules[name], ACTIVATIONS) and self._before(name)]
        dense = [name for name in self._usable() if isinstance(modules[name], (nn.Linear, _CONVOLUTIONS))]
        names: list[str] = next((names for names in (blocks, same, active, dense) if len(names) > 1), [])
        names = names or next((names for names in (blocks, same, active, dense) if names), [])
        names = sorted(names, key=lambda name: self.calls[name].ended)
        if len(names) > MOST:
            names = [names[round(i * (len(names) - 1) / (MOST - 1))] for i in range(MOST)]
        return names

    def channels(self, name: str) -> int:
        """The dimension that counts units, of what a submodule gives.

        Raises:
            ConfigError: it cannot be told.
        """
        dimension = self._channels(name)
        if dimension is None:
            raise ConfigError(
                f"slots: which dimension of what {name} gives counts its units cannot be told; write "
                f'esper.Slot("{name}", channels=1), or channels=-1'
            )
        return dimension

    # ---- candidates -------------------------------------------------------------------------------------------------

    def _blocks(self) -> list[str]:
        usable = {name for name in self._usable() if self._has_layers(name) and not self._leaf(name)}
        found: list[str] = []
        for name, module in self.modules.items():
            if isinstance(module, _CONTAINERS):
                children = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
                blocks = [child for child in children if child in usable]
                found += blocks if len(blocks) > 1 else []
        outermost = self._outermost(found)
        return outermost if len(outermost) >= _FEW else self._innermost(found)

    def _usable(self) -> list[str]:
        last = self.calls[self.layers[-1]].started if self.layers else 0
        return [
            name
            for name, call in self.calls.items()
            if name and call.times == 1 and call.taken and call.given and call.ended < last
            if 2 <= len(call.given) <= 4 and call.given[0] == self.batch and self._channels(name) is not None
        ]

    def _leaf(self, name: str) -> bool:
        return not any(True for _ in self.modules[name].children())

    def _has_layers(self, name: str) -> bool:
        return any(True for _ in self.modules[name].parameters())

    def _same(self, name: str) -> bool:
        return self.calls[name].taken == self.calls[name].given

    def _before(self, name: str) -> bool:
        """Whether a layer has run before it."""
        return self.calls[self.layers[0]].started < self.calls[name].started

    @staticmethod
    def _outermost(names: list[str]) -> list[str]:
        return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]

    @staticmethod
    def _innermost(names: list[str]) -> list[str]:
        return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]

    # ---- units ------------------------------------------------------------------------------------------------------

    def _channels(self, name: str) -> int | None:
        call = self.calls.get(name)
        if call is None or call.given is None:
            return -1  # which Anatomy refuses, and says why
        if len(call.given) == 2:
            return -1
        before = [layer for layer in self.layers if self.calls[layer].started < call.ended]
        widths = [width for layer in reversed(before) if (width := _width(self.modules[layer]))]
        own = [self.modules[layer] for layer in before if f"{layer}.".startswith(f"{name}.")]
        own = own or [self.modules[layer] for layer in before[-1:]]
        order = (1, -1) if any(isinstance(module, _FIRST) for module in own) else (-1, 1)
        return next((dimension for dimension in order if widths and call.given[dimension] == widths[0]), None)


def _width(module: nn.Module) -> int | None:
    """Units of what a layer gives."""
    for attribute in ("out_features", "out_channels", "num_features", "num_channels", "embedding_dim", "embed_dim"):
        if isinstance(width := getattr(module, attribute, None), int):
            return width
    shape: Iterable[int] = getattr(module, "normalized_shape", ())
    return next(iter(reversed(tuple(shape))), None)
