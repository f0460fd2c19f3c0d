"""A host as one would write it without the engine: its own modules of its own size, trained in an ordinary eager loop.

What the engine is compared with, so it is written to be fast as far as that goes without batching hosts: true sizes
instead of padding, one fused Adam, batches gathered once an epoch, statistics from the optimiser's moments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.growth.blueprints import ParameterSpec
from esper.growth.conditions import LEARNING_RATE_SPIKE, NEVER, Condition, activations
from esper.growth.lifecycle import Stage, is_live
from esper.growth.population import Population
from esper.growth.statistics import SAMPLES, statistics_samples
from trainers.benchmarks.plain_modules import Activation, Convolve, Seed, activation, kernel_of, linear


def _cut(flat: Tensor, full: Sequence[ParameterSpec], own: Sequence[ParameterSpec]) -> list[Tensor]:
    """The entries that the narrower network owns of parameters that lie one behind the other in `flat`."""
    parts = flat.split([spec.size for spec in full])
    return [
        part.view(whole.shape)[tuple(slice(extent) for extent in spec.shape)].clone()
        for part, whole, spec in zip(parts, full, own, strict=True)
    ]


class PlainHost(nn.Module):
    """Host `host` of `population` as it stands before an epoch: parameters, moments, seeds, data and minibatches.

    Nothing is shared with the population and nothing of it is used once `epoch` runs.
    """

    def __init__(self, population: Population, host: int):
        super().__init__()
        p, k = population, host
        self.spec, context = p.spec, p.context
        self.width, self.depth = int(context.width[k]), int(context.depth[k])
        width, spec = self.width, self.spec
        conv = spec.taps > 1
        # Stem, the stages that the host has, head.
        maps = [nn.Linear(spec.inputs, width)]
        maps += [Convolve(spec, width) if conv else nn.Linear(width, width) for _ in range(self.depth)]  # type: ignore[misc]
        self.maps = nn.ModuleList([*maps, nn.Linear(width, spec.classes)])
        self._lifecycle(p, k)
        self.to(p.device)
        self._activations(p, k)
        self._data(p, k)
        self._load(p, k)

    # ---- what it starts from --------------------------------------------------------------------------------------

    def _lifecycle(self, p: Population, k: int) -> None:
        """Seeds and their alpha in the coming epoch."""
        life = p.lifecycle
        self.stages = [Stage(stage) for stage in life.stage[k].tolist()]
        done = (life.epochs[k] + 1).clamp(max=life.ramp[k]) / life.ramp[k]
        self.alpha = torch.where(life.stage[k] == Stage.BLENDING, done, life.alpha[k]).tolist()
        self.kinds = {
            slot: int(life.blueprint[k, slot]) for slot in is_live(life.stage[k]).nonzero().flatten().tolist()
        }
        self.seeds = nn.ModuleDict(
            {str(slot): Seed(p.catalogue[kind].name, self.spec, self.width) for slot, kind in self.kinds.items()}
        )

    def _activations(self, p: Population, k: int) -> None:
        """Of every stage in the coming epoch and after it."""
        now, self.activations = p.epoch[k : k + 1], []
        c = p.context.rows(torch.tensor([k]))
        for epoch in (now, now + 1):
            kinds, severity = p.conditions(c, epoch)
            at = activations(kinds, severity, c.width, c.depth, p.spec.width)
            self.activations.append(
                [
                    activation(
                        Condition(int(kinds[0, s])),
                        float(at.high[0, s]),
                        float(at.leak[0, s]),
                        float(at.shift[0, s]),
                        at.units[0, s, : self.width].to(p.device),
                    )
                    for s in range(self.depth)
                ]
            )

    def _data(self, p: Population, k: int) -> None:
        data, c = p.data, p.context
        epoch, shift = int(p.epoch[k]), int(c.shift_epoch[k])
        signs = p.signs[k]
        flat = p.spec.site.tokens == 1

        def seen(x: Tensor, epoch: int) -> Tensor:
            x = x * signs if epoch >= shift else x
            return x.flatten(1) if flat else x

        self.batch = p.training.batch_size
        self.order = p._epoch_order()[k].flatten()
        self.train_x, self.train_y = seen(data.train_x[p.subset[k]], epoch), p.labels[k]
        self.validation_x, self.validation_y = seen(data.validation_x, epoch + 1), data.validation_y.flatten()
        asked = None
        if epoch + 1 < shift < NEVER and not p.spec.per_token:
            asked = p.first[k][self.validation_y].float()
        self.asked = asked

    def _load(self, p: Population, k: int) -> None:
        """Parameters and Adam's moments, in one optimiser."""
        spike = (p.context.strike_epoch[k] == p.epoch[k]) & (p.context.strike[k] == Condition.SATURATED)
        self.rate = float(p.context.learning_rate[k]) * (LEARNING_RATE_SPIKE if spike.any() else 1.0)
        parameters = [*self.maps.parameters(), *self.seeds.parameters()]
        training = p.training
        self.optimiser = torch.optim.Adam(
            parameters, lr=self.rate, betas=(training.beta1, training.beta2), eps=training.epsilon, fused=True
        )
        values, averages, squares = (
            self._arranged(p, k, own, seeds)
            for own, seeds in (
                (p.theta, p.seed_theta),
                (p.exp_avg, p.seed_exp_avg),
                (p.exp_avg_sq, p.seed_exp_avg_sq),
            )
        )
        own = len(list(self.maps.parameters()))
        steps = [p.steps[k]] * own
        groups = [layer for layer in range(len(self.maps)) for _ in range(2)]
        for number, (slot, seed) in enumerate(self.seeds.items()):
            count = len(list(seed.parameters()))
            steps += [p.seed_steps[k, int(slot)]] * count
            groups += [len(self.maps) + number] * count
        self.parameter_list, self.own_parameters = parameters, own
        with torch.no_grad():
            for parameter, value, average, square, step in zip(
                parameters, values, averages, squares, steps, strict=True
            ):
                parameter.copy_(value)
                self.optimiser.state[parameter] = {
                    "step": step.float().clone(),
                    "exp_avg": torch.empty_like(parameter).copy_(average),
                    "exp_avg_sq": torch.empty_like(parameter).copy_(square),
                }
        self.groups = torch.tensor(groups, device=p.device)
        self.group_sizes = torch.zeros(len(self.maps) + len(self.seeds), device=p.device).index_add(
            0, self.groups, torch.tensor([float(q.numel()) for q in parameters], device=p.device)
        )
        self.debias = [training.beta1, training.beta2]
        self.epsilon = training.epsilon

    def _arranged(self, p: Population, k: int, own: Tensor, seeds: list[Tensor]) -> list[Tensor]:
        """Parameters, or what lies like them, in the order and shapes of this module's."""
        parts = _cut(own[k], p.table.specs, self.spec.parameters(self.width))
        conv, result = self.spec.taps > 1, []
        for layer in [*range(self.depth + 1), self.spec.stages + 1]:
            weight, bias = parts[2 * layer], parts[2 * layer + 1]
            result += kernel_of(weight, bias, self.spec.grid) if weight.dim() == 3 and conv else linear(weight, bias)
        site = self.spec.site_of(self.width)
        for slot, kind in self.kinds.items():
            specs = list(p.catalogue[kind].parameters(site).values())
            seed = self.seeds[str(slot)]
            assert isinstance(seed, Seed)
            result += seed.arranged(_cut(seeds[kind][k, slot], p.seed_tables[kind].specs, specs))
        return result

    # ---- one epoch ------------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, activations: list[Activation], trace: dict[str, list[Tensor]] | None = None, without: int = -1
    ) -> Tensor:
        """Logits. `trace` collects sources, pre-activations and outputs of the stages; the seed in slot `without`
        is left out, and those in TRAINING are without gradients."""
        h = self.maps[0](x).relu()
        learns = torch.is_grad_enabled()
        for stage in range(self.depth):
            source = h
            z = self.maps[stage + 1](h)
            h = activations[stage].function(z)
            if trace is not None:
                trace["sources"].append(source)
                trace["z"].append(z)
                trace["outputs"].append(h)
            if stage not in self.kinds or stage == without:
                continue
            seed, alpha = self.seeds[str(stage)], self.alpha[stage]
            fed = source if seed.reads_source else h
            if self.stages[stage] == Stage.TRAINING:
                if learns:  # straight through: it adds 0 and learns as if it added itself
                    delta = seed(fed.detach())
                    h = h + (delta - delta.detach())
            elif alpha == 1:
                h = h + seed(fed)
            elif alpha > 0:
                h = torch.add(h, seed(fed), alpha=alpha)
        if self.spec.per_token:
            h = h.flatten(0, 1)
        elif h.dim() == 3:
            h = h.mean(1)
        return self.maps[-1](h)

    def epoch(self) -> dict[str, Tensor]:
        """Trains, validates and measures; returns what was measured, under the engine's names."""
        xs = self.train_x.index_select(0, self.order).split(self.batch)
        ys = self.train_y.index_select(0, self.order).flatten().split(self.batch * (self.train_y[0].numel()))
        losses = []
        traced: dict[str, list[Tensor]] = {"sources": [], "z": [], "outputs": []}
        for step, (x, y) in enumerate(zip(xs, ys, strict=True)):
            last = step == len(xs) - 1
            loss = F.cross_entropy(self(x, self.activations[0], traced if last else None), y)
            if last:
                for output in traced["outputs"]:
                    output.retain_grad()
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            losses.append(loss.detach())
        with torch.inference_mode():
            return {
                "train_loss": torch.stack(losses).mean(),
                **self._of_training(traced),
                **self._of_parameters(),
                **self._of_validation(),
            }

    def _of_training(self, traced: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        signals = [output.grad for output in traced["outputs"] if output.grad is not None]
        growth = [
            torch.linalg.vector_norm(source.flatten(0, -2).T @ signal.flatten(0, -2))
            for source, signal in zip(traced["sources"], signals, strict=True)
        ]
        rms = [torch.linalg.vector_norm(signal) / signal.numel() ** 0.5 for signal in signals]
        return {"activation_backward_rms": torch.stack(rms), "growth_gradient": torch.stack(growth)}

    def _of_parameters(self) -> dict[str, Tensor]:
        """RMS of parameters, gradients and updates from Adam's moments, as the engine takes them."""
        state = [self.optimiser.state[q] for q in self.parameter_list]
        own, layers = self.own_parameters, len(self.maps)
        average, square = [s["exp_avg"] for s in state], [s["exp_avg_sq"] for s in state]
        # All of the host's parameters have taken the same number of steps, and so have all of a seed's.
        steps = torch.stack([s["step"] for s in state])
        slow, fast = 1 - self.debias[0] ** steps, 1 - self.debias[1] ** steps
        values: list[Tensor] = list(self.parameter_list[:own])
        scale = torch._foreach_sqrt(square[:own])
        torch._foreach_div_(scale, fast[0].sqrt())
        torch._foreach_add_(scale, self.epsilon)
        updates = torch._foreach_div(average[:own], scale)
        norms = [torch._foreach_norm(part) for part in (values, updates, average[:own])]
        sums = torch.stack([value for part in norms for value in part]).view(3, own).square()
        gradients = torch.stack(torch._foreach_norm(square, 1.0)) / fast
        per_group = gradients.new_zeros(len(self.group_sizes)).index_add(0, self.groups, gradients)
        gradient_rms = (per_group / self.group_sizes).sqrt()
        per_layer = (sums.view(3, layers, 2).sum(2) / self.group_sizes[:layers]).sqrt()
        per_layer[1:] /= slow[0]
        per_layer[1] *= self.rate
        return {
            "layer_weight_rms": per_layer[0],
            "layer_gradient_rms": gradient_rms[:layers],
            "layer_update_rms": per_layer[1],
            "layer_signal_to_noise": per_layer[2] / (gradient_rms[:layers] + 1e-12),
            "update_rms": (sums[1].sum() / self.group_sizes[:layers].sum()).sqrt() * self.rate / slow[0],
            "seed_gradient_rms": gradient_rms[layers:],
        }

    def _of_validation(self) -> dict[str, Tensor]:
        """Validation loss, contributions of the blended seeds (by slot) and activation statistics."""
        after = self.activations[1]
        trace: dict[str, list[Tensor]] = {"sources": [], "z": [], "outputs": []}
        losses = F.cross_entropy(self(self.validation_x, after, trace), self.validation_y, reduction="none")
        samples = min(SAMPLES, len(self.validation_x))
        labels = samples * (len(self.validation_y) // len(self.validation_x))
        contributions = losses.new_zeros(self.depth)
        blended = [slot for slot in self.kinds if self.alpha[slot] > 0]
        if blended:
            as_is = self._mean(losses[:labels])
            x, y = self.validation_x[:samples], self.validation_y[:labels]
            ablated = [
                self._mean(F.cross_entropy(self(x, after, without=slot), y, reduction="none")) for slot in blended
            ]
            contributions[blended] = torch.stack(ablated) - as_is
        return {
            "validation_loss": self._mean(losses),
            "contribution": contributions,
            "activations": self._of_activations(trace),
        }

    def _mean(self, losses: Tensor) -> Tensor:
        if self.asked is None:
            return losses.mean()
        asked = self.asked[: len(losses)]
        return (losses * asked).sum() / asked.sum().clamp(min=1)

    def _of_activations(self, trace: dict[str, list[Tensor]]) -> Tensor:
        """[stages, 5], as esper.growth.statistics.activation_statistics."""
        tokens = self.spec.site.tokens
        rows = min(statistics_samples(tokens) * tokens, trace["outputs"][0].flatten(0, -2).shape[0])
        h = torch.stack([output.flatten(0, -2)[:rows] for output in trace["outputs"]])  # [stages, rows, width]
        pairs = zip(trace["z"], self.activations[1], strict=True)
        slopes = torch.stack([activation.slope(z.flatten(0, -2)[:rows]) for z, activation in pairs])
        steep = (slopes != 0).float().mean(1)
        mean = h.mean(1)
        centred = h - mean[:, None]
        covariance = centred.transpose(1, 2) @ centred / rows
        spread = covariance.diagonal(dim1=1, dim2=2).sum(1)
        between = mean.var(1, correction=0)
        columns = [
            1 - (steep > 0).float().mean(1),
            1 - steep.mean(1),
            mean.mean(1),
            (spread / self.width + between).sqrt(),
            spread.square() / covariance.square().sum((1, 2)).clamp(min=1e-12) / self.width,
        ]
        return torch.stack(columns, dim=1)
