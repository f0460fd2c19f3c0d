"""One environment that nobody here wrote, and what is asked of it; `envs.remote` does the same in another process.

What it does wrong is told in one line. Nothing heavy is imported here, since every such process imports it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

_LARGEST = float(np.finfo(np.float32).max)
_SHOWN = 60  # characters of a value in a message
_STEP = "(observation, reward, terminated, truncated, info)"


class Misbehaved(Exception):
    """What an environment did wrong, and what to do, in one line."""


class Lost(Misbehaved):
    """It does not answer any more."""


class Answer(NamedTuple):
    """What an environment shows after `reset` or `step`."""

    observation: Any
    mask: np.ndarray | None  # bool, `info["action_mask"]`; None where there is none
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False

    @property
    def over(self) -> bool:
        return self.terminated or self.truncated


def failure(error: BaseException) -> str:
    """What went wrong and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}{where}"


def short(value: Any) -> str:
    """Its representation in one line, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


# ---- what is asked --------------------------------------------------------------------------------------------------


def spaces(environment: Any) -> tuple[Any, Any]:
    """Its observation and action space, None where it has none."""
    return getattr(environment, "observation_space", None), getattr(environment, "action_space", None)


def reset(environment: Any, seed: int) -> Answer:
    """Starts an episode.

    Raises:
        Misbehaved: it raised, or returned something else than an observation and a dict.
    """
    call = f"reset(seed={seed})"
    found = _called(call, "(observation, info)", environment.reset, seed=seed)
    observation, info = _parts(call, found, 2, "(observation, info)")
    return Answer(observation, _mask(call, info))


def step(environment: Any, action: int) -> Answer:
    """Carries out an action.

    Raises:
        Misbehaved: it raised, or returned something else than it must.
    """
    call = f"step({action})"
    found = _called(call, _STEP, environment.step, action)
    observation, reward, terminated, truncated, info = _parts(call, found, 5, _STEP)
    try:
        gained, ends = float(reward), (bool(terminated), bool(truncated))
    except (TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(map(short, (reward, terminated, truncated)))
        raise Misbehaved(
            f"{call} returned reward, terminated, truncated = {given}; they must be a number and two bools"
        ) from error
    if not abs(gained) <= _LARGEST:
        raise Misbehaved(f"{call} returned the reward {gained}; it must be a finite float32")
    return Answer(observation, _mask(call, info), gained, *ends)


def replay(environment: Any, seed: int, actions: list[int]) -> tuple[Answer, float]:
    """Goes through an episode once more: its last answer and its return.

    Raises:
        Misbehaved: as `reset` and `step`, or it ended too early.
    """
    answer, total = reset(environment, seed), 0.0
    for number, action in enumerate(actions):
        if answer.over:
            raise Misbehaved(f"the episode was over after {number} of {len(actions)} steps")
        answer = step(environment, action)
        total += answer.reward
    return answer, total


def _called(call: str, wanted: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    try:
        return function(*arguments, **named)
    except (Exception, SystemExit) as error:  # whatever the environment's own code raises
        raise Misbehaved(f"{call} raised {failure(error)}; mend it there, it must return {wanted}") from error


def _parts(call: str, found: Any, count: int, wanted: str) -> tuple[Any, ...]:
    if not isinstance(found, tuple) or len(found) != count:
        given = f"{len(found)} values" if isinstance(found, tuple) else type(found).__name__
        raise Misbehaved(f"{call} returned {given}; it must return {wanted}")
    return found


def _mask(call: str, info: Any) -> np.ndarray | None:
    if not isinstance(info, Mapping):
        raise Misbehaved(f"{call} returned {short(info)} for info; it must be a dict")
    given = info.get("action_mask")
    if given is None:
        return None
    try:
        return np.asarray(given).astype(bool)
    except (TypeError, ValueError) as error:
        raise Misbehaved(
            f'{call} returned info["action_mask"]={short(given)}; give one bool for each action'
        ) from error


# ---- how it is made -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GymFactory:
    """`gymnasium.make(id, **kwargs)`."""

    id: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        """
        Raises:
            Misbehaved: it cannot be made.
        """
        try:
            return gymnasium.make(self.id, **self.kwargs)
        except Exception as error:  # whatever a registered environment's own code raises
            given = f" (env.kwargs={self.kwargs})" if self.kwargs else ""
            raise Misbehaved(
                f"gymnasium.make failed{given}: {failure(error)}; give the id of an installed environment"
            ) from error


@dataclass(frozen=True)
class TargetFactory:
    """What `package.module:factory` makes of `kwargs`."""

    target: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        """
        Raises:
            Misbehaved: it cannot be imported or called.
        """
        module, _, name = self.target.partition(":")
        try:
            found = import_module(module)
        except Exception as error:  # whatever the module's own code raises
            raise Misbehaved(
                f"importing {module} failed: {failure(error)}; install it, or put its folder on PYTHONPATH"
            ) from error
        factory = getattr(found, name, None)
        if not callable(factory):
            has = "is not callable" if hasattr(found, name) else "does not exist"
            raise Misbehaved(f"{name} {has} in {module}; name a function or class that makes an environment")
        try:
            return factory(**self.kwargs)
        except Exception as error:  # whatever the factory's own code raises
            raise Misbehaved(
                f"calling {name} failed: {failure(error)}; env.kwargs={self.kwargs} are its arguments"
            ) from error


# ---- who answers ----------------------------------------------------------------------------------------------------

_COMMANDS: dict[str, Callable[..., Any]] = {"spaces": spaces, "reset": reset, "step": step, "replay": replay}


class Worker:
    """An environment in this process. What has been sent is done when the answer is asked for.

    Attributes:
        environment: the environment, once it has been made.
    """

    environment: Any = None

    def perform(self, command: str, *arguments: Any) -> Any:
        """Does one of the functions above, or `make` with a factory.

        Raises:
            Misbehaved: the environment did something wrong.
        """
        if command == "make":
            self.environment = arguments[0]()
            return None
        return _COMMANDS[command](self.environment, *arguments)

    def send(self, command: str, *arguments: Any) -> None:
        """Asks for one thing; `receive` returns the answer."""
        self._request = command, *arguments

    def receive(self) -> Any:
        """The answer to what was sent.

        Raises:
            Misbehaved: the environment did something wrong.
        """
        return self.perform(*self._request)

    def hang_up(self) -> None:
        """Nothing more will be sent."""

    def close(self) -> None:
        """Ends it."""
