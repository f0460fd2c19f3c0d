"""A host that is an ordinary module: the same lifecycle, actions and observation graph as the hosts of a population.

Whoever trains the module calls `begin_epoch` before and `end_epoch` after each epoch; seeds are added to its optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.growth import blueprints
from esper.growth.blueprints import Blueprint
from esper.growth.context import Context
from esper.growth.host import Trace
from esper.growth.lifecycle import Event, Lifecycle, LifecycleSpec, Stage, is_live
from esper.growth.population import SEED
from esper.growth.statistics import SAMPLES, Statistics, activation_statistics, growth_gradient, statistics_samples
from esper.hosts import optimizers
from esper.hosts.anatomy import Anatomy, ModuleTables, Slot
from esper.hosts.grafting import Graft, Seed
from esper.runtime import seeding

Losses = Callable[[int | None], Tensor]
"""Losses [n] of the module on the first n validation samples, in one forward pass, or on all; in eval mode, without
gradients."""


class ModuleHost:
    """A module that grows; see `esper.growth.growable.Growable`, of which it is one host.

    Args:
        model: is hooked, and given seeds.
        slots: where seeds can live, in the order of the forward pass.
        catalogue: names of the blueprints that may be germinated.
        optimizer: of the model's parameters.
        sample: arguments of a forward pass.
        losses: evaluates the model.
        lifecycle: rules of the lifecycle.
        seeds: germinations allowed.
        train_size: samples that the model is trained on.
        key: of the seeds' initial values.

    Raises:
        ConfigError: a slot does not fit the module; names it.
        KeyError: an unknown blueprint.
    """

    hosts = 1

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[Slot],
        catalogue: Sequence[str],
        optimizer: Optimizer,
        sample: tuple[Any, ...],
        losses: Losses,
        lifecycle: LifecycleSpec,
        seeds: int,
        train_size: int,
        key: int = 0,
    ):
        self.model, self.optimizer, self.losses, self.lifecycle_spec = model, optimizer, losses, lifecycle
        self.catalogue: list[Blueprint] = [blueprints.get(name) for name in catalogue]
        self.anatomy = Anatomy(model, slots, sample)
        self.slots = len(slots)
        self.device = next(model.parameters()).device
        decay = float(optimizer.param_groups[0].get("weight_decay", 0.0))
        self._tables = ModuleTables(self.anatomy, self.catalogue, optimizers.momentum(optimizer), decay)
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
        self.context.seeds[:] = seeds
        self.lifecycle = Lifecycle.dormant(1, self.slots)
        layers = len(self.anatomy.layers)
        self.statistics = Statistics.empty(1, layers, self.slots, len(self.catalogue), self.device)
        self.epoch, self.germinated = torch.zeros(2, 1, dtype=torch.int64)
        self.extra_flops = torch.zeros(1)
        self.seed_steps = torch.zeros(1, self.slots, dtype=torch.int64, device=self.device)
        self.validation_loss = torch.zeros(1, device=self.device)
        self._counting = optimizer.register_step_post_hook(self._count)
        self._evaluate()

    def tables(self) -> ModuleTables:
        """See Growable."""
        return self._tables

    def moved(self, value: Tensor) -> Tensor:
        """See Growable."""
        return value.to(self.device)

    def _count(self, *_: Any) -> None:
        self.seed_steps += self.moved(is_live(self.lifecycle.stage))

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
        """See Growable."""
        return (self.germinated < self.context.seeds)[:, None, None] & self.fits

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
        seed = Seed(self.catalogue[kind], graft.place, key, self.lifecycle_spec.zero_init).to(self.device)
        optimizers.add(self.optimizer, seed.parameters())
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
        """Culls the seeds still in TRAINING or BLENDING and evaluates the module anew."""
        stage = self.lifecycle.stage
        unfinished = (stage == Stage.TRAINING) | (stage == Stage.BLENDING)
        if unfinished.any():
            self.lifecycle.fire(Event.CULL, unfinished)
            self._settle()
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
        self.lifecycle.begin_epoch()
        self.extra_flops += self.seed_flops_now(is_live(self.lifecycle.stage))
        self._settle()

    def end_epoch(self, train_loss: float) -> None:
        """To be called after the module has been trained for an epoch, whose mean loss was `train_loss`: evaluates it,
        refreshes the statistics and lets the lifecycle move on."""
        self.epoch += 1
        self._record(train_loss)
        self._evaluate()
        self.lifecycle.end_epoch(self.lifecycle_spec)
        self._settle()

    def _record(self, train_loss: float) -> None:
        s = self.statistics
        s.train_loss[:] = train_loss
        s.age_contributions(self.moved(self.lifecycle.stage))
        layers = self.anatomy.layers
        sums = torch.stack([optimizers.squares(self.optimizer, layer.parameters) for layer in layers])  # [L, 4]
        counts = torch.tensor([float(sum(p.numel() for p in layer.parameters)) for layer in layers])
        rms = self.moved((sums / counts[:, None]).sqrt())
        s.layer_weight_rms, s.layer_gradient_rms, s.layer_update_rms = (rms[None, :, i] for i in range(3))
        s.layer_signal_to_noise = rms[None, :, 3] / (rms[None, :, 1] + 1e-12)
        s.update_rms = self.moved((sums[:, 2].sum() / counts.sum()).sqrt())[None]
        s.seed_gradient_rms = torch.zeros_like(s.seed_gradient_rms)
        for slot, graft in enumerate(self.grafts):
            if graft.seed is not None:
                own = list(graft.seed.parameters())
                square = optimizers.squares(self.optimizer, own)[1] / sum(p.numel() for p in own)
                s.seed_gradient_rms[0, slot] = square.sqrt()
            if graft.learnt is not None:
                source, signal = (graft.place.slot.rows(x) for x in graft.learnt)
                s.activation_backward_rms[0, slot] = signal.square().mean().sqrt()
                s.growth_gradient[0, slot] = growth_gradient([source[None]], [signal[None]])[0, 0]
                graft.learnt = None

    def _evaluate(self) -> None:
        """Validation loss, activations and contributions, as `Population` measures them."""
        s, everyone = self.statistics, torch.tensor([0])
        losses = self.losses(SAMPLES)
        first = losses.mean()
        for slot, graft in enumerate(self.grafts):
            assert graft.seen is not None
            slot_, site = graft.place.slot, graft.place.slot.site(graft.seen[1])
            few = statistics_samples(site.tokens) * site.tokens
            source, rows = (slot_.rows(x)[None, :few] for x in graft.seen)
            width = torch.tensor([site.width])
            # What says 0 is taken for flat, which is so behind ReLUs.
            trace = Trace([rows], [source], [rows.ne(0).float()])
            s.activations[0, slot] = activation_statistics(trace, self.moved(width))[0, 0]
        alphas = self.lifecycle.alpha[0].tolist()
        for slot, alpha in enumerate(alphas):
            if alpha > 0:
                self.grafts[slot].set(0.0, False)
                s.contribution[0, slot] = self.losses(SAMPLES).mean() - first
                self.grafts[slot].set(alpha, False)
                s.contribution_known[0, slot] = True
                s.contribution_age[0, slot] = 0
        # Fewer than were asked for are all there are.
        self.validation_loss = (first if len(losses) < SAMPLES else self.losses(None).mean())[None]
        s.record_validation(everyone, self.validation_loss, self.moved(self.lifecycle.blueprint))

    def diverged(self) -> bool:
        """Whether a loss or a parameter is not finite, those of seeds included that reach the host."""
        seeds = [p for graft in self.grafts if graft.seed is not None and graft.active for p in graft.seed.parameters()]
        losses = torch.stack([self.validation_loss, self.statistics.train_loss])
        return not all(bool(x.isfinite().all()) for x in [*self.model.parameters(), *seeds, losses])

    # ---- saving ---------------------------------------------------------------------------------------------------

    _TENSORS = ("epoch", "germinated", "extra_flops", "seed_steps", "validation_loss")

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epochs depend on, but for the data's order, as tensors in plain containers."""
        return {
            "model": {name: value.clone() for name, value in self.model.state_dict().items()},
            # In the order in which the optimiser, whose state has no names, has met them.
            "seeds": {
                str(slot): {name: value.detach().clone() for name, value in seed.weights.items()}
                for slot, seed in self._planted()
            },
            "optimizer": deepcopy(self.optimizer.state_dict()),
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
        """Restores what `state_dict` returned."""
        for part in ("lifecycle", "statistics"):
            for name, value in state[part].items():
                setattr(getattr(self, part), name, value.clone())
        for name in self._TENSORS:
            setattr(self, name, state[name].clone())
        self.model.load_state_dict(state["model"])
        for graft in self.grafts:
            if graft.seed is not None:
                optimizers.remove(self.optimizer, graft.seed.parameters())
                graft.seed = None
        for slot, weights in state["seeds"].items():
            seed = self._plant(int(slot), int(self.lifecycle.blueprint[0, int(slot)]), self.context.key[0])
            with torch.no_grad():
                for name, value in weights.items():
                    seed.weights[name].copy_(value)
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))  # which would share its tensors
        self._settle()
