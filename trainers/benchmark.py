"""`python -m trainers.benchmark suite=SUITE`: how fast parts of Esper are on this machine; with `compare=REPORT.json`,
which of them have become slower than they were."""

from __future__ import annotations

import dataclasses
import json
import sys
from datetime import datetime
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from esper.runtime.errors import ConfigError, EsperError
from trainers import benchmarks, cli, config
from trainers.benchmarks import comparison, timing
from trainers.benchmarks.comparison import Stored
from trainers.config import BenchmarkConfig
from trainers.preemption import early


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


def _as_in(base: Stored, given: DictConfig) -> None:
    """Gives `given` the suite and the settings of a report, but for those named on the command line.

    Raises:
        ConfigError: the command line names another suite, or a setting of the report is none any more.
    """
    named = [override.partition("=")[0].lstrip("+~") for override in HydraConfig.get().overrides.task]
    if "suite" in named and given.suite != base.suite:
        raise ConfigError(
            f"suite={given.suite}: compare={base.path} is a report of suite={base.suite}; leave suite out"
        )
    given.suite = base.suite
    known = dict(comparison.settings(given))
    for key, value in base.settings.items():
        part = key.partition(".")[0]  # a group that is chosen stands for all of its keys
        if key not in known or key in named or part in named:
            continue
        try:
            OmegaConf.update(given, key, value)
        except OmegaConfBaseException as error:
            raise ConfigError(
                f"compare={base.path}: config: {key}={value}: no value of this key; override it by {key}=VALUE"
            ) from error


def _measured(settings: BenchmarkConfig, console: Console) -> Path:
    """Runs a suite, shows what it has found and writes it to a file."""
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
        **report.results,
    }
    path.write_text(json.dumps(content, indent=1, default=dataclasses.asdict) + "\n")
    for table in report.tables:
        console.print(table)
    console.print(f"{machine['cpu']}, torch {machine['torch']}, {machine['threads']} thread(s)", highlight=False)
    console.print(f"report: {path}", soft_wrap=True, highlight=False)
    return path


@hydra.main(version_base="1.3", config_path="pkg://esper.conf", config_name="benchmark")
@cli.job(BenchmarkConfig)
def _main(given: DictConfig) -> None:
    base = None if given.compare is None else comparison.read("compare", given.compare)
    if base is not None and given.against is None:
        _as_in(base, given)
    settings = OmegaConf.to_object(given)
    assert isinstance(settings, BenchmarkConfig)
    settings.validate()
    console = cli.console()
    if base is None:
        _measured(settings, console)
        return
    if settings.against is None:
        now = comparison.read("out", str(_measured(settings, console)))
    else:
        now = comparison.read("against", settings.against)
    found = comparison.compare(base, now, settings.tolerance)
    console.print(found.table())
    for line in found.notes():
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if settings.strict and found.worse:
        raise EsperError(f"strict=true: {found.summary()}: {'; '.join(change.name for change in found.worse)}")


def main() -> None:
    """Console entry point."""
    config.register()
    with early():
        sys.exit(cli.run(_main, BenchmarkConfig))


if __name__ == "__main__":
    main()
