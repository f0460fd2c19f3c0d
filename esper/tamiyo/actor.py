"""The actor: Tamiyo in inference mode, as it collects rollouts. It shares its weights with the learner."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from esper.graph import GraphBatch, Layout
from esper.runtime.compiled import CompileGuard, any_batch
from esper.runtime.errors import TrainingError
from esper.tamiyo.distribution import MaskedCategorical
from esper.tamiyo.policy import GraphPolicy, Prediction


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
        guard: of the compiled policy; by default nothing is compiled.
        device: another one than the policy's: the actor then has a copy of the policy, which `sync` brings up to date.

    Attributes:
        latencies_ms: wall time of the latest calls.
    """

    def __init__(
        self,
        policy: GraphPolicy,
        seed: int = 0,
        deterministic: bool = False,
        guard: CompileGuard | None = None,
        device: torch.device | str | None = None,
    ):
        self._learner, own = policy, next(policy.parameters()).device
        self.device = torch.device(device or own)
        self.policy = policy if self.device == own else copy.deepcopy(policy).to(self.device)
        self.deterministic, self.guard = deterministic, guard or CompileGuard("actor", "not asked for")
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        self.latencies_ms: deque[float] = deque(maxlen=1024)
        self._compiled: dict[Layout, Callable[..., tuple[Tensor, Tensor]] | None] = {}

    def sync(self) -> None:
        """Takes over the policy's weights where they are on another device, in one fused copy."""
        if self.policy is not self._learner:
            own, theirs = ([*map(torch.Tensor.detach, policy.parameters())] for policy in (self.policy, self._learner))
            torch._foreach_copy_(own, theirs, non_blocking=True)

    @torch.inference_mode()
    def warm_up(self, graph: GraphBatch) -> None:
        """Runs the policy on two small graphs like those in `graph`, so that one-time costs fall before the first
        decision."""
        graph = self._here(graph)
        few = graph[[0, min(1, len(graph) - 1)]]
        compiled = self._form(few.layout)
        if compiled is None:
            self.guard.why_not = self.guard.why_not or "the encoder's backend cannot be compiled"
            self.guard.warm_up(lambda: self._evaluated(few))
        else:
            # All batches share a program, but a captured CUDA graph is for one size.
            tensors = _tensors(graph) if self.guard.cuda_graphs else any_batch(_tensors(few))
            self.guard.warm_up(lambda: self.guard.run(lambda: compiled(*tensors), lambda: self._evaluated(few)))

    @torch.inference_mode()
    def __call__(self, graph: GraphBatch) -> Decision:
        """One decision for each of N graphs.

        Raises:
            TrainingError: a logit or a value is not finite.
        """
        start = time.perf_counter()
        log_probs, values = self._run(graph)
        # One bad logit makes a whole row bad.
        if not (log_probs.amax(1) + values).isfinite().all():
            raise TrainingError("the policy's outputs are not finite: use a smaller ppo.lr")
        # Not part of what is compiled: sampling in a captured graph stops being random.
        if self.deterministic:
            actions = log_probs.argmax(-1)
        else:
            actions = torch.multinomial(log_probs.exp(), 1, generator=self.generator).squeeze(1)
        decision = Decision(actions, log_probs.gather(1, actions[:, None]).squeeze(1), values)
        self.latencies_ms.append((time.perf_counter() - start) * 1e3)
        return decision

    @torch.inference_mode()
    def value(self, graph: GraphBatch) -> Tensor:
        """V of N graphs, float32 [N]."""
        return self._run(graph)[1]

    def _run(self, graph: GraphBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N, A] of all actions, and values [N]."""
        graph = self._here(graph)
        compiled = self._form(graph.layout)
        if compiled is None:
            return self._evaluated(graph)

        def run() -> tuple[Tensor, Tensor]:
            # What is new after the warm-up, such as a captured graph of another size, is not worth a compilation.
            with torch.compiler.set_stance("eager_on_recompile"):
                log_probs, values = compiled(*_tensors(graph))
            return (log_probs.clone(), values.clone()) if self.guard.cuda_graphs else (log_probs, values)

        return self.guard.run(run, lambda: self._evaluated(graph))

    @torch.inference_mode(False)  # copies of another kind would be inputs of another program
    def _here(self, graph: GraphBatch) -> GraphBatch:
        return graph.to(self.device, non_blocking=True)

    def _evaluated(self, graph: GraphBatch) -> tuple[Tensor, Tensor]:
        distribution, values = self.policy.evaluate(graph)
        return distribution.log_probs, values

    def _form(self, layout: Layout | None) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """The compiled policy for graphs of a layout, or None if there is none."""
        if layout is None or not self.guard.enabled:
            return None
        if layout not in self._compiled:
            predict = self.policy.of_tensors(layout)
            self._compiled[layout] = None if predict is None else self.guard.compile(_masked(predict))
        return self._compiled[layout]


def _masked(predict: Callable[..., Prediction]) -> Callable[..., tuple[Tensor, Tensor]]:
    def function(
        x: Tensor, attr: Tensor, mask: Tensor, node_mask: Tensor, action_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits, values, _ = predict(x, attr, mask, node_mask)
        return MaskedCategorical(logits, action_mask).log_probs, values

    return function


def _tensors(graph: GraphBatch) -> list[Tensor]:
    packed = graph.pack()
    return [packed.x, packed.attr, packed.mask, packed.node_mask, graph.action_mask]
