"""Which backend computes a call of attention: what was asked for, or the fastest that can.

What was asked for comes, in this order, from the call, the context manager `using`, the configuration
(`runtime.attention`), or the environment variable ESPER_ATTENTION_BACKEND; "auto" leaves it to the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

from esper.attention import events
from esper.attention.backends import BACKENDS
from esper.attention.events import Selection
from esper.attention.spec import AttentionSpec, Facts, facts
from esper.runtime.errors import ConfigError

AUTO = "auto"
ALIASES = {"legacy": "reference", "graph": "sdpa"}
"""`graph`: on Apple devices torch's attention runs on MPSGraph."""
VARIABLE = "ESPER_ATTENTION_BACKEND"
SOURCES = {"call": "backend", "context": "attention.using", "config": "runtime.attention", "environment": VARIABLE}

SPARSE = {False: 0.08, True: 0.12}
"""Density of graphs below which lists of edges are faster than dense scores, without and with gradients: measured on
one CPU thread (`python -m trainers.benchmark suite=attention`), assumed elsewhere."""

_context: ContextVar[str] = ContextVar("attention", default=AUTO)
_configured = AUTO


def checked(name: str, source: str) -> str:
    """The name of a backend, or "auto", from one that a user has given.

    Raises:
        ConfigError: there is no such backend.
    """
    resolved = ALIASES.get(name, name)
    if resolved not in (AUTO, *BACKENDS):
        others = ", ".join(f"{alias} (= {of})" for alias, of in ALIASES.items())
        raise ConfigError(f"{SOURCES[source]}={name}: choose one of {AUTO}, {', '.join(BACKENDS)}, {others}")
    return resolved


def configure(name: str) -> None:
    """What `runtime.attention` says, for this process.

    Raises:
        ConfigError: there is no such backend.
    """
    global _configured
    _configured = checked(name, "config")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Within it attention is computed by the backend `name`.

    Raises:
        ConfigError: there is no such backend.
    """
    token = _context.set(checked(name, "context"))
    try:
        yield
    finally:
        _context.reset(token)


def asked(call: str | None) -> tuple[str, str]:
    """(name, source) of what was asked for; "auto" from "auto" where nothing was.

    Raises:
        ConfigError: there is no such backend.
    """
    given = ("call", call or AUTO), ("context", _context.get()), ("config", _configured)
    for source, name in (*given, ("environment", os.environ.get(VARIABLE) or AUTO)):
        if (resolved := checked(name, source)) != AUTO:
            return resolved, source
    return AUTO, AUTO


def select(spec: AttentionSpec, backend: str | None = None, known: Facts | None = None) -> Selection:
    """What computes `spec`, and why not the others; tells `events` once.

    Args:
        spec: what is to be computed.
        backend: what the call asks for.
        known: of the device; looked up where they are not given.

    Raises:
        ConfigError: what was asked for does not exist or cannot compute it; says why, and what can.
    """
    return _select(spec, *asked(backend), known or facts(spec.device))


@lru_cache(4096)
def resolved(spec: AttentionSpec, name: str, source: str) -> str:
    """The backend of `select`, which is decided and told once for each spec and wish."""
    return _select(spec, name, source, facts(spec.device)).backend


def _select(spec: AttentionSpec, name: str, source: str, known: Facts) -> Selection:
    reasons = {each: tuple(module.reject(spec, known)) for each, module in BACKENDS.items()}
    rejected = {each: why for each, why in reasons.items() if why}
    if name in rejected:
        able = ", ".join(each for each in BACKENDS if each not in rejected)
        raise ConfigError(
            f"{SOURCES[source]}={name}: cannot compute attention of {spec}: {'; '.join(rejected[name])}; "
            f"choose one of {AUTO}, {able}"
        )
    if name == AUTO:
        name = next(each for each in _order(spec) if each not in rejected)
    selection = Selection(spec, name, source, rejected)
    events.emit(selection)
    return selection


def _order(spec: AttentionSpec) -> tuple[str, ...]:
    """From what is thought fastest to the reference, which computes everything. FlexAttention was never the fastest
    where it was measured; it has to be asked for."""
    if spec.kind == "graph" and spec.density is not None and spec.density < SPARSE[spec.needs_grad]:
        return "segment", "sdpa", "reference"
    if spec.device == "cpu" and spec.bias and spec.needs_grad and spec.mask is None and not spec.causal:
        # torch's fused kernel has no gradient of what is added, and its other one sums a bias over windows slowly.
        return "reference", "sdpa"
    return "sdpa", "reference"
