"""`python -m trainers.evaluate`: a trained Tamiyo against baseline controllers on held-out instances."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from envs.config import GrowthConfig
from envs.growth_env import GrowthEnv
from envs.making import make_envs, saved_env_config
from esper.runtime import checkpoint
from esper.runtime.errors import ConfigError
from esper.tamiyo.loading import PRETRAINED, interface_of, load_state, policy_of
from trainers import cli, config, judging
from trainers.config import EvaluateConfig


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
    learned = {} if growth else state["env"]["learned"]
    label, folder = _place(path, state, env.name)
    report = judging.evaluate(policy, env, settings, settings.runtime.device, label, learned)
    judging.write(report, folder)
    console = cli.console()
    console.print(judging.table(report))
    console.print(f"report: {folder / 'report.md'} and report.json", soft_wrap=True, highlight=False)


def _place(path: Path, state: dict[str, Any], env: str) -> tuple[str, Path]:
    """What the report calls a checkpoint, and the folder it goes to: that of its run. A shipped policy has none, and
    nothing is written into the package that it may lie in."""
    if (card := state.get("card")) is not None:
        # The fingerprint tells scripts/ship.py that a report is of the very parameters whose card it goes on.
        return f"{path.stem} {card['fingerprint']}", Path("runs") / PRETRAINED / path.stem / env / "eval"
    run_dir = path.parent.parent if path.parent.name == checkpoint.FOLDER else path.parent
    return str(path), run_dir / "eval"


def main() -> None:
    """Console entry point."""
    config.register()
    sys.exit(cli.run(_main, EvaluateConfig))


if __name__ == "__main__":
    main()
