"""`python -m trainers.evaluate`: a trained Tamiyo against baseline controllers on held-out instances."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from envs.config import EnvConfig
from esper.graph.schema import SCHEMA
from esper.runtime import checkpoint
from esper.runtime.errors import ConfigError
from esper.tamiyo.policy import PolicyConfig, Tamiyo
from trainers import cli, config, evaluation
from trainers.config import EvaluateConfig


def load(given: str) -> tuple[Path, dict[str, Any]]:
    """Path and state of the checkpoint that the user named by a file or a run directory.

    Raises:
        ConfigError: there is none, or it is not usable.
    """
    path = Path(given)
    if not path.exists():
        raise ConfigError(f"checkpoint={given}: no such file or directory; give a run directory or a checkpoint file")
    try:
        if path.is_dir():
            path, state, _ = checkpoint.latest(path)
        else:
            state = checkpoint.read(path)
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"checkpoint={given}: {error}") from error
    if state["schema_hash"] != SCHEMA.hash:
        raise ConfigError(f"checkpoint={given}: its graph schema differs from this version's; train it anew")
    return path, state


@hydra.main(version_base="1.3", config_path="pkg://esper.conf", config_name="evaluate")
@cli.job(EvaluateConfig)
def _main(given: DictConfig) -> None:
    settings = OmegaConf.to_object(given)
    assert isinstance(settings, EvaluateConfig)
    settings.runtime.validate()
    if settings.episodes < 1:
        raise ConfigError(f"episodes={settings.episodes}: must be above 0")
    path, state = load(settings.checkpoint)
    if settings.env is None:
        saved = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(EnvConfig), state["config"]["env"]))
        assert isinstance(saved, EnvConfig)
        env = saved
    else:
        env = settings.env
        env.validate()
    settings.validate(len(env.blueprints), "")
    torch.set_num_threads(settings.runtime.threads)
    policy = Tamiyo(PolicyConfig(**state["config"]["policy"])).to(settings.runtime.device)
    policy.load_state_dict(state["learner"]["policy"])
    report = evaluation.evaluate(policy, env, settings, settings.runtime.device, str(path))
    run_dir = path.parent.parent if path.parent.name == checkpoint.FOLDER else path.parent
    evaluation.write(report, run_dir / "eval")
    console = cli.console()
    console.print(evaluation.table(report))
    console.print(f"report: {run_dir / 'eval' / 'report.md'} and report.json", soft_wrap=True, highlight=False)


def main() -> None:
    """Console entry point."""
    config.register()
    sys.exit(cli.run(_main, EvaluateConfig))


if __name__ == "__main__":
    main()
