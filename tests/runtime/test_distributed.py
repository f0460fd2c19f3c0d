"""How the processes of a run divide work, find themselves, and pass signals on."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.runtime import launch
from esper.runtime.distributed import ALONE, World, _watch

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


@given(st.integers(0, 100), st.integers(1, 12))
def test_shares_are_all_there_is_and_nearly_equal(count: int, size: int) -> None:
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_seeds_differ_and_the_first_is_the_run_s_own() -> None:
    seeds = [World(rank, 8).seed(3) for rank in range(8)]
    assert seeds[0] == 3 == ALONE.seed(3)
    assert len(set(seeds)) == 8
    assert set(seeds).isdisjoint(World(rank, 8).seed(4) for rank in range(8))
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_alone_nothing_is_exchanged() -> None:
    tensors = [torch.ones(2), torch.zeros(3)]
    assert all(a is b for a, b in zip(ALONE.total(tensors), tensors, strict=True))
    assert ALONE.everyone("x") == ALONE.gathered("x") == ["x"]
    assert ALONE.from_first("x") == ALONE.told("key", lambda: "x") == "x"
    ALONE.check()
    assert ALONE.seconds == 0
    assert not ALONE.sums


def test_where_the_launcher_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert (launch.rank(), launch.size(), launch.local_rank(), launch.restarts()) == (0, 1, 0, 0)
    assert launch.identity() is None
    monkeypatch.setenv("RANK", "3")  # by some other software, which is no launcher
    assert (launch.rank(), launch.size()) == (0, 1)


def test_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("3", "8", "1", "mine", "2"), strict=True):
        monkeypatch.setenv(name, value)
    assert (launch.rank(), launch.size(), launch.local_rank(), launch.restarts()) == (3, 8, 1, 2)
    assert str(launch.identity()).startswith("mine ")
    world = World(3, 8)
    assert (world.device("cuda"), world.device("cpu"), world.device("cuda:5")) == ("cuda:1", "cpu", "cuda:5")
    assert ALONE.device("cuda") == "cuda"


class Texts(dict):
    """A store in this process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def test_a_signal_is_passed_on_to_others_and_from_them() -> None:
    store, over, come = Texts(), threading.Event(), []
    _watch(store, lambda: signal.SIGTERM, over)  # one has come to this process
    assert int(store["signal"]) == signal.SIGTERM
    before = signal.signal(signal.SIGTERM, lambda number, frame: come.append(number))
    try:
        _watch(store, lambda: None, over)  # one has come to another
        time.sleep(0.001)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert come == [signal.SIGTERM]


def test_watching_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(Texts(), lambda: None, over))
    watch.start()
    over.set()
    watch.join(10)
    assert not watch.is_alive()
