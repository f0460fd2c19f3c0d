"""N hosts trained together as one batched program.

Host parameters are one [N, P] tensor; the seeds of a blueprint are one [N, slots, P_b] tensor, of which only the rows
that hold a live seed are gathered, run and optimised. Lifecycles change between epochs only, so the gather is paid once
an epoch. All randomness is a pure function of each host's key (`esper.runtime.seeding`), so that host k's trajectory
does not depend on which hosts it runs beside.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from esper.growth import host
from esper.growth.conditions import NEVER, initial_scale, kept_at_start
from esper.growth.context import Context
from esper.growth.epoch import Trained, train_stacked
from esper.growth.graft import Grafts
from esper.growth.host import Trace
from esper.growth.lifecycle import Event, Stage, is_live
from esper.growth.native.engine import NativeEngine, unavailable
from esper.growth.sizes import SizeTables, Tables
from esper.growth.state import PopulationSpec, PopulationState
from esper.growth.statistics import SAMPLES, activation_statistics, statistics_samples
from esper.runtime import seeding
from esper.runtime.errors import ConfigError

log = logging.getLogger(__name__)

# Salts that keep the streams of one host key apart.
_INIT, _SUBSET, _NOISE, _ORDER, SEED, _SPARSE, _CLASSES, _SIGNS = range(1, 9)


class Population(PopulationState):
    """N hosts, their slots and their seeds; see PopulationState for the arguments.

    Raises:
        ConfigError: the engine that the spec asks for cannot run here; the message says why.
    """

    def __init__(self, spec: PopulationSpec, hosts: int, device: torch.device | str = "cpu"):
        super().__init__(spec, hosts, device)
        self.native: NativeEngine | None = None
        if spec.engine != "stacked":
            reason = unavailable(self)
            if reason is None:
                self.native = NativeEngine(self)
            elif spec.engine == "native":
                raise ConfigError(f"env.engine=native: {reason}; use auto or stacked")
            elif self.device.type == "cpu":
                _warn_once(reason)

    def tables(self) -> Tables:
        """See Growable."""
        return SizeTables(self)

    # ---- episodes -------------------------------------------------------------------------------------------------

    def reset(self, where: Tensor, context: Context) -> None:
        """Starts new episodes for the hosts `where` (int64 [m]) with `context` (m instances); evaluates them.

        Raises:
            ValueError: a width or depth that the population has no room for.
        """
        widest, deepest = int(context.width.max()), int(context.depth.max())
        if widest > self.spec.width or deepest > self.spec.stages:
            raise ValueError(
                f"a host of width {widest} and depth {deepest} in a population of width {self.spec.width} and depth "
                f"{self.spec.stages}"
            )
        self.context.put(where, context)
        pool, classes = self.subset.shape[1], self.spec.classes
        size = self.context.train_size[where] = context.train_size.clamp(max=pool)
        key = context.key.to(self.device)
        self.theta[where] = self._initial(context, key)
        for state in (self.exp_avg, self.exp_avg_sq, self.extra_flops, self.steps, self.epoch, self.germinated):
            state[where] = 0
        self.lifecycle.reset(where)

        # The classes that come before the shift, in the host's own order, and its samples with theirs in front.
        rank = seeding.permutation(seeding.fold(key, _CLASSES), torch.full_like(key, classes), classes).argsort(1)
        shifting = (context.shift_epoch < NEVER).to(self.device)
        first = (rank < context.first_classes.to(self.device)[:, None]) | ~shifting[:, None]
        order = seeding.permutation(seeding.fold(key, _SUBSET), torch.full_like(key, pool), pool)
        clean = self.data.train_y[order]
        inside = torch.arange(pool, device=self.device) < size.to(self.device)[:, None]
        if self.spec.per_token or not shifting.any():
            self.first_size[where] = size
        else:
            early = first.gather(1, clean) & inside
            behind = (~early).long() + (~inside).long()
            order = order.gather(1, behind.argsort(dim=1, stable=True))
            clean = self.data.train_y[order]
            self.first_size[where] = early.sum(1).clamp(min=1).cpu()
        self.first[where] = first
        flips = seeding.uniform(seeding.fold(key, _SIGNS), self.spec.inputs)
        self.signs[where] = 1.0 - 2.0 * (flips < context.flipped.to(self.device)[:, None]).float()

        labels = clean.flatten(1)
        draws = seeding.uniform(seeding.fold(key, _NOISE), 2 * labels.shape[1])
        random = (draws[:, : labels.shape[1]] * classes).long()
        noisy = draws[:, labels.shape[1] :] < context.label_noise.to(self.device)[:, None]
        self.subset[where] = order
        self.labels[where] = torch.where(noisy, random, labels).view_as(clean)
        self.statistics.reset(where)
        self._evaluate(where)

    def _initial(self, context: Context, key: Tensor) -> Tensor:
        """[m, P] initial host parameters: those of missing stages are 0, conditions have their say."""
        theta = self.table.initial(seeding.fold(key, _INIT), context.width.to(self.device))
        stages, m = torch.arange(self.slots), len(context)
        edge = torch.ones(m, 1)
        exists = torch.cat([edge, (stages < context.depth[:, None]).float(), edge], dim=1)
        scale = torch.cat([edge, initial_scale(context.condition, context.severity), edge], dim=1)
        weight = torch.tensor([len(p.shape) > 1 and p.shape[-2] > 1 for p in self.table.specs])
        weight = torch.repeat_interleave(weight, torch.tensor(self.table.sizes))  # bool [P]: of a weight, not a bias
        layer = self.layer
        factor = exists[:, layer] * torch.where(weight, scale[:, layer], 1.0)
        condition = torch.cat([edge * 0, context.condition, edge * 0], dim=1)[:, layer]
        kept = kept_at_start(condition, seeding.uniform(seeding.fold(context.key, _SPARSE), self.table.size))
        return theta * (factor * (kept | ~weight)).to(self.device)

    def germinate(self, where: Tensor, blueprint: Tensor) -> None:
        """Plants seeds in `where` (bool [N, slots]) of kind `blueprint` (int64 [N, slots], index into the catalogue).

        Raises:
            ValueError: a slot of `where` is not DORMANT.
        """
        self.lifecycle.germinate(where, blueprint)
        self.germinated += where.sum(1)
        for kind, table in enumerate(self.seed_tables):
            hosts, slots = (where & (blueprint == kind)).nonzero(as_tuple=True)
            if not len(hosts):
                continue
            key = seeding.fold(self.context.key[hosts], SEED, slots, self.epoch[hosts], kind)
            start = table.initial(key.to(self.device), self.context.width[hosts].to(self.device))
            self.seed_theta[kind][hosts, slots] = start
            self.seed_exp_avg[kind][hosts, slots] = 0.0
            self.seed_exp_avg_sq[kind][hosts, slots] = 0.0
        where = where.to(self.device)
        self.seed_steps = self.seed_steps.masked_fill(where, 0)
        self.statistics.germinated(where, self.validation_loss)

    def remove_unfinished(self, where: Tensor) -> None:
        """Culls the seeds still in TRAINING or BLENDING of the hosts `where` (bool [N]) and evaluates those anew."""
        stage = self.lifecycle.stage
        unfinished = ((stage == Stage.TRAINING) | (stage == Stage.BLENDING)) & where[:, None]
        self.lifecycle.fire(Event.CULL, unfinished)
        changed = unfinished.any(1).nonzero().squeeze(1)
        if len(changed):
            losses, asked, _ = self._validate(changed, self.lifecycle.alpha[changed])
            self.validation_loss[changed] = loss = _mean(losses, asked)
            self.statistics.revise_validation(changed, loss, self.lifecycle.stage.to(self.device))

    # ---- training -------------------------------------------------------------------------------------------------

    def train_epoch(self, evaluate: bool = True) -> None:
        """Trains every host for one epoch, evaluates it, refreshes the statistics and lets lifecycles move on.

        Args:
            evaluate: False leaves the last evaluation as it is, for forks that are only judged at their end.
        """
        self.lifecycle.begin_epoch()
        self.extra_flops += self.seed_flops_now(is_live(self.lifecycle.stage))
        order = self._epoch_order()
        index = self.subset.gather(1, order.flatten(1)).view_as(order)
        shape = (*order.shape, *self.labels.shape[2:])
        labels = self.labels[torch.arange(self.hosts, device=self.device)[:, None], order.flatten(1)].view(shape)
        trained = self.native.train(self, index, labels) if self.native else train_stacked(self, index, labels)
        self.epoch += 1
        if self.setup.measured:
            self._record(trained)
        if evaluate:
            self._evaluate(torch.arange(self.hosts))
        self.lifecycle.end_epoch(self.lifecycle_spec)

    def _epoch_order(self) -> Tensor:
        """[N, steps, batch] positions within each host's training samples for the coming epoch."""
        steps, batch = self.training.steps_per_epoch, self.training.batch_size
        size = torch.where(self.epoch < self.context.shift_epoch, self.first_size, self.context.train_size)
        size = torch.where(self.context.shift_epoch < NEVER, size, self.context.train_size)
        size = self.moved(size)
        key = self.moved(seeding.fold(self.context.key, _ORDER, self.epoch))
        shuffled = seeding.permutation(key, size, self.subset.shape[1])
        position = torch.arange(steps * batch, device=self.device) % size[:, None]
        return shuffled.gather(1, position).view(-1, steps, batch)

    def _record(self, trained: Trained) -> None:
        statistics = self.statistics
        statistics.train_loss = trained.loss
        statistics.age_contributions(self.moved(self.lifecycle.stage))
        sums = trained.squares
        sizes = self.moved(self.layer_sizes[self.context.width] * self.layer_exists())
        rms = (sums / sizes.clamp(min=1)[:, None]).sqrt()  # [N, 4, layers]
        statistics.layer_weight_rms, statistics.layer_gradient_rms, statistics.layer_update_rms = rms[:, :3].unbind(1)
        statistics.layer_signal_to_noise = rms[:, 3] / (rms[:, 1] + 1e-12)
        statistics.update_rms = (sums[:, 2].sum(1) / sizes.sum(1)).sqrt()
        statistics.seed_gradient_rms = trained.seed_gradient_rms
        statistics.activation_backward_rms = trained.backward_rms
        statistics.growth_gradient = trained.growth_gradient

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def diverged(self) -> Tensor:
        """bool [N] on the CPU: a loss or a parameter is not finite, those of its seeds included that it runs on.

        A seed in TRAINING does not reach its host, and may still be culled.
        """
        fine = self.theta.isfinite().all(1) & self._losses_finite()
        kinds = self.lifecycle.blueprint.masked_fill(self.lifecycle.alpha == 0, -1)
        for kind, theta in enumerate(self.seed_theta):
            hosts, slots = (kinds == kind).nonzero(as_tuple=True)
            if len(hosts):
                hosts, slots = self.moved(hosts), self.moved(slots)
                fine[hosts[~theta[hosts, slots].isfinite().all(1)]] = False
        return ~fine.cpu()

    def _losses_finite(self) -> Tensor:
        """bool [N], of the last epoch; the training loss is known where hosts are measured only."""
        return self.validation_loss.isfinite() & self.statistics.train_loss.isfinite()

    @torch.no_grad()
    def _evaluate(self, where: Tensor) -> None:
        """Validation loss of the hosts `where`, and if measured their activations and contributions.

        A slot's contribution is the loss with its alpha set to 0, minus the loss as is, both on the first SAMPLES of
        the validation split. Every (host, slot) with alpha > 0 is one more row of the same evaluation.
        """
        alpha, count, there = self.lifecycle.alpha[where], len(where), self.moved(where)
        if not self.setup.measured:
            losses, asked, _ = self._validate(where, alpha)
            self.validation_loss[there] = _mean(losses, asked)
            return
        place, slots = (alpha > 0).nonzero(as_tuple=True)
        without = alpha[place]
        without[torch.arange(len(place)), slots] = 0.0
        hosts, statistics = where[place], self.statistics
        losses, asked, activations = self._validate(
            torch.cat([where, hosts]), torch.cat([alpha, without]), ablated=len(hosts), measured=True
        )
        self.validation_loss[there] = _mean(losses[:count], asked[:count])
        if len(hosts):
            place, hosts, slots = (self.moved(index) for index in (place, hosts, slots))
            labels = SAMPLES * (losses.shape[1] // len(self.data.validation_x))
            change = _mean(losses[:, :labels], asked[:, :labels])
            statistics.contribution[hosts, slots] = change[count:] - change[place]
            statistics.contribution_known[hosts, slots] = True
            statistics.contribution_age[hosts, slots] = 0
        assert activations is not None
        statistics.activations[there] = activations
        blueprint = self.moved(self.lifecycle.blueprint[where])
        statistics.record_validation(there, self.validation_loss[there], blueprint)

    @torch.no_grad()
    def accuracy(self, where: Tensor, split: str) -> Tensor:
        """Accuracy of the hosts `where` (int64 [m]) on the split "validation" or "test", in [0, 1]: float32 [m].
        What has NaN among its logits is wrong. For reports only: it never enters an observation or a reward."""
        x, y = getattr(self.data, f"{split}_x"), getattr(self.data, f"{split}_y")
        alpha = self.lifecycle.alpha[where]
        if self.native:
            _, logits, _ = self.native.evaluate(self, where.cpu(), alpha, x, y, logits=True)
            assert logits is not None
        else:
            logits, _ = self._logits(where, alpha, x)
        right = (logits.argmax(-1) == y.flatten()) & ~logits.isnan().any(-1)
        return right.float().mean(1)

    @torch.no_grad()
    def _validate(
        self, rows: Tensor, alpha: Tensor, ablated: int = 0, measured: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the hosts `rows` [M] with `alpha` [M, slots], on the validation split: the loss of each label
        [M, labels], whether it counts (1 or 0), and if measured the activations' statistics.

        The last `ablated` rows see the first SAMPLES only, with a loss of 0 beyond them, and are not measured. Before
        a shift a host is only asked for the classes it has met.
        """
        x, y = self.data.validation_x, self.data.validation_y
        tokens = self.spec.site.tokens
        wanted = statistics_samples(tokens) if measured else 0
        activations: Tensor | None = None
        if self.native:
            losses, _, activations = self.native.evaluate(self, rows, alpha, x, y, wanted, ablated)
        else:
            full = len(rows) - ablated
            logits, trace = self._logits(rows[:full], alpha[:full], x, wanted * tokens)
            losses = host.cross_entropy(logits, y.flatten().expand(full, -1))
            if measured:
                activations = activation_statistics(trace, self.moved(self.context.width[rows[:full]]))
            if ablated:
                logits, _ = self._logits(rows[full:], alpha[full:], x[:SAMPLES])
                fewer = host.cross_entropy(logits, y[:SAMPLES].flatten().expand(ablated, -1))
                rest = losses.shape[1] - fewer.shape[1]
                losses = torch.cat([losses, torch.nn.functional.pad(fewer, (0, rest))])
        unmet = (self.epoch[rows] < self.context.shift_epoch[rows]) & (self.context.shift_epoch[rows] < NEVER)
        if self.spec.per_token or not unmet.any():
            return losses, torch.ones_like(losses), activations
        asked = (self.first[self.moved(rows)] | ~self.moved(unmet)[:, None]).gather(1, y.expand(len(rows), -1))
        return losses, asked.float(), activations

    def _logits(self, rows: Tensor, alpha: Tensor, x: Tensor, slopes: int = 0) -> tuple[Tensor, Trace]:
        """Stacked forward of the hosts `rows` [M] (repeats allowed), all on x [n, tokens, inputs], with `alpha`
        [M, slots]; the trace keeps derivatives on the first `slopes` rows."""
        kinds = self.lifecycle.blueprint[rows].masked_fill(alpha == 0, -1)
        grafts = Grafts(self, rows, kinds, alpha)
        grafts.use_rows(self.seed_theta)
        gain, at = self.gain(), self.activations()
        everyone = self.moved(rows)
        return host.forward(
            self.spec,
            self.table.views(self.theta[everyone]),
            x.expand(len(rows), *x.shape),
            at.map(lambda value: value[everyone]),
            None if gain is None else gain[everyone],
            grafts,
            slopes,
        )

    # ---- forks ----------------------------------------------------------------------------------------------------

    def fork(self, rows: Tensor, future: bool = False, measured: bool = False) -> Population:
        """A population of copies of the hosts `rows` (repeats allowed) that goes on by itself.

        Args:
            rows: int64 [M].
            future: keep the strikes and shifts that are still to come; otherwise they are taken out, so that what the
                fork tells is causal.
            measured: collect statistics.
        """
        setup = type(self.setup)(**{**vars(self.setup), "measured": measured})
        forked = Population(setup, len(rows), self.device)
        forked.load_state_dict(self._state(), rows)
        if not future:
            forked.context = forked.context.without_future(forked.epoch)
        return forked


@cache
def _warn_once(reason: str) -> None:
    log.warning("hosts are trained by the stacked engine, which is several times slower on a CPU: %s", reason)


def _mean(losses: Tensor, asked: Tensor) -> Tensor:
    """[M], over the labels that count."""
    return (losses * asked).sum(1) / asked.sum(1).clamp(min=1)
