"""One epoch of optimisation of a whole population: forward, backward and Adam over one flat vector."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from esper.growth import host
from esper.growth.conditions import LEARNING_RATE_SPIKE, Condition
from esper.growth.graft import Grafts
from esper.growth.lifecycle import Stage, is_live
from esper.growth.parameters import ParameterTable
from esper.growth.state import PopulationState
from esper.growth.statistics import growth_gradient

_LANES = 64  # a fused kernel rounds the elements that do not fill a SIMD vector differently


class Trained(NamedTuple):
    """What an epoch tells of N hosts besides the parameters it leaves; statistics are of its last step."""

    loss: Tensor  # [N], mean over the minibatches, each before its step
    squares: Tensor  # [N, 4, layers], sums of squares: of parameters, gradients, updates and mean gradients
    seed_gradient_rms: Tensor  # [N, slots], 0 where no seed lives
    backward_rms: Tensor  # [N, slots], of the loss's gradient with respect to the stages' outputs
    growth_gradient: Tensor  # [N, slots]


class _Rows(NamedTuple):
    """Parameters of one kind of rows, hosts or the seeds of one blueprint, and where they live in the flat vector."""

    rows: int
    table: ParameterTable
    sizes: Tensor  # [steps, rows], what multiplies Adam's direction in each step


class EpochRun:
    """One epoch's worth of optimisation over one flat vector: all host parameters, then the seeds of each blueprint.

    The vector holds one parameter of all rows after the other, so that every tensor of the forward pass is a piece of
    it and their gradients, one behind the other, are its gradient. A flat vector makes Adam one fused operation
    whatever lives in the population.
    """

    def __init__(self, population: PopulationState):
        p = self.population = population
        stage, kinds = p.lifecycle.stage, p.lifecycle.blueprint
        live = kinds.masked_fill(~is_live(stage), -1)
        self.grafts = Grafts(p, torch.arange(p.hosts), live, p.lifecycle.alpha, stage == Stage.TRAINING)
        blocks = self.grafts.blocks
        self.host_rate = p.moved(learning_rates(p))
        self.parts = [_Rows(p.hosts, p.table, self._sizes(self.host_rate, p.steps))]
        for kind, hosts, slots, _ in blocks:
            sizes = self._sizes(self.host_rate[hosts], p.seed_steps[hosts, slots])
            self.parts.append(_Rows(len(hosts), p.seed_tables[kind], sizes))
        self.padding = -sum(part.rows * part.table.size for part in self.parts) % _LANES
        self.theta = self._gather(p.theta, p.seed_theta)
        self.exp_avg = self._gather(p.exp_avg, p.seed_exp_avg)
        self.exp_avg_sq = self._gather(p.exp_avg_sq, p.seed_exp_avg_sq)
        self.direction = torch.zeros_like(self.theta)
        self.late = torch.full((), 1e9, device=p.device)
        self.theta_views, self.direction_views = self._views(self.theta), self._views(self.direction)
        self._make_leaves()
        self.at, self.gain = p.activations(), p.gain()
        self.backward_rms = torch.zeros(p.hosts, p.slots, device=p.device)
        self.growth_gradient = torch.zeros(p.hosts, p.slots, device=p.device)
        self.taken = 0

    def _sizes(self, rate: Tensor, before: Tensor) -> Tensor:
        """[steps, rows], rate * sqrt(1 - beta2^t) / (1 - beta1^t) for the t of each step and row."""
        t, p = self.population.training, self.population
        count = (before + torch.arange(1, t.steps_per_epoch + 1, device=p.device)[:, None]).double()
        return (rate.double() * (1 - t.beta2**count).sqrt() / (1 - t.beta1**count)).float()

    # ---- the flat vector ------------------------------------------------------------------------------------------

    def _gather(self, host_state: Tensor, seed_state: list[Tensor]) -> Tensor:
        pieces = []
        for part, state in zip(self.parts, [host_state, *self.grafts.gathered(seed_state)], strict=True):
            pieces += [piece.reshape(-1) for piece in state.split(part.table.sizes, dim=1)]
        return torch.cat([*pieces, host_state.new_zeros(self.padding)])

    def _views(self, flat: Tensor) -> list[list[Tensor]]:
        """For each part, its parameters [rows, size]."""
        extents = [(part.rows, size) for part in self.parts for size in part.table.sizes]
        pieces = iter(flat[: flat.numel() - self.padding].split([rows * size for rows, size in extents]))
        return [[next(pieces).view(part.rows, size) for size in part.table.sizes] for part in self.parts]

    def _rows(self, flat: Tensor) -> list[Tensor]:
        """For each part, [rows, P] as the population stores it."""
        return [torch.cat(views, dim=1) for views in self._views(flat)]

    def _make_leaves(self) -> None:
        """The tensors of the forward pass, in the order of the flat vector, which they share their memory with."""

        def leaf(view: Tensor, shape: tuple[int, ...]) -> Tensor:
            return view.detach().view(-1, *shape).requires_grad_(True)

        host, *seeds = self.theta_views
        self.host_leaves = [leaf(view, s.shape) for view, s in zip(host, self.parts[0].table.specs, strict=True)]
        self.leaves = list(self.host_leaves)
        per_block = []
        for views, part, (_, _, _, pieces) in zip(seeds, self.parts[1:], self.grafts.blocks, strict=True):
            split = [
                [leaf(piece, spec.shape) for piece in view.split(pieces)]
                for view, spec in zip(views, part.table.specs, strict=True)
            ]
            self.leaves += [piece for parameter in split for piece in parameter]
            per_block.append(split)
        self.grafts.use(per_block)

    # ---- steps ----------------------------------------------------------------------------------------------------

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimiser step of all on x [N, batch, tokens, inputs], y [N, batch] or [N, batch, tokens]; returns the
        loss [N] before it."""
        p = self.population
        logits, trace = host.forward(p.spec, self.host_leaves, x, self.at, self.gain, self.grafts)
        losses = host.cross_entropy(logits, y.flatten(1)).mean(1)
        last = self.taken == p.training.steps_per_epoch - 1 and p.setup.measured
        wanted = self.leaves + trace.outputs if last else self.leaves
        found = torch.autograd.grad(losses.sum(), wanted)
        gradients, signals = found[: len(self.leaves)], list(found[len(self.leaves) :])
        if last:
            # Nothing flows back into padding: the mean is over the units that a host has.
            values = p.moved(p.context.width * signals[0].shape[1])[:, None]
            squares = torch.stack([s.square().sum((1, 2)) for s in signals], dim=1)
            # Gradients run past a stage that a host lacks.
            exists = p.moved(p.layer_exists()[:, 1:-1])
            self.backward_rms = (squares / values).sqrt() * exists
            self.growth_gradient = growth_gradient([s.detach() for s in trace.sources], signals) * exists
        self._adam(torch.cat([*(g.reshape(-1) for g in gradients), self.theta.new_zeros(self.padding)]))
        self.taken += 1
        return losses.detach()

    @torch.no_grad()
    def _adam(self, gradient: Tensor) -> None:
        """theta -= rate * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + epsilon), the efficient order of Adam's
        section 2, since every row has a t and a rate of its own."""
        t = self.population.training
        self.direction.zero_()
        # One pass for m, v and m / (sqrt(v) + epsilon); so late a step has no bias left to correct.
        adam(
            [self.direction],
            [gradient],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.late],
            fused=True,
            amsgrad=False,
            beta1=t.beta1,
            beta2=t.beta2,
            lr=1.0,
            weight_decay=0.0,
            eps=t.epsilon,
            maximize=False,
        )
        for part, thetas, directions in zip(self.parts, self.theta_views, self.direction_views, strict=True):
            size = part.sizes[self.taken][:, None]
            for theta, direction in zip(thetas, directions, strict=True):
                theta.addcmul_(direction, size)

    def finish(self) -> None:
        """Writes parameters and moments back to the population."""
        p = self.population
        targets = ((self.theta, "theta"), (self.exp_avg, "exp_avg"), (self.exp_avg_sq, "exp_avg_sq"))
        for flat, name in targets:
            host_part, *seed_parts = self._rows(flat)
            setattr(p, name, host_part)
            for (kind, hosts, slots, _), part in zip(self.grafts.blocks, seed_parts, strict=True):
                getattr(p, f"seed_{name}")[kind][hosts, slots] = part
        p.steps += self.taken
        for _, hosts, slots, _ in self.grafts.blocks:
            p.seed_steps[hosts, slots] += self.taken

    def trained(self, loss: Tensor) -> Trained:
        """After `finish`, with the mean loss [N]."""
        return Trained(loss, self._squares(), self._seed_gradient_rms(), self.backward_rms, self.growth_gradient)

    def _squares(self) -> Tensor:
        # Adam keeps running means of g and g^2 already, so gradient scale and signal-to-noise cost nothing more.
        t, p = self.population.training, self.population
        steps = p.steps.double()[:, None]
        slow, fast = 1 - t.beta1**steps, 1 - t.beta2**steps
        size = (self.host_rate[:, None] * fast.sqrt() / slow).float()
        update = size * p.exp_avg / (p.exp_avg_sq.sqrt() + t.epsilon)
        mean, square = p.exp_avg / slow.float(), p.exp_avg_sq / fast.float()
        squares = torch.stack([p.theta.square(), square, update.square(), mean.square()], dim=1)
        # One small product per host: one large product would round differently for other numbers of hosts.
        return torch.bmm(squares, p.in_layer.expand(p.hosts, -1, -1))

    def _seed_gradient_rms(self) -> Tensor:
        p, t = self.population, self.population.training
        rms = torch.zeros(p.hosts, p.slots, device=p.device)
        widths = p.moved(p.context.width)
        for kind, hosts, slots, _ in self.grafts.blocks:
            debias = 1 - t.beta2 ** p.seed_steps[hosts, slots].double()
            owned = p.seed_tables[kind].count[widths[hosts]]
            rms[hosts, slots] = (p.seed_exp_avg_sq[kind][hosts, slots].sum(1) / owned / debias).sqrt().float()
        return rms


def learning_rates(population: PopulationState) -> Tensor:
    """[N] of the coming epoch, on the CPU: a stage that saturates mid-training does so in a spike."""
    context = population.context
    now = context.strike_epoch == population.epoch[:, None]
    spike = torch.where((now & (context.strike == Condition.SATURATED)).any(1), LEARNING_RATE_SPIKE, 1.0)
    return context.learning_rate * spike


@torch.enable_grad()
def train_stacked(population: PopulationState, index: Tensor, labels: Tensor) -> Trained:
    """One epoch of all hosts at once on the minibatches `index` [N, steps, batch] of the training split, with `labels`
    [N, steps, batch] or [N, steps, batch, tokens]; parameters, moments and step counters are brought up to date."""
    run, losses = EpochRun(population), []
    for step in range(population.training.steps_per_epoch):
        x = population.data.train_x.index_select(0, index[:, step].flatten())  # several times faster than x[index]
        losses.append(run.step(x.view(*index[:, step].shape, *x.shape[1:]), labels[:, step]))
    run.finish()
    return run.trained(torch.stack(losses, dim=1).mean(1))
