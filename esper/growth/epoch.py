"""One epoch of optimisation of a whole population: forward, backward and Adam over one flat vector."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.growth import host
from esper.growth.lifecycle import Stage, is_live
from esper.growth.parameters import views
from esper.growth.state import PopulationState


class EpochRun:
    """One epoch's worth of optimisation over one flat vector: all host parameters, then those of every live seed.

    A flat vector makes Adam a handful of operations whatever lives in the population, and the gradient of a `split` is
    one concatenation.
    """

    def __init__(self, population: PopulationState):
        p = self.population = population
        stage, kind = p.lifecycle.stage, p.lifecycle.blueprint
        self.groups: list[tuple[int, int, Tensor]] = []  # (slot, blueprint, hosts)
        for slot in range(p.slots):
            for blueprint in range(len(p.catalogue)):
                hosts = (is_live(stage[:, slot]) & (kind[:, slot] == blueprint)).nonzero().squeeze(1)
                if len(hosts):
                    self.groups.append((slot, blueprint, hosts))
        self.theta = self._gather(p.theta, p.seed_theta)
        self.exp_avg = self._gather(p.exp_avg, p.seed_exp_avg)
        self.exp_avg_sq = self._gather(p.exp_avg_sq, p.seed_exp_avg_sq)
        # A row is one host or one seed; every element of `theta` belongs to one.
        counts = [p.hosts] + [len(hosts) for _, _, hosts in self.groups]
        widths = [p.theta.shape[1]] + [p.seed_theta[b].shape[2] for _, b, _ in self.groups]
        self.shapes = list(zip(counts, widths, strict=True))
        row_width = torch.cat([torch.full((c,), w, device=p.device) for c, w in self.shapes])
        self.row = torch.repeat_interleave(torch.arange(len(row_width), device=p.device), row_width)
        everyone = [torch.arange(p.hosts, device=p.device)] + [hosts for _, _, hosts in self.groups]
        self.learning_rate = p.context.learning_rate[torch.cat(everyone)].double()
        self.steps = torch.cat([p.steps] + [p.seed_steps[hosts, slot] for slot, _, hosts in self.groups])
        self.alpha = [p.lifecycle.alpha[hosts, slot].view(-1, 1, 1) for slot, _, hosts in self.groups]
        # bool [m, 1, 1] per group, or None where no seed of it is in TRAINING
        self.isolated: list[Tensor | None] = []
        for slot, _, hosts in self.groups:
            isolated = stage[hosts, slot] == Stage.TRAINING
            self.isolated.append(isolated.view(-1, 1, 1) if isolated.any() else None)
        self.backward_rms = torch.zeros(p.hosts, p.slots, device=p.device)
        self.taken = 0

    def _gather(self, host_state: Tensor, seed_state: list[Tensor]) -> Tensor:
        parts = [host_state] + [seed_state[b][hosts, slot] for slot, b, hosts in self.groups]
        return torch.cat([part.reshape(-1) for part in parts])

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([c * w for c, w in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimiser step of all on x [N, batch, inputs], y [N, batch]; returns the loss [N] before it."""
        p = self.population
        self.theta.requires_grad_(True)
        host_flat, *seed_flat = self._split(self.theta)
        seeds = [p.seed_views(b, flat) for (_, b, _), flat in zip(self.groups, seed_flat, strict=True)]

        def graft(slot: int, h: Tensor) -> Tensor:
            grafted = h
            for group, (at, blueprint, hosts) in enumerate(self.groups):
                if at != slot:
                    continue
                isolated = self.isolated[group]
                source = h.index_select(0, hosts)
                # In TRAINING the seed learns on a detached input by a straight-through gradient: `delta - delta` is
                # exactly 0, so that the host trains as if the seed were not there (also where it has overflowed).
                if isolated is not None:
                    source = torch.where(isolated, source.detach(), source)
                delta = p.catalogue[blueprint].delta(seeds[group], source)
                through = self.alpha[group] * delta
                if isolated is not None:
                    through = torch.where(isolated, (delta - delta.detach()).nan_to_num(0.0), through)
                grafted = grafted.index_add(0, hosts, through)
            return grafted

        logits, activations = host.forward(p.spec, views(p.host_specs, host_flat), x, graft)
        losses = host.cross_entropy(logits, y).mean(1)
        last = self.taken == p.training.steps_per_epoch - 1
        wanted = [self.theta, *activations] if last else [self.theta]
        gradient, *signals = torch.autograd.grad(losses.sum(), wanted)
        self.theta = self.theta.detach()
        if last:
            self.backward_rms = torch.stack([s.square().mean((1, 2)).sqrt() for s in signals], dim=1)
        self._adam(gradient)
        self.taken += 1
        return losses.detach()

    def _adam(self, gradient: Tensor) -> None:
        t = self.population.training
        self.steps += 1
        self.exp_avg.lerp_(gradient, 1 - t.beta1)
        self.exp_avg_sq.mul_(t.beta2).addcmul_(gradient, gradient, value=1 - t.beta2)
        size = (self.learning_rate / (1 - t.beta1 ** self.steps.double())).float()
        root = (1 - t.beta2 ** self.steps.double()).sqrt().float()
        denominator = self.exp_avg_sq.sqrt().div_(root[self.row]).add_(t.epsilon)
        self.theta -= size[self.row] * self.exp_avg / denominator

    def finish(self) -> None:
        """Writes parameters and moments back to the population."""
        p = self.population
        targets = ((self.theta, "theta"), (self.exp_avg, "exp_avg"), (self.exp_avg_sq, "exp_avg_sq"))
        for flat, name in targets:
            host_part, *seed_parts = self._split(flat)
            setattr(p, name, host_part)
            for (slot, b, hosts), part in zip(self.groups, seed_parts, strict=True):
                getattr(p, f"seed_{name}")[b][hosts, slot] = part
        p.steps += self.taken
        for slot, _, hosts in self.groups:
            p.seed_steps[hosts, slot] += self.taken

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the host parameters, each [N, P]: the running mean of g^2, that of g, and the last update's size.

        Adam keeps both means already, so gradient scale and signal-to-noise cost nothing more.
        """
        t, p = self.population.training, self.population
        steps = p.steps.double()[:, None]
        mean = (p.exp_avg / (1 - t.beta1**steps)).float()
        square = (p.exp_avg_sq / (1 - t.beta2**steps)).float()
        return square, mean, p.context.learning_rate[:, None] * mean / (square.sqrt() + t.epsilon)

    def seed_gradient_rms(self) -> Tensor:
        """[N, slots], 0 where no seed lives."""
        p, t = self.population, self.population.training
        rms = torch.zeros(p.hosts, p.slots, device=p.device)
        for (slot, _, hosts), part in zip(self.groups, self._split(self.exp_avg_sq)[1:], strict=True):
            debias = 1 - t.beta2 ** p.seed_steps[hosts, slot].double()
            rms[hosts, slot] = (part.mean(1) / debias).sqrt().float()
        return rms
