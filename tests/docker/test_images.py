"""What can be said of the images without building one: their Dockerfiles, and what is copied into them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from packaging.specifiers import SpecifierSet

from trainers import config

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PAGE = ROOT / "docs" / "clusters.md"
BINARIES = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
FOLDERS = {"esper": "esper", "envs": "envs", "trainers": "trainers", "conf": "esper/conf"}  # in the sources, installed

both = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)


def instructions(path: Path) -> list[tuple[str, str]]:
    """(word, rest) of each, on one line."""
    text = re.sub(r"^ *#.*\n", "", path.read_text(), flags=re.MULTILINE)
    lines = re.sub(r" *\\\n *", " ", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def last_stage(path: Path) -> dict[str, str]:
    """The instructions that stand once in it."""
    found = instructions(path)
    start = max(number for number, (word, _) in enumerate(found) if word == "FROM")
    return dict(found[start:])


def installs(path: Path) -> set[str]:
    """The commands that put packages into the image."""
    runs = [re.sub(r"--mount=\S+ ", "", rest) for word, rest in instructions(path) if word == "RUN"]
    commands = [command.strip() for run in runs for command in run.split("&&")]
    return {command for command in commands if re.search(r"\b(pip|venv|apt-get install)\b", command)}


def context() -> list[Path]:
    """The files that .dockerignore leaves, relative to the root."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    assert rules[-1] == "**/__pycache__"
    kept = [ROOT / rule.removeprefix("!") for rule in rules[1:-1]]
    files = [file for path in kept for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return [file.relative_to(ROOT) for file in files if "__pycache__" not in file.parts]


def test_there_are_two() -> None:
    assert [path.name for path in DOCKERFILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@both
def test_hadolint(path: Path) -> None:
    if not (hadolint := shutil.which("hadolint", path=BINARIES)):
        pytest.skip("hadolint is not installed (the extra dev)")
    found = subprocess.run([hadolint, path], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@both
def test_stages_build_on_stages_before_them(path: Path) -> None:
    arguments = dict(rest.split("=") for word, rest in instructions(path) if word == "ARG")
    assert arguments == {"ACCELERATION": "off"}
    seen: set[str] = set()
    for word, rest in instructions(path):
        assert word in {"ARG", "FROM", "RUN", "ENV", "COPY", "WORKDIR", "VOLUME", "USER", "CMD"}
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            for choice in ("on", "off") if "$" in base else ("",):
                assert re.search(r"[:/]", base) or base.replace("${ACCELERATION}", choice) in seen, rest
            seen.add(name)
        assert not (word == "COPY" and rest.split()[0] != "."), "only what .dockerignore leaves"
        assert set(re.findall(r"from=(\w+)", rest)) <= seen, rest


@both
def test_it_runs_the_trainer_itself_as_nobody(path: Path) -> None:
    stage = last_stage(path)
    assert int(stage["USER"]) > 0
    command = json.loads(stage["CMD"])  # a shell would keep SIGTERM and the exit code for itself
    assert command[:3] == ["python", "-m", "trainers.train"]
    config.register()
    with initialize_config_module("esper.conf", version_base="1.3"):
        composed = compose("train", command[3:])
    assert composed.runtime.device == path.stem
    assert stage["VOLUME"] == f"{stage['WORKDIR']}/{composed.output_dir}"


def test_versions_agree() -> None:
    """Those of the images with each other, with the page, with the project and with the workflow for forks."""
    page = PAGE.read_text()
    (allowed,) = (
        SpecifierSet(line.removeprefix("torch"))
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if re.match(r"torch[<>=]", line)
    )
    named = [*DOCKERFILES, ROOT / ".github" / "workflows" / "ci.yml", PAGE]
    versions = {version for path in named for version in re.findall(r"torch==([\d.]+\d)", path.read_text())}
    (version,) = versions
    assert version in allowed
    assert f"| PyTorch | {version}, CPU build | {version}, " in page
    for path in DOCKERFILES:
        external = [rest.split()[0] for word, rest in instructions(path) if word == "FROM" and ":" in rest]
        assert external
        assert all(f"`{image}`" in page for image in external)


def test_what_is_installed_is_what_the_page_says() -> None:
    page = PAGE.read_text()
    section = page[page.index("## What the images install") : page.index("## Slurm")]
    said = {line for block in re.findall(r"```\n(.*?)```", section, flags=re.DOTALL) for line in block.splitlines()}
    assert set.union(*map(installs, DOCKERFILES)) == said


@pytest.mark.slow
def test_what_is_copied_can_be_installed_and_is_all(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77.0.3")
    for file in context():
        (tmp_path / "src" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / "src" / file)
    # As in the images, but without what they would download for it.
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    built = subprocess.run([*command, tmp_path / "src"], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    there = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{installed}/{file.relative_to(source)}"
        for source, installed in FOLDERS.items()
        for file in context()
        if source in file.parts[:1]
    }
    assert there == expected
