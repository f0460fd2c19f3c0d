import json

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
