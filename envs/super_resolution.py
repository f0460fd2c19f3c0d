"""Growing small super-resolution networks on photographs: N hosts that are ordinary modules, each beside its twin.

Instances differ in the initial values, the training crops, their order and the learning rate.
"""

from __future__ import annotations

import time
from collections import deque
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from envs import photos
from envs.config import GrowthConfig
from envs.contexts import check_range
from envs.growth_env import SPLITS
from esper.graph import GraphBatch
from esper.graph.interface import GROWTH, Interface
from esper.graph.schema import SCHEMA
from esper.growth.actions import WAIT, ActionLayout, Verb
from esper.growth.lifecycle import is_kept
from esper.growth.observation import Observer
from esper.hosts.anatomy import Anatomy, traced
from esper.hosts.budget import Budget
from esper.hosts.module import ModuleHost
from esper.hosts.super_resolver import TINY, SuperResolver, slots
from esper.runtime import seeding
from esper.runtime.errors import check_positive

SCALE = 2
LOWEST = -3.0  # dB: what a host scores that diverges, and the least that any scores
_EPISODE, _INIT, _CROPS, _ORDER, _RATE = 105, 1, 2, 3, 4  # salts
_LARGEST_SEED = 1 << 62


@dataclass
class SuperResolutionConfig(GrowthConfig):
    """Growth of super-resolution networks."""

    kind: str = "super_resolution"
    num_envs: int = 2
    epochs: int = 8
    crop: int = 32  # height and width of what is enlarged, pixels
    crops: list[int] = field(default_factory=lambda: [32, 128])  # training crops, drawn per episode from [low, high]
    judged: int = 12  # crops of validation, and of test
    learning_rate: list[float] = field(default_factory=lambda: [1e-4, 5e-4])
    seeds: int = 4  # germinations allowed
    rent: float = 0.1  # dB that 100 % more parameters cost

    @property
    def instances(self) -> str:
        """See GrowthConfig."""
        return self.name

    def validate(self, prefix: str = "env") -> None:
        """See BaseEnvConfig."""
        super().validate(prefix)
        check_positive(prefix, {name: getattr(self, name) for name in ("crop", "judged", "seeds")})
        check_range(f"{prefix}.crops", self.crops, 2, 100_000)
        check_range(f"{prefix}.learning_rate", self.learning_rate, 1e-8, 1.0)


class _Learner:
    """A network and its optimiser on the data of an instance."""

    def __init__(self, env: SuperResolutionEnv, key: Tensor, rate: float):
        self.env, self.key, t = env, key, env.config.training
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_plain(seeding.fold(key, _INIT)))
            self.network = SuperResolver.tiny(SCALE).to(env.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), rate, (t.beta1, t.beta2), t.epsilon)

    def train_epoch(self, low: Tensor, high: Tensor, epoch: int) -> float:
        """Mean loss of an epoch's minibatches, each before its step."""
        training = self.env.config.training
        order = torch.Generator().manual_seed(_plain(seeding.fold(self.key, _ORDER, epoch)))
        total = 0.0
        self.network.train()
        for _ in range(training.steps_per_epoch):
            place = torch.randperm(len(low), generator=order)[: training.batch_size]
            self.optimizer.zero_grad()
            loss = (self.network(low[place]) - high[place]).abs().mean() / self.env.unit
            loss.backward()
            self.optimizer.step()
            total += float(loss.detach()) / training.steps_per_epoch
        return total

    def losses(self, count: int | None) -> Tensor:
        """Of validation crops: mean absolute errors over that of bicubic enlargement, [n]."""
        low, high = self.env.judged["validation"]
        return (self.network.restored(low[:count]) - high[:count]).abs().mean((1, 2, 3)) / self.env.unit

    def state_dict(self) -> dict[str, Any]:
        """Of network and optimiser, copied."""
        return deepcopy({"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))  # which would share its tensors

    def psnr(self, split: str) -> float:
        """Over all crops of a split, dB on the Y channel."""
        low, high = self.env.judged[split]
        return _pooled(photos.psnr_y(self.network.restored(low), high, SCALE))


class _Episode:
    """A host, its twin, and what has become of them."""

    def __init__(self, env: SuperResolutionEnv, key: Tensor):
        config, self.env, self.key = env.config, env, key
        draw = torch.Generator().manual_seed(_plain(seeding.fold(key, _CROPS)))
        count = int(torch.randint(config.crops[0], config.crops[1] + 1, (), generator=draw))
        low, high = photos.crops(photos.load("train"), count, config.crop, SCALE, draw)
        self.data = low.to(env.device), high.to(env.device)
        slow, fast = (torch.tensor(rate).log() for rate in config.learning_rate)
        rate = float((slow + (fast - slow) * seeding.uniform(seeding.fold(key, _RATE), 1)[0]).exp())
        self.learner, self.twin = _Learner(env, key, rate), _Learner(env, key, rate)
        network = self.learner.network
        self.host = ModuleHost(
            network,
            Anatomy(network, slots(network.dat.spec), traced(network, (env.judged["validation"][0][:2],))),
            config.blueprints,
            self.learner.optimizer,
            self.learner.losses,
            config.lifecycle,
            Budget(parameters=None, seeds=config.seeds),
            count,
            _plain(key),
        )
        self.observer = Observer(self.host, config.epochs)
        self.counts = torch.zeros(len(Verb), dtype=torch.int64)
        self.returned, self.running = 0.0, True

    @property
    def epoch(self) -> int:
        return int(self.host.epoch)

    def growth(self) -> float:
        """Parameters that are kept over those of the host."""
        kept = self.host.seed_parameters(is_kept(self.host.lifecycle.stage))
        return float(kept / self.host.host_parameters())

    def step(self, action: int) -> float:
        """Carries out an action, trains both for an epoch, and returns the reward."""
        verb = self.env.layout.execute(self.host, torch.tensor([action]))
        self.counts[int(verb)] += 1
        epoch = self.epoch
        self.host.begin_epoch()
        loss = self.learner.train_epoch(*self.data, epoch)
        self.host.end_epoch(loss)
        self.twin.train_epoch(*self.data, epoch)
        if self.host.diverged() or self.epoch >= self.env.config.epochs:
            self.host.remove_unfinished()
            self.running = False
            self.returned = self._scored(self.learner.psnr("validation"), self.twin.psnr("validation"))
        return 0.0 if self.running else self.returned

    def _scored(self, psnr: float, twin: float) -> float:
        """dB above the twin, less the rent."""
        above = LOWEST if self.host.diverged() else max(psnr - twin, LOWEST)
        return above - self.env.config.rent * self.growth()

    def summary(self) -> dict[str, float]:
        """Of an episode that has ended; see `SuperResolutionEnv.step`."""
        host, config, growth = self.host, self.env.config, self.growth()
        psnr, twin = self.learner.psnr("test"), self.twin.psnr("test")
        return {
            "kind": 0,
            "return": self.returned,
            "length": self.epoch,
            "gain": self.returned + config.rent * growth,
            "points": self._scored(psnr, twin),
            "diverged": host.diverged(),
            "germinated": int(self.counts[Verb.GERMINATE]),
            "fossilized": int(self.counts[Verb.FOSSILIZE]),
            "culled": int(self.counts[Verb.CULL]),
            "waited": int(self.counts[Verb.WAIT]),
            "params_ratio": 1 + growth,
            "flops_ratio": float(host.extra_flops / (config.epochs * host.host_flops())),
            "test_psnr": psnr,
            "twin_test_psnr": twin,
            "bicubic_test_psnr": self.env.bicubic,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epochs depend on."""
        return {
            "key": self.key.clone(),
            "host": self.host.state_dict(),
            "learner": self.learner.state_dict(),
            "twin": self.twin.state_dict(),
            "counts": self.counts.clone(),
            "returned": self.returned,
            "running": self.running,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned of the same instance."""
        self.host.load_state_dict(state["host"])  # which gives the optimiser its parameters
        self.learner.load_state_dict(state["learner"])
        self.twin.load_state_dict(state["twin"])
        self.counts = state["counts"].clone()
        self.returned, self.running = state["returned"], state["running"]


class SuperResolutionEnv:
    """N networks, trained one after the other; as GrowthEnv but for what is trained.

    Args:
        config: what to grow.
        num_envs: N.
        split: which instances to draw, one of `growth_env.SPLITS`.
        autoreset: start the next episode in the step that ended one.
        device: where networks and crops are.

    Attributes:
        unit: the mean absolute error of bicubic enlargement on validation crops, in which losses are.
        bicubic: PSNR of bicubic enlargement on test crops, dB on the Y channel.
        judged: split -> low and high validation and test crops.
    """

    interface = Interface(SCHEMA, GROWTH)

    def __init__(
        self,
        config: SuperResolutionConfig,
        num_envs: int,
        split: str = "train",
        autoreset: bool = True,
        device: torch.device | str = "cpu",
    ):
        self.config, self.num_envs, self.autoreset = config, num_envs, autoreset
        self.device = torch.device(device)
        self._split = SPLITS.index(split)
        self.judged = {
            part: tuple(x.to(self.device) for x in photos.grid(photos.load(part), config.judged, config.crop, SCALE))
            for part in ("validation", "test")
        }
        low, high = self.judged["validation"]
        self.unit = float((photos.bicubic(low, SCALE) - high).abs().mean())
        low, high = self.judged["test"]
        self.bicubic = _pooled(photos.psnr_y(photos.bicubic(low, SCALE), high, SCALE))
        self.layout = ActionLayout(len(slots(TINY)), len(config.blueprints))
        self.graph_build_s: deque[float] = deque(maxlen=1024)
        self._seeds = torch.arange(num_envs)
        self._episodes = torch.zeros(num_envs, dtype=torch.int64)
        self._running: list[_Episode] = []

    @property
    def running(self) -> bool:
        """Whether an episode is going on in any environment."""
        return any(episode.running for episode in self._running)

    def reset(self, seeds: Tensor | None = None) -> GraphBatch:
        """See GrowthEnv."""
        if seeds is not None:
            self._seeds = seeds.cpu()
            self._episodes.zero_()
        self._running = [self._begin(row) for row in range(self.num_envs)]
        return self._observe()

    def _begin(self, row: int) -> _Episode:
        key = seeding.fold(torch.tensor(self._split), _EPISODE, self._seeds[row], self._episodes[row])
        self._episodes[row] += 1
        return _Episode(self, key)

    def action_mask(self) -> Tensor:
        """bool [N, A]: what is legal now."""
        return torch.cat([self.layout.mask(episode.host) for episode in self._running])

    def _observe(self) -> GraphBatch:
        start = time.perf_counter()
        graph = GraphBatch.cat([episode.observer() for episode in self._running])
        self.graph_build_s.append(time.perf_counter() - start)
        return graph

    def step(self, actions: Tensor) -> tuple[GraphBatch, Tensor, Tensor, Tensor, dict[str, Any]]:
        """See GrowthEnv. Rewards are dB of validation PSNR above the twin at the end of an episode, less
        `config.rent` for 100 % more parameters; points are the same on test crops, and accounts hold test PSNRs
        of the host, of its twin and of bicubic enlargement.

        Raises:
            ValueError: an illegal action, or not one for each environment; nothing is changed then.
        """
        if actions.shape != (self.num_envs,):
            raise ValueError(f"actions of shape {tuple(actions.shape)} for {self.num_envs} environments")
        allowed = self.action_mask()
        going = torch.tensor([episode.running for episode in self._running])
        chosen = torch.where(going, actions.cpu(), WAIT)
        if not allowed.gather(1, chosen[:, None]).all():
            raise ValueError(f"actions {actions.tolist()}: one is not legal; see action_mask")
        reward = torch.zeros(self.num_envs)
        for row, (episode, action) in enumerate(zip(self._running, chosen.tolist(), strict=True)):
            if going[row]:
                reward[row] = episode.step(action)
        ended = going & ~torch.tensor([episode.running for episode in self._running])
        graph, info = self._observe(), {}
        if ended.any():
            rows = ended.nonzero().flatten()
            summaries = [self._running[row].summary() for row in rows.tolist()]
            accounts = {name: torch.tensor([s[name] for s in summaries]) for name in summaries[0]}
            info = {"final_graph": graph, "episodes": {"env": rows, **accounts}}
            if self.autoreset:
                for row in rows.tolist():
                    self._running[row] = self._begin(row)
                graph = self._observe()
        return graph, reward, ended, torch.zeros_like(ended), info

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as tensors and primitives in plain containers."""
        return {
            "seeds": self._seeds.clone(),
            "episodes": self._episodes.clone(),
            "running": [episode.state_dict() for episode in self._running],
        }

    def load_state_dict(self, state: dict[str, Any]) -> GraphBatch:
        """Restores what `state_dict` returned; returns the observation at that point."""
        self._seeds, self._episodes = state["seeds"].clone(), state["episodes"].clone()
        self._running = []
        for each in state["running"]:
            episode = _Episode(self, each["key"])
            episode.load_state_dict(each)
            self._running.append(episode)
        return self._observe()


def _plain(key: Tensor) -> int:
    """A seed of torch's generators."""
    return int(key) % _LARGEST_SEED


def _pooled(psnr: Tensor) -> float:
    """Of the mean of the crops' squared errors, as if they were one image: smooth crops have hardly any, and would
    count most in a mean of decibels."""
    return float(-10 * (10 ** (-psnr.double() / 10)).mean().log10())
