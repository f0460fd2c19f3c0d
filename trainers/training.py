"""One training job under Hydra: trains Tamiyo, or goes on with a run, then compares it with the baselines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from envs.making import saved_env_config
from esper.graph.segment import acceleration_status
from esper.runtime import checkpoint, launch, lock
from esper.runtime.distributed import World, launched
from esper.runtime.errors import ConfigError, Interrupted, Preempted
from trainers import cli, config, judging
from trainers.config import LAUNCH_FILE, TrainConfig
from trainers.loop import Trainer
from trainers.objective import objective
from trainers.preemption import Preemption, Stop

log = logging.getLogger(__name__)

# What a resumed run may not change, since its parameters, its instances or its state would no longer fit; and what of
# that it may.
_FIXED = ("env", "policy", "seed", "init", "warm_start", "ppo.normalize_returns", "ppo.starts")
_FREE = ("env.subprocess", "env.timeout_s")

_DOING = "saving a checkpoint"


def resumed_config(given: DictConfig, overrides: list[str], saved: dict[str, Any], run: str) -> TrainConfig:
    """The saved configuration with this call's overrides.

    Args:
        given: the configuration composed from this call's command line.
        overrides: the command line, `KEY=VALUE` each.
        saved: the configuration in the checkpoint, as plain containers.
        run: the run directory, for messages.

    Raises:
        ConfigError: an override would change what is fixed, or the configuration is another version's.
    """
    try:
        env = OmegaConf.structured(saved_env_config(saved["env"]))
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), {"env": env}, saved)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"resume={run}: its configuration is another version's ({cli.explain(error, TrainConfig)}); "
            "resume it with the version that wrote it"
        ) from error
    # Which start takes which step follows from both.
    fixed = (*_FIXED, "ppo.total_steps") if merged.ppo.starts > 1 else _FIXED
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~").partition("@")[0].replace("/", ".")
        if key in ("resume", "output_dir"):
            continue
        if key in ("experiment", "recipe"):
            raise ConfigError(f"{override}: it sets many keys; override single keys when resuming {run}")
        for name in _touched(key, fixed):
            before = OmegaConf.select(merged, name)
            if OmegaConf.select(given, name) != before:
                raise ConfigError(
                    f"{override}: cannot be changed when resuming {run} ({name} was {before}); leave it out, or start "
                    f"a new run; all keys can be changed but those of {', '.join(fixed)}"
                )
        OmegaConf.update(merged, key, OmegaConf.select(given, key))
    assert isinstance(merged, DictConfig)
    return config.to_train_config(merged)


def _touched(key: str, fixed: Sequence[str]) -> list[str]:
    """What of `fixed` an override of `key` touches."""
    if key in _FREE:
        return []
    inside = [key for name in fixed if f"{key}.".startswith(f"{name}.")]
    return inside or [name for name in fixed if name.startswith(f"{key}.")]


@hydra.main(version_base="1.3", config_path="pkg://esper.conf", config_name="train")
@cli.job(TrainConfig)
def _main(given: DictConfig) -> float | None:
    run_dir, world = Path(HydraConfig.get().runtime.output_dir), launched()
    if not world.alone and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ConfigError(f"-m under WORLD_SIZE={world.size}: start a sweep without torchrun, or one run with it")
    if not world.first:
        logging.getLogger().setLevel(logging.WARNING)
    # What has been sent to all processes at once comes once more from the one that launched them.
    preemption = Preemption() if world.alone else Preemption(_DOING if world.first else None, grace_s=10.0)
    with preemption, lock.owned(run_dir) if world.first else nullcontext():
        try:
            world.connect(given.runtime.patience_s)
            with world.watched(lambda: preemption.number, preemption.stop):
                _train(given, run_dir, preemption, world)
        except Stop as stop:
            if not checkpoint.found(run_dir):
                raise Interrupted(f"stopped by {stop.name} before there was anything to save; start it again") from stop
            go_on = f"go on with: python -m trainers.train resume={run_dir}"
            raise Preempted(f"stopped by {stop.name} outside of training, all of it is saved; {go_on}") from stop
        finally:
            world.close()  # otherwise threads that still run would abort the process
    return objective(run_dir) if world.first else None


def _state(given: DictConfig, run_dir: Path, console: Console) -> dict[str, Any] | None:
    """The checkpoint to go on from: where the user says so, or where the launch that began the run is restarted."""
    if (identity := launch.identity()) and not given.resume:
        (run_dir / LAUNCH_FILE).write_text(identity)
    if not given.resume and not (launch.restarts() and checkpoint.found(run_dir)):
        return None
    try:
        path, state, problems = checkpoint.latest(run_dir)
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"resume={given.resume or run_dir}: {error}") from error
    for problem in problems:
        console.print(f"warning: {problem}; going on from {path.name}")
    return state


def _train(given: DictConfig, run_dir: Path, preemption: Preemption, world: World) -> None:
    """Training, and the evaluation after it."""
    console = cli.console()
    state = world.from_first(_state(given, run_dir, console) if world.first else None)
    if given.resume and state is not None:
        settings = resumed_config(given, list(HydraConfig.get().overrides.task), state["config"], str(run_dir))
    else:
        settings = config.to_train_config(given)
    status = acceleration_status()
    way = "accelerated in eager code" if status["acceleration_enabled"] else "native"
    log.info("segment reductions: %s (%s)", way, status["why"])
    trainer = Trainer(settings, run_dir, state, list(HydraConfig.get().overrides.task), world)
    if not world.alone:
        console.print(f"{world.size} processes, {settings.env.num_envs} environments")
    console.print(f"run directory: {run_dir}", soft_wrap=True, highlight=False)
    evaluated = not settings.evaluation.episodes or (run_dir / "eval" / "report.json").exists()
    if state is not None:
        console.print(f"resuming at step {trainer.step:,} of {settings.ppo.total_steps:,}")
    if trainer.step < settings.ppo.total_steps:
        trainer.run(preemption)
    elif evaluated and world.first:
        console.print(f"nothing left to do; to train longer: {_longer(settings, run_dir)}", soft_wrap=True)
        return
    world.close()
    if not world.first:
        return
    if settings.evaluation.episodes:
        console.print(judging.table(trainer.evaluate()))
    for line in (
        f"run directory:    {run_dir}",
        f"train longer:     {_longer(settings, run_dir)}",
        f"evaluate again:   python -m trainers.evaluate checkpoint={run_dir} baselines=all episodes=256",
        f"see the curves:   tensorboard --logdir {run_dir / 'tb'}",
        *([f"see the pictures: {run_dir / 'eval' / judging.PAGE}"] if settings.evaluation.episodes else []),
    ):
        console.print(line, soft_wrap=True, highlight=False)


def _longer(settings: TrainConfig, run_dir: Path) -> str:
    """How to train a run that has ended for longer."""
    if settings.ppo.starts > 1:
        return f"start a new run with init={run_dir}"
    return f"python -m trainers.train resume={run_dir} ppo.total_steps={2 * settings.ppo.total_steps}"


def run() -> int:
    """What the command line asks for; returns the exit code."""
    config.register()
    return cli.run(_main, TrainConfig)
