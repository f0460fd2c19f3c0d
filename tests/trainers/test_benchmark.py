import json
import statistics
from collections import Counter
from dataclasses import replace

import pytest
import torch

from envs.config import EnvConfig, HostConfig, load_config
from envs.growth_env import population_spec
from esper.growth.conditions import NEVER, Condition
from esper.growth.context import Context
from esper.growth.lifecycle import Stage
from esper.growth.population import Population
from esper.growth.state import TrainingSpec
from trainers import benchmark, benchmarks
from trainers.benchmarks import timing
from trainers.benchmarks.env import AGE, grown, picked, stage_counts
from trainers.benchmarks.plain import PlainHost

from .conftest import call

LIVES = [Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED, Stage.EMBARGOED]
TINY = [
    "benchmark.tasks=[segment]",
    "benchmark.hosts=3",
    "benchmark.hosts_one_by_one=2",
    "benchmark.sizes=[2,5]",
    "benchmark.repeats=2",
    "benchmark.size_repeats=1",
    "benchmark.warmup=0",
]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: call(benchmark.main, overrides, monkeypatch, capsys)


def short(name: str) -> EnvConfig:
    """A few steps an epoch, which is enough for every term to matter."""
    return replace(load_config(name), training=TrainingSpec(steps_per_epoch=3, batch_size=16))


def compare(population: Population) -> None:
    """One epoch of every host by the plain loop and by the engine: what both measure is the same."""
    p = population
    hosts = [PlainHost(p, k) for k in range(p.hosts)]
    measured = [host.epoch() for host in hosts]
    alpha = [host.alpha for host in hosts]
    p.train_epoch()
    for k, (host, found) in enumerate(zip(hosts, measured, strict=True)):
        s, layers = p.statistics, [*range(host.depth + 1), p.spec.stages + 1]
        slots, blended = list(host.kinds), [slot for slot in host.kinds if alpha[k][slot] > 0]
        torch.testing.assert_close(found["validation_loss"], p.validation_loss[k], rtol=1e-3, atol=1e-3)
        pairs = {
            "train_loss": (found["train_loss"], s.train_loss[k]),
            "update_rms": (found["update_rms"], s.update_rms[k]),
            "seed_gradient_rms": (found["seed_gradient_rms"], s.seed_gradient_rms[k, slots]),
            "contribution": (found["contribution"][blended], s.contribution[k, blended]),
            "activations": (found["activations"], s.activations[k, : host.depth]),
            "growth_gradient": (found["growth_gradient"], s.growth_gradient[k, : host.depth]),
        }
        if host.width == p.spec.width:  # the engine's mean runs over padding
            backward = s.activation_backward_rms[k, : host.depth]
            pairs["activation_backward_rms"] = (found["activation_backward_rms"], backward)
        for name in ("weight_rms", "gradient_rms", "update_rms", "signal_to_noise"):
            pairs[f"layer_{name}"] = (found[f"layer_{name}"], getattr(s, f"layer_{name}")[k, layers])
        for name, (mine, theirs) in pairs.items():
            # Units near the edge of a clamp may fall on either side.
            torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-3, msg=lambda m, n=name, k=k: f"{n} {k}: {m}")


@pytest.mark.parametrize("task", ["digits", "digits_conv"])
def test_plain_loop_computes_what_the_engine_does_in_every_stage(task):
    population = grown(short(task), 32, 0, "cpu", lambda hosts: None)
    counts = stage_counts(population)
    assert all(counts[stage.name] > 0 for stage in LIVES)
    compare(population)


@pytest.mark.parametrize(
    ("task", "catalogue"),
    [
        ("digits", ["mlp", "glu", "low_rank", "norm", "bypass", "widen"]),
        ("digits_conv", ["conv", "dilated_conv", "attention", "glu"]),
        ("signal", ["conv", "dilated_conv", "attention"]),
        ("charlm", ["conv", "dilated_conv", "attention"]),
    ],
)
def test_plain_loop_knows_every_blueprint_and_kind_of_task(task, catalogue):
    config = replace(short(task), blueprints=catalogue, host=HostConfig(width=[5, 6], stages=[2, 3]))
    hosts = 2 * len(catalogue)
    p = Population(population_spec(config), hosts)
    context = Context.plain(torch.arange(hosts) * 7919, 6, 3)
    context.width[::3], context.depth[1::3] = 5, 2
    p.reset(torch.arange(hosts), context)
    where = torch.zeros(hosts, 3, dtype=torch.bool)
    where[:, 1] = True
    kinds = (torch.arange(hosts) % len(catalogue))[:, None].expand(-1, 3)
    p.germinate(where, kinds)
    where[: len(catalogue)] = False  # every blueprint in TRAINING and in BLENDING
    p.lifecycle.blend(where, 2)
    compare(p)


def test_plain_loop_knows_every_condition():
    config = replace(short("digits"), host=HostConfig(width=[6, 6], stages=[2, 2]))
    p, kinds = Population(population_spec(config), len(Condition)), torch.tensor(list(Condition))
    context = Context.plain(torch.arange(len(kinds)), 6, 2)
    context.condition[:, 1] = context.strike[:, 1] = kinds
    context.severity[:] = 0.4
    # One host has seen half of the classes, one meets signs that flip in this epoch, one is struck after it.
    context.shift_epoch[0], context.first_classes[0] = 4, 5
    context.shift_epoch[3], context.flipped[3] = 0, 0.5
    context.strike_epoch[5, 0], context.strike[5, 0] = 1, Condition.CHOKE
    context.strike_epoch[6, 0], context.strike[6, 0] = 0, Condition.SATURATED  # and a spike
    assert (context.strike_epoch == NEVER).sum() == 2 * len(kinds) - 2
    p.reset(torch.arange(len(kinds)), context)
    compare(p)


def test_growing_is_reproducible_and_leaves_hosts_mid_episode():
    first, second = (grown(short("segment"), 6, 3, "cpu", lambda hosts: None) for _ in range(2))
    assert torch.equal(first.theta, second.theta)
    assert torch.equal(first.lifecycle.stage, second.lifecycle.stage)
    assert first.epoch.tolist() == [AGE] * 6
    assert not torch.equal(first.theta, grown(short("segment"), 6, 4, "cpu", lambda hosts: None).theta)


def test_picked_hosts_spread_over_the_costs():
    population = grown(short("segment"), 8, 0, "cpu", lambda hosts: None)
    assert sorted(picked(population, 8)) == list(range(8))
    p = population
    cost = p.host_flops() + p.seed_flops_now(p.lifecycle.blueprint >= 0)
    few = cost[picked(population, 2)]
    assert cost.min() <= few[0] <= cost.median() <= few[1] <= cost.max()


def test_a_run_writes_every_timing(run, tmp_path):
    result = run(*TINY, "out=deep/er/report.json")
    assert result.code == 0, result.err
    content = json.loads((tmp_path / "deep/er/report.json").read_text())
    assert content["suite"] == "env"
    assert content["config"]["benchmark"]["hosts"] == 3
    assert {"cpu", "torch", "threads"} <= content["machine"].keys()
    found = content["results"]["segment"]
    epoch, env = found["seconds"]["epoch"], found["environment"]
    assert [len(epoch[name]) for name in ("population", "unmeasured")] == [2, 2]
    assert [len(each) for name in ("plain", "engine") for each in epoch[name]] == [2] * 4
    assert {n: len(values) for n, values in found["seconds"]["sizes"].items()} == {"2": 1, "5": 1}
    assert len(found["seconds"]["steps"]["step"]) == env["epochs"]
    # one host alone is bitwise the host among others
    assert found["check"]["largest_difference"]["engine"] == 0
    assert sum(found["stages"].values()) == 3 * env["host"]["stages"][1]
    summary = found["summary"]
    assert summary["host_epochs_per_second"]["plain"]["low"] <= summary["host_epochs_per_second"]["plain"]["high"]
    assert content["ratios"]["segment, 3 hosts: together, times as fast as the plain loop"]["better"] == "higher"
    assert content["ratios"]["segment, 3 hosts: a host among 5, times one among 2"]["better"] == "lower"
    assert all(word in result.out for word in ("3 together", "plain loop, one by one", "deep/er/report.json"))


@pytest.mark.parametrize(
    ("suite", "overrides", "variants"),
    [
        (
            "encoder",
            ["benchmark.graphs=[3]", "benchmark.compile=false", "benchmark.policies=[tamiyo_small]"],
            [{"pyg", "segment", "dense", "native", "floor"}, {"pyg", "segment", "dense", "native"}],
        ),
        ("graph", ["benchmark.large=[60,120]"], [{"pyg", "observer"}, {"segment"}, {"segment"}]),
        (
            "attention",
            ["benchmark.compile=false"],
            [{"reference", "sdpa"}] * 8 + [{"reference", "sdpa", "segment"}] * 8,
        ),
        ("dat", ["benchmark.compile=false"], [{"spandrel", "reference, eager", "sdpa, eager"}]),
        ("grow", [], [{"by itself", "growing"}] * 2 + [{"a step", "tamiyo_small", "gradmax"}] * 2),
    ],
)
def test_suites_of_rows(run, tmp_path, suite, overrides, variants):
    tiny = ["benchmark.hosts=2", "benchmark.hosts_one_by_one=1", "benchmark.repeats=3", "benchmark.warmup=1"]
    result = run(f"suite={suite}", *tiny, *overrides, "out=rows.json")
    assert result.code == 0, result.err
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["suite"] == suite
    assert content["machine"]["threads"] == 1
    assert content["ratios"]
    assert all(ratio["low"] <= ratio["value"] <= ratio["high"] for ratio in content["ratios"].values())
    by_case: dict[str, dict] = {}
    for row in content["rows"]:
        by_case.setdefault(row["case"], {})[row["variant"]] = row
    assert [set(rows) for rows in by_case.values()] == variants
    for rows in by_case.values():
        for row in rows.values():
            assert 0 < row["median_ms"] <= row["p95_ms"]
            assert statistics.median(row["ms"]) == pytest.approx(row["median_ms"])
            if "pyg" in rows:
                assert row["ratio_vs_reference"] == pytest.approx(rows["pyg"]["median_ms"] / row["median_ms"])
            if "floor" in rows:
                assert row["ratio_vs_floor"] == pytest.approx(row["median_ms"] / rows["floor"]["median_ms"])


@pytest.mark.slow
def test_keeping_the_state_is_measured(run, tmp_path):
    result = run("suite=checkpoint", "benchmark.repeats=3", "runtime.compile=false", "out=report.json")
    assert result.code == 0, result.err
    content = json.loads((tmp_path / "report.json").read_text())
    assert [ratio["better"] for ratio in content["ratios"].values()] == ["lower"]
    found = content["results"]
    assert {name: len(times) for name, times in found["ms"].items()} == {"iteration": 3, "copy": 3, "file": 3}
    iteration, copy, file = (statistics.median(found["ms"][name]) for name in ("iteration", "copy", "file"))
    assert found["share"] == pytest.approx((copy + file / 10) / (iteration + copy + file / 10))
    assert found["file_mib"] > 1


def test_default_output_names_suite_and_time(run, tmp_path):
    result = run(*TINY, "benchmark.clock=cpu")
    assert result.code == 0, result.err
    assert len(list((tmp_path / "benchmarks/env").glob("*.json"))) == 1


def test_a_dishonest_comparison_is_refused(run, monkeypatch):
    epoch = PlainHost.epoch
    monkeypatch.setattr(PlainHost, "epoch", lambda self: {"validation_loss": epoch(self)["validation_loss"] * 1.01})
    result = run(*TINY, "out=report.json")
    assert result.code == 3
    assert result.err.startswith("error: segment, host")
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["suite=mars"],
            "suite=mars: no such suite; choose one of actor, attention, checkpoint, dat, distributed, encoder, "
            "end_to_end, env",
        ),
        (["benchmark.tasks=[mars]"], "benchmark.tasks=mars: env=mars: no such option; choose one of"),
        (["benchmark.tasks=[]"], "benchmark.tasks=[]: name at least one"),
        (["benchmark.repeats=0"], "benchmark.repeats=0: must be above 0"),
        (["benchmark.graphs=[0]"], "benchmark.graphs=[0]"),
        (["benchmark.policies=[mars]"], "benchmark.policies=mars: no such policy; choose from tamiyo, tamiyo_small"),
        (["benchmark.hosts_one_by_one=33"], "benchmark.hosts_one_by_one=33: must be from 1 to 32"),
        (["benchmark.sizes=[0]"], "benchmark.sizes=[0]: numbers of hosts must be above 0"),
        (["benchmark.clock=sun"], "benchmark.clock=sun: choose wall or cpu"),
        (["benchmark.host=4"], "benchmark.host: no such key; did you mean benchmark.hosts?"),
        (["runtime.device=mars"], "runtime.device=mars: "),
        (["out=."], "out=.: Is a directory; choose another file"),
    ],
)
def test_bad_input(run, overrides, expected):
    result = run(*overrides)
    assert result.code == 2
    assert result.err.startswith(f"error: {expected}"), result.err
    assert len(result.err.splitlines()) == 1


def test_help_names_suites_and_keys(run, capsys):
    result = run("--help")
    assert result.code == 0
    assert all(word in result.out for word in ("suite=env", "hosts_one_by_one", "docs/benchmark.md"))
    benchmarks.get("env")
    assert all(name in result.out for name in benchmarks.SUITES)


def test_a_suite_is_one_decorated_function(run, tmp_path, monkeypatch):
    benchmarks.get("env")  # imports them all, before they are copied
    monkeypatch.setattr(benchmarks, "SUITES", dict(benchmarks.SUITES))
    benchmarks.suite("mine")(lambda config: benchmarks.Report({"found": config.seed}, []))
    with pytest.raises(ValueError, match="registered twice"):
        benchmarks.suite("mine")(lambda config: benchmarks.Report({}, []))
    assert run("suite=mine", "seed=7", "out=mine.json").code == 0
    assert json.loads((tmp_path / "mine.json").read_text())["found"] == 7


def test_spread_and_timing():
    spread = timing.Spread.of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert spread == (3.0, 2.0, 4.0)
    assert spread.text(".1f") == "3.0 (2.0 - 4.0)"
    calls = Counter()
    assert timing.timed(lambda: calls.update(["x"]), torch.device("cpu"), "cpu") >= 0
    assert calls["x"] == 1
