"""The projection of docs/scaling.md: its formula by hand, and that the page is what the committed figures give."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "scaling.py"


@pytest.fixture
def scaling() -> Any:
    spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_ring_by_hand(scaling: Any) -> None:
    assert scaling.exchange(1, 4e6, 1.0, 1.0) == 0
    # Four machines: six messages of a megabyte, each a millisecond on its way and a hundredth of a second in transfer.
    assert scaling.exchange(4, 4e6, 1e-3, 100e6) == pytest.approx(6 * (1e-3 + 1e-2))


def test_without_network_and_waiting_speed_is_linear(scaling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "NETWORKS", {"none": (0.0, 1e30), "slow": (1.0, 1e30)})
    alone = {"kind": "in all", "steps": 100, "steps_per_s": [50.0]}
    weak = {"kind": "in each process", "communication": [0.1], "communication_and_waiting": [0.1], "sums": [[4, 3]]}
    fast, slow = scaling.projected({"rows": [alone, weak]})
    assert fast[1:] == [f"{50 * machines:,} (100%)" for machines in scaling.MACHINES]
    # Two machines: three sums of two messages of a second each, after an iteration of two seconds.
    assert slow[2] == f"{200 / 8:,.0f} (25%)"


def test_waiting_slows_down(scaling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "NETWORKS", {"none": (0.0, 1e30)})
    alone = {"kind": "in all", "steps": 100, "steps_per_s": [50.0]}
    weak = {"kind": "in each process", "communication": [0.1], "communication_and_waiting": [0.2], "sums": []}
    ((_, one, two, *_, most),) = scaling.projected({"rows": [alone, weak]})
    assert one == "50 (100%)"
    assert two == "91 (91%)"  # what was measured: a tenth of the time
    assert int(most.split("(")[1].rstrip("%)")) < 75


def test_the_page_is_made_of_the_committed_figures(scaling: Any) -> None:
    before = scaling.PAGE.read_text()
    try:
        scaling.main()
        assert scaling.PAGE.read_text() == before
    finally:
        scaling.PAGE.write_text(before)
