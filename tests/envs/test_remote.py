"""Environments in processes of their own: the same numbers, the same errors, and nobody waits for ever."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from envs import remote
from envs.adapter_config import GymConfig, HeteroConfig
from envs.gym import GymEnv
from envs.hetero import HeteroEnv
from esper.runtime.errors import ConfigError, TrainingError

from .conftest import played

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "docs" / "examples"
ID = "awkward:test/Awkward-v0"
WAIT = torch.zeros(2, dtype=torch.int64)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.syspath_prepend(str(EXAMPLES))


def made(apart=True, num_envs=2, id=ID, timeout_s=20.0, normalize=False, **kwargs) -> GymEnv:
    config = GymConfig(id=id, kwargs=kwargs, subprocess=apart, timeout_s=timeout_s, normalize=normalize)
    config.validate()
    return GymEnv(config, num_envs)


def alive(process: int) -> bool:
    """Whether it still runs; what has ended but not been waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def until(condition, seconds=20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def processes(env) -> list[int]:
    return [worker._process.pid for worker in env.workers]


def shown(env, steps: int) -> list[torch.Tensor]:
    """What it shows from the start of its episodes on."""
    return played(env, env.reset(torch.arange(env.num_envs)), steps, 0)[0]


@pytest.mark.parametrize("kind", ["gym", "hetero"])
def test_the_numbers_are_those_of_one_process(kind):
    def env(apart):
        if kind == "gym":
            return made(apart, 3, "CartPole-v1", normalize=True)
        config = HeteroConfig(target="scheduling:Scheduling", action_node="job", subprocess=apart)
        return HeteroEnv(config, 2)

    here, there = shown(env(False), 60), shown(env(True), 60)
    assert len(here) == len(there)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_they_work_side_by_side(monkeypatch):
    env = made(num_envs=2)
    order = []
    for k, worker in enumerate(env.workers):
        send, receive = worker.send, worker.receive
        monkeypatch.setattr(worker, "send", lambda *a, k=k, send=send: (order.append(("send", k)), send(*a)))
        monkeypatch.setattr(worker, "receive", lambda k=k, get=receive: (order.append(("receive", k)), get())[1])
    env.reset()
    env.step(WAIT)
    assert order == [("send", 0), ("send", 1), ("receive", 0), ("receive", 1)] * 2


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raise", r"step\(0\) raised ValueError: no way \(awkward.py:\d+\); mend it there"),
        ("four", r"step\(0\) returned 4 values; it must return"),
        ("nan observation", r"the observation is nan at \[1\]"),
        ("unsendable", r"its answer to step cannot be sent to another process: TypeError: stays at home .*"
         "; use env.subprocess=false"),
    ],
)  # fmt: skip
def test_the_errors_are_those_of_one_process(what, message):
    env = made(what=what)
    env.reset()
    env.step(WAIT)
    pids, seed = processes(env), env._seed(0)
    with pytest.raises(TrainingError, match=message) as raised:
        env.step(WAIT)
    assert str(raised.value).startswith(f"env.id={ID}: environment 0, in step 2 of the episode of seed {seed}: ")
    assert len(str(raised.value).splitlines()) == 1
    assert not any(alive(process) for process in pids)


@pytest.mark.parametrize("at", [0, 2])
def test_an_environment_that_hangs(at):
    plain = made(False)
    plain.reset()
    seed = plain._seed(1)
    env = made(what="hang", at=at, of=seed, timeout_s=1.5)
    pids = processes(env)

    def play():
        env.reset()
        env.step(WAIT)
        env.step(WAIT)

    start = time.monotonic()
    name, where = ("step", "in step 2") if at else ("reset", "at the start")
    message = rf"environment 1, {where} of the episode of seed {seed}: no answer to {name} within 1.5 s "
    with pytest.raises(
        TrainingError, match=rf"{message}\(env.timeout_s=1.5\); mend what hangs, or raise env.timeout_s"
    ):
        play()
    assert time.monotonic() - start < 15
    assert not any(alive(process) for process in pids)


@pytest.mark.parametrize(("what", "fate"), [("die", "was ended by SIGKILL"), ("leave", "ended with exit code 7")])
def test_an_environment_that_dies(what, fate):
    env = made(what=what)
    env.reset()
    env.step(WAIT)
    with pytest.raises(TrainingError, match=f"environment 0, in step 2 .*: its process {fate} in step; see its own"):
        env.step(WAIT)


def test_a_process_that_has_died_between_steps():
    env = made()
    env.reset()
    os.kill(processes(env)[1], signal.SIGKILL)
    assert until(lambda: not alive(processes(env)[1]))
    with pytest.raises(TrainingError, match=r"environment 1, in step 1 .*: its process was ended by SIGKILL in step"):
        env.step(WAIT)


def test_environments_that_cannot_be_made():
    with pytest.raises(ConfigError, match=r"env.id=Nowhere-v0: gymnasium.make failed: NameNotFound: .*installed"):
        made(id="Nowhere-v0")
    config = HeteroConfig(target="no_such_module:make", subprocess=True)
    with pytest.raises(ConfigError, match="importing no_such_module failed: ModuleNotFoundError"):
        HeteroEnv(config, 1)
    with pytest.raises(ConfigError, match=r"env.timeout_s=0: must be above 0"):
        made(timeout_s=0)


def test_a_process_that_never_starts(monkeypatch, tmp_path):
    (tmp_path / "sleepy.py").write_text("import time\ntime.sleep(1e6)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(remote, "START_S", 2.0)
    with pytest.raises(TrainingError, match=r"env.id=sleepy:A-v0: no answer to make within 2 s \(env.timeout_s=1\)"):
        made(id="sleepy:A-v0", timeout_s=1)


def test_signals_of_the_terminal_do_not_reach_them():
    env = made()
    env.reset()
    for process in processes(env):
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(process, number)
        assert os.getsid(process) != os.getsid(0)
    graph, *_ = env.step(WAIT)
    assert graph.x["observation"][:, 0, 1].tolist() == [1, 1]


def test_processes_end_with_their_environment():
    env = made()
    env.reset()
    pids = processes(env)
    assert all(alive(process) for process in pids)
    del env
    assert until(lambda: not any(alive(process) for process in pids))


PARENT = f"""
import sys, time
sys.path.insert(0, {str(HERE)!r})
import torch
from envs.adapter_config import GymConfig
from envs.gym import GymEnv
hangs = sys.argv[1] == "hang"
env = GymEnv(GymConfig(id={ID!r}, subprocess=True, kwargs={{"what": "hang" if hangs else "", "at": 1}}), 2)
env.reset()
print(*[worker._process.pid for worker in env.workers], flush=True)
if sys.argv[1] == "leave":
    sys.exit(0)
if sys.argv[1] == "raise":
    raise RuntimeError
env.step(torch.zeros(2, dtype=torch.int64))
time.sleep(1e6)
"""


ENDS = [("leave", None), ("raise", None), ("hang", signal.SIGTERM), ("hang", signal.SIGKILL), ("sleep", signal.SIGKILL)]


@pytest.mark.slow
@pytest.mark.parametrize(("end", "number"), ENDS)
def test_processes_end_with_the_program(end, number):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, end], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert parent.stdout
        pids = list(map(int, parent.stdout.readline().split()))
        assert len(pids) == 2
        if number:
            assert all(alive(process) for process in pids)
            parent.send_signal(number)
        assert parent.wait(30) is not None
        assert until(lambda: not any(alive(process) for process in pids))
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
