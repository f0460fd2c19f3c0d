"""A run on two machines, which here are two network namespaces of one: they share no loopback device, no port and no
working directory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import lines, newest

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ADDRESSES = ("10.231.17.1", "10.231.17.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces that are joined by a cable; on host k it is called `cable<k>`."""
    names = [f"esper{os.getpid()}{side}" for side in "ab"]
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` command")
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"namespaces cannot be made here: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for number, (name, address) in enumerate(zip(names, ADDRESSES, strict=True)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"cable{number}")
            for device in ("lo", f"cable{number}"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def test_two_machines_train_one_policy(hosts: list[str], tiny: list[str], tmp_path: Path) -> None:
    launchers, outs = [], []
    for number, host in enumerate(hosts):
        folder = tmp_path / host
        folder.mkdir()
        command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        command += ["--nproc-per-node=1", f"--node-rank={number}", f"--master-addr={ADDRESSES[0]}"]
        command += ["--master-port=29511", "-m", "trainers.train", *tiny]
        outs.append(open(folder / "out", "w"))  # noqa: SIM115 (open as long as the process)
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": f"cable{number}", "OMP_NUM_THREADS": "1"}
        given = {"stdout": outs[-1], "stderr": subprocess.STDOUT, "cwd": folder, "env": environment}
        launchers.append(subprocess.Popen(command, **given))
    try:
        codes = [launcher.wait(200) for launcher in launchers]
    finally:
        for launcher, out in zip(launchers, outs, strict=True):
            launcher.kill()
            out.close()
    said = [(tmp_path / host / "out").read_text() for host in hosts]
    assert codes == [0, 0], said
    (run_dir,) = (tmp_path / hosts[0] / "runs" / "digits").iterdir()
    assert [line["step"] for line in lines(run_dir)] == [32, 64, 96]
    assert len(newest(run_dir)["processes"]) == 2
    assert re.search("2 processes, 4 environments", said[0])
    assert not list((tmp_path / hosts[1]).rglob("*.ckpt"))
    assert "training" not in said[1]
