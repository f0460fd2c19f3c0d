"""The shell of scripts/train.sh and scripts/test.sh, with a `python` that only notes what it is asked to do."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
case "$1" in
  -c) echo "$PREFIX" ;;
  *) printf '%s\\n' "$*" >>"$PREFIX/calls"; [ "$2" != pip ] || exit "${PIP:-0}" ;;
esac
"""


@pytest.fixture
def command(tmp_path):
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "python").write_text(PYTHON)
    (binaries / "python").chmod(0o755)

    def run(script: str, *arguments: str, **more: str) -> tuple[int, list[str]]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        path = f"{binaries}:{os.environ['PATH']}"
        environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path), "PATH": path, "PREFIX": str(tmp_path), **more}
        done = subprocess.run(["bash", ROOT / "scripts" / script, *arguments], env=environment, cwd=tmp_path)
        return done.returncode, calls.read_text().splitlines()

    return run


INSTALL = f"-m pip install --quiet --editable {ROOT}"
INSTALL_DEV = [f"{INSTALL}[dev]", "-m pip install --quiet --no-deps spandrel==0.4.2"]


def test_it_installs_once_and_passes_its_arguments_on(command):
    # The arguments must reach the trainer and not the set-up, which is sourced and would see them as its own.
    assert command("train.sh", "env=digits", "seed=3") == (0, [INSTALL, "-m trainers.train env=digits seed=3"])
    assert command("train.sh", "ppo.lr=1e-4") == (0, ["-m trainers.train ppo.lr=1e-4"])


def test_tests_want_the_extra_and_training_is_content_with_it(command):
    assert command("test.sh", "tests/growth", "-k", "mlp") == (
        0,
        [*INSTALL_DEV, "-m pytest tests/growth -k mlp"],
    )
    assert command("train.sh") == (0, ["-m trainers.train"])


def test_training_alone_is_not_enough_for_the_tests(command):
    command("train.sh")
    assert command("test.sh") == (0, [*INSTALL_DEV, "-m pytest"])


def test_a_failed_installation_is_tried_again(command):
    assert command("train.sh", PIP="1") == (2, [INSTALL])
    assert command("train.sh") == (0, [INSTALL, "-m trainers.train"])
