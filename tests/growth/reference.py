"""What the population does, said slowly: one host at a time, in plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.growth.conditions import Condition
from esper.growth.lifecycle import Stage

SAMPLES = 128  # samples of the validation split that contributions are measured on
SATURATION, SHIFT = (0.03, 0.01), (3.0, 6.0)  # bound and shift of the mildest and of the worst defect


def cut(flat: Tensor, full: list[tuple[int, ...]], own: list[tuple[int, ...]]) -> list[Tensor]:
    """The leading entries, `own` of `full`, of parameters that lie one behind the other in `flat`."""
    parts, at = [], 0
    for whole, shape in zip(full, own, strict=True):
        size = math.prod(whole)
        parts.append(flat[at : at + size].view(whole)[tuple(slice(extent) for extent in shape)].clone())
        at += size
    assert at == len(flat)
    return parts


def paste(parts: list[Tensor], full: list[tuple[int, ...]]) -> Tensor:
    """The inverse of `cut`, with 0 elsewhere."""
    rows = []
    for part, whole in zip(parts, full, strict=True):
        row = torch.zeros(whole, dtype=part.dtype)
        row[tuple(slice(extent) for extent in part.shape)] = part
        rows.append(row.flatten())
    return torch.cat(rows)


def convolve(h: Tensor, k: Tensor, grid: tuple[int, ...], causal: bool, dilation: int = 1) -> Tensor:
    """h [batch, tokens, inputs] with k [taps, inputs, outputs] by the framework's own convolution."""
    x = h.transpose(1, 2)
    if len(grid) == 2:
        weight = k.view(3, 3, *k.shape[1:]).permute(3, 2, 0, 1)
        return F.conv2d(x.unflatten(2, grid), weight, padding=dilation, dilation=dilation).flatten(2).transpose(1, 2)
    x = F.pad(x, (2 * dilation, 0) if causal else (dilation, dilation))
    return F.conv1d(x, k.permute(2, 1, 0), dilation=dilation).transpose(1, 2)


class Seed(nn.Module):
    """A seed of `width` units; parameters lie as in the population, weights as [in, out]."""

    def __init__(self, name: str, width: int, grid: tuple[int, ...] = (1,), causal: bool = False):
        super().__init__()
        self.name, self.grid, self.causal, self.tokens = name, grid, causal, math.prod(grid)
        self.p = nn.ParameterList([torch.zeros(shape) for shape in self.shapes(width)])

    def shapes(self, w: int) -> list[tuple[int, ...]]:
        taps = 3 ** len(self.grid)
        return {
            "mlp": [(w, 2 * w), (1, 2 * w), (2 * w, w), (1, w)],
            "glu": [(w, 2 * w), (1, 2 * w), (w, 2 * w), (1, 2 * w), (2 * w, w), (1, w)],
            "low_rank": [(w, 2), (2, w)],
            "norm": [(1, w), (1, w)],
            "bypass": [(w, w), (1, w)],
            "widen": [(w, w), (1, w), (w, w)],
            "conv": [(taps, w, w), (1, w), (w, w)],
            "dilated_conv": [(taps, w, w), (1, w), (w, w)],
            "attention": [(w, w), (w, w), (w, w), (w, w), (1, 2 * self.tokens - 1)],
        }[self.name]

    def fill(self, values: list[Tensor]) -> Seed:
        self.p = nn.ParameterList([value.clone() for value in values])
        return self

    def forward(self, h: Tensor) -> Tensor:
        """h [batch, tokens, width]."""
        p = list(self.p)
        if self.name == "mlp":
            return F.linear(F.linear(h, p[0].T, p[1][0]).relu(), p[2].T, p[3][0])
        if self.name == "glu":
            halves = [F.linear(h, p[0].T, p[1][0]), F.linear(h, p[2].T, p[3][0])]
            return F.linear(F.glu(torch.cat(halves, dim=-1)), p[4].T, p[5][0])
        if self.name == "low_rank":
            return F.linear(F.linear(h, p[0].T), p[1].T)
        if self.name == "norm":
            return F.layer_norm(h, h.shape[-1:], p[0][0], p[1][0]) - h
        if self.name == "bypass":
            return F.linear(h, p[0].T, p[1][0])
        if self.name == "widen":
            return F.linear(F.linear(h, p[0].T, p[1][0]).relu(), p[2].T)
        if self.name == "attention":
            t = torch.arange(self.tokens)
            bias = p[4][0][t[None, :] - t[:, None] + self.tokens - 1]
            if self.causal:
                bias = bias.masked_fill(t[None, :] > t[:, None], -math.inf)
            q, k, v = (F.linear(h, p[i].T) for i in range(3))
            return F.linear(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), p[3].T)
        dilation = 2 if self.name == "dilated_conv" else 1
        return F.linear((convolve(h, p[0], self.grid, self.causal, dilation) + p[1]).relu(), p[2].T)


class SlowHost:
    """Host `host` of a population as separate tensors of its own width and depth, with torch.optim.Adam.

    Reads the population's starting values, batches and lifecycle; shares no arithmetic with it.
    """

    def __init__(self, population: Any, host: int):
        self.population, self.host = p, k = population, host
        self.spec, c = p.spec, p.context
        self.width, self.depth = int(c.width[k]), int(c.depth[k])
        self.shift = int(c.shift_epoch[k])
        self.wide, narrow = self.shapes(self.spec.width), self.shapes(self.width)
        values = cut(p.theta[k], self.wide, narrow)
        # Stem, the stages there are, and head: (weight, bias) pairs.
        kept = [0, 1, *range(2, 2 + 2 * self.depth), len(values) - 2, len(values) - 1]
        self.kept = kept
        self.body = nn.ParameterList([values[i] for i in kept])
        self.seeds: dict[int, Seed] = {}
        self.optimisers: dict[int, torch.optim.Adam] = {}
        self.optimiser = self.adam(self.body)
        self.signals: list[Tensor] = []
        self.sources: list[Tensor] = []
        self.loss = math.nan
        self.around: list[Tensor] | None = None  # per stage an extra linear map of its source

    # ---- parameters -----------------------------------------------------------------------------------------------

    def shapes(self, w: int) -> list[tuple[int, ...]]:
        spec = self.spec
        stage = (w, w) if math.prod(spec.grid) == 1 else (3 ** len(spec.grid), w, w)
        if spec.causal:
            stage = (3, w, w)
        return [(spec.inputs, w), (1, w), *[stage, (1, w)] * spec.stages, (w, spec.classes), (1, spec.classes)]

    def flat(self, of: Any = lambda p: p) -> Tensor:
        """The host's parameters, or what `of` finds for each, in the population's layout."""
        values: list[Tensor] = [torch.zeros(0)] * len(self.wide)
        for i, p in zip(self.kept, self.body, strict=True):
            values[i] = of(p).detach()
        values = [v if v.numel() else torch.zeros(self.wide[i]) for i, v in enumerate(values)]
        return paste(values, self.wide)

    def flat_seed(self, seed: Seed, of: Any = lambda p: p) -> Tensor:
        return paste([of(p).detach() for p in seed.p], seed.shapes(self.spec.width))

    def seed_from(self, kind: int, flat: Tensor) -> Seed:
        seed = Seed(self.population.catalogue[kind].name, self.width, self.spec.grid, self.spec.causal)
        return seed.fill(cut(flat, seed.shapes(self.spec.width), seed.shapes(self.width)))

    def adam(self, module: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(module.parameters(), lr=float(self.population.context.learning_rate[self.host]))

    @staticmethod
    def advance(optimiser: torch.optim.Adam, factor: float = 1.0) -> None:
        """A step with epsilon outside of the bias correction, as in section 2 of the paper."""
        group = optimiser.param_groups[0]
        state = optimiser.state.get(group["params"][0])
        taken = int(state["step"]) if state else 0
        rate = group["lr"]
        group["eps"] = 1e-8 / math.sqrt(1 - 0.999 ** (taken + 1))
        group["lr"] = rate * factor
        optimiser.step()
        group["lr"] = rate

    # ---- lifecycle ------------------------------------------------------------------------------------------------

    def stages(self) -> list[Stage]:
        return [Stage(s) for s in self.population.lifecycle.stage[self.host].tolist()]

    def alphas(self, ahead: int) -> list[float]:
        """Alpha in each slot, worked out from the stage; `ahead` = 1 for the coming epoch, 0 for now."""
        life, alphas = self.population.lifecycle, []
        for slot, stage in enumerate(self.stages()):
            done, ramp = int(life.epochs[self.host, slot]) + ahead, int(life.ramp[self.host, slot])
            alphas.append({Stage.BLENDING: done / ramp, Stage.HOLDING: 1.0, Stage.FOSSILIZED: 1.0}.get(stage, 0.0))
        return alphas

    def sync(self) -> None:
        """Takes over new seeds from the population and forgets the culled ones."""
        for slot, stage in enumerate(self.stages()):
            if stage in (Stage.DORMANT, Stage.EMBARGOED):
                self.seeds.pop(slot, None)
            elif slot not in self.seeds:
                kind = int(self.population.lifecycle.blueprint[self.host, slot])
                self.seeds[slot] = self.seed_from(kind, self.population.seed_theta[kind][self.host, slot])
                self.optimisers[slot] = self.adam(self.seeds[slot])

    # ---- arithmetic -----------------------------------------------------------------------------------------------

    def condition(self, stage: int, epoch: int) -> tuple[Condition, float]:
        c, at = self.population.context, (self.host, stage)
        if epoch >= int(c.strike_epoch[at]):
            return Condition(int(c.strike[at])), float(c.strike_severity[at])
        return Condition(int(c.condition[at])), float(c.severity[at])

    def activate(self, z: Tensor, stage: int, epoch: int) -> Tensor:
        kind, severity = self.condition(stage, epoch)
        units = self.width
        if kind == Condition.SATURATED:
            bound = SATURATION[0] + (SATURATION[1] - SATURATION[0]) * severity
            h = F.hardtanh(z, -bound, bound)
            return h + 0.01 * (z - h)
        if kind == Condition.HARDTANH:
            return F.hardtanh(z)
        if kind == Condition.LINEAR:
            return z
        if kind == Condition.DYING:
            return (z - (SHIFT[0] + (SHIFT[1] - SHIFT[0]) * severity)).relu()
        if kind == Condition.CHOKE:
            units = 4 if severity < 1 / 3 else 3 if severity < 2 / 3 else 2
        if kind == Condition.HALF:
            units = (self.width + 1) // 2
        return z.relu() * (torch.arange(self.width) < units)

    def forward(self, x: Tensor, alphas: list[float], epoch: int) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Logits [labels, classes] for x [batch, tokens, inputs], and per stage its source, pre-activation, output and
        what leaves its slot; a seed with alpha 0 is left out."""
        spec, p = self.spec, list(self.body)
        seen: dict[str, list[Tensor]] = {"sources": [], "z": [], "outputs": [], "leaving": []}
        if epoch >= self.shift:
            x = x * self.population.signs[self.host]
        h = F.linear(x, p[0].T, p[1][0]).relu()
        for stage in range(self.depth):
            source, weight, bias = h, p[2 * stage + 2], p[2 * stage + 3][0]
            z = F.linear(h, weight.T, bias) if weight.ndim == 2 else convolve(h, weight, spec.grid, spec.causal) + bias
            h = self.activate(z, stage, epoch)
            if self.around is not None:
                h = h + source @ self.around[stage]
            for name, value in (("sources", source), ("z", z), ("outputs", h)):
                seen[name].append(value)
            if alphas[stage] > 0:
                seed = self.seeds[stage]
                h = h + alphas[stage] * seed(source if seed.name in ("bypass", "widen") else h)
            else:
                h = h * 1  # a tensor of its own, whose gradient a seed in TRAINING learns from
            seen["leaving"].append(h)
        h = h.flatten(0, 1) if spec.per_token else h.mean(1)
        return F.linear(h, p[-2].T, p[-1][0]), seen

    def epoch(self) -> None:
        """One epoch of this host; call it before the population's `train_epoch`."""
        p, k = self.population, self.host
        self.sync()
        now, alphas, losses = int(p.epoch[k]), self.alphas(ahead=1), []
        c = p.context
        spikes = (c.strike_epoch[k] == now) & (c.strike[k] == Condition.SATURATED)
        factor = 4.0 if spikes.any() else 1.0
        for batch in p._epoch_order()[k]:
            x, y = p.data.train_x[p.subset[k, batch]], p.labels[k, batch]
            logits, seen = self.forward(x, alphas, now)
            loss = F.cross_entropy(logits, y.flatten())
            for optimiser in (self.optimiser, *(self.optimisers[s] for s in self.seeds)):
                optimiser.zero_grad()
            self.signals = list(torch.autograd.grad(loss, seen["outputs"], retain_graph=True))
            self.sources = seen["sources"]
            arriving = torch.autograd.grad(loss, seen["leaving"], retain_graph=True)
            loss.backward()
            for slot, stage in enumerate(self.stages()):
                if stage == Stage.TRAINING:
                    seed = self.seeds[slot]
                    fed = seen["sources" if seed.name in ("bypass", "widen") else "outputs"][slot]
                    (seed(fed.detach()) * arriving[slot]).sum().backward()
            self.advance(self.optimiser, factor)
            for slot in self.seeds:
                self.advance(self.optimisers[slot], factor)
            losses.append(float(loss.detach()))
        self.loss = sum(losses) / len(losses)

    @torch.no_grad()
    def validation_loss(self, alphas: list[float], epoch: int | None = None, samples: int | None = None) -> float:
        p, k = self.population, self.host
        epoch = int(p.epoch[k]) if epoch is None else epoch
        x, y = p.data.validation_x[:samples], p.data.validation_y[:samples].flatten()
        losses = F.cross_entropy(self.forward(x, alphas, epoch)[0], y, reduction="none")
        if epoch < self.shift < 1 << 40 and not self.spec.per_token:
            losses = losses[[bool(p.first[k, label]) for label in y.tolist()]]
        return float(losses.mean()) if len(losses) else 0.0
