"""Benchmark suites. Each lives in a module of its own and registers itself by one decorated function."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.table import Table

from esper.runtime.errors import ConfigError
from trainers.config import BenchmarkConfig


class Report(NamedTuple):
    """What a suite has found."""

    results: dict[str, Any]  # all raw timings and their summaries, for JSON; `ratios` are what is compared
    tables: list[Table]  # for the terminal


Suite = Callable[[BenchmarkConfig], Report]

SUITES: dict[str, Suite] = {}


def suite(name: str) -> Callable[[Suite], Suite]:
    """Decorator: makes a function known as the suite `name`."""

    def add(function: Suite) -> Suite:
        if name in SUITES:
            raise ValueError(f"suite {name!r} is registered twice")
        SUITES[name] = function
        return function

    return add


def get(name: str) -> Suite:
    """The suite called `name`.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    if name not in SUITES:
        raise ConfigError(f"suite={name}: no such suite; choose one of {', '.join(sorted(SUITES))}")
    return SUITES[name]
