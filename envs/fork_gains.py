"""What germinating and culling gain, tried on forks of hosts in random episodes: data for supervised learning."""

from __future__ import annotations

import torch
from torch import Tensor

from envs.config import EnvConfig
from envs.growth_env import GrowthEnv
from esper.graph import GraphBatch, Layout
from esper.graph.batch import Packed
from esper.growth.actions import WAIT, Verb
from esper.runtime import seeding

EPISODES = 128  # of a chunk
EVERY = 3  # epochs between the decisions that are tried
BUSIEST = 0.35  # largest share of epochs in which an episode's random controller acts
CULLS = 3.0  # how much more often than a germination a cull is tried
_TENSORS = ("x", "node_mask", "attr", "mask")
_SALT = 103  # of the instances


def collect(config: EnvConfig, seed: int, chunk: int, tried: int = 4) -> dict[str, Tensor]:
    """Plays EPISODES random episodes, each as busy as it happens to be, of instances that only this chunk has.

    At every third epoch `tried` random germinations and culls are done on forks that keep the host's own future, and
    nothing after them.

    Returns:
        Of m decisions: the packed graphs (`x`, `node_mask`, `attr`, `mask`), `action_mask` [m, A], `actions`
        [m, tried], and their `gains` in return over waiting [m, tried].
    """
    key = seeding.fold(torch.tensor(seed), _SALT, torch.tensor(chunk))
    generator = torch.Generator().manual_seed(int(key))
    env = GrowthEnv(config, EPISODES, autoreset=False)
    graph = env.reset(seeding.fold(key, torch.arange(EPISODES)))
    verbs, everyone = env.layout.table()[0], torch.arange(EPISODES)
    germinate, cull = verbs == Verb.GERMINATE, verbs == Verb.CULL
    busy = BUSIEST * torch.rand(EPISODES, generator=generator)
    first = 1 + int(torch.randint(min(EVERY, config.epochs - 2), (1,), generator=generator))
    graphs, found = [], []
    for epoch in range(config.epochs):
        legal = env.action_mask()
        if first <= epoch < config.epochs - 1 and (epoch - first) % EVERY == 0:
            weight = legal * (germinate + CULLS * cull)
            rows = everyone[weight.sum(1) > 0]
            actions = torch.multinomial(weight[rows], tried, replacement=True, generator=generator)
            both = torch.cat([torch.full_like(actions[:, :1], WAIT), actions], dim=1)
            each = rows[:, None].expand_as(both)
            returns = env.tried(each.flatten(), both.flatten(), future=True).view_as(both)
            graphs.append(graph[rows])
            found.append((actions, returns[:, 1:] - returns[:, :1]))
        weight = legal * (germinate + cull).float()
        drawn = torch.multinomial(weight + (weight.sum(1, keepdim=True) == 0), 1, generator=generator).squeeze(1)
        acts = (torch.rand(EPISODES, generator=generator) < busy) & (weight.sum(1) > 0)
        graph = env.step(torch.where(acts, drawn, WAIT))[0]
    packed = GraphBatch.cat(graphs).pack()
    masks = torch.cat([each.action_mask for each in graphs])
    actions, gains = (torch.cat(parts) for parts in zip(*found, strict=True))
    tensors = {name: getattr(packed, name) for name in _TENSORS}
    return {**tensors, "action_mask": masks, "actions": actions, "gains": gains}


def layout(config: EnvConfig) -> Layout:
    """Of the graphs that `collect` packs."""
    env = GrowthEnv(config, 1)
    return env.reset(torch.zeros(1, dtype=torch.int64)).pack().layout


def graphs(found: dict[str, Tensor], of: Layout, rows: Tensor | slice) -> GraphBatch:
    """Some of the decisions that `collect` returned."""
    return GraphBatch.of(Packed(of, *(found[name][rows] for name in _TENSORS)), found["action_mask"][rows])
