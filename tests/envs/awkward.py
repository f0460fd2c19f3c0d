"""An environment that does one thing wrong, for tests; its file can be imported by other processes."""

import os
import signal
import sys
import time

import gymnasium
import numpy as np
from gymnasium import spaces


class Unsendable(np.ndarray):
    def __reduce__(self):
        raise TypeError("stays at home")


OBSERVATIONS = {
    "nan observation": np.array([0.0, np.nan], dtype=np.float32),
    "inf observation": np.array([np.inf, 0.0], dtype=np.float32),
    "huge observation": np.array([1e300, 0.0]),
    "long observation": np.zeros(3, dtype=np.float32),
    "deep observation": np.zeros((2, 1), dtype=np.float32),
    "words": ["a", "b"],
    "ragged": [[1.0], [1.0, 2.0]],
    "nothing": None,
    "unsendable": np.zeros(2, dtype=np.float32).view(Unsendable),
}
REWARDS = {"nan reward": np.nan, "inf reward": -np.inf, "huge reward": 1e39, "no reward": None, "rewards": [1.0, 2.0]}


class Awkward(gymnasium.Env):
    """Counts its steps, of which an episode has six; does `what` in step `at` of the episode of seed `of` (None: of
    all), where step 0 is the reset. What differs from episode to episode hangs on the seed, unless it is `restless`."""

    observation_space = spaces.Box(-1e4, 1e4, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, what="", at=2, of=None, restless=False):
        self.what, self.at, self.of, self.restless, self.born = what, at, of, restless, time.time_ns() % 1000

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.count, self.sum = seed, 0, 0.0
        return self._result(5)[0], self.info

    def step(self, action):
        self.count += 1
        self.sum += float(self.np_random.normal()) * (1 + action)
        return self._result(5)

    def _result(self, length):
        born = self.born if self.restless else 0
        observation = np.array([self.sum, self.count + born], dtype=np.float32)
        self.info, reward = {}, self.sum
        if self.count == self.at and self.of in (None, self.seed):
            observation, reward, length = self._trouble(observation, reward)
        result = observation, reward, self.count == 6, False, self.info
        return (*result, None)[:length]

    def _trouble(self, observation, reward):
        length = 5
        match self.what:
            case "raise":
                raise ValueError("no way\nout")
            case "exit":
                sys.exit(4)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "leave":
                os._exit(7)
            case "hang":
                time.sleep(1e6)
            case "four":
                length = 4
            case "six":
                length = 6
            case "mask":
                self.info = {"action_mask": [1, 0, 1]}
            case "no action":
                self.info = {"action_mask": [0, 0]}
            case "odd mask":
                self.info = {"action_mask": {"left": True}}
            case "list":
                self.info = []
        return OBSERVATIONS.get(self.what, observation), REWARDS.get(self.what, reward), length


# Without the wrapper that orders calls, which unpacks what `step` returns.
gymnasium.register("test/Awkward-v0", Awkward, disable_env_checker=True, order_enforce=False)
