"""Several processes that train one policy, on torch.distributed: what they add up, exchange and agree on.

One process is the world of size 1, in which all of it costs nothing.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from esper.runtime import launch, seeding
from esper.runtime.errors import ConfigError, TrainingError

T = TypeVar("T")

_POLL_S = 0.2
_LARGE = 65_536  # numbers
_RANK = 105  # salt of seeds


class World:
    """The processes of one run.

    Args:
        rank: number of this one.
        size: how many there are.

    Attributes:
        asked: the number of the signal that has come to this process, or None.
        seconds: spent in exchanges so far, waiting for other processes included.
        sums: how many sums of that many bytes there have been.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self.seconds, self.sums = 0.0, Counter[int]()
        self._store: Any = None
        self.asked: Callable[[], int | None] = lambda: None
        self._stop: Callable[[], NoReturn]
        self._patience = 0.0

    @property
    def first(self) -> bool:
        """Whether this is the process that logs, saves and shows progress."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    def share(self, count: int) -> range:
        """Which of `count` things are this process's own; shares differ by at most one, and may be empty."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def seed(self, seed: int) -> int:
        """A seed of this process's own; the first one's is `seed`."""
        return seed if self.first else int(seeding.fold(torch.tensor(seed), _RANK, self.rank)) % 2**31

    def device(self, name: str) -> str:
        """`cuda` as this process's own device; others as they are."""
        return f"cuda:{launch.local_rank()}" if name == "cuda" and not self.alone else name

    # ---- the beginning and the end --------------------------------------------------------------------------------

    def connect(self, patience_s: float) -> None:
        """Finds the other processes: gloo carries what is on CPUs, NCCL what is on CUDA devices.

        Args:
            patience_s: how long processes wait for each other.

        Raises:
            ConfigError: they are not found.
        """
        if self.alone:
            return
        self._patience = patience_s
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        try:
            # What an earlier attempt has left there must not be taken for this one's.
            store = dist.PrefixStore("group", self.store)
            wait = timedelta(seconds=patience_s)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=wait)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"process {self.rank} of {self.size} does not find the others at MASTER_ADDR="
                f"{os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')} ({reason}); check the "
                "addresses, and the network's name in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
            ) from error

    def close(self) -> None:
        """Leaves the other processes."""
        if not self.alone and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def store(self) -> Any:
        """Texts that all processes see: a torch.distributed.Store."""
        if self._store is None:
            self._store = _store(self.first)
        return self._store

    @contextmanager
    def watched(self, asked: Callable[[], int | None], stop: Callable[[], NoReturn]) -> Iterator[None]:
        """Within it a signal to one process reaches all of them.

        Args:
            asked: the number of the signal that has come to this process, or None.
            stop: what ends this process's part; `check` calls it in all processes at the same place.
        """
        if self.alone:
            yield
            return
        self.asked, self._stop = asked, stop
        over = threading.Event()
        watch = threading.Thread(target=_watch, args=(_store(False), asked, over), daemon=True)
        watch.start()
        try:
            yield
        finally:
            over.set()
            watch.join()

    # ---- exchanges ------------------------------------------------------------------------------------------------

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over all processes, the same bits in each of them: one exchange, whatever the number of tensors.

        Args:
            tensors: of one kind and device, of the same shapes in all processes.

        Raises:
            TrainingError: another process is gone.
        """
        if self.alone:
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._exchange():
            # Two at a time, which gloo moves side by side.
            for work in [dist.all_reduce(part, async_op=True) for part in flat.chunk(2 if len(flat) > _LARGE else 1)]:
                work.wait()
        self.sums[flat.nbytes] += 1
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def check(self) -> None:
        """Ends the work of all processes here if a signal has come to any.

        Raises:
            TrainingError: another process is gone.
        """
        if self.alone:
            return
        asked = torch.tensor([float(self.asked() is not None)])
        with self._exchange():
            dist.all_reduce(asked)
        if asked.item():
            self._stop()

    def everyone(self, value: T) -> list[T]:
        """The values of all processes, in their order.

        Raises:
            TrainingError: another process is gone.
        """
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(values, value)
        return values

    def gathered(self, value: T) -> list[T]:
        """The values of all processes at the first one; nothing elsewhere.

        Raises:
            TrainingError: another process is gone.
        """
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size if self.first else []
        with self._exchange():
            dist.gather_object(value, values if self.first else None)
        return values

    def from_first(self, value: T) -> T:
        """The first process's value.

        Raises:
            TrainingError: another process is gone.
        """
        if self.alone:
            return value
        held: list[Any] = [value]
        with self._exchange():
            dist.broadcast_object_list(held)
        return held[0]

    def told(self, key: str, value: Callable[[], str]) -> str:
        """The text that the first process makes of `value`. Others wait for it as long as it takes, in Python, where
        signals reach them."""
        if self.alone:
            return value()
        if self.first:
            self.store.set(key, value())
        try:
            while not self.store.check([key]):
                time.sleep(_POLL_S)
            return str(self.store.get(key).decode())
        except RuntimeError as error:
            raise TrainingError(
                f"process {self.rank} of {self.size} has lost the first one, which has ended"
            ) from error

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            raise TrainingError(
                f"process {self.rank} of {self.size} has lost another one, which has ended or has not answered for "
                f"{self._patience:,.0f} s (runtime.patience_s): {str(error).splitlines()[0]}"
            ) from error
        finally:
            self.seconds += time.perf_counter() - start


ALONE = World()


@functools.cache
def launched() -> World:
    """The world that the launcher speaks of in the environment."""
    return World(launch.rank(), launch.size())


def _store(master: bool) -> Any:
    """A connection of its own to the launcher's store, or to the first process's where the launcher has none."""
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size=launch.size(),
            is_master=master and not kept,
            wait_for_workers=False,
        )
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"WORLD_SIZE={launch.size()}, but the other processes are not found by MASTER_ADDR and MASTER_PORT "
            f"({str(error).splitlines()[0]}); start with torchrun, or unset RANK and WORLD_SIZE"
        ) from error
    return dist.PrefixStore(f"esper/{launch.restarts()}", store)


def _watch(store: Any, asked: Callable[[], int | None], over: threading.Event) -> None:
    """Passes a signal on: from this process to all, and from any other to this one."""
    while not over.wait(_POLL_S):
        try:
            if (number := asked()) is not None:
                store.set("signal", str(number))
                return
            if store.check(["signal"]):
                os.kill(os.getpid(), int(store.get("signal")))
                return
        except RuntimeError:
            return  # the store is gone, and so is the launcher; whoever waits for others will find that out
