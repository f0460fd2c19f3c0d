"""Other people's environments, side by side behind the interface of GrowthEnv.

What their observations look like is up to the subclasses, in `envs.gym` and `envs.hetero`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.adapter_config import ProcessConfig
from envs.growth_env import SPLITS
from envs.remote import RemoteWorker
from envs.worker import Answer, Lost, Misbehaved, Worker
from esper.graph import GraphBatch
from esper.graph.interface import Interface
from esper.runtime import seeding
from esper.runtime.errors import ConfigError, EsperError, TrainingError

log = logging.getLogger(__name__)

_EPISODE = 102  # salt of the episodes' seeds


AnyWorker = Worker | RemoteWorker


def make_workers(factory: Any, config: ProcessConfig, count: int, origin: str) -> list[AnyWorker]:
    """`count` environments that `factory` makes, here or each in a process of its own.

    Raises:
        ConfigError: one cannot be made.
        TrainingError: a process hangs or dies over it.
    """
    threads = torch.get_num_threads()
    workers = [RemoteWorker(config.timeout_s, threads) if config.subprocess else Worker() for _ in range(count)]
    for worker in workers:
        worker.send("make", factory)
    for worker in workers:
        _received(worker, origin)
    return workers


def asked(worker: AnyWorker, origin: str, command: str, *arguments: Any) -> Any:
    """What an environment answers before there are episodes.

    Raises:
        ConfigError: it misbehaves.
        TrainingError: its process hangs or dies.
    """
    worker.send(command, *arguments)
    return _received(worker, origin)


def _received(worker: AnyWorker, origin: str) -> Any:
    try:
        return worker.receive()
    except Misbehaved as error:
        raise (TrainingError if isinstance(error, Lost) else ConfigError)(f"{origin}: {error}") from error


class AdaptedEnv:
    """N environments of the Gymnasium interface (`reset(seed=)`, `step(action)`), stepped one after the other, or side
    by side where each has a process of its own.

    Every episode starts from a seed of its own, which follows from the split, the environment's seed and the number of
    the episode, so that an episode never depends on its neighbours or on how many there are.

    What an environment does wrong is one error that names it, the episode and the step: a ConfigError until all have
    started for the first time, a TrainingError from then on, and always where a process hangs or dies.

    Args:
        workers: N of them.
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
        workers: list[AnyWorker],
        origin: str,
        interface: Interface,
        split: str,
        autoreset: bool,
        device: torch.device | str,
    ):
        self.workers, self.origin, self.interface = workers, origin, interface
        self.num_envs, self.autoreset, self.device = len(workers), autoreset, device
        self._split = SPLITS.index(split)
        self.graph_build_s: deque[float] = deque(maxlen=1024)
        self._seeds = torch.arange(self.num_envs)
        self._episodes = torch.zeros(self.num_envs, dtype=torch.int64)
        self._running = [False] * self.num_envs
        self._started = False  # all have begun an episode
        self._returns = [0.0] * self.num_envs
        self._actions = [array("q") for _ in range(self.num_envs)]  # of the episode, by which it can be found again
        self._observations: list[Any] = [None] * self.num_envs
        self._masks: list[np.ndarray] = [np.ones(1, dtype=bool)] * self.num_envs

    # ---- what subclasses say ----------------------------------------------------------------------------------------

    def _taken(self, observation: Any) -> Any:
        """What is kept of an observation until `_graphs` asks for it.

        Raises:
            Misbehaved: it is not of the kind that it must be.
        """
        raise NotImplementedError

    def _learn(self, observation: Any) -> None:
        """Takes in a kept observation that has not been seen before."""

    def _arrays(self, observation: Any) -> list[np.ndarray]:
        """All numbers of a kept observation."""
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
        self._begin(list(range(self.num_envs)))
        self._started = True
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
            TrainingError: an environment misbehaves, hangs or has died.
        """
        if actions.shape != (self.num_envs,):
            raise ValueError(f"actions of shape {tuple(actions.shape)} for {self.num_envs} environments")
        indices = actions.tolist()
        for k, (index, mask) in enumerate(zip(indices, self._masks, strict=True)):
            if self._running[k] and not (0 <= index < len(mask) and mask[index]):
                raise ValueError(f"action {index} of environment {k} is not legal")
        reward = torch.zeros(self.num_envs)
        terminated, truncated = (torch.zeros(self.num_envs, dtype=torch.bool) for _ in range(2))
        acting = [k for k in range(self.num_envs) if self._running[k]]
        for k in acting:
            self.workers[k].send("step", self._action(indices[k]))
        for k in acting:
            answer = self._answer(k, len(self._actions[k]) + 1)
            self._returns[k] += answer.reward
            self._actions[k].append(indices[k])
            reward[k], terminated[k], truncated[k] = answer.reward, answer.terminated, answer.truncated
        ended = [k for k in acting if not self._running[k]]
        graph, info = self._observe(), {}
        if ended:
            info = {"final_graph": graph, "episodes": self._summary(ended)}
            if self.autoreset:
                self._begin(ended)
                graph = self._observe()
        return graph, reward, terminated, truncated, info

    def close(self) -> None:
        """Ends the environments' processes, if they have any."""
        for worker in self.workers:
            worker.hang_up()
        for worker in self.workers:
            worker.close()

    # ---- episodes ---------------------------------------------------------------------------------------------------

    def _summary(self, ended: list[int]) -> dict[str, Tensor]:
        return {
            "env": torch.tensor(ended),
            "return": torch.tensor([self._returns[k] for k in ended]),
            "length": torch.tensor([len(self._actions[k]) for k in ended]),
        }

    def _seed(self, k: int) -> int:
        """Of the episode that environment k is in."""
        key = seeding.fold(torch.tensor(self._split), _EPISODE, self._seeds[k], self._episodes[k] - 1)
        return int(key) & 0x7FFFFFFF

    def _begin(self, where: list[int]) -> None:
        """The next episodes of the environments `where`."""
        for k in where:
            self._episodes[k] += 1
            self._returns[k], self._actions[k] = 0.0, array("q")
            self.workers[k].send("reset", self._seed(k))
        for k in where:
            self._answer(k, 0)

    def _answer(self, k: int, step: int) -> Answer:
        """What environment k answers in a step of its episode, or 0 at its start; takes in what it shows."""
        try:
            answer: Answer = self.workers[k].receive()
            self._running[k] = not answer.over
            self._observations[k], self._masks[k] = self._read(answer)
        except Misbehaved as error:
            raise self._error(k, step, error) from error
        self._learn(self._observations[k])
        return answer

    def _read(self, answer: Answer) -> tuple[Any, np.ndarray]:
        """What is kept of an answer, and which actions are legal then.

        Raises:
            Misbehaved: the observation or the mask is not as it must be.
        """
        kept = self._taken(answer.observation)
        count = self._count(kept)
        mask = np.ones(count, dtype=bool) if answer.mask is None else answer.mask
        if mask.shape != (count,):
            raise Misbehaved(
                f'info["action_mask"] has shape {mask.shape} where there are {count} actions; give one entry for each'
            )
        if not mask.any():
            if not answer.over:
                raise Misbehaved("no action is legal in an episode that goes on; terminate it there, or allow one")
            # Nobody acts after the end, but a distribution needs something to choose from.
            mask = np.ones(max(count, 1), dtype=bool)
        return kept, mask

    def _error(self, k: int, step: int, error: Misbehaved) -> EsperError:
        kind = TrainingError if self._started or isinstance(error, Lost) else ConfigError
        where = f"in step {step}" if step else "at the start"
        self.close()
        return kind(f"{self.origin}: environment {k}, {where} of the episode of seed {self._seed(k)}: {error}")

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

    def share_learned(self, learned: Sequence[dict[str, Any]]) -> None:
        """Takes over what `learned` returned in each of several processes, this one among them, that had all learned
        the same when this was last called, or `load_learned`."""

    def state_dict(self) -> dict[str, Any]:
        """Which episodes they are in, by which actions they came to where they are, and what has been learned."""
        return {
            "seeds": self._seeds.clone(),
            "episodes": self._episodes.clone(),
            "actions": [torch.from_numpy(np.array(actions, dtype=np.int64)) for actions in self._actions],
            "digests": [self._digest(k) for k in range(self.num_envs)],
            "learned": self.learned(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> GraphBatch:
        """Restores what `state_dict` returned by playing the episodes again up to where they were.

        An environment that does not come there, since it hangs on more than its seed, starts its next episode; one
        warning says so.

        Raises:
            ConfigError: an environment misbehaves at the start of its next episode.
            TrainingError: a process hangs or dies.
        """
        self._seeds, self._episodes = state["seeds"].clone(), state["episodes"].clone()
        self.load_learned(state["learned"])
        begun = [k for k in range(self.num_envs) if self._episodes[k]]
        for k in begun:
            self._actions[k] = array("q", state["actions"][k].tolist())
            self.workers[k].send("replay", self._seed(k), [self._action(index) for index in self._actions[k]])
        lost = [k for k in begun if not self._found_again(k, state["digests"][k])]
        if lost:
            log.warning(
                "%s: %d of its %d environments did not come to where they were by the same seed and actions, and start "
                "new episodes; draw everything from reset(seed=) to go on exactly",
                self.origin,
                len(lost),
                self.num_envs,
            )
        self._begin(sorted({*range(self.num_envs)} - {*begun} | {*lost}))
        self._started = True
        return self._observe()

    def _found_again(self, k: int, digest: str) -> bool:
        """Takes in how the replay of environment k ended; whether that is as `digest` says."""
        try:
            answer, self._returns[k] = self.workers[k].receive()
            self._running[k] = not answer.over
            self._observations[k], self._masks[k] = self._read(answer)
        except Lost as error:
            raise self._error(k, len(self._actions[k]), error) from error
        except Misbehaved:
            return False  # it has not the first time
        return self._digest(k) == digest

    def _digest(self, k: int) -> str:
        """Of all that environment k has shown last, and of its return."""
        found = hashlib.sha256(repr((self._returns[k], self._running[k])).encode())
        shown = [] if self._observations[k] is None else self._arrays(self._observations[k])
        for part in (*shown, self._masks[k]):
            found.update(repr((part.shape, part.dtype)).encode() + np.ascontiguousarray(part).tobytes())
        return found.hexdigest()
