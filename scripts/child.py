"""A Python program in a process of its own, for the scripts that train."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator


def output_of(arguments: list[str]) -> Iterator[str]:
    """What `python ARGUMENTS` prints, line by line until it ends, with one thread a process.

    Raises:
        SystemExit: it failed; with its last lines.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    last: deque[str] = deque(maxlen=3)
    for line in process.stdout or ():
        if line.strip():
            last.append(line.strip())
        yield line
    if process.wait():
        said = " | ".join(last)
        raise SystemExit(f"error: {' '.join(arguments)} ended with exit code {process.returncode}: {said}")
