"""Memory of the process."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Returns freed memory to the system where glibc keeps it, in fragments: a process that trains for hours would grow
    though nothing leaks. Elsewhere it does nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
