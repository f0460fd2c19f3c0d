"""N growth episodes side by side, in torch: GraphBatch observations, one step = one training epoch of every host.

The Gymnasium faces of it are in `envs.gym_env`.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from torch import Tensor

from envs import tasks
from envs.config import EnvConfig
from envs.reward import gain, load_reference, rent
from esper.graph import GraphBatch
from esper.growth.actions import ActionLayout, Verb
from esper.growth.host import HostSpec
from esper.growth.lifecycle import is_kept
from esper.growth.observation import Observer
from esper.growth.population import Population
from esper.growth.state import Context
from esper.runtime import seeding

SPLITS = ("train", "heldout")
"""Instances (init, data order, data subset, noise, learning rate) of the two splits never coincide."""

# Salts of the streams of a key; those of esper.growth.population are other numbers.
_EPISODE, _CONTEXT = 101, 102


class GrowthEnv:
    """N hosts with their twins as one population of 2N.

    Args:
        config: what to grow on what; `config.num_envs` is not used.
        num_envs: N.
        split: which instances to draw, one of SPLITS.
        autoreset: start the next episode in the step that ended one (SAME_STEP); otherwise the caller resets.
        device: where the population lives.
    """

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
        self.reference = load_reference(config.name)
        data = tasks.load(config.task)
        self.population = Population(
            host_spec(config),
            list(config.blueprints),
            data,
            config.training,
            config.lifecycle,
            hosts=2 * num_envs,
            observed=num_envs,
            device=device,
        )
        self.layout = ActionLayout(self.population.slots, len(config.blueprints))
        self.device = self.population.device
        self._observer = Observer(self.population, config.epochs)
        self.graph_build_s: deque[float] = deque(maxlen=1024)  # wall time of the latest observations
        largest = max(blueprint.parameter_count(config.host.width) for blueprint in self.population.catalogue)
        self._most_parameters = largest * self.population.slots
        self._seeds = torch.arange(num_envs, device=self.device)
        self._episodes = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._returns = torch.zeros(num_envs, device=self.device)
        self._counts = torch.zeros(num_envs, len(Verb), dtype=torch.int64, device=self.device)
        self._potential = torch.zeros(num_envs, device=self.device)

    def reset(self, seeds: Tensor | None = None) -> GraphBatch:
        """Starts an episode in every environment.

        Args:
            seeds: int64 [N]; restarts environment k's sequence of instances from seeds[k]. None goes on with it.
        """
        if seeds is not None:
            self._seeds = seeds.to(self.device)
            self._episodes.zero_()
        self._begin(torch.arange(self.num_envs, device=self.device))
        return self._observe()

    def action_mask(self) -> Tensor:
        """bool [N, A]: what is legal now."""
        return self.layout.mask(self.population.lifecycle.stage[: self.num_envs])

    def _observe(self) -> GraphBatch:
        start = time.perf_counter()
        graph = self._observer()
        self.graph_build_s.append(time.perf_counter() - start)
        return graph

    def _begin(self, where: Tensor) -> None:
        """New instances for the environments `where` ([m]); the twin gets the very context of its host."""
        split = torch.full_like(self._seeds[where], self._split)
        key = seeding.fold(split, _EPISODE, self._seeds[where], self._episodes[where])
        context = draw_context(self.config, key)
        both = {name: value.repeat(2) for name, value in vars(context).items()}
        self.population.reset(torch.cat([where, where + self.num_envs]), Context(**both))
        self._episodes[where] += 1
        for state in (self._returns, self._counts, self._potential):
            state[where] = 0

    def step(self, actions: Tensor) -> tuple[GraphBatch, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Carries out one action per environment and trains every host for an epoch.

        Args:
            actions: int64 [N].

        Returns:
            observation: GraphBatch of N graphs (with autoreset, of the new episode where one has ended).
            reward: float32 [N].
            terminated: bool [N]; the horizon is part of the task and of the observation, so reaching it terminates.
            truncated: bool [N], always False.
            info: empty unless an episode has ended; then `final_graph` (the N observations before the reset) and
                `episodes`, a dict of tensors over the m environments that ended (see `_summary`).

        Raises:
            ValueError: an illegal action, or not one for each environment; nothing is changed then.
        """
        if actions.shape != (self.num_envs,):
            raise ValueError(f"actions of shape {tuple(actions.shape)} for {self.num_envs} environments")
        verbs = self.layout.execute(self.population, actions.to(self.device))
        self._counts += torch.nn.functional.one_hot(verbs, len(Verb))
        self.population.train_epoch()
        n = self.num_envs
        terminated = self.population.epoch[:n] >= self.config.epochs
        if terminated.any():
            self.population.remove_unfinished(torch.cat([terminated, torch.zeros_like(terminated)]))
        loss = self.population.validation_loss
        score = gain(loss[:n], loss[n:], self.reference)
        potential = (self.config.reward.shaping * score).masked_fill(terminated, 0.0)
        reward = potential - self._potential + torch.where(terminated, score - self._price(), 0.0)
        self._potential = potential
        self._returns += reward
        graph, info = self._observe(), {}
        if terminated.any():
            ended = terminated.nonzero().squeeze(1)
            info = {"final_graph": graph, "episodes": self._summary(ended, score)}
            if self.autoreset:
                self._begin(ended)
                graph = self._observe()
        return graph, reward, terminated, torch.zeros_like(terminated), info

    def _kept_parameters(self) -> Tensor:
        return self.population.seed_parameters(is_kept(self.population.lifecycle.stage))[: self.num_envs]

    def _flops_ratio(self) -> Tensor:
        return self.population.extra_flops[: self.num_envs] / (self.config.epochs * self.population.spec.flops)

    def _price(self) -> Tensor:
        """[N], what growing has cost if the episode ended now."""
        weights = self.config.reward
        parameters = rent(self._kept_parameters(), self.population.spec.parameter_count, self._most_parameters)
        return weights.rent * parameters + weights.flops * self._flops_ratio()

    def _summary(self, ended: Tensor, score: Tensor) -> dict[str, Tensor]:
        """What is known of the episodes that have ended in the environments `ended` ([m]); every entry is [m].

        The two accuracies come from the test split; they are for reports and never enter observation or reward.
        """
        accuracy = self.population.test_accuracy(torch.cat([ended, ended + self.num_envs]))
        return {
            "env": ended,
            "return": self._returns[ended],
            "length": self.population.epoch[ended],
            "gain": score[ended],
            "germinated": self._counts[ended, Verb.GERMINATE],
            "fossilized": self._counts[ended, Verb.FOSSILIZE],
            "culled": self._counts[ended, Verb.CULL],
            "waited": self._counts[ended, Verb.WAIT],
            "params_ratio": 1 + self._kept_parameters()[ended] / self.population.spec.parameter_count,
            "flops_ratio": self._flops_ratio()[ended],
            "test_accuracy": accuracy[: len(ended)],
            "twin_test_accuracy": accuracy[len(ended) :],
        }

    # ---- state ----------------------------------------------------------------------------------------------------

    _STATE = ("_seeds", "_episodes", "_returns", "_counts", "_potential")

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as tensors in plain containers."""
        return {
            "population": self.population.state_dict(),
            **{name: getattr(self, name).clone() for name in self._STATE},
        }

    def load_state_dict(self, state: dict[str, Any]) -> GraphBatch:
        """Restores what `state_dict` returned; returns the observation at that point."""
        self.population.load_state_dict(state["population"])
        for name in self._STATE:
            setattr(self, name, state[name].clone())
        return self._observe()


def host_spec(config: EnvConfig) -> HostSpec:
    """The architecture that `config` asks for."""
    data = tasks.load(config.task)
    classes = int(data.train_y.max()) + 1
    return HostSpec(data.train_x.shape[1], classes, config.host.width, config.host.stages)


def draw_context(config: EnvConfig, key: Tensor) -> Context:
    """The contexts of the instances `key` (int64 [m])."""
    draw = seeding.uniform(seeding.fold(key, _CONTEXT), 3)

    def log_uniform(bounds: list[float] | list[int], u: Tensor) -> Tensor:
        low, high = torch.tensor(bounds, dtype=torch.float64, device=key.device).log()
        return (low + (high - low) * u.double()).exp()

    low, high = config.context.label_noise
    return Context(
        key=key,
        learning_rate=log_uniform(config.context.learning_rate, draw[:, 0]).float(),
        train_size=log_uniform(config.context.train_size, draw[:, 1]).round().long(),
        label_noise=low + (high - low) * draw[:, 2],
    )
