import os
from collections.abc import Iterator

import pytest

from esper.attention import compiled, events, selection
from esper.attention.masks import Pool, arena


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is asked for, kept or counted."""
    monkeypatch.setattr(selection, "_configured", "auto")
    monkeypatch.setattr(events, "selected", type(events.selected)())
    if selection.VARIABLE in os.environ:
        monkeypatch.delenv(selection.VARIABLE)
    selection.resolved.cache_clear()
    compiled.executables.clear()
    monkeypatch.setattr(arena, "pool", Pool(arena.pool.limit))
    yield
    selection.resolved.cache_clear()
    compiled.executables.clear()
