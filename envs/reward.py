"""The reward of an episode (DESIGN section 5), from validation losses of a host and its twin."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor

from esper.runtime.errors import ConfigError

LOWEST, HIGHEST = -1.0, 1.5


@dataclass(frozen=True)
class Reference:
    """Mean final validation loss of the task's ungrown host, and of the same host with wide layers.

    Their difference makes rewards of different tasks comparable: 1 means that growing did as much as starting wide.
    `scripts/references.py` computes them.
    """

    static: float
    large: float

    @property
    def gap(self) -> float:
        return self.static - self.large


def load_reference(name: str) -> Reference:
    """The stored reference of the task `name`.

    Raises:
        ConfigError: there is none.
    """
    stored = json.loads((resources.files("envs") / "references.json").read_text())
    if name not in stored:
        raise ConfigError(f"env.task={name}: no reference stored; run `python scripts/references.py {name}` first")
    return Reference(stored[name]["static"], stored[name]["large"])


def gain(loss: Tensor, twin_loss: Tensor, reference: Reference) -> Tensor:
    """Improvement over the twin in units of the reference gap, clipped; [N].

    A loss that is not finite is the worst; any other is the best where the twin's is not.
    """
    improvement = ((twin_loss - loss) / reference.gap).clamp(LOWEST, HIGHEST)
    improvement = torch.where(twin_loss.isfinite(), improvement, HIGHEST)
    return torch.where(loss.isfinite(), improvement, LOWEST)


def rent(kept: Tensor, host: Tensor, most: Tensor) -> Tensor:
    """`log(P / P0) / log(Pmax / P0)`, in [0, 1]: [N].

    Args:
        kept: parameters of the seeds that stay, [N].
        host: parameters of the host, P0, [N].
        most: parameters of the largest seeds in every slot, Pmax - P0, [N].
    """
    return torch.log1p(kept / host) / torch.log1p(most / host)
