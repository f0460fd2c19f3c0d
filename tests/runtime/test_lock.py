"""A run directory belongs to one process, however that ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper.runtime import lock
from esper.runtime.errors import ConfigError

HOLD = """
import sys
from pathlib import Path
from esper.runtime import lock
with lock.owned(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_whose_it_is(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "mine\n"
        message = rf"is being trained by process {owner.pid} on .* since .*; stop that one"
        with pytest.raises(ConfigError, match=message), lock.owned(tmp_path):
            pass
        owner.kill()
        owner.wait()
        with lock.owned(tmp_path):  # the system has given it back
            assert f"process {os.getpid()} " in (tmp_path / lock.FILE).read_text()


def test_it_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), lock.owned(tmp_path):
        raise ValueError("mine")
    with lock.owned(tmp_path):
        pass
