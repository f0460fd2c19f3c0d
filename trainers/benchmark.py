"""`python -m trainers.benchmark suite=SUITE`: how fast parts of Esper are on this machine."""

from __future__ import annotations

import dataclasses
import json
import sys
from datetime import datetime
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from esper.runtime.errors import ConfigError
from trainers import benchmarks, cli, config
from trainers.benchmarks import timing
from trainers.config import BenchmarkConfig


def _output(given: str) -> Path:
    """The file to write, in a folder that exists.

    Raises:
        ConfigError: it cannot be written.
    """
    path = Path(given)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"out={given}: {error.strerror}; choose another file") from error
    return path


@hydra.main(version_base="1.3", config_path="pkg://esper.conf", config_name="benchmark")
@cli.job(BenchmarkConfig)
def _main(given: DictConfig) -> None:
    settings = OmegaConf.to_object(given)
    assert isinstance(settings, BenchmarkConfig)
    settings.validate()
    suite = benchmarks.get(settings.suite)
    path = _output(settings.out)
    settings.runtime.set_up()
    machine, started = timing.machine(settings.runtime.device), datetime.now().astimezone()
    report = suite(settings)
    content = {
        "suite": settings.suite,
        "started": started.isoformat(timespec="seconds"),
        "machine": machine,
        "config": dataclasses.asdict(settings),
        # Suites of rows have one list of them, all others what they found under their own names.
        **(report.results if "rows" in report.results else {"results": report.results}),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    console = cli.console()
    for table in report.tables:
        console.print(table)
    console.print(f"{machine['cpu']}, torch {machine['torch']}, {machine['threads']} thread(s)", highlight=False)
    console.print(f"report: {path}", soft_wrap=True, highlight=False)


def main() -> None:
    """Console entry point."""
    config.register()
    sys.exit(cli.run(_main, BenchmarkConfig))


if __name__ == "__main__":
    main()
