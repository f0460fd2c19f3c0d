"""Signals: the first stops what is under way but not what is held, the second ends the process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from trainers.preemption import SIGNALS, Preemption, Stop


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
