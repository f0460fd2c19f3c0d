"""`python -m trainers.export`: a trained policy as a file that runs without Esper."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from esper.runtime.errors import ConfigError
from esper.tamiyo import export
from esper.tamiyo.loading import interface_of, load_state, policy_of
from trainers import cli, config
from trainers.config import ExportConfig
from trainers.preemption import early


@hydra.main(version_base="1.3", config_path="pkg://esper.conf", config_name="export")
@cli.job(ExportConfig)
def _main(given: DictConfig) -> None:
    settings = OmegaConf.to_object(given)
    assert isinstance(settings, ExportConfig)
    export.check_format(settings.format)
    _, state = load_state(settings.checkpoint, "checkpoint")
    out = Path(settings.out)
    if out.suffix != (ending := export.ENDINGS[settings.format]):
        raise ConfigError(f"out={out}: must end in {ending} with format={settings.format}")
    policy = policy_of(state, "cpu", f"checkpoint={settings.checkpoint}")
    console = cli.console()
    console.print(f"exporting {settings.checkpoint} (up to a few minutes) ...", soft_wrap=True, highlight=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    env = state["config"]["env"]
    trained_on = {"environment": env["name"], "blueprints": env.get("blueprints", [])}
    export.save(policy, interface_of(state), out, settings.format, trained_on)
    console.print(f"{settings.format}: {out}", soft_wrap=True, highlight=False)


def main() -> None:
    """Console entry point."""
    config.register()
    with early():
        sys.exit(cli.run(_main, ExportConfig))


if __name__ == "__main__":
    main()
