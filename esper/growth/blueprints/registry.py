"""What a blueprint is, and the registry that finds it by name."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeVar

from torch import Tensor

from esper.growth.blueprints.operations import Operation
from esper.growth.blueprints.site import Site
from esper.growth.parameters import ParameterSpec


class Blueprint(ABC):
    """A kind of block that can be grafted into a slot: `h + alpha * delta(x)`.

    It reads the output h of the slot's stage, or that stage's input if `reads_source`. The other four flags are
    features of the blueprint node of the observation graph. A block that `program` cannot say leaves it empty and
    overrides `delta`; populations that may hold it are trained by the stacked engine.
    """

    name: ClassVar[str]
    program: ClassVar[tuple[Operation, ...]] = ()
    reads_source: ClassVar[bool] = False
    mixes_tokens: ClassVar[bool] = False
    gated: ClassVar[bool] = False
    residual: ClassVar[bool] = True
    widens: ClassVar[bool] = False

    def fits(self, site: Site) -> bool:
        """Whether it can be grafted there: what mixes tokens needs some."""
        return not self.mixes_tokens or site.tokens > 1

    @abstractmethod
    def parameters(self, site: Site) -> dict[str, ParameterSpec]:
        """Parameters of one seed. Every dimension must grow with `site.width` or be constant in it."""

    def delta(self, p: dict[str, Tensor], x: Tensor, units: Tensor, site: Site) -> Tensor:
        """What the seed adds to its slot; the engine sets padding to 0. By default, what `program` says.

        Args:
            p: parameters, each [m, *shape] for m seeds that run together.
            x: [m, rows, width] with rows = batch * tokens, what the seed reads; 0 on padding.
            units: [m, 1, width], 1 for the units that a host has and 0 for padding.
            site: where they live; `site.width` is that of the widest host.

        Returns:
            [m, rows, width].
        """
        registers = [x]
        for operation in self.program:
            registers.append(operation(registers, p, units, site))
        return registers[-1]

    @abstractmethod
    def flops(self, site: Site) -> int:
        """Multiply-adds for one sample (all its tokens), forward."""

    def parameter_count(self, site: Site) -> int:
        return sum(spec.size for spec in self.parameters(site).values())


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
