"""From a checkpoint to a policy that can be used."""

from __future__ import annotations

from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from esper.graph.interface import GROWTH, Interface
from esper.graph.schema import SCHEMA
from esper.runtime import checkpoint
from esper.runtime.errors import ConfigError
from esper.tamiyo.policies import make_policy
from esper.tamiyo.policy import GraphPolicy, PolicyConfig


def load_state(given: str | PathLike[str], key: str = "path") -> tuple[Path, dict[str, Any]]:
    """Path and state of the checkpoint that the user named by a file or a run directory.

    Args:
        given: as the user wrote it.
        key: what the user gave it as, for messages.

    Raises:
        ConfigError: there is none, or it is not usable.
    """
    path = Path(given)
    if not path.exists():
        raise ConfigError(f"{key}={given}: no such file or directory; give a run directory or a checkpoint file")
    try:
        if path.is_dir():
            path, state, _ = checkpoint.latest(path)
        else:
            state = checkpoint.read(path)
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"{key}={given}: {error}") from error
    if interface_of(state).schema.hash != state["schema_hash"]:
        raise ConfigError(f"{key}={given}: its graph schema differs from this version's; train it anew")
    return path, state


def interface_of(state: dict[str, Any]) -> Interface:
    """What the policy in a checkpoint's state reads and chooses; that of growth environments is this version's."""
    saved = state.get("interface")
    return Interface(SCHEMA, GROWTH) if saved is None else Interface.of_state(saved)


def check_parameters(policy: GraphPolicy, state: dict[str, Any], origin: str) -> None:
    """Checks that a checkpoint's parameters are those of `policy`.

    Raises:
        ConfigError: says what differs.
    """
    own, saved = (
        {k: list(v.shape) for k, v in each.items()} for each in (policy.state_dict(), state["learner"]["policy"])
    )
    wrong = [
        f"{name} is {saved.get(name, 'missing')} there and {own.get(name, 'missing')} here"
        for name in {**own, **saved}
        if own.get(name) != saved.get(name)
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ConfigError(
            f"{origin}: its policy has another architecture: {wrong[0]}{more}; "
            "use the version that wrote it, or train anew"
        )


def policy_of(state: dict[str, Any], device: torch.device | str = "cpu", origin: str = "the checkpoint") -> GraphPolicy:
    """The policy in a checkpoint's state, in eval mode; `origin` names the checkpoint in messages.

    Raises:
        ConfigError: it is another version's.
    """
    config = state["config"]["policy"]
    if unknown := config.keys() - {field.name for field in fields(PolicyConfig)}:
        raise ConfigError(
            f"{origin}: its policy has keys that this version does not know: {', '.join(sorted(unknown))}; "
            "use the version that wrote it, or train anew"
        )
    policy = make_policy(PolicyConfig(**config), interface_of(state)).to(device)
    check_parameters(policy, state, origin)
    policy.load_state_dict(state["learner"]["policy"])
    return policy.eval()


def load_policy(path: str | PathLike[str], device: torch.device | str = "cpu") -> GraphPolicy:
    """The trained policy in a run directory (its newest whole checkpoint) or in a checkpoint file, in eval mode.

    Raises:
        ConfigError: there is no usable checkpoint; the message says why.
    """
    return policy_of(load_state(path)[1], device, f"path={path}")
