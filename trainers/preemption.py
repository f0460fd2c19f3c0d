"""Signals that ask for an early end: what is under way is given up at once, except what must not be cut short."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from esper.runtime.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stop(BaseException):
    """A signal has come. Not an Exception, so that nothing that mends errors takes it for one."""

    def __init__(self, number: int):
        super().__init__(number)
        self.name = signal.Signals(number).name


def _handled(handlers: Mapping[signal.Signals, Any]) -> dict[signal.Signals, Any]:
    """Sets the handlers of signals; returns those they had."""
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}


@contextmanager
def early() -> Iterator[None]:
    """Within it, and outside of any Preemption, a signal ends the process at once, as there is nothing to be saved."""

    def leave(number: int, frame: FrameType | None) -> None:
        line = f"error: stopped by {signal.Signals(number).name} before there was anything to save; start it again\n"
        os.write(2, line.encode())
        os._exit(Interrupted.exit_code)

    previous = _handled(dict.fromkeys(SIGNALS, leave))
    try:
        yield
    finally:
        _handled(previous)


class Preemption:
    """While it is entered, the first of SIGNALS raises Stop wherever the main thread is; a second one acts as if there
    were no handler.

    Args:
        doing: what follows the first one, for the line that is printed then; None prints nothing.
        grace_s: how long further signals do nothing, where a launcher passes on what the terminal has sent already.

    Attributes:
        number: of the signal that has come, or None.
    """

    def __init__(self, doing: str | None = "saving a checkpoint", grace_s: float = 0.0) -> None:
        self._doing, self._grace_s = doing, grace_s
        self.number: int | None = None
        self._at = 0.0
        self._held = 0

    def __enter__(self) -> Preemption:
        self._previous = _handled(dict.fromkeys(SIGNALS, self._note))
        return self

    def __exit__(self, *_: object) -> None:
        _handled(self._previous)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it a signal waits: for writing files."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self.number is not None and not self._held:
            raise Stop(self.number)

    def stop(self) -> NoReturn:
        """Raises Stop, also where no signal has come to this process but to another one of the run."""
        self.number = self.number or signal.SIGTERM
        raise Stop(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            if time.monotonic() - self._at < self._grace_s:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number, self._at = number, time.monotonic()
        with suppress(OSError):  # whoever read what is printed may be gone, which must not keep it from saving
            if self._doing:
                print(f"\n{signal.Signals(number).name}: {self._doing} (once more: stop at once) ...", flush=True)
        if not self._held:
            raise Stop(number)
