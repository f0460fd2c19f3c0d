"""Logs real episodes, fits the surrogate to them, and measures its fidelity and its cost.

    python scripts/fit_surrogate.py [log] [fit] [compare] [cost]     (default: all four)

`log` plays 2,176 episodes of `digits` on training instances from 5000 on, each group of 32 with one controller of
GROUPS (random numbers from seed 1000 plus the group's number), into runs/surrogate/log.pt. `fit` fits the network to
seven eighths of them (seed 0; the others are for what it prints) and writes envs/surrogate.npz. `compare` plays
CONTROLLERS on held-out instances 0 to 127 in both environments, `cost` measures CPU time; both write
scripts/results/surrogate.json. One thread; `log` and `compare` take about three minutes of CPU time each, `fit` one.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from envs import surrogate_model
from envs.config import EnvConfig, load_config
from envs.contexts import KINDS, MixtureConfig
from envs.growth_env import GrowthEnv, population_spec
from envs.surrogate import SurrogatePopulation
from envs.surrogate_model import HOST, LAYER, OUTER, STAGE, STATE, Fitted, Model, accuracy_inputs, encode
from esper.graph import GraphBatch
from esper.growth.actions import ActionLayout, Verb
from esper.growth.context import Context
from esper.growth.lifecycle import is_live
from esper.growth.population import Population
from esper.growth.statistics import ACTIVATION_STATISTICS, Statistics
from esper.tamiyo import baselines
from esper.tamiyo.baselines import BaselinesConfig, Controller
from esper.tamiyo.baselines.base import layout
from trainers.evaluation import play

ROOT = Path(__file__).parents[1]
LOG = ROOT / "runs" / "surrogate" / "log.pt"
RESULTS = ROOT / "scripts" / "results" / "surrogate.json"

Choice = tuple[str, dict[str, Any]]  # a controller and its knobs


def _with(name: str, *blueprints: str, **knobs: Any) -> list[Choice]:
    return [(name, {"blueprint": b, **knobs}) for b in blueprints]


EXPLORER = "explorer"
MIXTURE = MixtureConfig(repair=0.3, sequential=0.35, shift=0.15, growth=0.1, plain=0.1)  # of the logged instances
ROUNDS = 2  # of all groups, on new instances
EACH, FIRST = 32, 5000  # episodes of a group, and the first group's first instance
GROUPS: list[Choice] = [
    *[("never", {})] * 2,
    *[("random", {})] * 3,
    *[(EXPLORER, {})] * 8,
    *_with("all_at_start", "bypass", "norm", "mlp", "widen", "low_rank"),
    *_with("periodic", "bypass", "norm", "mlp", every=4),
    *_with("plateau", "bypass", "norm", "mlp"),
    *_with("statistic", "bypass", threshold=0.5),
    *_with("statistic", "norm", threshold=0.6),
    *_with("statistic", "mlp", threshold=0.7),
    *_with("gradient_norm", "bypass", "norm"),
    *_with("gradmax", "bypass", "norm"),
    *_with("probe", "bypass", "norm", "mlp"),
]
"""Who plays the logged episodes."""

SIZES = (32, 64, 48)  # hidden units of the network: H, G, Q of Model
EPOCHS, BATCH, RATE, DECAY = 30, 64, 4e-3, 0.5  # of AdamW

INSTANCES = 128
CONTROLLERS: list[Choice] = [
    ("never", {}),
    ("random", {}),
    *_with("all_at_start", "bypass", "norm", "mlp"),
    *_with("periodic", "bypass", "mlp", every=6),
    *_with("plateau", "bypass", "mlp"),
    *_with("best_fixed", "mlp", slot=0),
    *_with("best_fixed", "norm", slot=2),
    *_with("statistic", "bypass", threshold=0.7),
    *_with("statistic", "bypass", threshold=0.4),
    *_with("statistic", "norm", threshold=0.5),
    *_with("gradient_norm", "bypass"),
    *_with("gradmax", "bypass", "norm"),
    *_with("probe", "bypass", "norm", "mlp"),
]
"""Whose scores are compared."""


class Explorer:
    """Random, with a taste of each host's own for verbs and blueprints, so that episodes differ."""

    def __init__(self, seed: int, blueprints: int):
        self._generator, self._blueprints = torch.Generator().manual_seed(seed), blueprints

    def begin(self, hosts: int) -> None:
        verbs = torch.randn(hosts, len(Verb), generator=self._generator)
        self._verbs = 1.2 * verbs + torch.tensor([2.0, 0.5, -1.0, -0.5, -1.5])
        self._kinds = 1.5 * torch.randn(hosts, self._blueprints, generator=self._generator)

    def act(self, graph: GraphBatch) -> Tensor:
        verbs, _, choices = layout(graph).table()
        kinds = self._kinds[:, choices.clamp(max=self._blueprints - 1)]
        taste = (self._verbs[:, verbs] + torch.where(verbs == Verb.GERMINATE, kinds, 0.0)).exp()
        legal = graph.action_mask.float()
        count = (legal @ F.one_hot(verbs, len(Verb)).float())[:, verbs].clamp(min=1)
        # The legal actions of a verb share its weight.
        return torch.multinomial(taste * legal / count, 1, generator=self._generator).squeeze(1)


def controller(choice: Choice, config: EnvConfig, seed: int) -> Controller:
    """The controller of a choice, whose other knobs are at their defaults."""
    name, knobs = choice
    if name == EXPLORER:
        return Explorer(seed, len(config.blueprints))
    settings = BaselinesConfig()
    for key, value in knobs.items():
        setattr(getattr(settings, name), key, value)
    return baselines.make(name, settings, "", list(config.blueprints), seed)


def title(choice: Choice) -> str:
    name, knobs = choice
    return " ".join([name, *(f"{key}={value}" for key, value in knobs.items())])


# ---- logging ------------------------------------------------------------------------------------------------------


class LoggedPopulation(Population):
    """Keeps what is measured after each epoch."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.log: dict[str, list[Tensor]] = {field.name: [] for field in fields(Statistics)}
        self.log["validation_loss"] = []

    def note(self) -> None:
        for name, values in self.log.items():
            values.append(getattr(self if name == "validation_loss" else self.statistics, name).clone())

    def reset(self, where: Tensor, context: Context) -> None:
        super().reset(where, context)
        self.note()

    def train_epoch(self, evaluate: bool = True) -> None:
        super().train_epoch(evaluate)
        self.note()


def log(config: EnvConfig) -> dict[str, Tensor]:
    """Plays GROUPS. Of E episodes of T epochs: the contexts (`context_*`, [E, ...]), the `actions` [E, T], statistics
    and validation losses before the first epoch and after each (`log_*`, [E, T + 1, ...]), the `final` loss [E],
    without unfinished seeds, the losses of the `twin` [E, T + 1], and the accuracies at the end."""
    parts = []
    for number, choice in enumerate(ROUNDS * GROUPS):
        player = controller(choice, config, 1000 + number)
        env = GrowthEnv(config, EACH, "train", autoreset=False)
        env.population = population = LoggedPopulation(population_spec(config), EACH)
        env._observer.population = population
        graph, actions = env.reset(FIRST + number * EACH + torch.arange(EACH)), []
        player.begin(EACH)
        for _ in range(config.epochs):
            actions.append(player.act(graph))
            graph, _, _, _, info = env.step(actions[-1])
        part = {f"log_{name}": torch.stack(values, dim=1) for name, values in population.log.items()}
        part |= {f"context_{name}": value.clone() for name, value in vars(population.context).items()}
        part |= {name: info["episodes"][name] for name in info["episodes"] if name.endswith("accuracy")}
        part |= {"actions": torch.stack(actions, dim=1), "final": population.validation_loss.clone()}
        part["twin"] = env._twin[:, : config.epochs + 1].clone()
        parts.append(part)
        print(f"{title(choice):40} {info['episodes']['return'].mean():+.3f}", flush=True)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ---- fitting ------------------------------------------------------------------------------------------------------


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


def train(model: Model, episodes: Episodes, heldout: Episodes, epochs: int, generator: torch.Generator) -> Model:
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
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * count, pct_start=0.1)
    start = time.time()
    for epoch in range(epochs):
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


def fit(logged: dict[str, Tensor], config: EnvConfig, epochs: int) -> Fitted:
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
    model = train(fitted.model, episodes.rows(rest), episodes.rows(held), epochs, generator)
    model = noise(model, episodes.rows(rest))
    model.accuracy = accuracies(logged)
    return Fitted(**{**vars(fitted), "model": model})


# ---- fidelity and cost --------------------------------------------------------------------------------------------


def scores(config: EnvConfig) -> dict[str, np.ndarray]:
    """Returns of every controller of CONTROLLERS on the held-out instances, [INSTANCES] each; `kind` is theirs."""
    found = {}
    for choice in CONTROLLERS:
        played = play(controller(choice, config, 7), config, INSTANCES, 0, "cpu", lambda done: None)
        found[title(choice)] = played["return"].astype(float)
        print(f"{config.name:10} {title(choice):40} {played['return'].mean():+.3f}", flush=True)
    return found | {"kind": played["kind"]}


def agreement(real: np.ndarray, surrogate: np.ndarray) -> float:
    """Spearman's correlation of mean scores [controllers, instances]."""
    return float(stats.spearmanr(real.mean(1), surrogate.mean(1)).statistic)


def compared(real: dict[str, np.ndarray], surrogate: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean scores of the controllers in both environments with standard errors, and how well their ranks agree, with a
    bootstrap interval over instances."""
    names = [name for name in real if name != "kind"]
    a, b = (np.stack([found[name] for name in names]) for found in (real, surrogate))
    dice = np.random.default_rng(0)
    drawn = [agreement(a[:, i], b[:, i]) for i in dice.integers(a.shape[1], size=(1000, a.shape[1]))]
    table = {
        name: {
            "real": [round(float(x), 4) for x in (u.mean(), u.std() / len(u) ** 0.5)],
            "surrogate": [round(float(x), 4) for x in (v.mean(), v.std() / len(v) ** 0.5)],
        }
        for name, u, v in zip(names, a, b, strict=True)
    }
    kinds = {name: real["kind"] == number for number, name in enumerate(KINDS)}
    return {
        "instances": INSTANCES,
        "spearman": round(agreement(a, b), 4),
        "interval": [round(float(x), 4) for x in np.quantile(drawn, [0.025, 0.975])],
        "pearson": round(float(np.corrcoef(a.mean(1), b.mean(1))[0, 1]), 4),
        "kinds": {
            name: {"instances": int(rows.sum()), "spearman": round(agreement(a[:, rows], b[:, rows]), 4)}
            for name, rows in kinds.items()
        },
        "controllers": table,
    }


def cost(config: EnvConfig, hosts: int) -> dict[str, float]:
    """CPU time in microseconds per environment step (one host, one epoch) under random actions: of the `transition`
    (actions and epoch), of the same with the `observation`, and of `GrowthEnv.step`, where twins and resets count."""
    explorer = Explorer(0, len(config.blueprints))
    explorer.begin(hosts)
    env = GrowthEnv(config, hosts)
    population, graph = env.population, env.reset(torch.arange(hosts))
    observed = transition = 0.0
    for _ in range(config.epochs):
        actions = explorer.act(graph)
        start = time.process_time()
        env.layout.execute(population, actions)
        population.train_epoch()
        transition += time.process_time() - start
        graph = env._observe()
        observed += time.process_time() - start
    graph, whole = env.reset(), 0.0
    for _ in range(config.epochs):
        actions = explorer.act(graph)
        start = time.process_time()
        graph = env.step(actions)[0]
        whole += time.process_time() - start
    times = {"transition": transition, "observation": observed, "step": whole}
    return {name: 1e6 * value / hosts / config.epochs for name, value in times.items()}


def costs(real: EnvConfig, surrogate: EnvConfig) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for hosts in (32, 256):
        a, b = cost(real, hosts), min((cost(surrogate, hosts) for _ in range(5)), key=lambda found: found["step"])
        out[f"N={hosts}"] = {
            name: {"real_us": round(a[name], 1), "surrogate_us": round(b[name], 2), "factor": round(a[name] / b[name])}
            for name in a
        }
        print(hosts, out[f"N={hosts}"], flush=True)
    return out


def main() -> None:
    parts = ("log", "fit", "compare", "cost")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; default: all")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of the fit (default {EPOCHS})")
    arguments = parser.parse_args()
    chosen = arguments.parts or parts
    torch.set_num_threads(1)
    real = load_config("digits")
    if "log" in chosen:
        LOG.parent.mkdir(parents=True, exist_ok=True)
        logged = load_config("digits")
        logged.contexts.mixture = MIXTURE
        torch.save(log(logged), LOG)
    if "fit" in chosen:
        fit(torch.load(LOG, weights_only=True), real, arguments.epochs).save()
    surrogate = load_config("surrogate")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "compare" in chosen:
        results |= compared(scores(real), scores(surrogate))
        print({name: results[name] for name in ("spearman", "interval", "kinds")})
    if "cost" in chosen:
        results["cost"] = costs(real, surrogate)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
