"""Other people's environments, side by side behind the interface of GrowthEnv.

What their observations look like is up to the subclasses, in `envs.gym` and `envs.hetero`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.growth_env import SPLITS
from esper.graph import GraphBatch
from esper.graph.interface import Interface
from esper.runtime import seeding
from esper.runtime.errors import ConfigError

log = logging.getLogger(__name__)

_EPISODE = 102  # salt of the episodes' seeds


class AdaptedEnv:
    """N environments of the Gymnasium interface (`reset(seed=)`, `step(action)`), stepped one after the other.

    Every episode starts from a seed of its own, which follows from the split, the environment's seed and the number of
    the episode, so that an episode never depends on its neighbours or on how many there are.

    Args:
        environments: N of them.
        origin: the key and value that name them, for messages, as `env.id=CartPole-v1`.
        interface: what they show and let choose.
        split: one of SPLITS; the episodes of the two never share a seed.
        autoreset: start the next episode in the step that ended one (SAME_STEP); otherwise an environment whose episode
            has ended stays as it is until `reset`, whatever its action.
        device: where observations go.

    Attributes:
        graph_build_s: wall time of the latest observations.
    """

    def __init__(
        self,
        environments: list[Any],
        origin: str,
        interface: Interface,
        split: str,
        autoreset: bool,
        device: torch.device | str,
    ):
        self.environments, self.origin, self.interface = environments, origin, interface
        self.num_envs, self.autoreset, self.device = len(environments), autoreset, device
        self._split = SPLITS.index(split)
        self.graph_build_s: deque[float] = deque(maxlen=1024)
        self._seeds = torch.arange(self.num_envs)
        self._episodes = torch.zeros(self.num_envs, dtype=torch.int64)
        self._running = [False] * self.num_envs
        self._returns, self._lengths = [0.0] * self.num_envs, [0] * self.num_envs
        self._observations: list[Any] = [None] * self.num_envs
        self._masks: list[np.ndarray] = [np.ones(1, dtype=bool)] * self.num_envs

    # ---- what subclasses say ----------------------------------------------------------------------------------------

    def _taken(self, observation: Any) -> Any:
        """What is kept of an observation until `_graphs` asks for it."""
        raise NotImplementedError

    def _count(self, observation: Any) -> int:
        """How many actions there are to choose from at a kept observation."""
        raise NotImplementedError

    def _graphs(self, observations: list[Any], masks: list[np.ndarray]) -> GraphBatch:
        """The kept observations of all environments, with the legal actions of each, on the CPU."""
        raise NotImplementedError

    def _action(self, index: int) -> Any:
        """What an environment's `step` takes for the action `index`."""
        return index

    # ---- the interface of GrowthEnv ---------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether an episode is going on in any environment."""
        return any(self._running)

    def reset(self, seeds: Tensor | None = None) -> GraphBatch:
        """Starts an episode in every environment.

        Args:
            seeds: int64 [N]; restarts environment k's sequence of episodes from seeds[k]. None goes on with it.
        """
        if seeds is not None:
            self._seeds = seeds.cpu().clone()
            self._episodes.zero_()
        for k in range(self.num_envs):
            self._begin(k)
        return self._observe()

    def step(self, actions: Tensor) -> tuple[GraphBatch, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Carries out one action per environment.

        Args:
            actions: int64 [N].

        Returns:
            observation: GraphBatch of N graphs (with autoreset, of the new episode where one has ended).
            reward: float32 [N].
            terminated: bool [N], whether the step ended the episode by the environment's own rule.
            truncated: bool [N], whether it was cut off, for instance by a time limit.
            info: empty unless an episode has ended; then `final_graph` (the N observations before the reset) and
                `episodes`: `env`, `return` and `length`, each [m], of the m environments that ended.

        Raises:
            ValueError: an illegal action, or not one for each environment; nothing is changed then.
        """
        if actions.shape != (self.num_envs,):
            raise ValueError(f"actions of shape {tuple(actions.shape)} for {self.num_envs} environments")
        indices = actions.tolist()
        for k, (index, mask) in enumerate(zip(indices, self._masks, strict=True)):
            if self._running[k] and not (0 <= index < len(mask) and mask[index]):
                raise ValueError(f"action {index} of environment {k} is not legal")
        reward = torch.zeros(self.num_envs)
        terminated, truncated = (torch.zeros(self.num_envs, dtype=torch.bool) for _ in range(2))
        ended = []
        for k, index in enumerate(indices):
            if not self._running[k]:
                continue
            observation, gained, terminal, cut, info = self.environments[k].step(self._action(index))
            self._running[k] = not (terminal or cut)
            self._take(k, observation, info)
            self._returns[k] += float(gained)
            self._lengths[k] += 1
            reward[k], terminated[k], truncated[k] = float(gained), bool(terminal), bool(cut)
            if not self._running[k]:
                ended.append(k)
        graph, info = self._observe(), {}
        if ended:
            info = {"final_graph": graph, "episodes": self._summary(ended)}
            if self.autoreset:
                for k in ended:
                    self._begin(k)
                graph = self._observe()
        return graph, reward, terminated, truncated, info

    def _summary(self, ended: list[int]) -> dict[str, Tensor]:
        return {
            "env": torch.tensor(ended),
            "return": torch.tensor([self._returns[k] for k in ended]),
            "length": torch.tensor([self._lengths[k] for k in ended]),
        }

    def _begin(self, k: int) -> None:
        key = seeding.fold(torch.tensor(self._split), _EPISODE, self._seeds[k], self._episodes[k])
        observation, info = self.environments[k].reset(seed=int(key) & 0x7FFFFFFF)
        self._episodes[k] += 1
        self._returns[k], self._lengths[k], self._running[k] = 0.0, 0, True
        self._take(k, observation, info)

    def _take(self, k: int, observation: Any, info: dict[str, Any]) -> None:
        """Keeps what environment k shows, and which actions are legal then."""
        kept = self._taken(observation)
        count = self._count(kept)
        given = info.get("action_mask")
        mask = np.ones(count, dtype=bool) if given is None else np.asarray(given).astype(bool)
        if mask.shape != (count,):
            raise ConfigError(
                f'{self.origin}: info["action_mask"] has shape {mask.shape} where there are {count} actions; '
                "give one entry for each"
            )
        if not mask.any():
            if self._running[k]:
                raise ConfigError(
                    f"{self.origin}: no action is legal in an episode that goes on; terminate it there, or allow one"
                )
            # Nobody acts after the end, but a distribution needs something to choose from.
            mask = np.ones(max(count, 1), dtype=bool)
        self._observations[k], self._masks[k] = kept, mask

    def _observe(self) -> GraphBatch:
        start = time.perf_counter()
        graph = self._graphs(self._observations, self._masks).to(self.device, non_blocking=True)
        self.graph_build_s.append(time.perf_counter() - start)
        return graph

    # ---- state ------------------------------------------------------------------------------------------------------

    def learned(self) -> dict[str, Any]:
        """What training has found out about the observations; `load_learned` gives it to other environments."""
        return {}

    def load_learned(self, learned: dict[str, Any]) -> None:
        """Takes over what `learned` returned here or elsewhere."""

    def state_dict(self) -> dict[str, Any]:
        """What survives a stop: which episodes come next, and what has been learned of the observations. The state of
        the environments themselves is theirs."""
        return {"seeds": self._seeds.clone(), "episodes": self._episodes.clone(), "learned": self.learned()}

    def load_state_dict(self, state: dict[str, Any]) -> GraphBatch:
        """Restores what `state_dict` returned, and starts the next episode in every environment."""
        self._seeds, self._episodes = state["seeds"].clone(), state["episodes"].clone()
        self.load_learned(state["learned"])
        log.info("%s: the state of its environments cannot be saved; they start new episodes", self.origin)
        for k in range(self.num_envs):
            self._begin(k)
        return self._observe()
