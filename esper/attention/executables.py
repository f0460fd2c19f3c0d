"""Compiled executables, one for each bucketed key; the one that was not used for longest goes first.

Sequence lengths are rounded up to powers of two (`bucket`), so that growing sequences need few executables. All of it
is for one thread.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

from esper.attention.events import Access, Summary, emit

log = logging.getLogger(__name__)

EVERY = 100  # accesses between two summaries

Executable = Callable[..., Tensor]


def bucket(length: int) -> int:
    """The power of two that a length (at least 1) is rounded up to."""
    return 1 << (length - 1).bit_length()


@dataclass
class _Entry:
    run: Executable
    made: float
    used: float
    reuses: int = 0


class Executables:
    """Keeps executables by key.

    Args:
        limit: how many are kept.
        clock: seconds.
    """

    def __init__(self, limit: int = 64, clock: Callable[[], float] = time.perf_counter):
        self.limit, self._clock = limit, clock
        self.clear()

    def clear(self) -> None:
        """Forgets executables and counts."""
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._hits = self._misses = self._evictions = self._bytes = 0
        self._compile_s = self._call_s = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def call(self, key: Hashable, build: Callable[[], Executable], *tensors: Tensor) -> Tensor:
        """What the executable of `key` makes of `tensors`; `build` makes it where it is not there. One that fails at
        its first call is not kept."""
        start = self._clock()
        entry = self._entries.pop(key, None)
        hit = entry is not None
        if entry is None:
            entry = _Entry(build(), start, start)
        out = entry.run(*tensors)
        now = self._clock()
        self._entries[key] = entry  # as the newest
        entry.used, entry.reuses = now, entry.reuses + hit
        while len(self._entries) > self.limit:
            self._entries.popitem(last=False)
            self._evictions += 1
        self._hits, self._misses = self._hits + hit, self._misses + (not hit)
        if hit:
            self._call_s += now - start
        else:
            self._compile_s += now - start
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, out))
        self._bytes += moved
        emit(Access(key, hit, moved, now - start))
        if (self._hits + self._misses) % EVERY == 0:
            summary = self.summary()
            log.info("attention executables: %s", summary)
            emit(summary)
        return out

    def summary(self) -> Summary:
        """Of all accesses until now."""
        now, entries, accesses = self._clock(), self._entries.values(), self._hits + self._misses
        return Summary(
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
            hit_rate=self._hits / max(accesses, 1),
            size=len(entries),
            limit=self.limit,
            bytes=self._bytes,
            oldest_s=max((now - entry.made for entry in entries), default=0.0),
            newest_s=min((now - entry.made for entry in entries), default=0.0),
            idle_s=max((now - entry.used for entry in entries), default=0.0),
            reuses=tuple(entry.reuses for entry in entries),
            compile_s=self._compile_s,
            call_s=self._call_s,
        )
