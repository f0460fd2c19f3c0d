"""One process for one run directory."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from esper.runtime.errors import ConfigError

FILE = "run.lock"


@contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Within it this process owns the run directory; the system gives it back however the process ends.

    Raises:
        ConfigError: another process owns it; the message names that process.
    """
    with open(run_dir / FILE, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ConfigError(f"{run_dir}: is being trained by {owner}; stop that one first, or wait") from error
        file.truncate(0)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {started}\n")
        file.flush()
        yield
