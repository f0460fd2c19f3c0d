import ctypes
import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from envs.growth_env import GrowthEnv
from esper.graph import segment
from esper.runtime import checkpoint
from esper.runtime.errors import TrainingError
from esper.simic import update
from esper.tamiyo.actor import Actor
from trainers import episodes

from .conftest import STATEFUL, differences, lines, newest, stop_at, untimed

CONTRACT = {
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
    *(
        f"train/{name}"
        for name in (
            "approx_kl",
            "clip_fraction",
            "entropy_loss",
            "explained_variance",
            "policy_gradient_loss",
            "value_loss",
            "learning_rate",
        )
    ),
    "time/fps",
    *(
        f"perf/{name}"
        for name in ("collect_s", "update_s", "checkpoint_s", "graph_build_ms", "graphs_per_s", "recompiles")
    ),
    *(f"growth/{name}" for name in ("germinated", "fossilized", "culled", "diverged", "params_ratio")),
    *(
        f"tamiyo.gnn.{name}"
        for name in ("compile_enabled", "compile_fallback_total", "compile_warm_ms", "inference.latency_ms")
    ),
    "grad/norm",
    *(f"amp/{name}" for name in ("scale", "skipped_steps")),
    "train/auxiliary_loss",
}


def events(run_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run_dir / "tb"))
    accumulator.Reload()
    return accumulator


def test_event_file_holds_the_contracts_scalars(run_train):
    result = run_train()
    assert result.code == 0, result.err
    written = events(result.run_dir)
    assert set(written.Tags()["scalars"]) >= CONTRACT
    for name in CONTRACT:
        points = written.Scalars(name)
        assert [point.step for point in points] == [32, 64, 96], name
        assert all(math.isfinite(point.value) for point in points), name
    for line, step in zip(lines(result.run_dir), (32, 64, 96), strict=True):
        assert line["step"] == step
        assert line["train/value_loss"] == pytest.approx(
            next(p.value for p in written.Scalars("train/value_loss") if p.step == step), rel=1e-6
        )
    # 4 environments with episodes of 4 epochs
    assert lines(result.run_dir)[0]["rollout/ep_len_mean"] == 4
    assert lines(result.run_dir)[0]["train/learning_rate"] == pytest.approx(1e-3)
    assert lines(result.run_dir)[2]["train/learning_rate"] == pytest.approx(1e-3 / 3)


def test_run_directory_and_closing_lines(run_train):
    result = run_train("evaluation.episodes=3", "evaluation.baselines=[never,random]")
    run = result.run_dir
    assert run.parts[-3:-1] == ("runs", "digits")
    for name in (".hydra/config.yaml", "tb", "metrics.jsonl", "checkpoints", "eval/report.json", "eval/report.md"):
        assert (run / name).exists(), name
    assert f"resume={run}" in result.out
    assert f"tensorboard --logdir {run / 'tb'}" in result.out
    assert "ETA" in result.out
    controllers = json.loads((run / "eval/report.json").read_text())["controllers"]
    assert set(controllers) == {"tamiyo", "never", "random"}
    for name, row in controllers.items():
        (point,) = events(run).Scalars(f"eval/{name}")
        assert (point.step, point.value) == (96, pytest.approx(row["iqm"]))


@pytest.mark.parametrize(
    ("extension", "line"),
    [
        ((None, None, "it is not installed"), "native (it is not installed)"),
        ((print, "9", "torch-scatter 9 is installed"), "accelerated in eager code (torch-scatter 9 is installed)"),
    ],
)
def test_the_start_says_which_segment_reductions_run(run_train, monkeypatch, extension, line):
    monkeypatch.setattr(segment, "_extension", lambda: segment._Extension(*extension))
    result = run_train("ppo.total_steps=32")
    assert result.code == 0, result.err
    assert [text for text in result.out.splitlines() if "reductions" in text] == [f"segment reductions: {line}"]


def test_same_seed_same_bits_and_other_seed_other_run(run_train):
    first, second, other = run_train(), run_train(), run_train("seed=2")
    assert first.run_dir != second.run_dir
    assert not differences(newest(first.run_dir), newest(second.run_dir))
    assert untimed(first.run_dir) == untimed(second.run_dir)
    assert untimed(first.run_dir) != untimed(other.run_dir)


@pytest.mark.parametrize(("step", "number"), [(32, signal.SIGTERM), (64, signal.SIGINT)])
@pytest.mark.parametrize(
    "overrides", [["env=segment"], ["env=digits"], ["env=segment", *STATEFUL]], ids=["segment", "digits", "stateful"]
)
def test_preempted_and_resumed_equals_uninterrupted(run_train, monkeypatch, step, number, overrides):
    whole = run_train(*overrides)
    with monkeypatch.context() as patch:
        stop_at(step, number, patch)
        stopped = run_train(*overrides, "checkpoint.every=100")
    assert stopped.code == 75
    assert f"resume={stopped.run_dir}" in stopped.err
    assert newest(stopped.run_dir)["step"] == step
    resumed = run_train(f"resume={stopped.run_dir}", tiny=False)
    assert resumed.code == 0, resumed.err
    assert resumed.run_dir == stopped.run_dir
    states = newest(whole.run_dir), newest(resumed.run_dir)
    for state in states:
        del state["config"]  # it differs in checkpoint.every
    assert not differences(*states)
    assert untimed(whole.run_dir) == untimed(resumed.run_dir)
    assert [p.step for p in events(resumed.run_dir).Scalars("train/approx_kl")] == [32, 64, 96]


def test_points_after_the_checkpoint_are_taken_back(run_train):
    # Saved at 64 only; the run then logs 96 and dies, and 96 must not be there twice after the resume.
    result = run_train("checkpoint.every=2")
    (result.run_dir / "checkpoints" / f"step_{96:012d}.ckpt").unlink()
    with open(result.run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 12')  # cut off while it was written
    resumed = run_train(f"resume={result.run_dir}", tiny=False)
    assert resumed.code == 0, resumed.err
    assert [line["step"] for line in lines(result.run_dir)] == [32, 64, 96]
    assert [p.step for p in events(result.run_dir).Scalars("train/approx_kl")] == [32, 64, 96]


def test_resume_may_train_longer_but_not_change_the_task(run_train):
    run = run_train().run_dir
    for override in (
        "env.epochs=5",
        "env=digits",
        "policy.hidden=[4,4,4,4]",
        "seed=9",
        "recipe=none",
        "experiment=smoke",
    ):
        refused = run_train(f"resume={run}", override, tiny=False)
        assert refused.code == 2
        assert override in refused.err
        assert len(refused.err.splitlines()) == 1
    done = run_train(f"resume={run}", tiny=False)
    assert done.code == 0
    assert "nothing left to do" in done.out
    longer = run_train(f"resume={run}", "ppo.total_steps=128", "ppo.lr=1e-4", tiny=False)
    assert longer.code == 0, longer.err
    assert [line["step"] for line in lines(run)] == [32, 64, 96, 128]
    assert newest(run)["config"]["ppo"]["lr"] == 1e-4
    assert newest(run)["config"]["ppo"]["epochs"] == 2  # as saved, not the default
    assert (run / ".hydra_resume").exists()


def test_contexts_and_knobs_reach_the_run_and_stay(run_train):
    first = run_train("env/contexts=growth", "evaluation.controllers.plateau.slope=-0.01", "ppo.total_steps=32")
    assert first.code == 0, first.err
    run = first.run_dir
    refused = run_train(f"resume={run}", "env/contexts=shift", tiny=False)
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert refused.err.startswith("error: env/contexts=shift: cannot be changed when resuming")
    longer = run_train(f"resume={run}", "env/contexts=growth", "ppo.total_steps=64", tiny=False)
    assert longer.code == 0, longer.err
    config = newest(run)["config"]
    assert {kind for kind, weight in config["env"]["contexts"]["mixture"].items() if weight} == {"growth"}
    assert config["evaluation"]["controllers"]["plateau"]["slope"] == -0.01
    assert config["evaluation"]["controllers"]["plateau"]["patience"] is None
    assert newest(run)["processes"][0]["env"]["population"]["context"]["priced"].all()


def test_damaged_checkpoint_is_named_and_the_one_before_used(run_train):
    run = run_train().run_dir
    newest_file, before = checkpoint.found(run)[:2]
    content = bytearray(newest_file.read_bytes())
    content[len(content) // 2] ^= 1
    newest_file.write_bytes(content)
    resumed = run_train(f"resume={run}", tiny=False)
    assert resumed.code == 0
    assert f"{newest_file.name} is damaged" in resumed.out.replace("\n", "")
    assert before.name in resumed.out
    assert "resuming at step 64" in resumed.out


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("ppo.lrr=1", "ppo.lrr: no such key; did you mean ppo.lr?"),
        ("+ppo.momentum=1", "ppo.momentum: no such key"),
        ("colour=red", "colour: no such key"),
        ("ppo.lr=fast", "ppo.lr: 'fast' of type 'str' could not be converted to Float"),
        ("seed=1.5", "seed: '1.5' of type 'float'"),
        (
            "env=mars",
            "env=mars: no such option; choose one of charlm, digits, digits_conv, gym, hetero",
        ),
        ("policy=huge", "policy=huge: no such option"),
        ("ppo.total_steps=-5", "ppo.total_steps=-5: must be above 0"),
        ("ppo.gamma=1.5", "ppo.gamma=1.5: must lie between 0 and 1"),
        ("ppo.minibatches=99", "ppo.minibatches=99: more than the"),
        (
            "env.task=moon",
            "env.task=moon: no such task; choose one of charlm, digits, digits_conv, mnist5k, segment, signal",
        ),
        ("env.blueprints=[mlp,brick]", "env.blueprints=brick: no such blueprint; choose from"),
        ("env.host.width=[9,5]", "env.host.width=[9, 5]: give [low, high]"),
        ("env.contexts.learning_rate=[1,2]", "env.contexts.learning_rate=[1.0, 2.0]: give [low, high]"),
        ("env/contexts=dream", "env/contexts=dream: no such option; choose one of growth, mixture"),
        ("evaluation.controllers.plateau.slope=steep", "evaluation.controllers.plateau.slope"),
        (
            "evaluation.controllers.probe.blueprint=glue",
            "evaluation.controllers.probe.blueprint=glue: the environment has",
        ),
        ("policy.heads=3", "policy.heads=3: must divide"),
        ("runtime.device=warp", "runtime.device=warp:"),
        ("runtime.actor_device=warp", "runtime.actor_device=warp:"),
        ("runtime.precision=fp8", "runtime.precision=fp8: choose one of fp32, bf16, fp16"),
        ("runtime.cuda_graphs=true", "runtime.cuda_graphs=true: needs runtime.device=cuda, not cpu"),
        ("ppo.lr_schedule=cosine", "ppo.lr_schedule=cosine: choose one of linear, adaptive, constant"),
        ("evaluation.baselines=[never,magic]", "evaluation.baselines=magic: no such baseline"),
        ("evaluation.controllers.plateau.blueprint=7", "evaluation.controllers.plateau.blueprint=7:"),
        ("resume=no/such/run", "resume=no/such/run: no such directory"),
        ("ppo", "ppo: not of the form KEY=VALUE"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run_train, tmp_path, override, expected):
    result = run_train(override)
    assert result.code == 2
    assert result.err.startswith(f"error: {expected}"), result.err
    assert len(result.err.splitlines()) == 1
    assert "Traceback" not in result.err + result.out
    assert not list(tmp_path.glob("runs/**/metrics.jsonl"))


def test_a_run_may_start_from_the_policy_of_another(run_train):
    first = run_train()
    again = run_train(f"init={first.run_dir}", "ppo.lr=1e-12", "seed=2")
    assert (first.code, again.code) == (0, 0)
    trained, started = (newest(each.run_dir)["learner"]["policy"] for each in (first, again))
    for name, values in trained.items():
        torch.testing.assert_close(started[name], values, atol=1e-9, rtol=0)
    resumed = run_train(f"resume={again.run_dir}", "init=null", tiny=False)
    assert (resumed.code, len(resumed.err.splitlines())) == (2, 1)
    assert "init=null: cannot be changed when resuming" in resumed.err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("init=no/such/run", "init=no/such/run: no such file or directory"),
        ("init={run} policy.hidden=[16,16,16,16]", "init={run}: its policy has another architecture"),
        ("init={run} env=gym env.id=CartPole-v1", "init={run}: its graphs or actions differ from those of env="),
    ],
)
def test_a_policy_that_cannot_be_started_from(run_train, given, expected):
    run = run_train().run_dir
    environment = "env=gym" in given
    overrides = given.format(run=run).split()
    extra = ["policy.hidden=[8,8,8,8]", "env.num_envs=4", "ppo.total_steps=64"] if environment else []
    result = run_train(*overrides, *extra, tiny=not environment)
    assert (result.code, len(result.err.splitlines())) == (2, 1), result.err
    assert result.err.startswith(f"error: {expected.format(run=run)}")


def test_resume_from_a_foreign_directory(run_train, tmp_path):
    (tmp_path / "photos").mkdir()
    result = run_train("resume=photos", tiny=False)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "resume=photos: not a run directory" in result.err
    (tmp_path / "photos/checkpoints").mkdir()
    (tmp_path / "photos/checkpoints/step_000000000032.ckpt").write_bytes(b"not ours")
    result = run_train("resume=photos", tiny=False)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "is not an Esper checkpoint" in result.err
    assert (tmp_path / "photos/checkpoints/step_000000000032.ckpt").read_bytes() == b"not ours"


def test_output_directory_that_cannot_be_made(run_train, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run_train("output_dir=file")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "file" in result.err
    assert "output_dir" in result.err


def obey_permissions() -> None:
    """Takes from root the right to write where the permissions forbid it (Linux's CAP_DAC_OVERRIDE)."""
    if os.geteuid() == 0:
        drop_from_bounding_set, dac_override = 24, 1
        ctypes.CDLL(None).prctl(drop_from_bounding_set, dac_override, 0, 0, 0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="root ignores permissions; only Linux can make it obey")
def test_read_only_output_directory(tmp_path, tiny):
    folder = tmp_path / "runs"
    folder.mkdir(mode=0o555)
    done = subprocess.run(
        [sys.executable, "-m", "trainers.train", *tiny, f"output_dir={folder}"],
        capture_output=True,
        text=True,
        preexec_fn=obey_permissions,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {folder}/digits: Permission denied; choose another output_dir, or mend the path"
    ]
    assert not list(folder.iterdir())


def test_full_disk_while_saving_keeps_the_earlier_checkpoint(run_train, monkeypatch):
    fsync, saves = os.fsync, []

    def full(descriptor):
        saves.append(descriptor)
        if len(saves) > 2:  # a save syncs its file and its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = run_train()
    run = result.run_dir
    assert result.code == 3
    assert len(result.err.splitlines()) == 1
    assert "No space left on device" in result.err
    assert f"resume={run}" in result.err
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{32:012d}.ckpt"]
    assert run_train(f"resume={run}", tiny=False).code == 0
    assert not differences(newest(run), newest(run_train().run_dir))


def test_file_size_limit_of_the_operating_system(run_train):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        result = run_train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.code == 3
    assert len(result.err.splitlines()) == 1
    assert "File too large" in result.err
    assert not list((result.run_dir / "checkpoints").iterdir())


def test_numbers_that_are_not_finite_end_training(run_train, monkeypatch):
    sound = run_train("ppo.normalize_returns=true").run_dir
    honest, calls = GrowthEnv.step, []

    def broken(self, actions):
        graph, reward, *rest = honest(self, actions)
        calls.append(1)
        return graph, reward * (float("nan") if len(calls) > 8 else 1), *rest  # from the second iteration on

    with monkeypatch.context() as patch:
        patch.setattr(GrowthEnv, "step", broken)
        result = run_train("ppo.normalize_returns=true", "checkpoint.every=100")
    assert result.code == 3
    assert result.err.startswith("error: 3 steps in a row had a loss or a gradient that is not finite")
    assert f"resume={result.run_dir}" in result.err
    assert len(result.err.splitlines()) == 1
    # What it logged of that iteration is there, and its checkpoint is sound: no step was taken since the first one.
    assert [line["amp/skipped_steps"] for line in lines(result.run_dir)] == [0, 4]
    first = checkpoint.read(checkpoint.found(sound)[-1])
    assert first["step"] == 32
    assert newest(result.run_dir)["step"] == 64
    for name, value in newest(result.run_dir)["learner"]["policy"].items():
        assert value.isfinite().all()
        assert torch.equal(value, first["learner"]["policy"][name])
    assert newest(result.run_dir)["learner"]["normalizer"]["moments"].isfinite().all()
    assert run_train(f"resume={result.run_dir}", tiny=False).code == 0
    assert [line["amp/skipped_steps"] for line in lines(result.run_dir)] == [0, 4, 4]
    assert math.isfinite(lines(result.run_dir)[2]["train/loss"])


def test_one_step_that_is_not_finite_is_left_out(run_train, monkeypatch):
    honest, calls = update.ppo_loss, []

    def broken(*arguments):
        loss, metrics = honest(*arguments)
        calls.append(1)
        return loss * (float("nan") if len(calls) == 6 else 1), metrics

    monkeypatch.setattr(update, "ppo_loss", broken)
    result = run_train()
    assert result.code == 0, result.err
    assert [line["amp/skipped_steps"] for line in lines(result.run_dir)] == [0, 1, 1]


def test_an_error_of_an_environment_loses_nothing(run_train, monkeypatch):
    whole, honest, calls = run_train(), GrowthEnv.step, []

    def broken(self, actions):
        calls.append(1)
        if len(calls) == 13:  # in the middle of the second iteration
            raise TrainingError("env.id=Mine: it broke")
        return honest(self, actions)

    with monkeypatch.context() as patch:
        patch.setattr(GrowthEnv, "step", broken)
        result = run_train("checkpoint.every=100")
    assert result.code == 3
    assert result.err.startswith("error: env.id=Mine: it broke; the state after 32 steps is saved, go on with: ")
    assert result.err.endswith(f"resume={result.run_dir}\n")
    assert newest(result.run_dir)["step"] == 32
    assert run_train(f"resume={result.run_dir}", tiny=False).code == 0
    assert untimed(result.run_dir) == untimed(whole.run_dir)


def test_an_unforeseen_error_loses_nothing(run_train, monkeypatch):
    def broken(self, actions):
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(GrowthEnv, "step", broken)
        with pytest.raises(ZeroDivisionError):
            run_train()
    (run,) = Path("runs/digits").iterdir()
    assert newest(run)["step"] == 0


@pytest.mark.parametrize("part", ["wait", "value"])
def test_outputs_that_are_not_finite_end_training(run_train, monkeypatch, part):
    honest = Actor.sync

    def poisoned(self):
        honest(self)
        with torch.no_grad():
            next(p for name, p in self.policy.named_parameters() if name.startswith(part)).fill_(float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(Actor, "sync", poisoned)
        result = run_train()
    assert result.code == 3
    assert result.err.startswith("error: the policy's outputs are not finite")
    assert len(result.err.splitlines()) == 1


def test_the_checkpoint_with_the_highest_return_is_kept(run_train, run_evaluate, monkeypatch):
    honest, calls = GrowthEnv.step, []

    def rewarded(self, actions):
        graph, reward, terminated, *rest, info = honest(self, actions)
        calls.append(1)
        if "episodes" in info:  # the second of three iterations is the best
            info["episodes"]["return"] = torch.full_like(info["episodes"]["return"], -abs(len(calls) - 12.0))
        return graph, reward, terminated, *rest, info

    monkeypatch.setattr(GrowthEnv, "step", rewarded)
    monkeypatch.setattr(episodes, "LATEST", 8)
    result = run_train("checkpoint.keep=1", "evaluation.episodes=0")
    best = result.run_dir / "checkpoints" / checkpoint.BEST
    assert checkpoint.read(best)["step"] == 64
    assert newest(result.run_dir)["step"] == 96
    calls.clear()
    assert run_train(f"resume={result.run_dir}", "ppo.total_steps=128", tiny=False).code == 0  # far worse
    assert checkpoint.read(best)["step"] == 64
    evaluated = run_evaluate(f"checkpoint={best}", "episodes=2", "baselines=none")
    assert evaluated.code == 0, evaluated.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state["learner"]["policy"].pop(next(iter(state["learner"]["policy"]))),
            "its policy has another architecture: encoder.inputs.global.0.weight is missing there",
        ),
        (lambda state: state.update(schema_hash="old"), "its graph schema"),
        (lambda state: state.update(format_version=1), "format version 1, this version of Esper reads"),
    ],
    ids=["architecture", "schema", "format"],
)
def test_what_another_version_wrote_is_refused_in_one_line(run_train, run_evaluate, change, message):
    run = run_train("ppo.total_steps=32").run_dir
    path = checkpoint.found(run)[0]
    state = checkpoint.read(path)
    change(state)
    for file in (path, path.with_name(checkpoint.BEST)):
        checkpoint.write(file, state)
    for result in (
        run_train(f"resume={run}", "ppo.total_steps=64", tiny=False),
        run_evaluate(f"checkpoint={run}", "episodes=2"),
    ):
        assert result.code == 2
        assert message in result.err
        assert len(result.err.splitlines()) == 1


def test_a_configuration_of_another_version_is_refused_in_one_line(run_train):
    run = run_train("ppo.total_steps=32").run_dir
    path = checkpoint.found(run)[0]
    state = checkpoint.read(path)
    state["config"]["ppo"]["momentum"] = 0.9
    checkpoint.write(path, state)
    result = run_train(f"resume={run}", "ppo.total_steps=64", tiny=False)
    assert result.code == 2
    assert result.err.startswith(f"error: resume={run}: its configuration is another version's (ppo.momentum: no such")
    assert len(result.err.splitlines()) == 1


@pytest.mark.slow
def test_a_compiled_run_is_that_of_the_config_and_resumes_bit_for_bit(run_train):
    eager, compiled = run_train(), run_train("runtime.compile=true")
    for result in (eager, compiled):
        assert result.code == 0, result.err
        for line in lines(result.run_dir):
            assert line["tamiyo.gnn.compile_enabled"] == (result is not eager)
            assert line["tamiyo.gnn.compile_fallback_total"] == line["perf/recompiles"] == 0
            assert line["tamiyo.gnn.compile_warm_ms"] > 0
    whole, logged = newest(compiled.run_dir), untimed(compiled.run_dir)
    # The first update: of the same actions, but for rounding.
    assert logged[0] == pytest.approx(untimed(eager.run_dir)[0], rel=1e-3, abs=1e-5)
    (compiled.run_dir / "checkpoints" / f"step_{96:012d}.ckpt").unlink()
    resumed = run_train(f"resume={compiled.run_dir}", tiny=False)
    assert resumed.code == 0, resumed.err
    assert not differences(newest(compiled.run_dir), whole)
    assert untimed(compiled.run_dir) == logged


def test_multirun(run_train, tmp_path):
    result = run_train("-m", "seed=1,2", "ppo.total_steps=32")
    assert result.code == 0, result.err
    runs = sorted(path.parent for path in tmp_path.glob("runs/multirun/*/*/metrics.jsonl"))
    assert [run.name for run in runs] == ["0", "1"]
    assert [newest(run)["config"]["seed"] for run in runs] == [1, 2]


@pytest.mark.slow
def test_output_that_nobody_reads_is_one_line() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "trainers.train", "--help"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=240
    )
    os.close(write)
    assert done.returncode == 2
    assert done.stderr == "error: whoever read what is printed has gone; print to a file instead\n"


def test_help(run_train):
    result = run_train("--help", tiny=False)
    assert result.code == 0
    for text in (
        "env: charlm, digits, digits_conv, gym, hetero, mnist5k, segment, signal",
        "policy: tamiyo, tamiyo_small",
        "total_steps:",
        "resume",
        "Exit codes",
    ):
        assert text in result.out
