"""N hosts trained together as one batched program.

Host parameters are one [N, P] tensor; the seeds of a blueprint are one [N, slots, P_b] tensor, of which only the rows
that hold a live seed are gathered, run and optimised. Lifecycles change between epochs only, so the gather is paid once
an epoch. All randomness is a pure function of each host's key (`esper.runtime.seeding`), so that host k's trajectory
does not depend on which hosts it runs beside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esper.growth import host
from esper.growth.epoch import EpochRun
from esper.growth.lifecycle import Event, Stage, is_live
from esper.growth.parameters import initial, views
from esper.growth.state import Context, PopulationState
from esper.growth.statistics import activation_statistics
from esper.runtime import seeding

# Salts that keep the streams of one host key apart.
_INIT, _SUBSET, _NOISE, _ORDER, _SEED = range(1, 6)


class Population(PopulationState):
    """N hosts of one architecture, their slots and their seeds.

    Args:
        spec: architecture of the hosts.
        catalogue: names of the blueprints that may be germinated, in the order of their indices.
        data: the task.
        training: how hosts are trained.
        lifecycle: rules of the lifecycle.
        hosts: N.
        observed: statistics are only collected for the first `observed` hosts (the others are twins); default all.
        device: where everything lives.

    Raises:
        KeyError: an unknown blueprint.
    """

    # ---- episodes -------------------------------------------------------------------------------------------------

    def reset(self, where: Tensor, context: Context) -> None:
        """Starts new episodes for the hosts `where` (int64 [m]) with `context` (each [m]); evaluates them."""
        key = context.key
        for name in ("key", "learning_rate", "train_size", "label_noise"):
            getattr(self.context, name)[where] = getattr(context, name)
        self.theta[where] = initial(self.host_specs, seeding.fold(key, _INIT))
        for state in (self.exp_avg, self.exp_avg_sq, self.extra_flops, self.steps, self.epoch):
            state[where] = 0
        self.lifecycle.reset(where)
        pool = self.subset.shape[1]
        order = seeding.permutation(seeding.fold(key, _SUBSET), torch.full_like(key, pool), pool)
        clean = self.data.train_y[order]
        draws = seeding.uniform(seeding.fold(key, _NOISE), 2 * pool)
        random = (draws[:, :pool] * self.spec.classes).long()
        self.subset[where] = order
        self.labels[where] = torch.where(draws[:, pool:] < context.label_noise[:, None], random, clean)
        observed = where[where < self.observed]
        self.statistics.reset(observed)
        self._evaluate(where)

    def germinate(self, where: Tensor, blueprint: Tensor) -> None:
        """Plants seeds in `where` (bool [N, slots]) of kind `blueprint` (int64 [N, slots], index into the catalogue).

        Raises:
            ValueError: a slot of `where` is not DORMANT.
        """
        self.lifecycle.germinate(where, blueprint)
        for kind, specs in enumerate(self.seed_specs):
            hosts, slots = (where & (blueprint == kind)).nonzero(as_tuple=True)
            key = seeding.fold(self.context.key[hosts], _SEED, slots, self.epoch[hosts], kind)
            self.seed_theta[kind][hosts, slots] = initial(specs, key)
            self.seed_exp_avg[kind][hosts, slots] = 0.0
            self.seed_exp_avg_sq[kind][hosts, slots] = 0.0
        self.seed_steps = self.seed_steps.masked_fill(where, 0)
        self.statistics.germinated(where[: self.observed], self.validation_loss[: self.observed])

    def remove_unfinished(self, where: Tensor) -> None:
        """Culls the seeds still in TRAINING or BLENDING of the hosts `where` (bool [N]) and evaluates those anew."""
        stage = self.lifecycle.stage
        unfinished = ((stage == Stage.TRAINING) | (stage == Stage.BLENDING)) & where[:, None]
        self.lifecycle.fire(Event.CULL, unfinished)
        changed = unfinished.any(1).nonzero().squeeze(1)
        if len(changed):
            loss, _ = self._validate(changed, self.lifecycle.alpha[changed])
            self.validation_loss[changed] = loss
            watched = changed < self.observed
            self.statistics.revise_validation(changed[watched], loss[watched], self.lifecycle.stage)

    # ---- accounts -------------------------------------------------------------------------------------------------

    def seed_parameters(self, mask: Tensor) -> Tensor:
        """Parameters of the seeds in `mask` (bool [N, slots]), summed per host: float32 [N]."""
        sizes = self.seed_sizes[self.lifecycle.blueprint.clamp(min=0)]
        return (sizes * mask).sum(1).float()

    # ---- training -------------------------------------------------------------------------------------------------

    @torch.enable_grad()
    def train_epoch(self) -> None:
        """Trains every host for one epoch, evaluates it, refreshes the statistics and lets lifecycles move on."""
        self.lifecycle.begin_epoch()
        live = is_live(self.lifecycle.stage)
        self.extra_flops += (self.seed_flops[self.lifecycle.blueprint.clamp(min=0)] * live).sum(1)
        run = EpochRun(self)
        order = self._epoch_order()
        x_index = self.subset.gather(1, order.flatten(1)).view_as(order)
        labels = self.labels.gather(1, order.flatten(1)).view_as(order)
        losses = []
        for step in range(self.training.steps_per_epoch):
            losses.append(run.step(self.data.train_x[x_index[:, step]], labels[:, step]))
        run.finish()
        self.epoch += 1
        self._record(run, torch.stack(losses, dim=1).mean(1))
        self.lifecycle.end_epoch(self.lifecycle_spec)

    def _epoch_order(self) -> Tensor:
        """[N, steps, batch] positions within each host's training samples for the coming epoch."""
        steps, batch = self.training.steps_per_epoch, self.training.batch_size
        size = self.context.train_size
        shuffled = seeding.permutation(seeding.fold(self.context.key, _ORDER, self.epoch), size, self.subset.shape[1])
        position = torch.arange(steps * batch, device=self.device) % size[:, None]
        return shuffled.gather(1, position).view(-1, steps, batch)

    def _record(self, run: EpochRun, train_loss: Tensor) -> None:
        n = self.observed
        statistics = self.statistics
        statistics.train_loss = train_loss[:n]
        statistics.age_contributions(self.lifecycle.stage[:n])
        square, mean, update = (t[:n] for t in run.moments())
        squares = torch.stack([self.theta[:n].square(), square, update.square(), mean.square()], dim=1)
        # One small product per host: one large product would round differently for other numbers of hosts.
        rms = torch.bmm(squares, self.layer_of.expand(n, -1, -1)).sqrt()  # [n, 4, layers]
        statistics.layer_weight_rms, statistics.layer_gradient_rms, statistics.layer_update_rms = rms[:, :3].unbind(1)
        statistics.layer_signal_to_noise = rms[:, 3] / (rms[:, 1] + 1e-12)
        statistics.update_rms = (update**2).mean(1).sqrt()
        statistics.seed_gradient_rms = run.seed_gradient_rms()[:n]
        statistics.activation_backward_rms = run.backward_rms[:n]
        self._evaluate(torch.arange(self.hosts, device=self.device))

    # ---- evaluation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self, where: Tensor) -> None:
        """Validation loss of the hosts `where`, and for the observed ones among them activations and contributions.

        A slot's contribution is the validation loss with its alpha set to 0, minus the loss as is. Every (host, slot)
        with alpha > 0 is one more row of the same batched forward pass.
        """
        alpha = self.lifecycle.alpha
        blended = torch.zeros_like(alpha, dtype=torch.bool)
        blended[where] = alpha[where] > 0
        blended[self.observed :] = False
        pair_host, pair_slot = blended.nonzero(as_tuple=True)
        without = alpha[pair_host].clone()
        without[torch.arange(len(pair_host), device=self.device), pair_slot] = 0.0
        rows = torch.cat([where, pair_host])
        losses, activations = self._validate(rows, torch.cat([alpha[where], without]))
        self.validation_loss[where] = losses[: len(where)]
        watched = where < self.observed
        hosts = where[watched]
        if not len(hosts):
            return
        contribution = losses[len(where) :] - self.validation_loss[pair_host]
        self.statistics.contribution[pair_host, pair_slot] = contribution
        self.statistics.contribution_known[pair_host, pair_slot] = True
        self.statistics.contribution_age[pair_host, pair_slot] = 0
        self.statistics.activations[hosts] = activation_statistics(
            torch.stack([a[: len(where)][watched] for a in activations], dim=1)
        )
        self.statistics.record_validation(hosts, self.validation_loss[hosts], self.lifecycle)

    @torch.no_grad()
    def test_accuracy(self, where: Tensor) -> Tensor:
        """Accuracy of the hosts `where` (int64 [m]) on the test split, in [0, 1]: float32 [m].
        For reports only: it never enters an observation or a reward."""
        logits = self._logits_rows(where, self.lifecycle.alpha[where], self.data.test_x)[0]
        return (logits.argmax(-1) == self.data.test_y).float().mean(1)

    @torch.no_grad()
    def _validate(self, rows: Tensor, alpha: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Validation losses [M] of the hosts `rows` [M] with `alpha` [M, slots], and their activations."""
        logits, activations = self._logits_rows(rows, alpha, self.data.validation_x)
        return host.cross_entropy(logits, self.data.validation_y.expand(len(rows), -1)).mean(1), activations

    def _logits_rows(self, rows: Tensor, alpha: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Forward of the hosts `rows` [M] (repeats allowed), all on x [n, inputs], with `alpha` [M, slots]."""
        members: list[list[tuple[int, Tensor, dict[str, Tensor]]]] = [[] for _ in range(self.slots)]
        kinds = self.lifecycle.blueprint[rows].masked_fill(alpha == 0, -1)
        for slot in range(self.slots):
            for kind in range(len(self.catalogue)):
                index = (kinds[:, slot] == kind).nonzero().squeeze(1)
                if len(index):
                    flat = self.seed_theta[kind][rows[index], slot]
                    members[slot].append((kind, index, self.seed_views(kind, flat)))

        def graft(slot: int, h: Tensor) -> Tensor:
            added = h
            for kind, index, parameters in members[slot]:
                delta = self.catalogue[kind].delta(parameters, h[index])
                added = added.index_add(0, index, alpha[index, slot, None, None] * delta)
            return added

        parameters = views(self.host_specs, self.theta[rows])
        return host.forward(self.spec, parameters, x.expand(len(rows), -1, -1), graft)
