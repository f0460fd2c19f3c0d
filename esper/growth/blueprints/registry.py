"""What a blueprint is, and the registry that finds it by name."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from torch import Tensor


@dataclass(frozen=True)
class ParameterSpec:
    """Shape of one parameter of one seed, and how it starts.

    `uniform`: U(-1/sqrt(fan_in), 1/sqrt(fan_in)) with fan_in = `fan_in` or the last dimension, as torch.nn.Linear.
    """

    shape: tuple[int, ...]
    init: Literal["uniform", "zeros", "ones"] = "uniform"
    fan_in: int | None = None

    @property
    def size(self) -> int:
        size = 1
        for extent in self.shape:
            size *= extent
        return size


class Blueprint(ABC):
    """A kind of block that can be grafted into a slot: `h + alpha * delta(h)`.

    The four flags are features of the blueprint node of the observation graph.
    """

    name: ClassVar[str]
    mixes_tokens: ClassVar[bool] = False
    gated: ClassVar[bool] = False
    residual: ClassVar[bool] = True
    widens: ClassVar[bool] = False

    @abstractmethod
    def parameters(self, width: int) -> dict[str, ParameterSpec]:
        """Parameters of one seed in a slot of `width` units."""

    @abstractmethod
    def delta(self, p: dict[str, Tensor], h: Tensor) -> Tensor:
        """What the seed adds to its slot.

        Args:
            p: parameters, each [m, *shape] for m seeds that run together.
            h: [m, batch, width], the slot's input.

        Returns:
            [m, batch, width].
        """

    @abstractmethod
    def flops(self, width: int) -> int:
        """Multiply-adds for one sample, forward."""

    def parameter_count(self, width: int) -> int:
        return sum(spec.size for spec in self.parameters(width).values())


_REGISTRY: dict[str, Blueprint] = {}
_B = TypeVar("_B", bound=type[Blueprint])


def register(name: str) -> Callable[[_B], _B]:
    """Class decorator: makes the blueprint known as `name`."""

    def add(cls: _B) -> _B:
        if name in _REGISTRY:
            raise ValueError(f"blueprint {name!r} is registered twice")
        cls.name = name
        _REGISTRY[name] = cls()
        return cls

    return add


def _load() -> None:
    """Imports every module of this package, so that a new file is found without being listed anywhere."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")


def available() -> list[str]:
    """Names of all registered blueprints, sorted."""
    _load()
    return sorted(_REGISTRY)


def get(name: str) -> Blueprint:
    """The blueprint called `name`.

    Raises:
        KeyError: no such blueprint; the message lists those there are.
    """
    _load()
    if name not in _REGISTRY:
        raise KeyError(f"unknown blueprint {name!r}; available: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]
