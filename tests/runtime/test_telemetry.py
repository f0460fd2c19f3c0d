import io
import json

import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

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


START, EXPERIMENT = "_hparams_/session_start_info", "_hparams_/experiment"
LAYOUT = {
    "Learning": {"return": ["rollout/ep_rew_mean$"], "critic": ["train/a$", "train/b$"]},
    "Speed": {"fps": ["f$"]},
}


def test_the_layout_is_shown_once_however_often_the_run_was_resumed(tmp_path):
    for number in range(3):
        telemetry = Telemetry(tmp_path, resumed_at=10 * number if number else None, layout=LAYOUT)
        telemetry.log(10 * number + 10, {"rollout/ep_rew_mean": float(number)})
        telemetry.close()
    assert points(tmp_path, "rollout/ep_rew_mean") == [(10, 0.0), (20, 1.0), (30, 2.0)]
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    events = accumulator.Tensors("custom_scalars__config__")
    assert [event.step for event in events] == [0, 10, 20]  # one for each file
    merged = set()
    for event in events:
        layout = Layout.FromString(event.tensor_proto.string_val[0])
        shown = {each.title: {c.title: list(c.multiline.tag) for c in each.chart} for each in layout.category}
        assert shown == LAYOUT
        merged.add(event.tensor_proto.string_val[0])
    assert len(merged) == 1  # equal ones are one to TensorBoard


def test_pictures_and_texts(tmp_path):
    figure = Figure(figsize=(2, 1), dpi=50)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    telemetry = Telemetry(tmp_path)
    telemetry.picture(7, "eval/x", file.getvalue())
    telemetry.text(3, "run", "a **card**")
    telemetry.close()
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    (image,) = accumulator.Images("eval/x")
    assert (image.step, image.width, image.height) == (7, 100, 50)
    assert image.encoded_image_string == file.getvalue()
    (text,) = accumulator.Tensors("run/text_summary")
    assert (text.step, text.tensor_proto.string_val[0]) == (3, b"a **card**")


def test_what_was_given_and_how_it_ended_goes_into_the_same_run(tmp_path):
    telemetry = Telemetry(tmp_path)
    telemetry.log(10, {"eval/tamiyo": 0.25})
    telemetry.outcome(10, {"ppo.lr": 1e-3, "seed": 3, "policy.hidden": [8, 8], "init": None}, ["eval/tamiyo"])
    telemetry.close()
    assert not [path for path in (tmp_path / "tb").iterdir() if path.is_dir()]
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    found = accumulator.SummaryMetadata(START).plugin_data.content
    given = HParamsPluginData.FromString(found).session_start_info.hparams
    assert given["ppo.lr"].number_value == 1e-3
    assert given["seed"].number_value == 3
    assert (given["policy.hidden"].string_value, given["init"].string_value) == ("[8, 8]", "None")
    experiment = HParamsPluginData.FromString(accumulator.SummaryMetadata(EXPERIMENT).plugin_data.content).experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == ["eval/tamiyo"]
    assert points(tmp_path, "eval/tamiyo") == [(10, 0.25)]


def test_a_run_that_ended_again_shows_what_it_was_given_last(tmp_path):
    for number in range(3):
        telemetry = Telemetry(tmp_path, resumed_at=10 * number if number else None)
        telemetry.log(10 * number + 10, {"x": float(number)})
        telemetry.outcome(10 * number + 10, {"ppo.total_steps": 10 * number + 10}, ["x", "eval/y"][: number + 1])
        telemetry.close()
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    found = accumulator.SummaryMetadata(START).plugin_data.content
    assert HParamsPluginData.FromString(found).session_start_info.hparams["ppo.total_steps"].number_value == 30
    experiment = HParamsPluginData.FromString(accumulator.SummaryMetadata(EXPERIMENT).plugin_data.content).experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == ["x", "eval/y"]
    assert points(tmp_path, "x") == [(10, 0.0), (20, 1.0), (30, 2.0)]
    assert len(list((tmp_path / "tb").iterdir())) == 4  # one for each time it was started, and the last outcome
