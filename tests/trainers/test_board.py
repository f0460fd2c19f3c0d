import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from trainers import board
from trainers.config import TrainConfig

TAGS = [tag for charts in board.LAYOUT.values() for tags in charts.values() for tag in tags]


def read(run_dir):
    accumulator = EventAccumulator(str(run_dir / "tb"), size_guidance={"images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


@pytest.fixture
def run(run_train):
    return run_train("evaluation.episodes=4", "evaluation.baselines=[never]").run_dir


def test_every_chart_finds_its_scalars_and_every_scalar_its_chart(run):
    scalars = read(run).Tags()["scalars"]
    optional = [tag for tag in TAGS if tag.startswith("attention/")]
    for tag in set(TAGS) - set(optional):
        assert any(re.match(tag, scalar) for scalar in scalars), tag
    named = [scalar for scalar in scalars if not any(re.match(tag, scalar) for tag in TAGS)]
    assert named == ["tamiyo.gnn.compile_warm_ms"]  # one number for the whole run, no curve
    assert list(board.LAYOUT) == ["Learning", "Growth", "Speed", "Health"]


def test_a_run_tells_what_it_is_how_it_ended_and_what_it_looks_like(run, run_train):
    found = read(run)
    (card,) = found.Tensors("run/text_summary")
    text = card.tensor_proto.string_val[0].decode()
    assert card.step == 0
    assert "| on | `digits`:" in text
    (given,) = (line for line in text.splitlines() if line.startswith("| overrides |"))
    assert {"`env.num_envs=4`", "`recipe=none`"} <= set(given.split())
    assert f"python -m trainers.train resume={run}\n" in text
    assert f"python -m trainers.evaluate checkpoint={run} " in text
    metadata = found.SummaryMetadata("_hparams_/session_start_info")
    assert b"ppo.lr" in metadata.plugin_data.content
    experiment = found.SummaryMetadata("_hparams_/experiment").plugin_data.content
    assert all(name in experiment for name in (b"eval/tamiyo", b"eval/never", b"rollout/ep_rew_mean"))
    assert [image.step for image in found.Images("eval/lifecycle")] == [96]
    assert set(found.Tags()["images"]) == {"eval/lifecycle", "eval/plantings", "eval/attention"}
    assert not [path for path in (run / "tb").iterdir() if path.is_dir()]

    assert run_train(f"resume={run}", "ppo.total_steps=128", "evaluation.episodes=0", tiny=False).code == 0
    resumed = read(run)
    cards = resumed.Tensors("run/text_summary")
    assert [each.step for each in cards] == [0, 96]
    assert "96 done of 128" in cards[-1].tensor_proto.string_val[0].decode()
    layouts = {event.tensor_proto.string_val[0] for event in resumed.Tensors("custom_scalars__config__")}
    assert len(layouts) == 1
    given = resumed.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert HParamsPluginData.FromString(given).session_start_info.hparams["ppo.total_steps"].number_value == 128
    assert [point.step for point in resumed.Scalars("train/loss")] == [32, 64, 96, 128]


def test_settings_are_leaves_by_key():
    config = TrainConfig()
    config.ppo.lr = 0.5
    found = board.settings(config) if not isinstance(config.env, str) else {}
    assert found["ppo.lr"] == 0.5
    assert "runtime.precision" in found
    assert not any(isinstance(value, dict) for value in found.values())
