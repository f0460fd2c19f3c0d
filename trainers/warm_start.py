"""Before PPO: Tamiyo learns by regression what single actions gain, on forks of hosts in random episodes.

PPO then starts from a policy that does what promises most, and learns what one action at a time does not tell. What has
been collected is kept in files, so that a run that is stopped here goes on where it was.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from envs import fork_gains
from envs.config import EnvConfig
from esper.growth.actions import WAIT
from esper.runtime import seeding
from esper.runtime.distributed import ALONE, World
from esper.tamiyo.policy import Tamiyo
from trainers.config import WarmStartConfig
from trainers.progress import Reporter

FOLDER = "warm_start"  # in the run directory
UNIT = 0.05  # return that a difference of 1 between two logits stands for while gains are learned
LARGEST = 0.6  # return; a host that diverges says no more than that
_MAX_NORM = 5.0  # of the gradient
_WEIGHT_DECAY = 0.01
_SALT = 104  # of the order of decisions; `envs.fork_gains` has another


def run(
    policy: Tamiyo, config: EnvConfig, settings: WarmStartConfig, seed: int, run_dir: Path, world: World = ALONE
) -> None:
    """Collects `settings.episodes` random episodes, fits `policy` to them and makes it act on what it predicts.

    What is collected is gone afterwards. The same seed gives the same policy, also if it was stopped in between, and
    whatever the number of processes, which collect side by side; the first one fits.
    """
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    chunks = range(-(-settings.episodes // fork_gains.EPISODES))[world.rank :: world.size]
    paths = [folder / f"{chunk}.pt" for chunk in chunks]
    with Reporter("warm start: random episodes", len(chunks), "chunks") as reporter:
        for done, (chunk, path) in enumerate(zip(chunks, paths, strict=True), 1):
            if not path.exists():
                torch.save(fork_gains.collect(config, seed, chunk, settings.tried), path.with_suffix(".part"))
                os.replace(path.with_suffix(".part"), path)
            reporter.update(done)
    own = {chunk: torch.load(path, weights_only=True) for chunk, path in zip(chunks, paths, strict=True)}
    parts = [part for _, part in sorted(item for each in world.gathered(own) for item in each.items())]
    if world.first:
        fit(policy, config, settings, seed, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    world.told("warm", lambda: "fitted")
    policy.load_state_dict(world.from_first(policy.state_dict()))
    policy.act_on_gains(UNIT / settings.temperature, settings.caution)
    for path in paths:
        path.unlink()
    with suppress(OSError):  # other processes' files may be there
        folder.rmdir()


def fit(policy: Tamiyo, config: EnvConfig, settings: WarmStartConfig, seed: int, found: dict[str, Tensor]) -> None:
    """Regression: an action's logit is to be above WAIT's by what the action gains, in units of UNIT. With
    `settings.huber`, errors above it count by their size (Huber, "Robust estimation of a location parameter", 1964)."""
    generator = torch.Generator().manual_seed(int(seeding.fold(torch.tensor(seed), _SALT)))
    of, count = fork_gains.layout(config), len(found["gains"])
    device = next(policy.parameters()).device
    targets = found["gains"].clamp(-LARGEST, LARGEST) / UNIT
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.lr, weight_decay=_WEIGHT_DECAY, fused=True)
    batch = min(settings.batch_size, count)
    steps = settings.epochs * (count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps)
    error = nn.functional.mse_loss
    if settings.huber is not None:
        error = partial(nn.functional.smooth_l1_loss, beta=settings.huber / UNIT)
    done = 0
    with Reporter("warm start: regression", steps, "steps") as reporter:
        for _ in range(settings.epochs):
            for rows in torch.randperm(count, generator=generator)[: count // batch * batch].split(batch):
                graph = fork_gains.graphs(found, of, rows).to(device)
                logits, _ = policy(graph)
                predicted = logits.gather(1, found["actions"][rows].to(device)) - logits[:, WAIT, None]
                loss = error(predicted, targets[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), _MAX_NORM)
                optimizer.step()
                schedule.step()
                done += 1
                reporter.update(done, f"loss {loss.item():.2f}" if done % 50 == 0 else "")
