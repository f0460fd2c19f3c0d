import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esper.runtime.telemetry import Telemetry


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def points(path, name):
    accumulator = EventAccumulator(str(path / "tb"))
    accumulator.Reload()
    return [(point.step, point.value) for point in accumulator.Scalars(name)]


def test_both_files_get_every_point(tmp_path):
    telemetry = Telemetry(tmp_path)
    telemetry.log(10, {"a/b": 0.5, "c": float("nan")})
    telemetry.log(20, {"a/b": 1.5, "c": 2.0})
    telemetry.close()
    assert [(line["step"], line["a/b"], line["c"]) for line in lines(tmp_path)] == [(10, 0.5, None), (20, 1.5, 2.0)]
    assert points(tmp_path, "a/b") == [(10, 0.5), (20, 1.5)]


def test_resuming_takes_back_what_came_after_the_checkpoint(tmp_path):
    telemetry = Telemetry(tmp_path)
    for step in (10, 20, 30):
        telemetry.log(step, {"x": float(step)})
    telemetry.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "x"')
    resumed = Telemetry(tmp_path, resumed_at=20)
    resumed.log(30, {"x": 31.0})
    resumed.close()
    assert [(line["step"], line["x"]) for line in lines(tmp_path)] == [(10, 10.0), (20, 20.0), (30, 31.0)]
    assert points(tmp_path, "x") == [(10, 10.0), (20, 20.0), (30, 31.0)]


@pytest.mark.parametrize("clock", [(1_000_000, 1_000_000), (1_000_000, 999_000), (1_000_000, 2_000_000)])
def test_resuming_in_the_same_second_or_after_the_clock_was_set_back(tmp_path, monkeypatch, clock):
    for number in range(12):  # names end in a count, of which "10" comes before "9"
        monkeypatch.setattr("time.time", lambda number=number: float(clock[number % 2]))
        telemetry = Telemetry(tmp_path, resumed_at=10 * number if number else None)
        for step in (10 * number + 10, 10 * number + 20):  # the second one is taken back
            telemetry.log(step, {"x": float(number)})
        telemetry.close()
    expected = [(10 * number + 10, float(number)) for number in range(12)] + [(130, 11.0)]
    assert points(tmp_path, "x") == expected
    assert [(line["step"], line["x"]) for line in lines(tmp_path)] == expected


@pytest.mark.parametrize(
    "damage", [b"\xed\x28", b"\x00", b"[1]", b"7", b'{"x": 1}', b'{"step": "a"}', b'{"step": null}'], ids=repr
)
def test_lines_that_are_damaged_are_dropped(tmp_path, damage):
    telemetry = Telemetry(tmp_path)
    for step in (10, 20, 30):
        telemetry.log(step, {"x": float(step)})
    telemetry.close()
    first, _, third = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(first + damage + b"\n" + third.rstrip())  # the last line's end is lost too
    Telemetry(tmp_path, resumed_at=30).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == first + third
