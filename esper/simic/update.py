"""The update step: forward, loss and backward of one minibatch, compiled, then clip and optimiser step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esper.graph import Layout
from esper.runtime.compiled import CompileGuard, any_batch
from esper.runtime.distributed import ALONE, World
from esper.runtime.errors import TrainingError
from esper.runtime.precision import LossScaler
from esper.simic.config import PPOConfig
from esper.simic.rollout import Minibatch, Targets, Totals
from esper.tamiyo.distribution import MaskedCategorical
from esper.tamiyo.policy import GraphPolicy, Prediction

log = logging.getLogger(__name__)

METRICS = ("loss", "policy_gradient_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction", "auxiliary_loss")
"""What a minibatch's loss reports, in order."""


class Coefficients(NamedTuple):
    """What schedules change: 0-dimensional tensors, so that no change compiles anything anew."""

    clip: Tensor
    entropy: Tensor


def ppo_loss(
    distribution: MaskedCategorical,
    values: Tensor,
    predictions: Tensor | None,
    targets: Targets,
    totals: Totals,
    coefficients: Coefficients,
    config: PPOConfig,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, squared value error, entropy bonus (arXiv 1707.06347, eq. 9), and the auxiliary error.

    All means are over the whole minibatch: where it is shared by processes, what they get adds up to the loss.

    The KL estimate is `mean((r - 1) - log r)` (Schulman, "Approximating KL divergence", 2020). With `config.value_clip`
    the value error is the larger of that of the value and that of the value clipped around the old one (Engstrom et
    al., arXiv 2005.12729). The auxiliary error is the mean square over the slots whose target is known.

    Args:
        predictions: [B, n], what the auxiliary targets are compared with; None if there are none.

    Returns:
        The loss, and METRICS [7] without gradients.
    """
    clip = coefficients.clip
    log_ratio = distribution.log_prob(targets.actions) - targets.log_probs
    ratio = log_ratio.exp()
    advantages = targets.advantages
    if config.normalize_advantages:
        advantages = (advantages - totals.mean) / (totals.std + 1e-8)
    surrogate = torch.min(ratio * advantages, torch.clamp(ratio, 1 - clip, 1 + clip) * advantages)
    policy_gradient = -surrogate.sum() / totals.graphs
    error = (values - targets.returns).square()
    if config.value_clip is not None:
        clipped = targets.values + (values - targets.values).clamp(-config.value_clip, config.value_clip)
        error = torch.max(error, (clipped - targets.returns).square())
    value = 0.5 * error.sum() / totals.graphs
    entropy = distribution.entropy().sum() / totals.graphs
    total = policy_gradient + config.value_coef * value - coefficients.entropy * entropy
    auxiliary = torch.zeros_like(total)
    if predictions is not None and config.auxiliary_coef:
        known = targets.auxiliary_mask.float()
        auxiliary = ((predictions - targets.auxiliary).square() * known).sum() / totals.known.clamp(min=1)
        total = total + config.auxiliary_coef * auxiliary
    approx_kl = ((ratio - 1) - log_ratio).sum() / totals.graphs
    clip_fraction = ((ratio - 1).abs() > clip).float().sum() / totals.graphs
    parts = total, policy_gradient, value, -entropy, approx_kl, clip_fraction, auxiliary
    return total, torch.stack([part.detach() for part in parts])


class UpdateStep:
    """One optimiser step on one minibatch.

    Args:
        policy: what is trained.
        scaler: over the policy's parameters.
        config: settings of PPO.
        guard: of the compiled form.
        world: the processes that take the step together.

    Attributes:
        halved: whether memory did not suffice for whole minibatches.
        frozen: parameters that steps leave as they are.
    """

    def __init__(
        self,
        policy: GraphPolicy,
        scaler: LossScaler,
        config: PPOConfig,
        guard: CompileGuard,
        world: World = ALONE,
    ):
        self.policy, self.scaler, self.config, self.guard, self.world = policy, scaler, config, guard, world
        self.halved = False
        self.frozen: list[nn.Parameter] = []
        device = next(policy.parameters()).device
        self.coefficients = Coefficients(*(torch.tensor(c, device=device) for c in (config.clip, config.entropy_coef)))
        self._compiled: dict[Layout, Callable[..., tuple[Tensor, Tensor]]] = {}

    def __call__(self, batch: Minibatch | None) -> Tensor:
        """Takes the step; returns METRICS, the norm of the gradient and whether the step was skipped, float32 [9] on
        the device, so that nothing here waits for it. Without a batch it is taken by the gradients of others."""
        if batch is None:
            self.policy.zero_grad(set_to_none=True)
            metrics = torch.zeros(len(METRICS), device=self.coefficients.clip.device)
        else:
            result = None if self.halved else self._whole(batch)
            metrics = self._in_halves(batch) if result is None else result
        metrics = self._summed(metrics)
        for parameter in self.frozen:
            parameter.grad = None
        norm, skipped = self.scaler.step(metrics[METRICS.index("loss")], self.config.max_grad_norm)
        return torch.cat([metrics, torch.stack([norm, skipped])])

    def _summed(self, metrics: Tensor) -> Tensor:
        """Adds up gradients and METRICS [7] over all processes, in one exchange, outside of what is compiled."""
        if self.world.alone:
            return metrics
        parameters = self.scaler.parameters
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        *gradients, metrics = self.world.total([*gradients, metrics])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return metrics

    def _whole(self, batch: Minibatch) -> Tensor | None:
        """Gradients of a minibatch at once; None if memory does not suffice."""
        compiled = self._form(batch)
        try:
            if compiled is None:
                return self._eager(batch)
            return self.guard.run(lambda: self._differentiated(compiled, batch), lambda: self._eager(batch))
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
        self._halve()
        return None

    def _halve(self) -> None:
        log.warning("out of memory in the update: minibatches are halved from now on, their gradients are added up")
        self.halved = True

    def _in_halves(self, batch: Minibatch) -> Tensor:
        """The same gradients with half the memory, in more time.

        Each half is run twice: first for its outputs, from which the loss of the whole minibatch is computed, so that
        advantages are normalised over all of it; then to send back the gradient of its outputs (Gao et al.,
        arXiv 2101.06983).

        Raises:
            TrainingError: memory does not suffice for half a minibatch either.
        """
        self.policy.zero_grad(set_to_none=True)
        indices = torch.arange(len(batch.graph), device=batch.targets.actions.device)
        halves = [batch.graph[half] for half in indices.tensor_split(2) if len(half)]
        try:
            with torch.no_grad():
                outputs = zip(*(_given(self.policy.predict(half)) for half in halves), strict=True)
            joined = [torch.cat(parts).requires_grad_() for parts in outputs]
            logits, values, *predictions = joined
            distribution = MaskedCategorical(logits, batch.graph.action_mask)
            predicted = predictions[0] if predictions else None
            loss, metrics = ppo_loss(
                distribution, values, predicted, batch.targets, batch.totals, self.coefficients, self.config
            )
            self.scaler.backward(loss)
            gradients = {number: output.grad for number, output in enumerate(joined) if output.grad is not None}
            sizes = [len(half) for half in halves]
            sent = zip(*(gradient.split(sizes) for gradient in gradients.values()), strict=True)
            for half, own in zip(halves, sent, strict=True):
                given = _given(self.policy.predict(half))
                torch.autograd.backward([given[number] for number in gradients], own)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            raise TrainingError(
                "out of memory in the update, with halves of minibatches too; "
                f"raise ppo.minibatches, which is {self.config.minibatches}"
            ) from error
        return metrics

    def warm_up(self, batch: Minibatch) -> None:
        """Compiles what `batch`, of at least two transitions, needs; changes nothing."""
        compiled = self._form(batch)
        if compiled is None:
            self.guard.why_not = self.guard.why_not or "the encoder's backend cannot be compiled"
            self.guard.warm = True
            return

        def first() -> Tensor:
            self.policy.zero_grad(set_to_none=True)
            loss, metrics = compiled(*any_batch(_tensors(batch)), *batch.totals, *self.coefficients)
            loss.backward()
            return metrics

        try:
            self.guard.warm_up(lambda: self.guard.run(first, lambda: self._eager(batch)))
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            self.guard.warm = True
            self._halve()
        self.policy.zero_grad(set_to_none=True)

    def _eager(self, batch: Minibatch) -> Tensor:
        self.policy.zero_grad(set_to_none=True)
        logits, values, predictions = self.policy.predict(batch.graph)
        distribution = MaskedCategorical(logits, batch.graph.action_mask)
        loss, metrics = ppo_loss(
            distribution, values, predictions, batch.targets, batch.totals, self.coefficients, self.config
        )
        self.scaler.backward(loss)
        return metrics

    def _differentiated(self, compiled: Callable[..., tuple[Tensor, Tensor]], batch: Minibatch) -> Tensor:
        self.policy.zero_grad(set_to_none=True)
        loss, metrics = compiled(*_tensors(batch), *batch.totals, *self.coefficients)
        self.scaler.backward(loss)
        # A captured graph writes its outputs to the same place again.
        return metrics.clone()

    def _form(self, batch: Minibatch) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """The compiled forward pass and loss for graphs of this layout, or None if there is none."""
        if not self.guard.enabled or batch.graph.layout is None:
            return None
        layout = batch.graph.layout
        if layout not in self._compiled:
            predict, config = self.policy.of_tensors(layout), self.config
            if predict is None:
                return None

            def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
                x, attr, mask, node_mask, action_mask, *rest = tensors
                logits, values, predictions = predict(x, attr, mask, node_mask)
                targets, totals, coefficients = Targets(*rest[:-6]), Totals(*rest[-6:-2]), Coefficients(*rest[-2:])
                distribution = MaskedCategorical(logits, action_mask)
                return ppo_loss(distribution, values, predictions, targets, totals, coefficients, config)

            self._compiled[layout] = self.guard.compile(function)
        return self._compiled[layout]


def _given(prediction: Prediction) -> list[Tensor]:
    """What there is of logits, values and predictions."""
    return [each for each in prediction if each is not None]


def _out_of_memory(error: Exception) -> bool:
    """Whether a device's memory, or the machine's, did not suffice."""
    told = "can't allocate memory" in str(error) or "bad_alloc" in str(error)  # by the CPU's allocators
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or told


def _tensors(batch: Minibatch) -> list[Tensor]:
    graph = batch.graph.pack()
    return [graph.x, graph.attr, graph.mask, graph.node_mask, batch.graph.action_mask, *batch.targets]
