"""One epoch of optimisation of a whole population: forward, backward and Adam over one flat vector."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam

from esper.growth import host
from esper.growth.conditions import LEARNING_RATE_SPIKE, Condition
from esper.growth.graft import Grafts
from esper.growth.lifecycle import Stage, is_live
from esper.growth.state import PopulationState
from esper.growth.statistics import growth_gradient

_LANES = 64  # a fused kernel rounds the elements that do not fill a SIMD vector differently


class EpochRun:
    """One epoch's worth of optimisation over one flat vector: all host parameters, then the seeds of each blueprint.

    A flat vector makes Adam a handful of operations whatever lives in the population, and the gradient of a `split` is
    one concatenation.
    """

    def __init__(self, population: PopulationState):
        p = self.population = population
        stage, kinds = p.lifecycle.stage, p.lifecycle.blueprint
        everyone = torch.arange(p.hosts)
        live = kinds.masked_fill(~is_live(stage), -1)
        self.grafts = Grafts(p, everyone, live, p.lifecycle.alpha, stage == Stage.TRAINING)
        blocks = self.grafts.blocks
        # A row is one host or one seed.
        self.shapes = [(p.hosts, p.table.size)] + [(len(h), p.seed_tables[k].size) for k, h, _, _ in blocks]
        self.sizes = [rows * width for rows, width in self.shapes]
        self.sizes.append(-sum(self.sizes) % _LANES)
        rates = p.context.learning_rate * self._spike()
        self.host_rate = p.moved(rates)
        self.rates = [p.moved(rates.double())] + [p.moved(rates[h].double()) for _, h, _, _ in blocks]
        self.steps = [p.steps] + [p.seed_steps[h, s] for _, h, s, _ in blocks]
        self.theta = self._gather(p.theta, p.seed_theta)
        self.exp_avg = self._gather(p.exp_avg, p.seed_exp_avg)
        self.exp_avg_sq = self._gather(p.exp_avg_sq, p.seed_exp_avg_sq)
        self.update = torch.zeros_like(self.theta)
        self.at, self.gain = p.activations(), p.gain()
        self.backward_rms = torch.zeros(p.hosts, p.slots, device=p.device)
        self.growth_gradient = torch.zeros(p.hosts, p.slots, device=p.device)
        self.taken = 0

    def _spike(self) -> Tensor:
        """[N], the factor on the learning rate: a stage that saturates mid-training does so in a spike."""
        context = self.population.context
        now = context.strike_epoch == self.population.epoch[:, None]
        return torch.where((now & (context.strike == Condition.SATURATED)).any(1), LEARNING_RATE_SPIKE, 1.0)

    def _gather(self, host_state: Tensor, seed_state: list[Tensor]) -> Tensor:
        parts = [host_state, *self.grafts.gathered(seed_state), host_state.new_zeros(self.sizes[-1])]
        return torch.cat([part.reshape(-1) for part in parts])

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=False)]

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimiser step of all on x [N, batch, tokens, inputs], y [N, batch] or [N, batch, tokens]; returns the
        loss [N] before it."""
        p = self.population
        self.theta.requires_grad_(True)
        host_flat, *seed_flats = self._split(self.theta)
        self.grafts.use(seed_flats)
        logits, trace = host.forward(p.spec, p.table.views(host_flat), x, self.at, self.gain, self.grafts)
        losses = host.cross_entropy(logits, y.flatten(1)).mean(1)
        last = self.taken == p.training.steps_per_epoch - 1 and p.setup.measured
        wanted = [self.theta, *trace.outputs] if last else [self.theta]
        gradient, *signals = torch.autograd.grad(losses.sum(), wanted)
        self.theta = self.theta.detach()
        if last:
            self.backward_rms = torch.stack([s.square().mean((1, 2)).sqrt() for s in signals], dim=1)
            self.growth_gradient = growth_gradient([s.detach() for s in trace.sources], signals)
        self.taken += 1
        self._adam(gradient)
        return losses.detach()

    def _adam(self, gradient: Tensor) -> None:
        """theta -= rate * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + epsilon), the efficient order of Adam's
        section 2, since every row has a t and a rate of its own."""
        t = self.population.training
        self.update.zero_()
        # One pass for m, v and m / (sqrt(v) + epsilon); so late a step has no bias left to correct.
        late = torch.full((), 1e9, device=self.theta.device)
        adam(
            [self.update],
            [gradient],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [late],
            fused=True,
            amsgrad=False,
            beta1=t.beta1,
            beta2=t.beta2,
            lr=1.0,
            weight_decay=0.0,
            eps=t.epsilon,
            maximize=False,
        )
        thetas, updates = self._split(self.theta), self._split(self.update)
        for theta, update, rate, before in zip(thetas, updates, self.rates, self.steps, strict=True):
            count = (before + self.taken).double()
            size = rate * (1 - t.beta2**count).sqrt() / (1 - t.beta1**count)
            theta.addcmul_(update, size.float()[:, None])

    def finish(self) -> None:
        """Writes parameters and moments back to the population."""
        p = self.population
        targets = ((self.theta, "theta"), (self.exp_avg, "exp_avg"), (self.exp_avg_sq, "exp_avg_sq"))
        for flat, name in targets:
            host_part, *seed_parts = self._split(flat)
            setattr(p, name, host_part)
            for (kind, hosts, slots, _), part in zip(self.grafts.blocks, seed_parts, strict=True):
                getattr(p, f"seed_{name}")[kind][hosts, slots] = part
        p.steps += self.taken
        for _, hosts, slots, _ in self.grafts.blocks:
            p.seed_steps[hosts, slots] += self.taken

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the host parameters, each [N, P]: the running mean of g^2, that of g, and the last update's size.

        Adam keeps both means already, so gradient scale and signal-to-noise cost nothing more.
        """
        t, p = self.population.training, self.population
        steps = p.steps.double()[:, None]
        mean = p.exp_avg / (1 - t.beta1**steps).float()
        square = p.exp_avg_sq / (1 - t.beta2**steps).float()
        return square, mean, self.host_rate[:, None] * mean / (square.sqrt() + t.epsilon)

    def seed_gradient_rms(self) -> Tensor:
        """[N, slots], 0 where no seed lives."""
        p, t = self.population, self.population.training
        rms = torch.zeros(p.hosts, p.slots, device=p.device)
        for (kind, hosts, slots, _), part in zip(self.grafts.blocks, self._split(self.exp_avg_sq)[1:], strict=True):
            debias = 1 - t.beta2 ** p.seed_steps[hosts, slots].double()
            owned = p.seed_tables[kind].count[p.moved(p.context.width[hosts])]
            rms[hosts, slots] = (part.sum(1) / owned / debias).sqrt().float()
        return rms
