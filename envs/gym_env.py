"""The Gymnasium faces of GrowthEnv: a single environment and a vector environment with padded Dict observations."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from envs.growth_env import GrowthEnv
from envs.making import make_growth
from envs.super_resolution import SuperResolutionEnv
from esper.graph.space import space_of, to_numpy
from esper.growth.actions import WAIT

AnyGrowth = GrowthEnv | SuperResolutionEnv

_ACCOUNTS = ("gain", "germinated", "fossilized", "culled", "params_ratio", "flops_ratio", "diverged")


def _spaces(env: AnyGrowth) -> tuple[spaces.Dict, spaces.Discrete]:
    return space_of(env.reset()), spaces.Discrete(env.layout.size)


def _made_legal(env: AnyGrowth, actions: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Actions with the illegal ones replaced by WAIT, and which those were (bool [N]).

    Gymnasium's checker and agents without masks draw from the whole action space; the rest of Esper never does.
    """
    chosen = torch.as_tensor(actions).long()
    allowed = env.action_mask().gather(1, chosen[:, None]).squeeze(1)
    return chosen.masked_fill(~allowed, WAIT), (~allowed).numpy()


def _result(info: dict[str, Any], row: int) -> dict[str, float]:
    """The accounts of one ended episode as plain numbers."""
    return {name: float(info["episodes"][name][row]) for name in _ACCOUNTS}


class SingleGrowthEnv(gymnasium.Env):
    """One host; `gymnasium.make("esper/Segment-v0")`.

    `reset` and `step` put the legal actions into `info["action_mask"]` (int8 [A]) as well as into the observation.
    An action that is not legal counts as WAIT and is reported in `info["illegal_action"]`. `reset(seed=s)` starts the
    sequence of instances that environment k of a vector environment gets from `reset(seed=s - k)`.

    Args:
        name: an environment of `conf/env`.
        split: "train" or "heldout" instances.
        overrides: as for `load_config`, for instance `contexts="repair"` or `epochs=10`.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own declaration)

    def __init__(self, name: str, split: str = "train", render_mode: str | None = None, **overrides: Any):
        self.render_mode = render_mode
        self.growth = make_growth(name, 1, split, autoreset=False, **overrides)
        self.observation_space, self.action_space = _spaces(self.growth)
        self._seeded = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        if seed is None and not self._seeded:
            seed = int(self.np_random.integers(2**31))
        self._seeded = True
        graph = self.growth.reset(None if seed is None else torch.tensor([seed]))
        return self._first(graph), {"action_mask": self._mask}

    def action_masks(self) -> np.ndarray:
        """bool [A], the legal actions now, under the name that SB3-contrib's MaskablePPO asks for."""
        return self._mask.astype(bool)

    def _first(self, graph: Any) -> dict[str, np.ndarray]:
        observation = {key: value[0] for key, value in to_numpy(graph).items()}
        self._mask = observation["action_mask"]
        return observation

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        actions, illegal = _made_legal(self.growth, np.array([action]))
        graph, reward, terminated, truncated, info = self.growth.step(actions)
        observation = self._first(graph)
        infos = {"action_mask": self._mask, "illegal_action": bool(illegal[0])}
        if "episodes" in info:
            infos |= _result(info, 0)
        return observation, float(reward), bool(terminated), bool(truncated), infos


class VectorGrowthEnv(gymnasium.vector.VectorEnv):
    """N hosts as one population; `gymnasium.make_vec("esper/Segment-v0", num_envs=N)`. Autoreset is SAME_STEP.

    `infos["action_mask"]` is int8 [N, A]; `infos["final_obs"]` and `infos["final_info"]` as in Gymnasium.

    Args:
        num_envs: N.
        name, split, overrides: as for SingleGrowthEnv.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int, name: str, split: str = "train", **overrides: Any):
        self.num_envs = num_envs
        self.growth = make_growth(name, num_envs, split, autoreset=True, **overrides)
        self.single_observation_space, self.single_action_space = _spaces(self.growth)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._seeded = False

    def reset(self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Starts all episodes anew; an int seed s gives environment k the seed s + k.

        Raises:
            ValueError: a list of another length than num_envs.
        """
        if isinstance(seed, np.integer):
            seed = int(seed)
        super().reset(seed=seed if isinstance(seed, int) else None)
        if seed is None and not self._seeded:
            seed = int(self.np_random.integers(2**31))
        self._seeded = True
        if isinstance(seed, int):
            seed = [seed + k for k in range(self.num_envs)]
        if seed is not None and len(seed) != self.num_envs:
            raise ValueError(f"{len(seed)} seeds for {self.num_envs} environments")
        observation = to_numpy(self.growth.reset(None if seed is None else torch.tensor(seed)))
        return observation, {"action_mask": observation["action_mask"]}

    def step(self, actions: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        chosen, illegal = _made_legal(self.growth, np.asarray(actions))
        graph, reward, terminated, truncated, info = self.growth.step(chosen)
        observation = to_numpy(graph)
        infos: dict[str, Any] = {"action_mask": observation["action_mask"], "illegal_action": illegal}
        if "episodes" in info:
            final = to_numpy(info["final_graph"])
            for row, env in enumerate(info["episodes"]["env"].tolist()):
                final_obs = {key: value[env] for key, value in final.items()}
                infos = self._add_info(
                    infos,
                    {
                        "final_obs": final_obs,
                        "final_info": {"action_mask": final_obs["action_mask"], **_result(info, row)},
                    },
                    env,
                )
        return observation, reward.double().numpy(), terminated.numpy(), truncated.numpy(), infos
