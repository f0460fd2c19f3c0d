"""Controllers that are not learned by reinforcement. They see what Tamiyo sees, and nothing else.

Their knobs default to the values that `scripts/headroom.py` tuned for the environment, stored in `fitted.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from importlib import resources
from typing import Any, get_type_hints

import torch

from esper.growth.actions import RAMPS
from esper.runtime.errors import ConfigError
from esper.tamiyo.baselines import greedy, linear, simple  # noqa: F401 (they register themselves)
from esper.tamiyo.baselines.base import REGISTRY, Controller, Grower

NAMES = tuple(REGISTRY)

__all__ = ["NAMES", "REGISTRY", "BaselinesConfig", "Controller", "Grower", "fitted", "forget", "make", "usable"]


def _optional(name: str, knobs: type) -> tuple[str, Any, Any]:
    """A field for the knobs of one baseline, each of which may be None."""
    types = get_type_hints(knobs)
    members = [(f.name, types[f.name] | None, field(default=None)) for f in fields(knobs)]
    given = make_dataclass(f"{knobs.__name__}Given", members)
    return name, given, field(default_factory=given)


_Given: Any = make_dataclass("_Given", [_optional(name, knobs) for name, (_, knobs) in REGISTRY.items() if knobs])


@dataclass
class BaselinesConfig(_Given):
    """Knobs of all of them. None stands for the value tuned for the environment, or else the knob's default."""

    ramp: int = 3  # alpha ramp of BLEND, where blending does not start by itself

    def given(self, name: str) -> dict[str, Any]:
        """The knobs of a baseline that are not None."""
        knobs = getattr(self, name, None)
        return {} if knobs is None else {key: value for key, value in vars(knobs).items() if value is not None}

    def validate(self, blueprints: list[str], prefix: str) -> None:
        """Checks the values against an environment with those blueprints.

        Raises:
            ConfigError: names the key, the value and the remedy.
        """
        if self.ramp not in RAMPS:
            raise ConfigError(f"{prefix}.ramp={self.ramp}: choose one of {RAMPS}")
        for name in REGISTRY:
            for key, value in self.given(name).items():
                where = f"{prefix}.{name}.{key}={value}"
                if key == "blueprint" and value not in blueprints:
                    raise ConfigError(f"{where}: the environment has {', '.join(blueprints)}")
                if key in ("first", "epoch", "slot", "patience", "probation") and value < 0:
                    raise ConfigError(f"{where}: must not be negative")
                if key == "every" and value < 1:
                    raise ConfigError(f"{where}: must be above 0")


@cache
def _stored() -> dict[str, Any]:
    return json.loads((resources.files("esper.tamiyo.baselines") / "fitted.json").read_text())


def forget() -> None:
    """Reads what has been tuned afresh the next time, for the study that writes it."""
    _stored.cache_clear()


def fitted(environment: str) -> dict[str, Any]:
    """What has been tuned for an environment: `knobs` by baseline, and the linear scorer's `weights` by blueprint."""
    return _stored().get(environment, {})


def usable(environment: str) -> tuple[str, ...]:
    """The baselines that can be made for it: all, but for the linear scorer where none has been fitted."""
    return tuple(name for name in NAMES if name != "linear" or "weights" in fitted(environment))


def make(name: str, config: BaselinesConfig, environment: str, blueprints: list[str], seed: int) -> Controller:
    """The baseline called `name`.

    Args:
        name: one of NAMES.
        config: knobs that were given.
        environment: whose tuned knobs fill in the others, see `fitted`.
        blueprints: of the environment, in the order of their indices.
        seed: of `random`.

    Raises:
        KeyError: no such baseline; the message lists those there are.
        ConfigError: the linear scorer has not been fitted for the environment.
    """
    if name not in REGISTRY:
        raise KeyError(f"unknown baseline {name!r}; available: {', '.join(NAMES)}")
    cls, schema = REGISTRY[name]
    if schema is None:
        return cls(seed) if name == "random" else cls()
    tuned = fitted(environment)
    knobs = schema(**{**tuned.get("knobs", {}).get(name, {}), **config.given(name)})
    if name == "linear":
        if "weights" not in tuned:
            raise ConfigError(
                f"baselines=linear: no scorer has been fitted for {environment}; fit one with "
                f"`python scripts/headroom.py {environment}`, or leave the baseline out"
            )
        weights = [tuned["weights"].get(b) for b in blueprints]
        width = len(next(w for w in tuned["weights"].values()))
        # A blueprint that it has not been fitted for is never chosen.
        rows = [[0.0] * (width - 1) + [-1e9] if w is None else w for w in weights]
        return cls(knobs, torch.tensor(rows), config.ramp)
    blueprint = blueprints.index(knobs.blueprint) if knobs.blueprint in blueprints else 0
    return cls(knobs, blueprint, config.ramp)
