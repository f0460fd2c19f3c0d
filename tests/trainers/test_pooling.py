import json

import pytest
import torch

from esper.graph import segment
from trainers import benchmark
from trainers.benchmarks import pooling

from .conftest import call

STATUS = segment.acceleration_status()
needs_torch_scatter = pytest.mark.skipif(not STATUS["acceleration_enabled"], reason=STATUS["why"])
TINY = ["suite=pooling", "benchmark.rows=[60,90]", "benchmark.repeats=2", "benchmark.warmup=1", "out=rows.json"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pooling, "_ROWS_A_TURN", 180)
    return lambda *overrides: call(benchmark.main, (*TINY, *overrides), monkeypatch, capsys)


def by_case(content: dict) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for row in content["rows"]:
        assert row["suite"] == "pooling"
        assert 0 < row["median_ms"] <= row["p95_ms"]
        found.setdefault(row["case"], {})[row["variant"]] = row
    return found


EXPECTED = {
    f"{name}, {size} rows, {order}, {kind}"
    for name in ("sum", "mean", "max", "softmax")
    for size in ("3 x 60", "2 x 90")
    for order in ("sorted", "random")
    for kind in ("forward", "forward + backward")
}


def test_native_rows_alone_say_why(run, tmp_path, monkeypatch):
    absent = segment._Extension(None, None, "torch-scatter is not installed")
    monkeypatch.setattr(segment, "_extension", lambda: absent)
    result = run()
    assert result.code == 0, result.err
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["acceleration"]["fallback_mode"]
    cases = by_case(content)
    assert cases.keys() == EXPECTED
    assert all(list(rows) == ["native"] for rows in cases.values())
    assert "Pooling: torch-scatter is not installed" in result.out


@needs_torch_scatter
def test_every_way_is_compared_with_the_native_one(run, tmp_path):
    result = run()
    assert result.code == 0, result.err
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["acceleration"] == STATUS
    cases = by_case(content)
    assert cases.keys() == EXPECTED
    for case, rows in cases.items():
        ordered = "sorted" in case and not case.startswith("softmax")
        assert list(rows) == ["native", "accelerated", "torch_scatter", *["torch_scatter, csr"] * ordered]
        for row in rows.values():
            assert row["ratio_vs_reference"] == pytest.approx(rows["native"]["median_ms"] / row["median_ms"])


@needs_torch_scatter
def test_native_is_native_and_accelerated_is_not(monkeypatch):
    calls = []
    real = segment._extension()

    def noted(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        return real.scatter_sum(*arguments)

    monkeypatch.setattr(segment, "_extension", lambda: real._replace(scatter_sum=noted))
    ways = pooling.variants("sum", torch.tensor([0, 0, 1]), 2, True)
    seen = {}
    for name, pool in ways.items():
        calls.clear()
        assert pool(torch.tensor([1.0, 2.0, 4.0])).tolist() == [3, 4]
        seen[name] = len(calls)
    assert seen == {"native": 0, "accelerated": 1, "torch_scatter": 0, "torch_scatter, csr": 0}


def test_ways_that_differ_are_refused(run, monkeypatch):
    ways = pooling.variants

    def wrong(name, *arguments):
        native = ways(name, *arguments)["native"]
        return {"native": native, "accelerated": lambda x: native(x) + 0.01 * (name == "max")}

    monkeypatch.setattr(pooling, "variants", wrong)
    result = run()
    assert result.code == 3
    assert result.err.startswith("error: max, 3 x 60 rows, sorted: accelerated: differs from native")


def test_gradients_that_differ_are_refused(run, monkeypatch):
    ways = pooling.variants

    def wrong(name, *arguments):
        native = ways(name, *arguments)["native"]
        return {"native": native, "accelerated": lambda x: native(x.detach()) + 0 * x.sum()}

    monkeypatch.setattr(pooling, "variants", wrong)
    result = run()
    assert result.code == 3
    assert result.err.startswith("error: sum, 3 x 60 rows, sorted: accelerated, gradient: differs from native")


def test_sizes_are_checked(run):
    result = run("benchmark.rows=[0]")
    assert result.code == 2
    assert result.err.startswith("error: benchmark.rows=[0]: sizes must be above 0")
