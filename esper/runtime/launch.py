"""Which of several processes this one is, as torchrun and other launchers say it in the environment. Without torch, so
that it can be asked at once."""

from __future__ import annotations

import os
import socket


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", 0)) if "WORLD_SIZE" in os.environ else 0


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def local_rank() -> int:
    """Number of this process on its machine, which stands for its CUDA device."""
    return int(os.environ.get("LOCAL_RANK", 0)) if size() > 1 else 0


def restarts() -> int:
    """How many times torchrun has started all processes again after one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def identity() -> str | None:
    """Tells this launch from others, and is the same after a restart; None where nothing restarts processes."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run is None else f"{run} {socket.gethostname()} {os.getppid()}"
