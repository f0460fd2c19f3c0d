"""A scheduling problem as an environment that emits PyG's HeteroData: which job does the machine that is free take?

Jobs differ in weight and duration, and not every machine can run every job. The return is minus the mean over jobs of
weight times the time at which the job is done. docs/your_own_environment.md walks through it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch_geometric.data import HeteroData


class Scheduling:
    """One problem per episode: `jobs` and `machines` are drawn from [low, high].

    Args:
        jobs: range of their number.
        machines: range of their number.
    """

    def __init__(self, jobs: tuple[int, int] = (6, 12), machines: tuple[int, int] = (2, 3)):
        self.jobs, self.machines = jobs, machines

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[HeteroData, dict[str, Any]]:
        draw = np.random.default_rng(seed)
        count, machines = (int(draw.integers(low, high + 1)) for low, high in (self.jobs, self.machines))
        self.weight, self.duration = draw.uniform(0.1, 1.0, count), draw.uniform(0.1, 1.0, count)
        self.can_run = draw.random((count, machines)) < 0.6
        self.can_run[np.arange(count), draw.integers(0, machines, count)] = True  # every job runs somewhere
        self.waiting = np.arange(count)
        self.free_at = np.zeros(machines)
        return self._observation()

    def step(self, action: int) -> tuple[HeteroData, float, bool, bool, dict[str, Any]]:
        """`action` is the index of a job node of the last observation."""
        job, machine = self.waiting[action], self._next_machine()
        self.free_at[machine] += self.duration[job]
        self.waiting = np.delete(self.waiting, action)
        reward = -self.weight[job] * self.free_at[machine] / len(self.weight)
        observation, info = self._observation()
        return observation, float(reward), len(self.waiting) == 0, False, info

    def _next_machine(self) -> int:
        """The first to be free of those that can run a job that waits."""
        useful = self.can_run[self.waiting].any(0)
        return int(np.where(useful, self.free_at, np.inf).argmin())

    def _observation(self) -> tuple[HeteroData, dict[str, Any]]:
        able = self.can_run[self.waiting]  # [waiting jobs, machines]
        following = np.zeros(len(self.free_at))
        if len(self.waiting):
            following[self._next_machine()] = 1.0
        data = HeteroData()
        data["job"].x = torch.tensor(np.stack([self.weight[self.waiting], self.duration[self.waiting]], 1)).float()
        data["machine"].x = torch.tensor(np.stack([self.free_at - self.free_at.min(), following], 1)).float()
        data["job", "runs_on", "machine"].edge_index = torch.tensor(np.stack(able.nonzero()))
        legal = able[:, following.argmax()] if len(self.waiting) else np.zeros(0, dtype=bool)
        return data, {"action_mask": legal}
