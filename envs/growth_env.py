"""N growth episodes side by side, in torch: GraphBatch observations, one step = one training epoch of every host.

The Gymnasium faces of it are in `envs.gym_env`.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from typing import Any

import torch
from torch import Tensor

from envs import contexts, tasks, twins
from envs.config import EnvConfig, host_spec
from envs.points import PARTS, RENT, Meter
from envs.reward import gain, load_reference, rent
from envs.surrogate import SurrogatePopulation
from esper.graph import GraphBatch
from esper.graph.interface import GROWTH, Interface
from esper.graph.schema import SCHEMA
from esper.growth.actions import WAIT, ActionLayout, Verb
from esper.growth.context import Context
from esper.growth.lifecycle import is_kept, is_live
from esper.growth.observation import Observer
from esper.growth.population import Population
from esper.growth.state import PopulationSpec
from esper.runtime import seeding

SPLITS = ("train", "heldout")
"""Instances (contexts, init, data order, data subset, noise) of the two splits never coincide."""

_FORKS = 384  # trained side by side
_EPISODE = 101  # salt of the instances' keys


class GrowthEnv:
    """N hosts side by side, each measured against its twin.

    Args:
        config: what to grow on what; `config.num_envs` is not used.
        num_envs: N.
        split: which instances to draw, one of SPLITS.
        autoreset: start the next episode in the step that ended one (SAME_STEP); otherwise an environment whose episode
            has ended earns nothing more, whatever its action, until the caller resets.
        device: where the population lives.
    """

    interface = Interface(SCHEMA, GROWTH)

    def __init__(
        self,
        config: EnvConfig,
        num_envs: int,
        split: str = "train",
        autoreset: bool = True,
        device: torch.device | str = "cpu",
    ):
        self.config, self.num_envs, self.autoreset = config, num_envs, autoreset
        self._split = SPLITS.index(split)
        self.reference = load_reference(config.task)
        spec = population_spec(config)
        kind = SurrogatePopulation if config.dynamics == "surrogate" else Population
        self.population = kind(spec, num_envs, device)
        hosts = (config.host, config.training, config.contexts)
        identity = repr((kind, config.engine, config.task, config.epochs, *hosts))
        self._twins = twins.shared(kind, spec, config.epochs, device, identity)
        self.layout = ActionLayout(self.population.slots, len(config.blueprints))
        self.device = self.population.device
        self._observer = Observer(self.population, config.epochs)
        self.graph_build_s: deque[float] = deque(maxlen=1024)  # wall time of the latest observations
        self._largest = (self.population.seed_sizes * self.population.fits).amax(1)  # [width + 1]
        self._foresees = config.reward.foresight
        self._seeds = torch.arange(num_envs)
        self._episodes = torch.zeros(num_envs, dtype=torch.int64)
        self._kinds = torch.zeros(num_envs, dtype=torch.int64)
        self._running = torch.zeros(num_envs, dtype=torch.bool)  # an episode is going on
        self._returns = torch.zeros(num_envs)
        self._counts = torch.zeros(num_envs, len(Verb), dtype=torch.int64)
        self._potential = torch.zeros(num_envs)
        # Under the best validation loss so far, over the compute of an ungrown episode: of the hosts, and of the twins.
        self._area, self._twin_area = torch.zeros(num_envs), torch.zeros(num_envs)
        self._spent, self._twin_spent = torch.zeros(num_envs), torch.zeros(num_envs)  # compute, in ungrown episodes
        self._best = torch.zeros(num_envs)  # validation loss so far
        self._twin = torch.zeros(num_envs, config.epochs + twins.COLUMNS)  # as Twins returns it
        self._accuracy = Meter(self.population, config.epochs)

    @property
    def running(self) -> bool:
        """Whether an episode is going on in any environment."""
        return bool(self._running.any())

    def reset(self, seeds: Tensor | None = None) -> GraphBatch:
        """Starts an episode in every environment.

        Args:
            seeds: int64 [N]; restarts environment k's sequence of instances from seeds[k]. None goes on with it.
        """
        if seeds is not None:
            self._seeds = seeds.cpu()
            self._episodes.zero_()
        self._begin(torch.arange(self.num_envs))
        return self._observe()

    def action_mask(self) -> Tensor:
        """bool [N, A]: what is legal now."""
        return self.layout.mask(self.population)

    def _observe(self) -> GraphBatch:
        start = time.perf_counter()
        graph = self._observer()
        self.graph_build_s.append(time.perf_counter() - start)
        return graph

    def _begin(self, where: Tensor) -> None:
        """New instances for the environments `where` ([m])."""
        split = torch.full_like(where, self._split)
        key = seeding.fold(split, _EPISODE, self._seeds[where], self._episodes[where])
        context, self._kinds[where] = draw_context(self.config, key)
        self._twin[where] = self._twins(context)
        self.population.reset(where, context)
        self._episodes[where] += 1
        meters = (self._area, self._twin_area, self._spent, self._twin_spent)
        for state in (self._returns, self._counts, self._potential, *meters):
            state[where] = 0
        self._accuracy.begin(where)
        self._best[where] = _or_inf(self.population.validation_loss[where.to(self.device)])
        self._running[where] = True

    def step(self, actions: Tensor) -> tuple[GraphBatch, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Carries out one action per environment and trains every host for an epoch.

        Args:
            actions: int64 [N].

        Returns:
            observation: GraphBatch of N graphs (with autoreset, of the new episode where one has ended).
            reward: float32 [N].
            terminated: bool [N]; the horizon is part of the task and of the observation, so reaching it terminates, and
                so does a host that diverges, whose gain is the lowest there is.
            truncated: bool [N], always False.
            info: empty unless an episode has ended; then `final_graph` (the N observations before the reset) and
                `episodes`, a dict of tensors over the m environments that ended (see `_summary`).

        Raises:
            ValueError: an illegal action, or not one for each environment; nothing is changed then.
        """
        if actions.shape != (self.num_envs,):
            raise ValueError(f"actions of shape {tuple(actions.shape)} for {self.num_envs} environments")
        if not self.running:
            over = torch.zeros_like(self._running)
            return self._observe(), torch.zeros(self.num_envs), over, over.clone(), {}
        terminated, reward, score, diverged = self._advance(actions)
        graph, info = self._observe(), {}
        if terminated.any():
            ended = terminated.nonzero().squeeze(1)
            info = {"final_graph": graph, "episodes": self._summary(ended, score[ended], diverged[ended])}
            if self.autoreset:
                self._begin(ended)
                graph = self._observe()
        return graph, reward, terminated, torch.zeros_like(terminated), info

    def _advance(self, actions: Tensor, evaluate: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One epoch after the actions [N]: which episodes it has ended, rewards, scores and which hosts have diverged,
        all [N]; without `evaluate`, which the last epoch needs, only the hosts move on."""
        running = self._running.clone()
        actions = torch.where(running, actions.cpu(), WAIT)
        foreseen = self._foreseen(actions) if self._foresees else self._potential
        # Hosts whose episode is over are trained along, for nothing: they are part of the batch.
        verbs = self.layout.execute(self.population, actions)
        self._counts += torch.nn.functional.one_hot(verbs, len(Verb)) * running[:, None]
        cost = self._epoch_cost()
        self._accuracy.train_epoch(evaluate)
        self._meter(cost)
        diverged = self.population.diverged()
        terminated = running & (diverged | (self.population.epoch >= self.config.epochs))
        if terminated.any():
            self.population.remove_unfinished(terminated)
            diverged |= self.population.diverged()  # what is left without those seeds may be no better
        score = self._score(diverged)
        shaping = self.config.reward.shaping
        potential = (shaping * score if shaping else foreseen).masked_fill(terminated, 0.0)
        if terminated.any() and self.config.reward.measure == "accuracy":
            ended = terminated.nonzero().squeeze(1)
            score[ended] = self._better(ended, diverged[ended], "validation", self.config.reward.twin)
        reward = potential - self._potential + torch.where(terminated, score - self._price(), 0.0)
        reward = reward.masked_fill(~running, 0.0)
        self._potential = potential
        self._returns += reward
        self._running = running & ~terminated
        return terminated, reward, score, diverged

    # ---- forks ------------------------------------------------------------------------------------------------------

    def fork(self, rows: Tensor, future: bool = False) -> GrowthEnv:
        """Copies of the episodes `rows` (int64 [m], repeats allowed) that go on by themselves, to see what an action
        leads to; they cannot be observed.

        Args:
            future: keep the strikes and shifts that are still to come; otherwise they are taken out, so that what the
                fork tells is causal.
        """
        forked = copy.copy(self)
        forked.num_envs, forked.autoreset, forked._foresees = len(rows), False, False
        forked.population = self.population.fork(rows, future)
        forked._accuracy = self._accuracy.fork(forked.population, rows)
        for name in self._STATE:
            setattr(forked, name, getattr(self, name)[rows].clone())
        return forked

    def played_out(self, actions: Tensor) -> Tensor:
        """[N], the returns of the episodes if `actions` are done now and nothing after them."""
        # Losses over time matter where an area under them is what is scored.
        always = self.config.reward.measure == "loss" and bool(self.population.context.priced.any())
        while self.running:
            last = bool((self.population.epoch + 1 >= self.config.epochs).any())
            self._advance(actions, evaluate=last or always)
            actions = torch.zeros_like(actions)
        return self._returns

    def tried(self, rows: Tensor, actions: Tensor, future: bool = False) -> Tensor:
        """[m], the returns of the episodes `rows` ([m], repeats allowed) if `actions` [m] are done now and nothing
        after them, on forks; see `fork`."""
        parts = zip(rows.split(_FORKS), actions.split(_FORKS), strict=True)
        return torch.cat([self.fork(part, future).played_out(chosen) for part, chosen in parts])

    def _foreseen(self, actions: Tensor) -> Tensor:
        """[N], the returns of the episodes if `actions` are done now and nothing after them, strikes and shifts that
        are still to come included. Waiting leaves them as they are."""
        foreseen = self._potential.clone()
        rows = (actions != WAIT).nonzero().squeeze(1)
        if len(rows):
            foreseen[rows] = self.tried(rows, actions[rows], future=True)
        return foreseen

    def _epoch_cost(self) -> tuple[Tensor, Tensor]:
        """[N] each, compute of the coming epoch of the hosts and of their twins, in ungrown episodes."""
        p = self.population
        host = p.host_flops()
        grown = host + p.seed_flops_now(is_live(p.lifecycle.stage))
        return grown / (host * self.config.epochs), host / (host * self.config.epochs)

    def _meter(self, cost: tuple[Tensor, Tensor]) -> None:
        """Adds the epoch that has been trained to the areas, as far as an ungrown episode's compute goes.

        The areas are under the best loss so far, so that burning compute never pays, also where the loss rises. An area
        that is not finite stays so: no loss has been finite when it began.
        """
        p, everyone = self.population, torch.arange(self.num_envs)
        self._best = torch.minimum(self._best, _or_inf(p.validation_loss))
        twin = self._twin[:, : self.config.epochs + 1].cummin(1).values[everyone, p.epoch]
        meters = ((self._area, self._spent, self._best), (self._twin_area, self._twin_spent, twin))
        for (area, spent, loss), one in zip(meters, cost, strict=True):
            area += torch.minimum(one, (1 - spent).clamp(min=0)) * loss
            spent += one

    def _score(self, diverged: Tensor) -> Tensor:
        """[N], improvement over the twin: of the final loss, or where priced of the mean over compute of the best loss
        so far, for which a grown host is done earlier, since its epochs cost more. Hosts that have `diverged` (bool
        [N]) score lowest, and others highest where the twin has."""
        p, everyone = self.population, torch.arange(self.num_envs)
        loss, twin = p.validation_loss.cpu(), self._twin[everyone, p.epoch]
        area = self._area / self._spent.clamp(1e-9, 1)
        twin_area = self._twin_area / self._twin_spent.clamp(1e-9, 1)
        priced = p.context.priced
        loss = torch.where(priced, area, loss).masked_fill(diverged, torch.inf)
        twin = torch.where(priced & twin.isfinite(), twin_area, twin)
        if not self.config.reward.twin:
            twin = torch.full_like(twin, self.reference.static)
        return gain(loss, twin, self.reference)

    def _better(
        self, ended: Tensor, diverged: Tensor, part: str, twin: bool = True, last: Tensor | None = None
    ) -> Tensor:
        """[m], how far the accuracies of the episodes `ended` are above their twins' (or 0) on a part of the data;
        those of hosts that have `diverged` ([m]) are 0. `last` as for `Meter.accuracy`."""
        accuracy = self._accuracy.accuracy(ended, part, last).masked_fill(diverged, 0.0)
        return accuracy - self._twin[ended, -2 + PARTS.index(part)] * twin

    def twin_accuracies(self) -> tuple[Tensor, Tensor]:
        """[N] each, of the twins of the present episodes, as `points.Meter` counts them, on the validation and on the
        test split."""
        return self._twin[:, -2].clone(), self._twin[:, -1].clone()

    def _kept_parameters(self) -> Tensor:
        return self.population.seed_parameters(is_kept(self.population.lifecycle.stage))

    def _flops_ratio(self) -> Tensor:
        return self.population.extra_flops / (self.config.epochs * self.population.host_flops())

    def _price(self) -> Tensor:
        """[N], what growing has cost if the episode ended now; where compute is priced already, parameters only."""
        p, weights = self.population, self.config.reward
        context, kept = p.context, self._kept_parameters()
        if weights.measure == "accuracy":
            parameters = kept / p.host_parameters()
        else:
            most = self._largest[context.width] * torch.minimum(context.depth, context.seeds)
            parameters = rent(kept, p.host_parameters(), most)
        return weights.rent * parameters + weights.flops * self._flops_ratio() * ~context.priced

    def _summary(self, ended: Tensor, score: Tensor, diverged: Tensor) -> dict[str, Tensor]:
        """What is known of the episodes that have ended in the environments `ended` ([m]), of their scores and whether
        their hosts have diverged ([m] each); every entry is [m].

        Points and test accuracies come from the test split; they are for reports and never enter observation or reward.
        `kind` is an index into `contexts.KINDS`.
        """
        p = self.population
        growth = self._kept_parameters()[ended] / p.host_parameters()[ended]
        test = p.accuracy(ended, "test").cpu()
        return {
            "env": ended,
            "kind": self._kinds[ended],
            "label_noise": p.context.label_noise[ended],
            "return": self._returns[ended],
            "length": p.epoch[ended],
            "gain": score,
            "points": 100 * self._better(ended, diverged, "test", last=test) - RENT * growth,
            "diverged": diverged,
            "germinated": self._counts[ended, Verb.GERMINATE],
            "fossilized": self._counts[ended, Verb.FOSSILIZE],
            "culled": self._counts[ended, Verb.CULL],
            "waited": self._counts[ended, Verb.WAIT],
            "params_ratio": 1 + growth,
            "flops_ratio": self._flops_ratio()[ended],
            "validation_accuracy": p.accuracy(ended, "validation").cpu(),
            "test_accuracy": test,
            "twin_validation_accuracy": self._twin[ended, -4],
            "twin_test_accuracy": self._twin[ended, -3],
        }

    # ---- state ----------------------------------------------------------------------------------------------------

    _METERS = ("_area", "_twin_area", "_spent", "_twin_spent", "_best")
    _STATE = ("_seeds", "_episodes", "_kinds", "_running", "_returns", "_counts", "_potential", "_twin", *_METERS)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as tensors in plain containers."""
        return {
            "population": self.population.state_dict(),
            "accuracy": self._accuracy.state_dict(),
            **{name: getattr(self, name).clone() for name in self._STATE},
        }

    def load_state_dict(self, state: dict[str, Any]) -> GraphBatch:
        """Restores what `state_dict` returned; returns the observation at that point."""
        self.population.load_state_dict(state["population"])
        self._accuracy.load_state_dict(state["accuracy"])
        for name in self._STATE:
            setattr(self, name, state[name].clone())
        return self._observe()


def _or_inf(loss: Tensor) -> Tensor:
    """On the CPU, with inf for NaN, which would win every comparison."""
    return loss.cpu().nan_to_num(nan=torch.inf, posinf=torch.inf)


def population_spec(config: EnvConfig) -> PopulationSpec:
    """What the hosts that `config` asks for have in common."""
    data = tasks.load(config.task)
    rules, names = (config.training, config.lifecycle), tuple(config.blueprints)
    return PopulationSpec(host_spec(config), names, data, *rules, engine=config.engine)


def draw_context(config: EnvConfig, key: Tensor) -> tuple[Context, Tensor]:
    """The contexts of the instances `key` (int64 [m]) and their kinds [m]."""
    host, classes = config.host, tasks.load(config.task).classes
    return contexts.draw(config.contexts, host.width, host.stages, config.epochs, classes, key)
