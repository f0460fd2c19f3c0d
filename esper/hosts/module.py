"""A host that is an ordinary module: the same lifecycle, actions and observation graph as the hosts of a population.

Whoever trains the module calls `begin_epoch` before and `end_epoch` after each epoch; seeds are added to its optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.growth import blueprints
from esper.growth.blueprints import Blueprint, Site
from esper.growth.context import Context
from esper.growth.host import Trace
from esper.growth.lifecycle import Event, Lifecycle, LifecycleSpec, Stage, is_live
from esper.growth.population import SEED
from esper.growth.statistics import SAMPLES, Statistics, activation_statistics, growth_gradient, statistics_samples
from esper.hosts import optimizers
from esper.hosts.anatomy import Anatomy, ModuleTables
from esper.hosts.budget import Budget
from esper.hosts.grafting import Graft, Seed
from esper.runtime import seeding

Losses = Callable[[int | None], Tensor]
"""Losses [n] of the module on the first n validation samples, in one forward pass, or on all; in eval mode, without
gradients."""

_TOKENS = 8192  # of the last minibatch, that the gradient of new units is estimated from


class ModuleHost:
    """A module that grows; see `esper.growth.growable.Growable`, of which it is one host.

    Args:
        model: is hooked, and given seeds.
        anatomy: of the model, with the slots.
        catalogue: names of the blueprints that may be germinated.
        optimizer: of the model's parameters.
        losses: evaluates the model; None leaves that to the caller of `end_epoch`.
        lifecycle: rules of the lifecycle.
        budget: what seeds may cost.
        train_size: samples that the model is trained on.
        key: of the seeds' initial values.

    Raises:
        KeyError: an unknown blueprint.
    """

    hosts = 1

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        catalogue: Sequence[str],
        optimizer: Optimizer,
        losses: Losses | None,
        lifecycle: LifecycleSpec,
        budget: Budget,
        train_size: int,
        key: int = 0,
    ):
        self.model, self.anatomy, self.optimizer = model, anatomy, optimizer
        self.losses, self.lifecycle_spec, self.budget = losses, lifecycle, budget
        self.catalogue: list[Blueprint] = [blueprints.get(name) for name in catalogue]
        self.slots = len(anatomy.places)
        self.device = next(model.parameters()).device
        decay = float(optimizer.param_groups[0].get("weight_decay", 0.0))
        self._tables = ModuleTables(anatomy, self.catalogue, optimizers.momentum(optimizer), decay)
        modules = dict(model.named_modules())
        self.grafts = [Graft(modules[place.slot.name], place) for place in self.anatomy.places]
        self.fits = torch.tensor(
            [
                [b.fits(place.site) and (place.same or not b.reads_source) for b in self.catalogue]
                for place in self.anatomy.places
            ]
        )  # bool [S, K]
        width = max(place.site.width for place in self.anatomy.places)
        self.context = Context.plain(torch.tensor([key]), width, self.slots)
        self.context.learning_rate[:] = float(optimizer.param_groups[0]["lr"])
        self.context.train_size[:] = train_size
        self.context.seeds[:] = budget.seeds
        self.lifecycle = Lifecycle.dormant(1, self.slots)
        layers = len(self.anatomy.layers)
        self.statistics = Statistics.empty(1, layers, self.slots, len(self.catalogue), self.device)
        self.epoch, self.germinated = torch.zeros(2, 1, dtype=torch.int64)
        self.extra_flops = torch.zeros(1)
        self.seed_steps = torch.zeros(1, self.slots, dtype=torch.int64, device=self.device)
        self.validation_loss = torch.zeros(1, device=self.device)
        self._steps, self._squares = 0, None  # type: tuple[int, tuple[Tensor, Tensor] | None]
        self._counting = optimizer.register_step_post_hook(self._count)
        if losses is not None:
            self.measure()

    def tables(self) -> ModuleTables:
        """See Growable."""
        return self._tables

    def moved(self, value: Tensor) -> Tensor:
        """See Growable."""
        return value.to(self.device)

    def _count(self, *_: Any) -> None:
        self.seed_steps += self.moved(is_live(self.lifecycle.stage))
        self._steps += 1
        # Without running means, gradients may be gone when the epoch ends: those of its second half stand for them.
        if self._steps.bit_count() == 1 and not optimizers.has_moments(self.optimizer):
            self._squares = self._measure_squares()

    def _measure_squares(self) -> tuple[Tensor, Tensor]:
        """What `optimizers.squares` says of every layer [L, 4] and of every slot's seed [S, 4], 0 without one."""
        layers = [layer.parameters for layer in self.anatomy.layers]
        seeds = [() if graft.seed is None else tuple(graft.seed.parameters()) for graft in self.grafts]
        sums = optimizers.squares(self.optimizer, [*layers, *seeds])
        return sums[: len(layers)], sums[len(layers) :]

    # ---- sizes and costs ------------------------------------------------------------------------------------------

    def host_parameters(self) -> Tensor:
        """float32 [1], without seeds."""
        return self._tables.parameters

    def host_flops(self) -> Tensor:
        """float32 [1], multiply-adds for one sample, forward, without seeds."""
        return self._tables.flops

    def seed_parameters(self, mask: Tensor) -> Tensor:
        """See Growable."""
        return (self._per_slot(self._tables.seed_parameters) * mask).sum(1)

    def seed_flops_now(self, mask: Tensor) -> Tensor:
        """float32 [1], multiply-adds of the seeds in `mask` (bool [1, S]) for one sample."""
        return (self._per_slot(self._tables.seed_flops) * mask).sum(1)

    def _per_slot(self, cost: Tensor) -> Tensor:
        return cost.gather(1, self.lifecycle.blueprint.clamp(min=0).T).T

    def germinable(self) -> Tensor:
        """See Growable; what the budget has no room for is left out."""
        room = (self.germinated < self.context.seeds)[:, None, None] & self.fits
        live, tables = is_live(self.lifecycle.stage), self._tables
        for limit, own, seeds, now in (
            (self.budget.parameters, tables.parameters, tables.seed_parameters, self.seed_parameters(live)),
            (self.budget.flops, tables.flops, tables.seed_flops, self.seed_flops_now(live)),
        ):
            if limit is not None:
                room = room & (now[:, None, None] + seeds <= (limit - 1) * own[:, None, None])
        return room

    # ---- growing --------------------------------------------------------------------------------------------------

    def germinate(self, where: Tensor, blueprint: Tensor) -> None:
        """See Growable.

        Raises:
            ValueError: a slot of `where` is not DORMANT.
        """
        self.lifecycle.germinate(where, blueprint)
        self.germinated += where.sum(1)
        for slot in where[0].nonzero().flatten().tolist():
            kind = int(blueprint[0, slot])
            key = seeding.fold(self.context.key[0], SEED, slot, self.epoch[0], kind)
            self._plant(slot, kind, key)
        self.seed_steps = self.seed_steps.masked_fill(self.moved(where), 0)
        self.statistics.germinated(self.moved(where), self.validation_loss)

    def _plant(self, slot: int, kind: int, key: Tensor) -> Seed:
        graft = self.grafts[slot]
        place, zero = graft.place, self.lifecycle_spec.zero_init
        seed = Seed(self.catalogue[kind], place.slot, place.site, key, zero).to(self.device)
        like = self.anatomy.layers[graft.place.own].parameters[0]
        optimizers.add(self.optimizer, seed.parameters(), like)
        graft.seed = seed
        return seed

    def _settle(self) -> None:
        """Brings the grafts up to the lifecycle: culled seeds go, the others are added as it says."""
        lives = is_live(self.lifecycle.stage)[0].tolist()
        for slot, graft in enumerate(self.grafts):
            if graft.seed is not None and not lives[slot]:
                optimizers.remove(self.optimizer, graft.seed.parameters())
                graft.seed = None
            training = bool(self.lifecycle.stage[0, slot] == Stage.TRAINING)
            graft.set(float(self.lifecycle.alpha[0, slot]), training)

    def remove_unfinished(self) -> None:
        """Culls the seeds still in TRAINING or BLENDING and, if it can, evaluates the module anew."""
        stage = self.lifecycle.stage
        unfinished = (stage == Stage.TRAINING) | (stage == Stage.BLENDING)
        if unfinished.any():
            self.lifecycle.fire(Event.CULL, unfinished)
            self._settle()
            if self.losses is not None:
                self.validation_loss = self.losses(None).mean()[None]
                self.statistics.revise_validation(torch.tensor([0]), self.validation_loss, self.lifecycle.stage)

    def release(self) -> None:
        """Takes every hook out of the module and the optimiser, and with them the seeds."""
        self._counting.remove()
        for graft in self.grafts:
            graft.remove()

    # ---- epochs ---------------------------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """To be called before the module is trained for an epoch."""
        self._steps, self._squares = 0, None
        self.lifecycle.begin_epoch()
        self.extra_flops += self.seed_flops_now(is_live(self.lifecycle.stage))
        self._settle()

    def end_epoch(self, train_loss: float, validation_loss: float | None = None) -> None:
        """To be called after the module has been trained for an epoch: evaluates it, refreshes the statistics and lets
        the lifecycle move on.

        Args:
            train_loss: mean of the epoch, NaN where it is not known.
            validation_loss: where the caller has evaluated the module; contributions are then not known, and
                activations are those of its latest forward pass.
        """
        self.epoch += 1
        self._record(train_loss)
        self.measure(validation_loss)
        self.lifecycle.end_epoch(self.lifecycle_spec)
        self._settle()

    def measure(self, validation_loss: float | None = None) -> None:
        """Validation loss, activations and contributions as they are now; see `end_epoch`."""
        if validation_loss is None:
            self._evaluate()
        else:
            self._measure_activations()
            self._note(self.validation_loss.new_tensor([validation_loss]))

    def _record(self, train_loss: float) -> None:
        s = self.statistics
        s.train_loss[:] = train_loss
        s.age_contributions(self.moved(self.lifecycle.stage))
        layers = self.anatomy.layers
        sums, seeds = self._squares or self._measure_squares()
        counts = torch.tensor([float(sum(p.numel() for p in layer.parameters)) for layer in layers])
        rms = self.moved((sums / counts[:, None]).sqrt())
        s.layer_weight_rms, s.layer_gradient_rms, s.layer_update_rms = (rms[None, :, i] for i in range(3))
        s.layer_signal_to_noise = rms[None, :, 3] / (rms[None, :, 1] + 1e-12)
        s.update_rms = self.moved((sums[:, 2].sum() / counts.sum()).sqrt())[None]
        s.seed_gradient_rms = torch.zeros_like(s.seed_gradient_rms)
        for slot, graft in enumerate(self.grafts):
            if graft.seed is not None:
                count = sum(p.numel() for p in graft.seed.parameters())
                s.seed_gradient_rms[0, slot] = (seeds[slot, 1] / count).sqrt()
            if graft.learnt is not None:
                slot_, (read, signal) = graft.place.slot, graft.learnt
                norm = torch.linalg.vector_norm(signal, dtype=torch.float32)
                s.activation_backward_rms[0, slot] = norm / signal.numel() ** 0.5
                few = max(_TOKENS // slot_.site(signal.shape).tokens, 1)
                part = [slot_.rows(x[:few])[None].float() for x in (read, signal)]
                share = min(few / len(signal), 1)
                s.growth_gradient[0, slot] = growth_gradient(part[:1], part[1:])[0, 0] / share
                graft.learnt = None

    def _evaluate(self) -> None:
        """As `Population` measures them."""
        s, losses = self.statistics, self.losses
        assert losses is not None
        few = losses(SAMPLES)
        first = few.mean()
        self._measure_activations()
        alphas = self.lifecycle.alpha[0].tolist()
        for slot, alpha in enumerate(alphas):
            if alpha > 0:
                self.grafts[slot].set(0.0, False)
                s.contribution[0, slot] = losses(SAMPLES).mean() - first
                self.grafts[slot].set(alpha, False)
                s.contribution_known[0, slot] = True
                s.contribution_age[0, slot] = 0
        # Fewer than were asked for are all there are.
        self._note((first if len(few) < SAMPLES else losses(None).mean())[None])

    def _measure_activations(self) -> None:
        alike: dict[Site, list[int]] = {}  # slots that can be measured at once
        for slot, graft in enumerate(self.grafts):
            assert graft.seen is not None
            alike.setdefault(graft.place.slot.site(graft.seen[1].shape), []).append(slot)
        for site, slots in alike.items():
            few, rows = statistics_samples(site.tokens), []
            for slot in slots:
                graft = self.grafts[slot]
                assert graft.seen is not None
                rows.append(graft.place.slot.rows(graft.seen[1][:few])[None].float())
            # What says 0 is taken for flat, which is so behind ReLUs.
            trace = Trace(rows, rows, [x.ne(0).float() for x in rows])
            width = self.moved(torch.tensor([site.width]))
            self.statistics.activations[0, slots] = activation_statistics(trace, width)[0]

    def _note(self, validation_loss: Tensor) -> None:
        self.validation_loss = validation_loss
        lives = self.moved(self.lifecycle.blueprint)
        self.statistics.record_validation(torch.tensor([0]), validation_loss, lives)

    def diverged(self) -> bool:
        """Whether a loss or a parameter is not finite, those of seeds included that reach the host."""
        seeds = [p for graft in self.grafts if graft.seed is not None and graft.active for p in graft.seed.parameters()]
        losses = torch.stack([self.validation_loss, self.statistics.train_loss])
        return not all(bool(x.isfinite().all()) for x in [*self.model.parameters(), *seeds, losses])

    # ---- saving ---------------------------------------------------------------------------------------------------

    _TENSORS = ("epoch", "germinated", "extra_flops", "seed_steps", "validation_loss")

    def state_dict(self) -> dict[str, Any]:
        """Everything of growing that the next epochs depend on, as tensors in plain containers. The module and its
        optimiser, whose state holds the seeds' moments, are the caller's to save."""
        return {
            # In the order in which the optimiser, whose state has no names, has met them.
            "seeds": {
                str(slot): {name: value.detach().clone() for name, value in seed.weights.items()}
                for slot, seed in self._planted()
            },
            "lifecycle": {name: value.clone() for name, value in vars(self.lifecycle).items()},
            "statistics": {name: value.clone() for name, value in vars(self.statistics).items()},
            **{name: getattr(self, name).clone() for name in self._TENSORS},
        }

    def _planted(self) -> list[tuple[int, Seed]]:
        """Slots with their seeds in the order in which the optimiser has met these."""
        met = {id(p): place for place, p in enumerate(p for g in self.optimizer.param_groups for p in g["params"])}
        seeds = [(slot, graft.seed) for slot, graft in enumerate(self.grafts) if graft.seed is not None]
        return sorted(seeds, key=lambda planted: met[id(next(planted[1].parameters()))])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, and gives the optimiser the seeds' parameters: its own state is to be
        loaded afterwards."""
        for part in ("lifecycle", "statistics"):
            for name, value in state[part].items():
                setattr(getattr(self, part), name, value.clone())
        for name in self._TENSORS:
            setattr(self, name, state[name].clone())
        for graft in self.grafts:
            if graft.seed is not None:
                optimizers.remove(self.optimizer, graft.seed.parameters())
                graft.seed = None
        for slot, weights in state["seeds"].items():
            seed = self._plant(int(slot), int(self.lifecycle.blueprint[0, int(slot)]), self.context.key[0])
            with torch.no_grad():
                for name, value in weights.items():
                    seed.weights[name].copy_(value)
        self._settle()
