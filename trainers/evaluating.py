"""One evaluation job under Hydra: a trained policy against baseline controllers on held-out episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from envs.config import GrowthConfig
from envs.growth_env import GrowthEnv
from envs.making import make_envs, saved_env_config
from esper.runtime import checkpoint
from esper.runtime.errors import ConfigError, Interrupted
from esper.tamiyo.loading import PRETRAINED, interface_of, load_state, policy_of
from trainers import cli, config, judging
from trainers.config import EvaluateConfig
from trainers.preemption import Preemption, Stop


@hydra.main(version_base="1.3", config_path="pkg://esper.conf", config_name="evaluate")
@cli.job(EvaluateConfig)
def _main(given: DictConfig) -> None:
    settings = OmegaConf.to_object(given)
    assert isinstance(settings, EvaluateConfig)
    settings.runtime.validate()
    if settings.episodes < 1:
        raise ConfigError(f"episodes={settings.episodes}: must be above 0")
    path, state = load_state(settings.checkpoint, "checkpoint")
    if settings.env is None:
        env = saved_env_config(state["config"]["env"])
    else:
        env = settings.env
        env.validate()
    settings.validate(env, "")
    interface = interface_of(state)
    # Growth environments all have one interface; others show theirs once they are made.
    growth = isinstance(env, GrowthConfig)
    if (GrowthEnv.interface if growth else make_envs(env, 1).interface) != interface:
        raise ConfigError(
            f"env={env.name}: its graphs or actions differ from those that {settings.checkpoint} was trained on; "
            "evaluate it on an environment of the same kind and sizes"
        )
    settings.runtime.set_up()
    policy = policy_of(state, settings.runtime.device, f"checkpoint={settings.checkpoint}")
    learned = {} if growth else state["processes"][0]["env"]["learned"]
    label, folder = _place(path, state, env.name)
    try:
        with Preemption("stopping") as preemption:
            report, drawn = judging.evaluate(policy, env, settings, settings.runtime.device, label, learned)
            with preemption.held():  # files are not to be cut short
                judging.write(report, drawn, folder)
    except Stop as stop:
        raise Interrupted(f"stopped by {stop.name}; {_left(folder)}, evaluate again for a new one") from stop
    console = cli.console()
    console.print(judging.table(report))
    console.print(f"report: {folder / judging.PAGE}, report.md and report.json", soft_wrap=True, highlight=False)


def _left(folder: Path) -> str:
    """What there is in a folder whose report is not written."""
    before = (folder / "report.json").exists()
    return f"the report in {folder} is the one of before" if before else "there is no report yet"


def _place(path: Path, state: dict[str, Any], env: str) -> tuple[str, Path]:
    """What the report calls a checkpoint, and the folder it goes to: that of its run. A shipped policy has none, and
    nothing is written into the package that it may lie in."""
    if (card := state.get("card")) is not None:
        # The fingerprint tells scripts/ship.py that a report is of the very parameters whose card it goes on.
        return f"{path.stem} {card['fingerprint']}", Path("runs") / PRETRAINED / path.stem / env / "eval"
    run_dir = path.parent.parent if path.parent.name == checkpoint.FOLDER else path.parent
    return str(path), run_dir / "eval"


def run() -> int:
    """What the command line asks for; returns the exit code."""
    config.register()
    return cli.run(_main, EvaluateConfig)
