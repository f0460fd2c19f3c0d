"""Commands of the documentation: their scripts exist, and their keys and values are accepted. None is run."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from esper.runtime.errors import ConfigError
from trainers import cli, config

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCHEMAS = {
    "train": config.TrainConfig,
    "evaluate": config.EvaluateConfig,
    "benchmark": config.BenchmarkConfig,
    "export": config.ExportConfig,
}
OTHERS = (".", "tensorboard", "pre-commit", "mkdocs", "ruff", "mypy", "pytest", "git", "cd", "until", "case", "docker",
          "apt-get", "kubectl", "python3", "sbatch", "torchrun")  # fmt: skip
_INLINE = re.compile(r"`((?:python|esper-\w+|scripts/\S+\.sh|\.ci/run|pip install)(?: [^`]+)?)`")


def commands(docs: Any, page: Path) -> list[tuple[str, list[str]]]:
    """(where, words) of each command of a page, in blocks and in the text."""
    found = []
    for block in docs.blocks(page):
        if block.language not in ("", "sh", "bash") or re.match(r"floor \d|error:", block.text):
            continue
        text = re.sub(r"<<'(\w+)'.*?^\1$", "", block.text.replace("\\\n", " "), flags=re.MULTILINE | re.DOTALL)
        found += [(str(block), line) for line in text.splitlines()]
    found += [(page.name, match[1].replace("\n", " ")) for match in _INLINE.finditer(docs.prose(page))]
    return [(where, words) for where, line in found if (words := shlex.split(line.split(";")[0], comments=True))]


def refused(words: list[str]) -> str | None:
    """What is wrong with a command, or None."""
    words = [word for number, word in enumerate(words) if "=" not in word or any("=" not in w for w in words[:number])]
    program, *arguments = words
    script = program
    if program == "python":
        if arguments[:1] == ["-m"]:
            module = arguments[1]
            return overrides_refused(module, arguments[2:]) if module.startswith("trainers.") else None
        script = arguments[0] if arguments else program
    elif program in PROJECT["scripts"]:
        return overrides_refused(PROJECT["scripts"][program].split(":")[0], arguments)
    elif program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(arguments))
        unknown = [name for each in extras for name in each.split(",") if name not in PROJECT["optional-dependencies"]]
        return f"no such extra: {unknown}" if unknown else None
    elif program == "scripts/train.sh":
        return overrides_refused("trainers.train", arguments)
    elif program in OTHERS:
        return None
    if script.startswith(("scripts/", "examples/", ".ci/")):
        return None if (ROOT / script).exists() else f"no such script: {script}"
    return None if script in ("python", "-", "-c") or program == "python" else f"unknown command: {program}"


def overrides_refused(module: str, arguments: list[str]) -> str | None:
    """What is wrong with the keys and values that an entry point is given, or None."""
    name = module.removeprefix("trainers.")
    if name not in SCHEMAS:
        return f"no such entry point: {module}"
    given = [plain(word) for word in arguments if not word.startswith("-") and "${" not in word and word != "..."]
    config.register()
    try:
        with initialize_config_module("esper.conf", version_base="1.3"):
            composed = compose(name, [word for word in given if word])
        cli._check_keys(composed, SCHEMAS[name])
        OmegaConf.to_container(composed, resolve=False)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        return str(error)
    return None


def plain(word: str) -> str:
    """One of the values that a sweep names, and something for words that stand for values."""
    (override,) = OverridesParser.create().parse_overrides([word])
    key, value = word.split("=", 1)
    if re.fullmatch(r"[A-Z]+", key):
        return ""  # KEY=VALUE
    if override.is_choice_sweep():
        return f"{key}={next(iter(override.value().list))}"
    if override.is_sweep_override():
        return ""
    if key == "env" and value == "NAME":
        return ""
    return f"{key}=1" if re.fullmatch(r"[A-Z]+", value) else word


@pytest.mark.slow
def test_commands_are_accepted(docs: Any) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    wrong, seen = [], 0
    for page in docs.pages():
        for where, words in commands(docs, page):
            seen += 1
            if reason := refused(words):
                wrong.append(f"{where}: {shlex.join(words)}: {reason.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
    assert seen > 80


@pytest.mark.parametrize(
    "command",
    [
        "python -m trainers.train ppo.lrr=1",
        "python -m trainers.train ppo.epochs=many",
        "python -m trainers.train env=digit",
        "python -m trainers.trian",
        "esper-evaluate checkpoint=x episode=3",
        "scripts/train.sh +ppo.colour=red",
        "python scripts/no_such.py",
        "scripts/no_such.sh",
        "pip install 'esper[colours]'",
        "esper-grow x=1",
    ],
)
def test_what_does_not_fit_is_refused(command: str) -> None:
    assert refused(shlex.split(command))


def test_console_scripts_exist() -> None:
    for target in PROJECT["scripts"].values():
        module, _, function = target.partition(":")
        assert f"def {function}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()
