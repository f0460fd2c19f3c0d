"""Runs of several processes: what they write, that they stop, die and go on together, and what a restart finds."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.runtime import checkpoint

from .conftest import STATEFUL, differences, lines, newest, untimed

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

Together = Callable[..., list[subprocess.Popen[str]]]
MANY = ("env.epochs=100", "ppo.total_steps=100_000_000", "checkpoint.every=1")  # more than there is time for


class Run:
    """Processes of one run; ends them when the test does."""

    def __init__(self, processes: list[subprocess.Popen[str]]):
        self.processes = processes

    def ended(self, timeout: float = 120) -> list[int]:
        """Exit codes; fails if a process hangs."""
        deadline = time.monotonic() + timeout
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]

    def until(self, text: str) -> str:
        """What the first process has printed up to a line with `text`."""
        said = ""
        for line in self.processes[0].stdout or ():
            said += line
            if text in line:
                return said
        raise AssertionError(f"ended without {text!r}:\n{said}")


@pytest.fixture
def train(start_together: Together, tiny: list[str], tmp_path: Path) -> Any:
    """`train(size, overrides)`: a run of `size` processes."""
    begun: list[Run] = []

    def start(size: int, *overrides: str, settings: Sequence[str] | None = None) -> Run:
        arguments = ["-m", "trainers.train", *(tiny if settings is None else settings), *overrides]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "cwd": tmp_path}
        begun.append(Run(start_together(arguments, size, **pipes)))
        return begun[-1]

    yield start
    for run in begun:
        for process in run.processes:
            process.kill()
            process.wait()
            assert process.stdout
            process.stdout.close()


def run_dir(folder: Path) -> Path:
    (found,) = (folder / "runs" / "digits").iterdir()
    return found


def test_one_run_directory_and_an_exact_resume(train: Any, tmp_path: Path) -> None:
    """Three hosts on two processes, with all state there is; stopped between two starts of PPO, then gone on with."""
    given = ("env.num_envs=3", "env=digits", "ppo.starts=2", *STATEFUL)
    whole = train(2, *given)
    assert whole.ended() == [0, 0]
    out = whole.processes[0].stdout.read()
    assert "2 processes, 3 environments" in out
    assert whole.processes[1].stdout.read() == ""
    folder = run_dir(tmp_path)
    state = newest(folder)
    assert len(state["processes"]) == 2
    assert [len(own["env"]["_seeds"]) for own in state["processes"]] == [2, 1]
    assert len(untimed(folder)) == state["iteration"] == 4
    assert all(line["perf/communication_s"] > 0 for line in lines(folder))

    again = tmp_path / "again"
    shutil.copytree(folder, again)
    for path in [again / "checkpoints" / "best.ckpt", *checkpoint.found(again)[:2]]:
        path.unlink()
    rest = train(2, f"resume={again}", settings=())
    assert rest.ended() == [0, 0]
    assert "resuming at step 48 of 96" in rest.processes[0].stdout.read()
    assert differences(state, newest(again)) == []
    assert untimed(again) == untimed(folder)


def test_another_number_of_processes_goes_on(train: Any, tmp_path: Path) -> None:
    size = 3
    assert train(2).ended() == [0, 0]
    folder = run_dir(tmp_path)
    before = newest(folder)
    after = train(size, f"resume={folder}", "ppo.total_steps=160", settings=())
    assert after.ended() == [0] * size
    out = after.processes[0].stdout.read()
    assert f"was saved by 2 process(es) and goes on with {size}" in out
    state = newest(folder)
    assert state["step"] == 160
    assert len(state["processes"]) == size
    seeds = [torch.cat([own["env"]["_seeds"] for own in each["processes"]]) for each in (before, state)]
    assert not set(seeds[0].tolist()) & set(seeds[1].tolist())  # no episode is played twice


def test_a_process_without_environments(train: Any, tmp_path: Path) -> None:
    assert train(2, "env.num_envs=1", "ppo.total_steps=16", "ppo.minibatches=3").ended() == [0, 0]
    assert [line["step"] for line in untimed(run_dir(tmp_path))] == [8, 16]


def test_a_warm_start_is_that_of_one_process(train: Any, tmp_path: Path) -> None:
    given = ("warm_start.episodes=200", "warm_start.epochs=1", "ppo.total_steps=32", "ppo.lr=1e-12")
    policies = []
    for size in (1, 2):
        assert train(size, *given, f"output_dir={size}").ended() == [0] * size
        (folder,) = (tmp_path / str(size) / "digits").iterdir()
        assert not (folder / "warm_start").exists()
        policies.append(newest(folder)["learner"]["policy"])
    for name, value in policies[0].items():
        torch.testing.assert_close(policies[1][name], value, rtol=1e-4, atol=1e-6)


def test_a_signal_to_one_process_stops_all(train: Any, tmp_path: Path) -> None:
    run = train(2, *MANY)
    run.until("training  ")
    time.sleep(2)
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.ended(30) == [75, 75]
    folder = run_dir(tmp_path)
    out = run.processes[0].stdout.read()
    assert "is saved, go on with" in out
    assert "Traceback" not in out + run.processes[1].stdout.read()
    state = newest(folder)
    assert state["iteration"] == untimed(folder)[-1]["step"] // 32
    again = train(2, f"resume={folder}", f"ppo.total_steps={state['step'] + 32}", settings=())
    assert again.ended() == [0, 0]
    assert f"resuming at step {state['step']:,}" in again.processes[0].stdout.read()


def test_a_killed_process_ends_the_others(train: Any, tmp_path: Path) -> None:
    run = train(2, *MANY)  # torchrun's own tests kill the second process
    run.until("training  ")
    time.sleep(2)
    run.processes[0].kill()
    assert run.ended(30) == [-signal.SIGKILL, 3]
    out = run.processes[1].stdout.read()
    assert re.search(r"error: process \d of 2 has lost another one.*go on from", out)
    assert "Traceback" not in out
    assert not checkpoint.latest(run_dir(tmp_path))[2]  # every file is whole


def test_a_process_that_is_held_up_is_waited_for(train: Any, tmp_path: Path) -> None:
    run = train(2, "ppo.total_steps=640")
    run.until("training  ")
    run.processes[1].send_signal(signal.SIGSTOP)
    time.sleep(5)
    assert run.processes[0].poll() is None
    run.processes[1].send_signal(signal.SIGCONT)
    assert run.ended() == [0, 0]
    assert untimed(run_dir(tmp_path))[-1]["step"] == 640


def test_a_lost_process_is_not_waited_for_in_vain(train: Any) -> None:
    run = train(2, *MANY, "runtime.patience_s=3")
    run.until("training  ")
    run.processes[1].send_signal(signal.SIGSTOP)
    assert run.processes[0].wait(60) == 3
    assert "runtime.patience_s" in run.processes[0].stdout.read()


def test_what_is_wrong_is_said_once_and_ends_all(train: Any) -> None:
    run = train(2, "ppo.lr=-1")
    assert run.ended(60) == [2, 2]
    assert "ppo.lr=-1" in run.processes[0].stdout.read()


def test_a_sweep_of_several_processes_is_refused(train: Any, tiny: list[str]) -> None:
    run = train(2, "seed=1,2", settings=("-m", *tiny))
    assert run.ended(60) == [2, 2]
    assert "start a sweep without torchrun" in run.processes[0].stdout.read()


# ---- torchrun --------------------------------------------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def workers(launcher: int) -> list[int]:
    """Its processes, in the order of their ranks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            settings = dict(line.split("=", 1) for line in (folder / "environ").read_text().split("\0") if "=" in line)
        except (OSError, ValueError):  # it has just ended
            continue
        if parent == launcher and "RANK" in settings:
            found.append((int(settings["RANK"]), int(folder.name)))
    return [number for _, number in sorted(found)]


def test_torchrun_restarts_from_the_last_checkpoint(tiny: list[str], tmp_path: Path) -> None:
    arguments = ["--nproc-per-node=2", "--max-restarts=1", "-m", "trainers.train", *tiny, "ppo.total_steps=1600"]
    with open(tmp_path / "out", "w") as out:
        launcher = subprocess.Popen([*TORCHRUN, *arguments], stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path)
        try:
            deadline = time.monotonic() + 100
            while not list(tmp_path.glob("runs/digits/*/checkpoints/step_*.ckpt")):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.kill(workers(launcher.pid)[1], signal.SIGKILL)
            assert launcher.wait(150) == 0
        finally:
            launcher.kill()
    said, folder = (tmp_path / "out").read_text(), run_dir(tmp_path)  # and there is no other
    assert re.search(r"resuming at step \d+ of 1,600", said)
    steps = [line["step"] for line in untimed(folder)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 1600
    assert not list(workers(launcher.pid))


def test_torchrun_passes_a_signal_on(tiny: list[str], tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as out:
        command = [*TORCHRUN, "--nproc-per-node=2", "-m", "trainers.train", *tiny, *MANY]
        launcher = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path)
        try:
            while "training  " not in (tmp_path / "out").read_text():
                assert launcher.poll() is None
                time.sleep(0.1)
            launcher.terminate()
            assert launcher.wait(40) != 0
        finally:
            launcher.kill()
    assert "is saved, go on with" in (tmp_path / "out").read_text()
    folder = run_dir(tmp_path)
    assert newest(folder)["step"] == max((line["step"] for line in untimed(folder)), default=0)
