"""A population whose epochs are drawn from a fitted model instead of trained; everything else is the real thing.

For debugging and testing controllers and trainers. How far it may be trusted is in `docs/surrogate.md`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from envs.surrogate_model import (
    HOST,
    LAYER,
    STAGE,
    STATE,
    Fitted,
    accuracy_inputs,
    decode,
    host_inputs,
    stage_inputs,
    stored,
)
from esper.growth.blueprints.exponential import sigmoid
from esper.growth.context import Context
from esper.growth.lifecycle import Event, Stage, is_live
from esper.growth.population import Population
from esper.growth.state import PopulationSpec
from esper.growth.statistics import ACTIVATION_STATISTICS
from esper.runtime import seeding

_EPOCH = 201  # salt of the stream of noise
_ROWS = 4096  # vectors of noise, of which keys choose one
_LOWEST = 0.02  # loss, in nats
_LIMIT = 3.0  # at which noise is cut off, in standard deviations

_ACTIVATIONS = slice(len(LAYER), len(LAYER) + len(ACTIVATION_STATISTICS))  # of STAGE
_SPLITS = ("validation", "test")  # in the order of Model.accuracy

_TRAINED = (
    "theta", "exp_avg", "exp_avg_sq", "seed_theta", "seed_exp_avg", "seed_exp_avg_sq", "steps", "subset", "labels",
    "first_size", "first", "signs",
)  # fmt: skip
"""What hosts need that are really trained."""


@cache
def _normals(width: int, device: torch.device) -> Tensor:
    """[_ROWS, width] standard normals, always the same."""
    uniform = seeding.uniform(seeding.fold(torch.arange(_ROWS), _EPOCH), width).double().clamp(1e-9, 1 - 1e-9)
    normal = math.sqrt(2) * torch.erfinv(2 * uniform - 1)
    return normal.clamp(-_LIMIT, _LIMIT).float().to(device)


class SurrogatePopulation(Population):
    """N hosts without parameters.

    A host is what it is by its context and key alone, like a real one. Its noise is that of its twin until its first
    germination and resembles it from then on.

    Args:
        spec, hosts, device: see PopulationState.
        fitted: the model; default: the one that is shipped.

    Raises:
        ConfigError: the model has not been fitted to such hosts.
    """

    _TENSORS: tuple[str, ...] = (  # type: ignore[assignment]
        "seed_steps", "epoch", "germinated", "extra_flops", "validation_loss", "memory", "noise",
    )  # fmt: skip

    def __init__(
        self, spec: PopulationSpec, hosts: int, device: torch.device | str = "cpu", fitted: Fitted | None = None
    ):
        fitted = fitted or stored()
        fitted.check(spec)
        super().__init__(replace(spec, engine="stacked"), hosts, device)  # nothing is to be compiled for it
        for name in _TRAINED:
            delattr(self, name)
        self.model = model = fitted.model.map(self.moved)
        self.memory = torch.zeros(hosts, STATE, device=device)  # see Model.step
        # The model's number of each blueprint of the catalogue; NO_BLUEPRINT is -1, the last entry.
        self._kinds = torch.tensor([*(fitted.blueprints.index(name) for name in spec.catalogue), -1])
        self._blueprints = len(fitted.blueprints)
        self._lasts = torch.cat([model.host_memory, model.stage_memory.repeat(self.slots)])
        self._fresh = (1 - self._lasts.square()).sqrt()
        self.noise = torch.zeros(hosts, len(self._lasts), device=device)  # about standard normal

    # ---- episodes -------------------------------------------------------------------------------------------------

    def reset(self, where: Tensor, context: Context) -> None:
        """Starts new episodes for the hosts `where` (int64 [m]) with `context` (m instances); evaluates them."""
        self.context.put(where, context)
        self.context.train_size[where] = context.train_size.clamp(max=len(self.data.train_y))
        for state in (self.extra_flops, self.epoch, self.germinated, self.memory):
            state[where] = 0
        self.lifecycle.reset(where)
        self.statistics.reset(where)
        self.noise[where] = self._innovations()[where]
        host, stages = self._predicted(torch.zeros(self.hosts, self.slots))
        self.memory[where, 0] = host[where, 0]
        self.validation_loss[where] = loss = host[where, 0].exp()
        if stages is not None:
            self.statistics.activations[where] = decode(STAGE, stages[where])[..., _ACTIVATIONS]
            blueprint = self.moved(self.lifecycle.blueprint[where])
            self.statistics.record_validation(where, loss, blueprint)

    def germinate(self, where: Tensor, blueprint: Tensor) -> None:
        """Plants seeds in `where` (bool [N, slots]) of kind `blueprint` (int64 [N, slots], index into the catalogue).

        Raises:
            ValueError: a slot of `where` is not DORMANT.
        """
        self.lifecycle.germinate(where, blueprint)
        self.germinated += where.sum(1)
        where = self.moved(where)
        self.seed_steps = self.seed_steps.masked_fill(where, 0)
        self.statistics.germinated(where, self.validation_loss)

    def remove_unfinished(self, where: Tensor) -> None:
        """Culls the seeds still in TRAINING or BLENDING of the hosts `where` (bool [N]), which lose them."""
        stage, statistics = self.lifecycle.stage, self.statistics
        unfinished = ((stage == Stage.TRAINING) | (stage == Stage.BLENDING)) & where[:, None]
        lost = self._contributions(unfinished).sum(1)
        self.lifecycle.fire(Event.CULL, unfinished)
        self.validation_loss = (self.validation_loss + lost).clamp(min=_LOWEST)
        changed = unfinished.any(1).nonzero().squeeze(1)
        statistics.revise_validation(changed, self.validation_loss[changed], self.moved(self.lifecycle.stage))

    def diverged(self) -> Tensor:
        """bool [N] on the CPU: a loss, or what the next one is drawn from, is not finite."""
        return ~(self._losses_finite() & self.memory.isfinite().all(1)).cpu()

    def _contributions(self, where: Tensor) -> Tensor:
        """[N, slots], of the seeds in `where` (bool [N, slots]) as far as they are known, else 0."""
        return self.statistics.contribution * (self.statistics.contribution_known & self.moved(where))

    # ---- an epoch -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def train_epoch(self, evaluate: bool = True) -> None:
        """Draws what an epoch does to every host, refreshes the statistics and lets lifecycles move on.

        Args:
            evaluate: not used, every epoch is evaluated.
        """
        removed = self.begin_epoch()
        self.noise = self._lasts * self.noise + self._fresh * self._innovations()
        host, stages = self._predicted(removed)
        loss = host[:, 0]
        self.memory = torch.stack([loss, loss - self.memory[:, 0], host[:, 1], torch.ones_like(loss)], dim=1)
        self.validation_loss = loss.exp()
        if stages is not None:
            self._report(host, stages)
        self.lifecycle.end_epoch(self.lifecycle_spec)

    def begin_epoch(self) -> Tensor:
        """All of an epoch but its effect: returns the contributions [N, slots] of the seeds that have just been culled,
        which the hosts lose."""
        stage = self.lifecycle.stage
        removed = self._contributions((stage == Stage.EMBARGOED) & (self.lifecycle.epochs == 0))
        self.memory[:, 0] = (self.memory[:, 0].exp() + removed.sum(1)).clamp(min=_LOWEST).log()
        self.lifecycle.begin_epoch()
        live = is_live(stage)
        self.extra_flops += self.seed_flops_now(live)
        self.seed_steps += self.training.steps_per_epoch * self.moved(live)
        self.epoch += 1
        return removed

    def inputs(self, removed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The model's inputs: of the stages [N, S, in], which of them exist (bool [N, S]), and of the hosts [N, in]."""
        context, lifecycle = self.context, self.lifecycle
        condition, severity = self.conditions(context, self.epoch)
        live = is_live(lifecycle.stage)
        stages = stage_inputs(
            context,
            condition,
            severity,
            self.epoch,
            self._kinds[lifecycle.blueprint],
            lifecycle.alpha,
            self.seed_steps.cpu() / self.training.steps_per_epoch * live,
            removed.cpu(),
            self._blueprints,
        )
        host = host_inputs(context, self.epoch, self.spec.classes)
        return self.moved(stages), self.moved(self.layer_exists()[:, 1:-1]), self.moved(host)

    @torch.no_grad()
    def _predicted(self, removed: Tensor) -> tuple[Tensor, Tensor | None]:
        """The hosts' [N, len(HOST) + OUTER] and, if measured, the stages' [N, S, len(STAGE)] statistics, encoded."""
        model = self.model
        inputs, exists, host = self.inputs(removed)
        code = model.code(inputs, exists)
        mean, hidden = model.step(code, host, self.memory)
        width = mean.shape[1]
        drawn = mean + model.host_scales(hidden) * self.noise[:, :width]
        if not self.setup.measured:
            return drawn, None
        means, middle = model.stages(inputs, code, hidden)
        return drawn, means + model.stage_scales(middle) * self.noise[:, width:].view(means.shape)

    def _innovations(self) -> Tensor:
        """[N, len(HOST) + OUTER + S len(STAGE)], what is new in the noise of this epoch, about standard normal."""
        table, shared = _normals(self.noise.shape[1], self.device), self.model.shared
        key = seeding.fold(self.context.key, _EPOCH, self.epoch)
        twin = table[self.moved(key % _ROWS)]
        own = table[self.moved(seeding.fold(key, self.germinated) % _ROWS)]
        grown = self.moved(self.germinated > 0)[:, None]
        return torch.where(grown, shared * twin + (1 - shared.square()).sqrt() * own, twin)

    def _report(self, host: Tensor, stages: Tensor) -> None:
        """Puts what was drawn, encoded as in `_predicted`, into the statistics."""
        statistics, lifecycle = self.statistics, self.lifecycle
        statistics.age_contributions(self.moved(lifecycle.stage))
        statistics.train_loss = host[:, 1].exp()
        statistics.update_rms = decode(HOST[2:], host[:, 2:3]).squeeze(1)
        stages = decode(STAGE, stages)
        outer = decode(LAYER, host[:, len(HOST) :].view(self.hosts, 2, len(LAYER)))
        layers = torch.cat([outer[:, :1], stages[..., : len(LAYER)], outer[:, 1:]], dim=1)
        weight, gradient, ratio, signal = layers.unbind(2)
        statistics.layer_weight_rms, statistics.layer_gradient_rms = weight, gradient
        statistics.layer_update_rms, statistics.layer_signal_to_noise = ratio * weight, signal
        statistics.activations = stages[..., _ACTIVATIONS]
        backward, growth, seed, contribution = stages[..., _ACTIVATIONS.stop :].unbind(2)
        statistics.activation_backward_rms, statistics.growth_gradient = backward, growth
        statistics.seed_gradient_rms = seed
        blended = self.moved(lifecycle.alpha > 0)
        statistics.contribution = torch.where(blended, contribution, statistics.contribution)
        statistics.contribution_known |= blended
        statistics.contribution_age.masked_fill_(blended, 0)
        everyone = torch.arange(self.hosts, device=self.device)
        statistics.record_validation(everyone, self.validation_loss, self.moved(lifecycle.blueprint))

    @torch.no_grad()
    def accuracy(self, where: Tensor, split: str) -> Tensor:
        """Accuracy of the hosts `where` (int64 [m]) on the split "validation" or "test", in [0, 1]: float32 [m]; 0 of
        those that have diverged."""
        at = where.to(self.device)
        loss, train_loss = self.validation_loss[at].log(), self.memory[at, 2]
        inputs = accuracy_inputs(self.context.rows(where), loss.cpu(), train_loss.cpu())
        known = sigmoid((inputs * self.model.accuracy[_SPLITS.index(split)].cpu()).sum(1))
        return self.moved(known.masked_fill(self.diverged()[where.cpu()], 0.0))
