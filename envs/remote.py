"""An environment in a process of its own, which can be given up where it hangs or dies.

Gymnasium's AsyncVectorEnv stacks observations by their space, of which graphs have none, and tells neither which
environment hangs nor which has died. Processes are started afresh rather than by `multiprocessing`, which would import
the main program, and with it torch, in each of them.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from envs.worker import Lost, Misbehaved, Worker, failure

START_S = 60.0
"""A process has at least as long to start and to make its environment."""

_GRACE_S = 2.0  # for an environment to finish what it does, once nobody listens any more
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the parent saves first, and takes it down with it


class RemoteWorker:
    """As Worker, in a process of its own: what is sent is done at once, side by side with the others.

    The process ends with this object, and with this process however that ends.

    Args:
        timeout_s: how long an answer may take.
        threads: of the numerical libraries, which round differently with other numbers.
    """

    def __init__(self, timeout_s: float, threads: int):
        self._timeout_s = timeout_s
        ours, theirs = Pipe()
        self._connection = ours
        place = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from envs.remote import serve; serve({theirs.fileno()})"],
            stdin=subprocess.PIPE,  # its end tells that we are gone
            pass_fds=[theirs.fileno()],
            env=os.environ | place,
            start_new_session=True,  # a terminal's Ctrl-C is for us
        )
        theirs.close()
        self._end = weakref.finalize(self, _end, self._process, ours)

    def send(self, command: str, *arguments: Any) -> None:
        """Asks for one thing; `receive` returns the answer."""
        allowed = max(self._timeout_s, START_S) if command == "make" else self._timeout_s
        if command == "replay":
            allowed *= 1 + len(arguments[1])
        self._sent, self._allowed, self._command = time.monotonic(), allowed, command
        with suppress(OSError):  # it has died, which `receive` tells
            self._connection.send_bytes(pickle.dumps((command, *arguments)))

    def receive(self) -> Any:
        """The answer to what was sent.

        Raises:
            Misbehaved: the environment did something wrong.
            Lost: there is no answer in time, or the process has died.
        """
        if not self._connection.poll(max(self._sent + self._allowed - time.monotonic(), 0.0)):
            self._process.kill()
            raise Lost(
                f"no answer to {self._command} within {self._allowed:g} s (env.timeout_s={self._timeout_s:g}); "
                "mend what hangs, or raise env.timeout_s"
            )
        try:
            data = self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise Lost(f"its process {self._fate()} in {self._command}; see its own output above") from error
        try:
            fine, value = pickle.loads(data)
        except Exception as error:  # whatever classes of the environment's own raise
            raise Misbehaved(
                f"its answer to {self._command} cannot be read in another process: {failure(error)}; "
                "use env.subprocess=false"
            ) from error
        if not fine:
            raise Misbehaved(value)
        return value

    def _fate(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(_GRACE_S)
            return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return "hung up"

    def hang_up(self) -> None:
        """Nothing more will be sent, so that it can begin to end."""
        _hang_up(self._process, self._connection)

    def close(self) -> None:
        """Ends the process, by force if it goes on for more than a moment."""
        self._end()


def _hang_up(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    assert process.stdin
    process.stdin.close()


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    _hang_up(process, connection)
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ---- in the other process -------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Answers what comes through the pipe, until its other end is closed."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(descriptor, False)
    lifeline, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # an environment that reads stdin finds its end
    threading.Thread(target=_leave_with, args=(lifeline,), daemon=True).start()
    connection, worker = Connection(descriptor), Worker()
    with suppress(EOFError, ConnectionError):
        while True:
            request = pickle.loads(connection.recv_bytes())
            connection.send_bytes(_answer(worker, request))
    close = getattr(worker.environment, "close", None)
    if callable(close):
        close()


def _answer(worker: Worker, request: tuple[Any, ...]) -> bytes:
    try:
        answer = True, worker.perform(*request)
    except Misbehaved as error:
        answer = False, str(error)
    try:
        return pickle.dumps(answer)
    except Exception as error:  # whatever classes of the environment's own raise
        text = f"its answer to {request[0]} cannot be sent to another process: {failure(error)}"
        return pickle.dumps((False, f"{text}; use env.subprocess=false"))


def _leave_with(lifeline: int) -> None:
    """Ends this process soon after the parent, also while the environment hangs."""
    os.read(lifeline, 1)
    time.sleep(_GRACE_S / 2)
    os._exit(1)
