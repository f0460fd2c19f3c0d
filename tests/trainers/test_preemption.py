"""Signals: the first stops what is under way but not what is held, the second ends the process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainers.preemption import SIGNALS, Preemption, Stop

from .conftest import Command


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.001)  # the handler runs between two instructions of Python's


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_what_is_under_way(number: signal.Signals) -> None:
    before, done = signal.getsignal(number), []

    def work() -> None:
        with Preemption():
            send(number)
            done.append("went on")

    with pytest.raises(Stop) as stop:
        work()
    assert not done
    assert stop.value.name == number.name
    assert not isinstance(stop.value, Exception)
    assert signal.getsignal(number) is before


def test_it_stops_also_if_nobody_reads_what_it_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*text: str, **how: bool) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("builtins.print", broken)
    with Preemption(), pytest.raises(Stop):
        send(signal.SIGTERM)


def test_what_is_held_is_finished_first() -> None:
    done = []

    def work() -> None:
        with Preemption() as preemption:
            with preemption.held():
                with preemption.held():
                    send(signal.SIGTERM)
                    done.append("inner")
                done.append("outer")
            done.append("behind")

    with pytest.raises(Stop):
        work()
    assert done == ["inner", "outer"]


def test_an_error_in_what_is_held_is_not_replaced() -> None:
    def work() -> None:
        with Preemption() as preemption, preemption.held():
            send(signal.SIGTERM)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        work()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    code = (
        "import os, signal\nfrom trainers.preemption import Preemption\n"
        "with Preemption() as preemption, preemption.held():\n"
        f"    os.kill(os.getpid(), {int(number)}); print('held', flush=True)\n"
        f"    os.kill(os.getpid(), {int(number)}); print('still here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -number
    assert "held" in done.stdout
    assert "still here" not in done.stdout


def test_before_there_is_anything_to_save_a_signal_ends_the_process_with_its_own_exit_code() -> None:
    code = (
        "import os, signal\nfrom trainers.preemption import Preemption, early\n"
        "with early():\n"
        "    with Preemption(): pass\n"
        "    os.kill(os.getpid(), signal.SIGUSR1); print('still here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr == "error: stopped by SIGUSR1 before there was anything to save; start it again\n"
    assert not done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("entry", ["benchmark", "export"])
def test_commands_that_save_nothing_underway_end_with_one_line(entry: str, number: signal.Signals) -> None:
    code = (
        f"import os\nfrom trainers import {entry}\n"
        f"{entry}.cli.run = lambda *_: os.kill(os.getpid(), {int(number)}) or print('still here', flush=True)\n"
        f"{entry}.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 130
    assert done.stderr == f"error: stopped by {number.name} before there was anything to save; start it again\n"
    assert not done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("marker", "overrides", "number"),
    [
        (None, [], signal.SIGTERM),  # while torch is imported
        ("compiling the actor", ["runtime.compile=true"], signal.SIGINT),
        ("compiling the update step", ["runtime.compile=true"], signal.SIGUSR1),
        ("training ", ["ppo.total_steps=1000000"], signal.SIGTERM),
        ("training  96/96", ["evaluation.episodes=512", "evaluation.baselines=all"], signal.SIGUSR1),
        ("training ", ["-m", "seed=1,2", "ppo.total_steps=1000000"], signal.SIGINT),
    ],
    ids=["imports", "actor", "update", "training", "evaluation", "multirun"],
)
def test_a_signal_at_any_moment_ends_a_run_within_ten_seconds_and_it_goes_on(
    marker: str | None, overrides: list[str], number: signal.Signals, tiny: list[str], tmp_path: Path
) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}  # so that compiling takes long

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "trainers.train", *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
        )

    flags = [each for each in overrides if each.startswith("-")]
    with start(*flags, *tiny, *(each for each in overrides if each not in flags)) as process:
        try:
            if marker:
                assert process.stdout is not None
                assert any(marker in line for line in process.stdout)
            time.sleep(0.5)
            process.send_signal(number)
            sent = time.monotonic()
            _, err = process.communicate(timeout=60)
            took = time.monotonic() - sent
        finally:
            process.kill()
    assert process.returncode == (75 if marker else 130), err
    assert took < 10
    line = err.strip().splitlines()[-1]
    assert line.startswith(f"error: stopped by {number.name}")
    if marker is None:
        assert not list(tmp_path.glob("runs/**/*.ckpt"))
        return
    resume = line.split()[-1]
    assert resume.startswith("resume=")
    assert list(Path(resume.removeprefix("resume=")).glob("checkpoints/step_*.ckpt"))
    less = "ppo.total_steps=128" if "training  96/96" not in marker else "evaluation.episodes=0"
    with start(resume, less, "runtime.compile=false") as process:
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "resuming at step" in out


@pytest.mark.slow
@pytest.mark.parametrize("marker", ["starting", "evaluating "], ids=["imports", "episodes"])
@pytest.mark.parametrize("before", [False, True], ids=["first", "again"])
def test_an_evaluation_that_is_stopped_says_what_is_left(
    marker: str, before: bool, run_train: Command, run_evaluate: Command, tmp_path: Path
) -> None:
    run = run_train("ppo.total_steps=32").run_dir
    if before:
        assert run_evaluate(f"checkpoint={run}", "episodes=2", "baselines=none").code == 0
    report = run / "eval" / "report.json"
    kept = report.read_bytes() if before else None
    command = [sys.executable, "-m", "trainers.evaluate", f"checkpoint={run}", "episodes=100000", "baselines=[random]"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            assert process.stdout is not None
            assert any(line.startswith(marker) for line in process.stdout)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    (line,) = err.strip().splitlines()
    assert line.startswith("error: stopped by SIGINT")
    if marker == "starting":
        assert line.endswith("before there was anything to save; start it again")
    else:
        assert ("is the one of before" if before else "there is no report yet") in line
    assert (report.read_bytes() if report.exists() else None) == kept
