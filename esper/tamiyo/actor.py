"""The actor: Tamiyo in inference mode, as it collects rollouts. It shares its weights with the learner."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from esper.graph import GraphBatch
from esper.tamiyo.distribution import MaskedCategorical
from esper.tamiyo.policy import Tamiyo


class Decision(NamedTuple):
    """What the actor returns for N graphs; inference tensors, to be copied before any of it reaches the update."""

    actions: Tensor  # int64 [N]
    log_probs: Tensor  # float32 [N]
    values: Tensor  # float32 [N]


class Actor:
    """Callable that chooses actions.

    Args:
        policy: whose weights are used, as they are at each call.
        seed: of the sampling generator.
        deterministic: take the most probable action instead of sampling.

    Attributes:
        latencies_ms: wall time of the latest calls.
        warm_ms: wall time of the warm-up, 0 before it.
    """

    # The compiled form fills these in; eager execution has nothing that could fall back.
    compile_enabled = False
    compile_fallback_total = 0
    recompiles = 0

    def __init__(self, policy: Tamiyo, seed: int = 0, deterministic: bool = False):
        self.policy, self.deterministic = policy, deterministic
        self.generator = torch.Generator(device=next(policy.parameters()).device)
        self.generator.manual_seed(seed)
        self.latencies_ms: deque[float] = deque(maxlen=1024)
        self.warm_ms = 0.0

    @torch.inference_mode()
    def warm_up(self, graph: GraphBatch) -> None:
        """Runs the policy once on `graph`, so that one-time costs fall before the first decision."""
        start = time.perf_counter()
        self.policy(graph)
        self.warm_ms = (time.perf_counter() - start) * 1e3

    @torch.inference_mode()
    def __call__(self, graph: GraphBatch) -> Decision:
        start = time.perf_counter()
        logits, values = self.policy(graph)
        distribution = MaskedCategorical(logits, graph.action_mask)
        actions = distribution.mode() if self.deterministic else distribution.sample(self.generator)
        decision = Decision(actions, distribution.log_prob(actions), values)
        self.latencies_ms.append((time.perf_counter() - start) * 1e3)
        return decision

    @torch.inference_mode()
    def value(self, graph: GraphBatch) -> Tensor:
        """V of N graphs, float32 [N]."""
        return self.policy(graph)[1]
