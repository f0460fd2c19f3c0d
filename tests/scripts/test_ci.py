"""The shell of .ci/run, with a `python`, `ruff` and `mypy` that only note what they are asked to do."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/bash
note() { printf '%s|%s|%s\\n' "$*" "${ESPER_TORCH_SCATTER-}" "${PYTHONPATH:+path}" >>"$PREFIX/calls"; }
case "$*" in
  "-m trainers.benchmark "*) echo "${@:2}" >>"$PREFIX/comparisons"; exit "${COMPARED-0}" ;;
  *"sys.prefix"*) echo "$PREFIX" ;;
  *"cache_tag"*) echo torch-2-cpython ;;
  *"pip wheel"*"--no-cache-dir --no-build-isolation"*)
    note pip wheel
    [ -z "${BROKEN-}" ] && mkdir -p "${@: -2:1}" && touch "${@: -2:1}/torch_scatter-9-x.whl" ;;
  *"pip install --quiet --no-index"*) note pip install "${@: -1}" ;;
  *"acceleration_enabled"*) note check; [ -z "${UNUSABLE-}" ] ;;
  *"pip"*) ;;
  *) note "$@"; echo "1 passed"; [ "${FAIL-}" != "$PYTHONPATH" ] ;;
esac
"""
WITHOUT = "-m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal --durations=40|0|"
INSTALL = "pip install {wheels}/torch-2-cpython/torch_scatter-9-x.whl|{variable}|"
TESTS = ("graph/test_segment", "tamiyo/test_encoder", "trainers/test_matrix", "trainers/test_pooling")
WITH = f"-m pytest {' '.join(f'tests/{name}.py' for name in TESTS)}||path"


@pytest.fixture
def ci(tmp_path):
    binaries, wheels = tmp_path / "bin", tmp_path / "wheels"
    binaries.mkdir()
    for name, text in {"python": PYTHON, "ruff": "#!/bin/sh\n", "mypy": "#!/bin/sh\n"}.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)

    def run(**more: str) -> tuple[int, list[str], str]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        known = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "ESPER_TORCH_SCATTER")}
        own = {"VIRTUAL_ENV": str(tmp_path), "PATH": f"{binaries}:{os.environ['PATH']}", "PREFIX": str(tmp_path)}
        done = subprocess.run(
            [ROOT / ".ci/run"],
            env={**known, **own, "ESPER_WHEELS": str(wheels), "CXX": "true", "FAIL": "never", **more},
            capture_output=True,
            text=True,
        )
        return done.returncode, calls.read_text().splitlines(), done.stdout + done.stderr

    return run


def test_both_modes_are_tested_and_the_wheel_is_kept(ci, tmp_path):
    used = [INSTALL.format(wheels=tmp_path / "wheels", variable=""), "check||path", WITH]
    code, calls, out = ci()
    assert (code, calls) == (0, [WITHOUT, "pip wheel||", *used])
    assert out.splitlines()[-1] == "1 passed"
    assert ci()[:2] == (0, [WITHOUT, *used])
    (tmp_path / "wheels/torch-2-cpython/torch_scatter-9-x.whl").unlink()
    assert ci()[1] == [WITHOUT, "pip wheel||", *used]


def test_a_variable_that_turns_it_off_does_not_turn_off_the_second_mode(ci):
    assert ci(ESPER_TORCH_SCATTER="0")[1][-1] == WITH


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"CXX": "no-such-compiler"}, "error: there is no C++ compiler (no-such-compiler)"),
        ({"BROKEN": "1"}, "error: torch-scatter could not be compiled"),
        ({"UNUSABLE": "1"}, "error: torch-scatter cannot be used; remove "),
    ],
)
def test_it_fails_where_torch_scatter_cannot_be_tested(ci, more, message):
    code, calls, out = ci(**more)
    assert code == 1
    assert WITH not in calls
    assert message in out


@pytest.mark.parametrize("code", [0, 2])
def test_benchmarks_are_compared_with_what_is_committed_and_fail_nothing(ci, tmp_path, code):
    assert ci(COMPARED=str(code))[0] == 0
    told = (tmp_path / "comparisons").read_text().splitlines()
    bases = [word.removeprefix("compare=") for line in told for word in line.split() if word.startswith("compare=")]
    assert bases
    assert all((ROOT / base).is_file() for base in bases)


def test_a_failure_without_torch_scatter_fails(ci):
    code, calls, _ = ci(FAIL="")
    assert code == 1
    assert calls[-1] == WITH
