"""The examples for clusters, with a torchrun, a Slurm and a trainer that only note what they are asked to do."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module

from esper.runtime.errors import ConfigError, Interrupted, Preempted, TrainingError
from trainers import config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "examples" / "cluster"
STUB = """#!/bin/bash
echo "${0##*/} $*" >>"$CALLS"
exit "${CODE-0}"
"""
# As torchrun: hands a signal on, takes its time, and ends with 1.
WAITING = """#!/bin/bash
trap 'echo signalled >>"$CALLS"; sleep 0.5; echo saved >>"$CALLS"; exit 1' TERM
echo up >>"$CALLS"
while :; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && printf 'first\\nsecond\\n' || echo "scontrol $*" >>"$CALLS"
"""


class Machine:
    """A folder to work in and programs that are found first."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, folder / "calls"
        (folder / "bin").mkdir()
        self.calls.touch()
        self.environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(self.calls)}

    def program(self, name: str, text: str = STUB) -> None:
        (self.folder / "bin" / name).write_text(text)
        (self.folder / "bin" / name).chmod(0o755)

    def start(self, *command: Any, **more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=self.folder, env={**self.environment, **more})

    def run(self, *command: Any, **more: str) -> tuple[int, list[str]]:
        """The exit code, and what has been called."""
        self.calls.write_text("")
        code = self.start(*command, **more).wait()
        return code, self.calls.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def checkpoint(run: Path) -> None:
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step_000000000032.ckpt").touch()


@pytest.mark.parametrize("name", ["train.sbatch", "torchrun.sh"])
def test_shellcheck(name: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    assert subprocess.run(["bash", "-n", CLUSTER / name]).returncode == 0
    if not (shellcheck := shutil.which("shellcheck", path=path)):
        pytest.skip("shellcheck is not installed (the extra dev)")
    found = subprocess.run([shellcheck, CLUSTER / name], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


# ---- torchrun.sh -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1])
def test_the_code_of_torchrun_is_passed_on(machine: Machine, code: int) -> None:
    machine.program("torchrun")
    done = machine.run(CLUSTER / "torchrun.sh", "--nnodes=1", "-m", "trainers.train", "a=[1, 2]", CODE=str(code))
    assert done == (code, ["torchrun --nnodes=1 -m trainers.train a=[1, 2]"])


def test_a_signal_is_handed_on_once_waited_for_and_told_by_the_code(machine: Machine) -> None:
    machine.program("torchrun", WAITING)
    process = machine.start(CLUSTER / "torchrun.sh")
    for awaited in ("up\n", "up\nsignalled\n"):
        while machine.calls.read_text() != awaited:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
    assert process.wait() == Preempted.exit_code
    assert machine.calls.read_text().split() == ["up", "signalled", "saved"]


# ---- Slurm -----------------------------------------------------------------------------------------------------------

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "node[1-2]"}
SRUN = (
    "srun examples/cluster/torchrun.sh --nnodes=2 --nproc-per-node=4 --max-restarts=3 --rdzv-backend=c10d "
    "--rdzv-id=7.0 --rdzv-endpoint=first:29500 -m trainers.train "
)


@pytest.fixture
def batch(machine: Machine) -> Any:
    machine.program("srun")
    machine.program("scontrol", SCONTROL)
    return lambda *overrides, **more: machine.run("bash", CLUSTER / "train.sbatch", *overrides, **SLURM, **more)


def test_a_job_trains_in_a_folder_of_its_own(batch: Any) -> None:
    assert batch("runtime=cuda") == (0, [f"{SRUN}runtime=cuda output_dir=runs/slurm/7"])
    assert batch() == (0, [f"{SRUN}output_dir=runs/slurm/7"])
    assert (ROOT / SRUN.split()[1]).stat().st_mode & 0o100


def test_a_job_goes_on_with_its_newest_run_that_has_a_checkpoint(batch: Any, tmp_path: Path) -> None:
    runs = tmp_path / "runs" / "slurm"
    checkpoint(runs / "8" / "digits" / "2026-11-23_10-00-00")
    (runs / "7" / "digits" / "2026-11-21_12-00-00" / "checkpoints").mkdir(parents=True)
    assert batch("seed=3")[1] == [f"{SRUN}seed=3 output_dir=runs/slurm/7"]
    checkpoint(runs / "7" / "digits" / "2026-11-21_10-00-00")
    checkpoint(runs / "7" / "digits" / "2026-11-21_11-00-00")
    assert batch("seed=3")[1] == [f"{SRUN}resume=runs/slurm/7/digits/2026-11-21_11-00-00"]


@pytest.mark.parametrize(
    ("code", "again"),
    [(0, False), (1, False), (2, False), (3, False), (Preempted.exit_code, True), (Interrupted.exit_code, True)],
)
def test_a_job_that_was_stopped_is_queued_again(batch: Any, code: int, again: bool) -> None:
    done, calls = batch(CODE=str(code))
    assert done == code
    assert calls[1:] == ["scontrol requeue 7"] * again


def test_a_signal_to_the_shell_does_not_end_it_before_the_training(machine: Machine) -> None:
    machine.program("scontrol", SCONTROL)
    machine.program("srun", '#!/bin/bash\nkill -TERM $PPID; sleep 0.2; echo trained >>"$CALLS"; exit 75\n')
    code, calls = machine.run("bash", CLUSTER / "train.sbatch", **SLURM)
    assert (code, calls) == (75, ["trained", "scontrol requeue 7"])


# ---- Kubernetes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job() -> Any:
    claim, found = yaml.safe_load_all((CLUSTER / "job.yaml").read_text())
    volumes = found["spec"]["template"]["spec"]["volumes"]
    assert [volume["persistentVolumeClaim"]["claimName"] for volume in volumes] == [claim["metadata"]["name"]]
    return found


@pytest.fixture
def pod(job: Any, machine: Machine) -> Any:
    """Runs the container's command."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    machine.program("python")
    return lambda **more: machine.run(*container["command"], *container["args"], **more)


def test_the_pod_fits_the_image(job: Any) -> None:
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    image = (ROOT / "docker" / "cuda.Dockerfile").read_text()
    (user,), (runs,) = (re.findall(rf"^{word} (\S+)$", image, re.MULTILINE) for word in ("USER", "VOLUME"))
    assert spec["securityContext"] == {"runAsNonRoot": True, "runAsUser": int(user), "fsGroup": int(user)}
    assert [(each["name"], each["mountPath"]) for each in container["volumeMounts"]] == [("runs", runs)]
    assert [volume["name"] for volume in spec["volumes"]] == ["runs"]


def test_every_exit_code_has_the_rule_that_it_needs(job: Any) -> None:
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never", "what a podFailurePolicy asks for"
    rules = {}
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["operator"] == "In"
            rules |= dict.fromkeys(rule["onExitCodes"]["values"], rule["action"])
    assert rules == {
        Preempted.exit_code: "Ignore",
        Interrupted.exit_code: "Ignore",
        ConfigError.exit_code: "FailJob",
        TrainingError.exit_code: "FailJob",
    }


def test_a_pod_starts_or_goes_on(pod: Any, job: Any, tmp_path: Path) -> None:
    overrides = job["spec"]["template"]["spec"]["containers"][0]["args"][1:]
    config.register()
    with initialize_config_module("esper.conf", version_base="1.3"):
        assert compose("train", overrides).runtime.device == "cuda"
    assert pod() == (0, [f"python -m trainers.train {' '.join(overrides)} output_dir=runs/esper"])
    checkpoint(tmp_path / "runs" / "esper" / "digits" / "2026-11-21_10-00-00")
    assert pod(CODE="75") == (75, ["python -m trainers.train resume=runs/esper/digits/2026-11-21_10-00-00"])


def test_the_trainer_takes_the_place_of_the_shell(pod: Any, machine: Machine) -> None:
    """So that it is the pod's first process, which gets the signals."""
    machine.program("python", '#!/bin/bash\ncat /proc/$PPID/comm >>"$CALLS"\n')
    own = Path("/proc/self/comm")
    if not own.exists():
        pytest.skip("needs /proc")
    assert pod()[1] == [own.read_text().strip()]
