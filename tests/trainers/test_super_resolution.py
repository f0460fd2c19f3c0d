"""The commands on hosts that are ordinary modules: a shipped policy plays them unchanged, and runs train on them."""

import json
from pathlib import Path

from .conftest import untimed

SMALL = (
    "env=super_resolution", "env.epochs=2", "env.crop=12", "env.crops=[3,4]", "env.judged=2",
    "env.training.steps_per_epoch=1", "env.training.batch_size=2",
)  # fmt: skip
RUN = (
    *SMALL, "env.num_envs=2", "ppo.num_steps=2", "ppo.minibatches=1", "ppo.epochs=1", "ppo.total_steps=8",
    "policy.hidden=[8,8,8,8]", "runtime.compile=false", "evaluation.episodes=0",
)  # fmt: skip


def test_a_policy_of_small_networks_plays_it_unchanged(run_evaluate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_evaluate("checkpoint=tamiyo_small", "baselines=[never,random]", "episodes=2", *SMALL)
    assert result.code == 0, result.err
    folder = Path("runs/pretrained/tamiyo_small/super_resolution/eval")
    report = json.loads((folder / "report.json").read_text())
    assert report["environment"] == "super_resolution"
    controllers = report["controllers"]
    assert set(controllers) == {"tamiyo", "never", "random"}
    assert controllers["never"]["scores"] == [0, 0]
    assert controllers["never"]["test_psnr"] == controllers["never"]["twin_test_psnr"]
    assert {row["bicubic_test_psnr"] for row in controllers.values()} == {controllers["never"]["bicubic_test_psnr"]}
    assert "dB" in (folder / "report.md").read_text()


def test_a_run_resumes_exactly(run_train, run_evaluate):
    whole = run_train(*RUN, tiny=False)
    assert whole.code == 0, whole.err
    part = run_train(*RUN, "ppo.total_steps=4", tiny=False)
    resumed = run_train(f"resume={part.run_dir}", "ppo.total_steps=8", tiny=False)
    assert resumed.code == 0, resumed.err
    assert len(untimed(whole.run_dir)) == 2
    assert untimed(part.run_dir) == untimed(whole.run_dir)
    result = run_evaluate(f"checkpoint={whole.run_dir}", "baselines=none", "episodes=1")
    assert result.code == 0, result.err


def test_a_warm_start_needs_hosts_that_can_be_forked(run_train):
    result = run_train(*RUN, "warm_start.episodes=4", tiny=False)
    assert result.code == 2
    assert result.err.startswith("error: warm_start.episodes=4: env=super_resolution has no hosts to fork; set it to 0")
