"""What attention tells whoever listens: which backend was chosen and why, and how compiled executables fare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from esper.attention.spec import AttentionSpec


@dataclass(frozen=True)
class Selection:
    """A choice of a backend.

    Attributes:
        spec: what was asked for.
        backend: the name of what was chosen.
        source: what decided: "call", "context", "config", "environment" or "auto".
        rejected: of every backend that cannot compute it, the reasons.
    """

    spec: AttentionSpec
    backend: str
    source: str
    rejected: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Access:
    """A call of a compiled executable.

    Attributes:
        key: of the executable.
        hit: whether it was there.
        bytes: of all tensors that it has read and written.
        seconds: wall time of the call, compilation included where there was one.
    """

    key: Hashable
    hit: bool
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """The executables that are kept, and what became of them; ages and idle times in seconds.

    Attributes:
        hits, misses, evictions: since the start or the last `clear`.
        hit_rate: hits over accesses; 0 before the first.
        size, limit: executables that are kept, and how many may be.
        bytes: of all tensors that all calls have read and written.
        oldest_s, newest_s: ages of the oldest and of the newest executable.
        idle_s: how long the one has waited that was not used for longest.
        reuses: how often each has been used again.
        compile_s, call_s: wall time of the first calls, and of all others.
    """

    hits: int
    misses: int
    evictions: int
    hit_rate: float
    size: int
    limit: int
    bytes: int
    oldest_s: float
    newest_s: float
    idle_s: float
    reuses: tuple[int, ...]
    compile_s: float
    call_s: float


Event = Selection | Access | Summary
Listener = Callable[[Event], None]

_listeners: list[Listener] = []

selected: Counter[tuple[str, str]] = Counter()
"""How often each (kind, backend) has been chosen in this process."""


def emit(event: Event) -> None:
    """Tells every listener."""
    if isinstance(event, Selection):
        selected[event.spec.kind, event.backend] += 1
    for listener in tuple(_listeners):
        listener(event)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within it `listener` is called with every event."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
