"""Who decides: a trained policy, or any of the baselines, for one network."""

from __future__ import annotations

from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esper.graph import GraphBatch
from esper.runtime.errors import ConfigError, EsperError
from esper.tamiyo import baselines
from esper.tamiyo.baselines import BaselinesConfig, Controller
from esper.tamiyo.loading import load_state, policy_of
from esper.tamiyo.policy import GraphPolicy, Tamiyo

Given = str | PathLike[str] | GraphPolicy | Controller
"""A baseline's name, a shipped policy's name, a run directory or checkpoint, or the policy or controller itself."""


class Choice(NamedTuple):
    """What a controller wants.

    Attributes:
        action: its number.
        probabilities: float32 [actions], of a policy.
        value: of a policy.
    """

    action: int
    probabilities: Tensor | None
    value: float | None


def resolved(given: Given) -> str | GraphPolicy | Controller:
    """The name of a baseline as it is, all else loaded.

    Raises:
        ConfigError: there is no such policy, or it does not grow networks.
    """
    if isinstance(given, str) and given in baselines.usable(""):
        return given
    if not isinstance(given, str | PathLike):
        policy: GraphPolicy | Controller = given
    else:
        try:
            state = load_state(given, "policy")[1]
            # The fastest for one graph at a time, and a large one.
            state["config"]["policy"]["backend"] = "dense"
            policy = policy_of(state, origin=f"policy={given}")
        except ConfigError as error:
            raise ConfigError(f"{error}; baselines are {', '.join(baselines.usable(''))}") from error
    if isinstance(policy, GraphPolicy) and not isinstance(policy, Tamiyo):
        raise ConfigError(f"policy={given}: was not trained to grow networks; choose one that was")
    return policy


class Chooser:
    """One decision at a time.

    Args:
        given: who decides, see `resolved`.
        catalogue: names of the blueprints.
        seed: of the baseline `random`.
    """

    def __init__(self, given: str | GraphPolicy | Controller, catalogue: list[str], seed: int):
        self.policy = given if isinstance(given, GraphPolicy) else None
        self.controller: Controller | None = None
        if isinstance(given, str):
            self.controller = baselines.make(given, BaselinesConfig(), "", catalogue, seed)
        elif not isinstance(given, GraphPolicy):
            self.controller = given
        if self.controller is not None:
            self.controller.begin(1)

    @torch.inference_mode()
    def __call__(self, graph: GraphBatch) -> Choice:
        """For one graph.

        Raises:
            EsperError: the policy's outputs are not finite.
        """
        if self.policy is None:
            assert self.controller is not None
            return Choice(int(self.controller.act(graph)[0]), None, None)
        distribution, values = self.policy.evaluate(graph.to(next(self.policy.parameters()).device))
        log_probs = distribution.log_probs[0]
        if not log_probs.max().isfinite():
            raise EsperError("the policy's outputs are not finite; choose another checkpoint")
        return Choice(int(log_probs.argmax()), log_probs.exp().cpu(), float(values[0]))

    def state_dict(self) -> dict[str, Any]:
        """What a baseline remembers; policies remember nothing."""
        found: dict[str, Any] = {}
        for name, value in vars(self.controller).items() if self.controller is not None else ():
            if isinstance(value, torch.Generator):
                found[name] = value.get_state()
            elif isinstance(value, Tensor):
                found[name] = value.clone()
            elif isinstance(value, int | float):
                found[name] = value
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for name, value in state.items():
            own = getattr(self.controller, name)
            if isinstance(own, torch.Generator):
                own.set_state(value)
            else:
                setattr(self.controller, name, value.clone() if isinstance(value, Tensor) else value)
