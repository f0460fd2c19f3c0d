"""Gymnasium environments with flat observations, each a graph of one node.

The growth environments' own Gymnasium faces are in `envs.gym_env`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from envs.adapter import AdaptedEnv, asked, make_workers
from envs.adapter_config import GymConfig
from envs.worker import GymFactory, Misbehaved, short
from esper.graph import GraphBatch, Layout
from esper.graph.batch import Packed, empty
from esper.graph.interface import DISCRETE, Interface
from esper.graph.schema import GraphSchema
from esper.runtime.errors import ConfigError

NODE = "observation"
_BOUND = 10.0  # of normalised observations, in standard deviations


class GymEnv(AdaptedEnv):
    """N environments of one id; see AdaptedEnv for the other arguments.

    Args:
        config: which environment; `config.num_envs` is not used.
        num_envs: N.

    Raises:
        ConfigError: there is no such environment, or its observations or actions are of a kind that does not fit.
    """

    def __init__(
        self,
        config: GymConfig,
        num_envs: int,
        split: str = "train",
        autoreset: bool = True,
        device: torch.device | str = "cpu",
    ):
        origin = f"env.id={config.id}"
        workers = make_workers(GymFactory(config.id, config.kwargs), config, num_envs, origin)
        observed, acted = asked(workers[0], origin, "spaces")
        if not isinstance(acted, spaces.Discrete):
            raise ConfigError(f"{origin}: its actions are {acted}; only Discrete actions can be learned")
        self._space, self._start = observed, int(acted.start)
        width = _width(observed, origin)
        # What a relation does to a node that is alone: each layer is then a perceptron layer with a residual.
        relation = (NODE, "itself", NODE)
        schema = GraphSchema({NODE: tuple(f"f{number}" for number in range(width))}, {relation: ("presence",)})
        interface = Interface(schema, DISCRETE, int(acted.n))
        super().__init__(workers, origin, interface, split, autoreset, device)
        frame = empty(Layout.of(schema, {NODE: 1}), num_envs)
        self._frame = Packed(frame.layout, frame.x, *(part.fill_(1) for part in frame.tensors()[1:]))
        self._normalizer = Normalizer(width) if config.normalize else None
        self._learns = split == "train"

    def _taken(self, observation: Any) -> np.ndarray:
        _check(self._space, observation, "the observation")
        if isinstance(self._space, spaces.Box):
            return np.asarray(observation, dtype=np.float32).reshape(-1)
        return np.asarray(spaces.flatten(self._space, observation), dtype=np.float32)

    def _learn(self, observation: np.ndarray) -> None:
        if self._normalizer and self._learns:
            self._normalizer.learn(observation)

    def _arrays(self, observation: np.ndarray) -> list[np.ndarray]:
        return [observation]

    def _count(self, observation: np.ndarray) -> int:
        return self.interface.count

    def _graphs(self, observations: list[np.ndarray], masks: list[np.ndarray]) -> GraphBatch:
        x = np.stack(observations)
        if self._normalizer:
            x = self._normalizer(x)
        frame = self._frame
        packed = Packed(frame.layout, torch.from_numpy(x)[:, None], frame.node_mask, frame.attr, frame.mask)
        return GraphBatch.of(packed, torch.from_numpy(np.stack(masks)))

    def _action(self, index: int) -> int:
        return self._start + index

    def learned(self) -> dict[str, Any]:
        return self._normalizer.state_dict() if self._normalizer else {}

    def load_learned(self, learned: dict[str, Any]) -> None:
        if self._normalizer:
            self._normalizer.load_state_dict(learned)

    def share_learned(self, learned: Sequence[dict[str, Any]]) -> None:
        if self._normalizer:
            self._normalizer.merge(learned)


class Normalizer:
    """Running mean and standard deviation of observations (Welford, 1962).

    Args:
        width: numbers of an observation.
    """

    def __init__(self, width: int):
        self._count, self._mean, self._squares = 0, np.zeros(width), np.zeros(width)
        self._common = self.state_dict()  # what others know, too

    def learn(self, x: np.ndarray) -> None:
        """Takes in one observation [width]."""
        self._count += 1
        delta = x - self._mean
        self._mean += delta / self._count
        self._squares += delta * (x - self._mean)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Observations [N, width] of zero mean and unit variance, clipped, float32; as they are before any is known."""
        std = np.sqrt(self._squares / max(self._count, 1) + 1e-8) if self._count > 1 else 1.0
        return np.clip((x - self._mean) / std, -_BOUND, _BOUND).astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        """As tensors and numbers."""
        moments = {"mean": self._mean, "squares": self._squares}
        return {"count": self._count, **{name: torch.tensor(value) for name, value in moments.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._count = state["count"]
        self._mean, self._squares = state["mean"].numpy().copy(), state["squares"].numpy().copy()
        self._common = self.state_dict()

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Takes in what others, and this one, have seen since this was last called, or `load_state_dict`."""
        sums = [_sums(state) for state in states]
        before = _sums(self._common)
        count, total, squared = (sum(s[i] for s in sums) - (len(sums) - 1) * before[i] for i in range(3))
        mean = total / max(count, 1)
        squares = np.maximum(squared - mean * total, 0)
        self.load_state_dict({"count": int(count), "mean": torch.tensor(mean), "squares": torch.tensor(squares)})


def _sums(state: dict[str, Any]) -> tuple[Any, Any, Any]:
    """How many, their sum [width] and that of their squares [width]."""
    count, mean = state["count"], state["mean"].numpy()
    return count, count * mean, state["squares"].numpy() + count * mean**2


def _check(space: spaces.Space, value: Any, name: str) -> None:
    """Refuses what is not of the space, or not finite. Bounds are not looked at: many environments exceed theirs.

    Raises:
        Misbehaved: names the part.
    """
    if isinstance(space, spaces.Dict | spaces.Tuple):
        named = isinstance(space, spaces.Dict)
        parts = _members(space.spaces)
        found = _members(value) if isinstance(value, Mapping if named else tuple | list) else {}
        if found.keys() != parts.keys():
            wanted = f"a {'dict' if named else 'tuple'} of {list(parts)}"
            raise Misbehaved(f"{name} is {short(value)}; its observation_space wants {wanted}")
        for key, part in parts.items():
            _check(part, found[key], f"{name}[{key!r}]")
        return
    if not isinstance(space, spaces.Box):
        if not space.contains(value):
            raise Misbehaved(f"{name} is {short(value)}, which is not in its observation_space {space}")
        return
    try:
        array = np.asarray(value)
    except ValueError as error:  # of unequal lengths
        raise Misbehaved(f"{name} is {short(value)}; its observation_space wants an array {space.shape}") from error
    if array.dtype.kind not in "biuf":
        raise Misbehaved(f"{name} is {short(value)}; its observation_space wants numbers")
    if array.shape != space.shape:
        raise Misbehaved(f"{name} has shape {array.shape}; its observation_space says {space.shape}")
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32))
    if not finite.all():
        at = tuple(int(index) for index in np.argwhere(~finite)[0])
        place = f" at {list(at)}" if at else ""
        raise Misbehaved(f"{name} is {array[at]}{place}; it must be finite in float32")


def _members(parts: Any) -> dict[Any, Any]:
    """By their keys, or their numbers where they have none."""
    return dict(parts) if isinstance(parts, Mapping) else dict(enumerate(parts))


def _width(space: spaces.Space, origin: str) -> int:
    """How many numbers an observation has once it is flat."""
    try:
        flat: spaces.Space = spaces.flatten_space(space)
    except NotImplementedError:
        flat = space
    if not isinstance(flat, spaces.Box) or len(flat.shape) != 1 or not flat.shape[0]:
        raise ConfigError(
            f"{origin}: its observations are {space}, which has no flat form of fixed length; "
            "wrap it, or emit HeteroData (env=hetero)"
        )
    return flat.shape[0]
