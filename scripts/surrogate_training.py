"""Fits the surrogate's network and its noise to logged episodes. Run by `fit_surrogate.py`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from envs import surrogate_model
from envs.config import EnvConfig
from envs.growth_env import population_spec
from envs.surrogate import SurrogatePopulation
from envs.surrogate_model import HOST, LAYER, OUTER, STAGE, STATE, Fitted, Model, accuracy_inputs, encode
from esper.growth.actions import ActionLayout
from esper.growth.context import Context
from esper.growth.lifecycle import is_live
from esper.growth.statistics import ACTIVATION_STATISTICS

SIZES = (32, 64, 48)  # hidden units of the network: H, G, Q of Model
EPOCHS, BATCH, RATE, DECAY = 30, 64, 4e-3, 0.5  # of AdamW


@dataclass
class Episodes:
    """What the network is fitted to; E episodes, T epochs, each with the evaluation before the first epoch."""

    stages: Tensor  # inputs [E, T + 1, S, in]
    twin_stages: Tensor  # the same without seeds
    exists: Tensor  # bool [E, S]
    host: Tensor  # inputs [E, T + 1, in]
    removed: Tensor  # [E, T + 1], contributions of the seeds culled before the evaluation's epoch
    host_target: Tensor  # [E, T + 1, len(HOST) + OUTER]
    host_known: Tensor  # the same shape, 1 where it was measured
    stage_target: Tensor  # [E, T + 1, S, len(STAGE)]
    stage_known: Tensor
    losses: Tensor  # log validation losses [2, E, T + 1], of the host and of its twin
    grown: Tensor  # bool [E, T + 1], whether a seed has been germinated

    def rows(self, index: Tensor) -> Episodes:
        picked = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "losses"}
        return Episodes(**picked, losses=self.losses[:, index])


def replay(logged: dict[str, Tensor], config: EnvConfig, fitted: Fitted, grow: bool) -> tuple[Tensor, ...]:
    """Stage inputs, host inputs, contributions removed, alpha > 0, live slots and whether grown at every evaluation,
    from the logged actions (or without any); each [E, T + 1, ...]."""
    context = Context(**{f.name: logged[f"context_{f.name}"] for f in fields(Context)})
    population = SurrogatePopulation(population_spec(config), len(context), fitted=fitted)
    population.reset(torch.arange(len(context)), context)
    numbering, out = ActionLayout(population.slots, len(population.catalogue)), []

    def note(removed: Tensor) -> None:
        stages, _, host = population.inputs(removed)
        lifecycle = population.lifecycle
        live = is_live(lifecycle.stage)
        out.append((stages, host, removed.sum(1), lifecycle.alpha > 0, live, population.germinated > 0))

    note(torch.zeros(population.hosts, population.slots))
    for epoch, actions in enumerate(logged["actions"].unbind(1)):
        population.statistics.contribution = logged["log_contribution"][:, epoch]
        population.statistics.contribution_known = logged["log_contribution_known"][:, epoch].clone()
        numbering.execute(population, actions * grow)
        note(population.begin_epoch())
        population.lifecycle.end_epoch(population.lifecycle_spec)
    return tuple(torch.stack(values, dim=1) for values in zip(*out, strict=True))


def prepare(logged: dict[str, Tensor], config: EnvConfig, fitted: Fitted) -> Episodes:
    stages, host, removed, blended, live, grown = replay(logged, config, fitted, grow=True)
    layers = {name: logged[f"log_layer_{name}"] for name in ("weight_rms", "gradient_rms", "signal_to_noise")}
    layers["update_ratio"] = logged["log_layer_update_rms"] / (layers["weight_rms"] + 1e-8)
    layer = torch.stack([encode(name, layers[name]) for name in LAYER], dim=-1)  # [E, T + 1, L, len(LAYER)]
    values = dict(zip(ACTIVATION_STATISTICS, logged["log_activations"].unbind(-1), strict=True))
    values |= {"backward_rms": logged["log_activation_backward_rms"]}
    values |= {name: logged[f"log_{name}"] for name in ("growth_gradient", "seed_gradient_rms", "contribution")}
    rest = torch.stack([encode(name, values[name]) for name in STAGE[len(LAYER) :]], dim=-1)
    stage_target = torch.cat([layer[:, :, 1:-1], rest], dim=-1)
    losses = [encode(name, logged[f"log_{name}"]).clamp(min=math.log(0.02)) for name in HOST]
    losses[2] = encode("update_rms", logged["log_update_rms"])
    host_target = torch.cat([torch.stack(losses, dim=-1), layer[:, :, 0], layer[:, :, -1]], dim=-1)

    host_known, stage_known = torch.ones_like(host_target), torch.ones_like(stage_target)
    host_known[:, 0, 1:] = 0
    exists = torch.arange(stages.shape[2]) < logged["context_depth"][:, None]
    stage_known *= exists[:, None, :, None]
    for number, name in enumerate(STAGE):
        if name not in ACTIVATION_STATISTICS:
            stage_known[:, 0, :, number] = 0
    stage_known[..., STAGE.index("seed_gradient_rms")] *= live
    stage_known[..., STAGE.index("contribution")] *= blended
    return Episodes(
        stages=stages,
        twin_stages=replay(logged, config, fitted, grow=False)[0],
        exists=exists,
        host=host,
        removed=removed,
        host_target=host_target,
        host_known=host_known,
        stage_target=stage_target,
        stage_known=stage_known,
        losses=torch.stack([logged["log_validation_loss"], logged["twin"]]).log(),
        grown=grown,
    )


def untrained(sizes: tuple[int, int, int], inputs: tuple[int, int], generator: torch.Generator) -> Model:
    """A network with random weights, for inputs of (a stage, a host) and H, G, Q hidden units."""
    (h, g, q), (stage, host), outputs = sizes, inputs, len(HOST) + OUTER

    def layer(rows: int, columns: int, scale: float = 1.0) -> list[Tensor]:
        weight = torch.randn(rows, columns, generator=generator) * scale * math.sqrt(2 / rows)
        return [weight, torch.zeros(columns)]

    return Model(
        *layer(stage, h),
        *layer(2 * h + host + STATE, g),
        *layer(g, g),
        *layer(g, 2 + outputs, 0.1),
        *layer(3 * h, q),
        *layer(g, q),
        *layer(q + stage, len(STAGE), 0.1),
        *layer(g, outputs, 0.0),
        *layer(q + stage, len(STAGE), 0.0),
        torch.zeros(outputs),
        torch.zeros(len(STAGE)),
        torch.tensor(0.0),
        torch.zeros(2, 5),
    )


def flat(value: Tensor) -> Tensor:
    return value.flatten(0, 1)


def codes(model: Model, stages: Tensor, exists: Tensor) -> Tensor:
    """[E, T + 1, S, H]."""
    times = stages.shape[1]
    return model.code(flat(stages), exists.repeat_interleave(times, 0)).unflatten(0, (-1, times))


def states(episodes: Episodes) -> Tensor:
    """[E, T + 1, STATE], what `Model.step` was handed before each evaluation, from the logged losses."""
    loss, train = episodes.host_target[..., 0], episodes.host_target[..., 1]
    state = torch.zeros(*loss.shape, STATE)
    state[:, 1:, 0] = without(loss[:, :-1], episodes.removed[:, 1:])
    state[:, 2:, 1] = loss[:, 1:-1] - state[:, 1:-1, 0]
    state[:, 2:, 2] = train[:, 1:-1]
    state[:, 2:, 3] = 1
    return state


def without(loss: Tensor, removed: Tensor) -> Tensor:
    """Log losses after seeds with those contributions in sum are removed, all of one shape."""
    return (loss.exp() + removed).clamp(min=0.02).log()


def rollout(model: Model, code: Tensor, host: Tensor, removed: Tensor, real: Tensor, forced: bool = False) -> Tensor:
    """Log validation losses [E, T + 1] without noise, from the real first one on; or, forced, each from the real one
    before it (real, removed: [E, T + 1])."""
    zero = torch.zeros(len(real))
    loss, losses = real[:, 0], [real[:, 0]]
    change = train = has = zero
    for epoch in range(1, real.shape[1]):
        start = without(loss, removed[:, epoch])
        after, _ = model.step(code[:, epoch], host[:, epoch], torch.stack([start, change, train, has], dim=1))
        losses.append(after[:, 0])
        loss = real[:, epoch] if forced else after[:, 0]
        change, train, has = loss - start, after[:, 1], zero + 1
    return torch.stack(losses, dim=1)


def mean_over(value: Tensor, known: Tensor) -> Tensor:
    """The mean of each column where it is known."""
    return (flat_all(value) * flat_all(known)).sum(0) / flat_all(known).sum(0)


def flat_all(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])


@dataclass
class Objective:
    """How far a model is from episodes: of one step of the losses, of the statistics, of whole episodes, and of what
    growing changes in them."""

    model: Model
    host_spread: Tensor
    stage_spread: Tensor
    generator: torch.Generator

    def __call__(self, e: Episodes) -> Tensor:
        """[4]."""
        model, times = self.model, e.host.shape[1]
        code, twin_code = codes(model, e.stages, e.exists), codes(model, e.twin_stages, e.exists)
        after, hidden = model.step(flat(code), flat(e.host), flat(states(e)))
        error = (after.view_as(e.host_target) - e.host_target) * e.host_known
        one = F.smooth_l1_loss(8 * error[..., :2], torch.zeros_like(error[..., :2]))
        picked = torch.randperm(times, generator=self.generator)[:6]
        hidden = hidden.unflatten(0, (-1, times))[:, picked]
        parts = flat(e.stages[:, picked]), flat(code[:, picked]), flat(hidden)
        stages = model.stages(*parts)[0].unflatten(0, (-1, len(picked)))
        known = e.stage_known[:, picked]
        off = (stages - e.stage_target[:, picked]) * known / self.stage_spread
        statistics = (error[..., 2:] / self.host_spread[2:]).square().mean() + off.square().sum() / known.sum()
        removed = torch.cat([e.removed, torch.zeros_like(e.removed)])
        both = torch.cat([code, twin_code]), torch.cat([e.host, e.host]), removed, flat(e.losses)
        free = rollout(model, *both).unflatten(0, (2, -1))
        whole = F.smooth_l1_loss(4 * free, 4 * e.losses)
        # In nats, as the reward measures it, with little weight on what the reward cuts off.
        growth = F.mse_loss(_bounded(free), _bounded(e.losses))
        return torch.stack([one, statistics, whole, growth])


def _bounded(losses: Tensor) -> Tensor:
    """What growing has changed, [E, T + 1], from log losses [2, E, T + 1]."""
    host, twin = losses.exp()
    return ((twin - host) / 0.6).tanh()


WEIGHTS = torch.tensor([1.0, 0.3, 1.0, 8.0])  # of the terms of the objective


def train(model: Model, episodes: Episodes, heldout: Episodes, generator: torch.Generator) -> Model:
    """AdamW on the objective; the scales and what follows them stay as they are."""
    host_mean = mean_over(episodes.host_target, episodes.host_known)
    stage_mean = mean_over(episodes.stage_target, episodes.stage_known)
    model.host_out_bias[:2], model.host_out_bias[2:], model.stage_out_bias[:] = -1.5, host_mean, stage_mean
    spread = [
        mean_over((target - mean).square(), known).sqrt()
        for target, mean, known in (
            (episodes.host_target, host_mean, episodes.host_known),
            (episodes.stage_target, stage_mean, episodes.stage_known),
        )
    ]
    network = [f.name for f in fields(Model)][:14]
    parameters = [getattr(model, name).requires_grad_() for name in network]
    objective = Objective(model, *spread, generator)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
    count = len(episodes.exists) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * count, pct_start=0.1)
    start = time.time()
    for epoch in range(EPOCHS):
        order, total = torch.randperm(len(episodes.exists), generator=generator), torch.zeros(4)
        for part in order[: count * BATCH].view(count, BATCH):
            terms = objective(episodes.rows(part))
            optimizer.zero_grad()
            (terms @ WEIGHTS).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            total += terms.detach() / count
        if epoch % 10 == 9:
            terms = objective(heldout).detach()
            print(f"{epoch + 1:4} {time.time() - start:5.0f} s  ", total.tolist(), terms.tolist(), flush=True)
    return model.map(lambda value: value.detach())


def scale(hidden: Tensor, residual: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-linear standard deviations of residuals [n, D] from hidden layers [n, G], by least squares.

    Returns:
        weight [G, D], bias [D], and the residuals in those standard deviations [n, D], 0 where not known.
    """
    x = torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1).double()
    weights, ratios = [], []
    for column in range(residual.shape[1]):
        rows = known[:, column] > 0
        r = residual[rows, column].double()
        low = 0.01 * r.square().mean().sqrt() + 1e-6
        gram = x[rows].T @ x[rows] + 1e-2 * rows.sum() * torch.eye(x.shape[1])
        target = r.abs().clamp(min=low).log() + 0.635  # the mean of log |z| for a standard normal z is -0.635
        weight = torch.linalg.solve(gram, x[rows].T @ target)
        z = residual[:, column].double() / (x @ weight).clamp(-6, 2).exp() * rows
        level = (z[rows].clamp(-4, 4).square().mean()).sqrt()
        weight[-1] += level.log()
        weights.append(weight)
        ratios.append(z / level)
    weight = torch.stack(weights, dim=1).float()
    return weight[:-1], weight[-1], torch.stack(ratios, dim=1).float()


def memory(z: Tensor, known: Tensor) -> Tensor:
    """[D], correlation of residuals z [series, T, D] with those of the epoch before."""
    z = z.clamp(-4, 4) * known
    both = known[:, 1:] * known[:, :-1]
    product = (z[:, 1:] * z[:, :-1] * both).sum((0, 1)) / both.sum((0, 1))
    return (product / (z.square().sum((0, 1)) / known.sum((0, 1)))).clamp(0, 0.98)


@torch.no_grad()
def noise(model: Model, e: Episodes) -> Model:
    """The model with the noise that the residuals of single steps show."""
    with torch.enable_grad():  # one large product is faster here
        code = codes(model, e.stages, e.exists)
        after, hidden = model.step(flat(code), flat(e.host), flat(states(e)))
        stages, middle = model.stages(flat(e.stages), flat(code), hidden)
    after, hidden, stages, middle = (value.detach() for value in (after, hidden, stages, middle))
    residual, known = flat(e.host_target) - after, flat(e.host_known)
    model.host_scale, model.host_scale_bias, z = scale(hidden, residual, known)
    model.host_memory = memory(z.view_as(e.host_target)[:, 1:], e.host_known[:, 1:])
    residual, known = flat_all(flat(e.stage_target) - stages), flat_all(e.stage_known)
    model.stage_scale, model.stage_scale_bias, z = scale(flat_all(middle), residual, known)

    def series(value: Tensor) -> Tensor:
        """[E S, T, D] of [E, T + 1, S, D]."""
        return value.view_as(e.stage_target)[:, 1:].transpose(1, 2).flatten(0, 1)

    model.stage_memory = memory(series(z), series(e.stage_known))
    twin_code = codes(model, e.twin_stages, e.exists)
    none = torch.zeros_like(e.removed)
    pairs = zip((code, twin_code), (e.removed, none), e.losses, strict=True)
    forced = [rollout(model, c, e.host, removed, real, forced=True) for c, removed, real in pairs]
    off = (e.losses - torch.stack(forced)).clamp(-0.5, 0.5)[:, e.grown]
    model.shared = torch.corrcoef(off)[0, 1].clamp(0, 1)
    return model


def accuracies(logged: dict[str, Tensor]) -> Tensor:
    """[2, 5], least squares on the logits of the accuracies at the end."""
    context = Context(**{f.name: logged[f"context_{f.name}"] for f in fields(Context)})
    x = accuracy_inputs(context, logged["final"].log(), logged["log_train_loss"][:, -1].clamp(min=0.02).log())
    weights = []
    for split in ("validation", "test"):
        y = logged[f"{split}_accuracy"]
        weights.append(torch.linalg.lstsq(x, y.clamp(0.02, 0.98).logit()[:, None]).solution.squeeze(1))
    return torch.stack(weights)


def fit(logged: dict[str, Tensor], config: EnvConfig) -> Fitted:
    """The model of logged episodes (seed 0); an eighth of them is held out, for what is printed."""
    spec = population_spec(config)
    generator = torch.Generator().manual_seed(0)
    fitted = Fitted(
        untrained(SIZES, surrogate_model.input_sizes(len(config.blueprints)), generator),
        tuple(config.blueprints),
        spec.host.inputs,
        spec.host.classes,
        spec.host.width,
        spec.host.stages,
        spec.training.steps_per_epoch,
        spec.training.batch_size,
    )
    episodes = prepare(logged, config, fitted)
    order = torch.randperm(len(episodes.exists), generator=torch.Generator().manual_seed(1))
    held, rest = order.split([len(order) // 8, len(order) - len(order) // 8])
    model = train(fitted.model, episodes.rows(rest), episodes.rows(held), generator)
    model = noise(model, episodes.rows(rest))
    model.accuracy = accuracies(logged)
    return Fitted(**{**vars(fitted), "model": model})
