"""From a checkpoint, or the name of a policy that Esper ships, to a policy that can be used.

Shipped policies are the files `esper/pretrained/*.pt`: checkpoints that `scripts/ship.py` has cut down to what a policy
needs.
"""

from __future__ import annotations

from dataclasses import fields
from importlib import resources
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

PRETRAINED = "pretrained"
"""Means the policy DEFAULT where a checkpoint is asked for; also the folder of the shipped policies."""
DEFAULT = "tamiyo_small"
_RETRAIN = "retrain with `python -m trainers.train experiment=study`, then `python scripts/ship.py RUN_DIR`"
_PARTS = ("schema_hash", "config", "learner")  # of a state, that a policy is made of


def pretrained_names() -> list[str]:
    """The policies that Esper ships."""
    return sorted(file.stem for file in _folder().glob("*.pt"))


def _folder() -> Path:
    return Path(str(resources.files("esper"))) / PRETRAINED


def load_state(given: str | PathLike[str], key: str = "path") -> tuple[Path, dict[str, Any]]:
    """Path and state of the checkpoint that the user named by a file, a run directory or the name of a shipped policy.

    Args:
        given: as the user wrote it; a path that exists wins over a name.
        key: what the user gave it as, for messages.

    Raises:
        ConfigError: there is none, or it is not usable.
    """
    path, state = _read(given, key)
    if interface_of(state).schema.hash != state["schema_hash"]:
        remedy = _RETRAIN if "card" in state else "train it anew"
        raise ConfigError(f"{key}={given}: its graph schema differs from this version's; {remedy}")
    return path, state


def card(name: str | PathLike[str]) -> dict[str, Any]:
    """What is known of a shipped policy: what it was trained on, how, its scores and its limits.

    Raises:
        ConfigError: there is no such policy, or it is not a shipped one.
    """
    path, state = _read(name, "name")
    if "card" not in state:
        raise ConfigError(f"name={name}: {path} has no card; only what scripts/ship.py has written has one")
    found: dict[str, Any] = state["card"]
    return found


def _read(given: str | PathLike[str], key: str) -> tuple[Path, dict[str, Any]]:
    """As `load_state`, whatever the schema."""
    path, names = Path(given), pretrained_names()
    if not path.exists():
        name = DEFAULT if str(given) == PRETRAINED else str(given)
        if name not in names:
            shipped = f", or the name of a shipped policy ({', '.join(names)})" if names else ""
            raise ConfigError(
                f"{key}={given}: no such file or directory; give a run directory or a checkpoint file{shipped}"
            )
        path = _folder() / f"{name}.pt"
    try:
        if path.is_dir():
            path, state, _ = checkpoint.latest(path)
        else:
            state = checkpoint.read(path)
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"{key}={given}: {error}") from error
    if missing := [part for part in _PARTS if part not in state]:
        raise ConfigError(f"{key}={given}: {path} holds no policy (it has no {', '.join(missing)})")
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


def take_over(policy: GraphPolicy, interface: Interface, given: str, env: str) -> None:
    """Gives `policy`, which is to be trained, the parameters of the one that the user named as `init`.

    Raises:
        ConfigError: there is none, or it is of another kind.
    """
    _, state = load_state(given, "init")
    if interface_of(state) != interface:
        raise ConfigError(
            f"init={given}: its graphs or actions differ from those of env={env}; choose a policy that was trained on "
            "an environment of the same kind and sizes"
        )
    check_parameters(policy, state, f"init={given}")
    policy.load_state_dict(state["learner"]["policy"])


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
    """The trained policy in a run directory (its newest whole checkpoint), in a checkpoint file, or that Esper ships
    under a name, in eval mode.

    Raises:
        ConfigError: there is no usable checkpoint; the message says why.
    """
    return policy_of(load_state(path)[1], device, f"path={path}")
