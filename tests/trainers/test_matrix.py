"""Training in every mode: torch-scatter on and off, compiled and eager, fp32 and fp16.

torch-scatter is on or off for a whole process: .ci/run runs this file in both, and each skips the other's half.
"""

import math

import pytest

from esper.graph import segment

from .conftest import lines

ON = segment.acceleration_status()["acceleration_enabled"]
HERE = "torch-scatter is {} here; .ci/run also runs the other half"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize(
    "acceleration",
    [
        pytest.param("off", marks=pytest.mark.skipif(ON, reason=HERE.format("on"))),
        pytest.param("on", marks=pytest.mark.skipif(not ON, reason=HERE.format("off"))),
    ],
)
def test_two_iterations(run_train, monkeypatch, acceleration, way, precision):
    extension, sums = segment._extension(), []

    def noted(*arguments):
        sums.append(arguments)
        return extension.scatter_sum(*arguments)

    if acceleration == "on":
        monkeypatch.setattr(segment, "_extension", lambda: extension._replace(scatter_sum=noted))
    compiled = way == "compiled"
    # The backend that reduces segments cannot be compiled.
    backend = "auto" if compiled else "segment"
    result = run_train(
        "ppo.total_steps=64",
        f"policy.backend={backend}",
        f"runtime.compile={compiled}",
        f"runtime.precision={precision}",
    )
    assert result.code == 0, result.err
    assert ("segment reductions: accelerated" in result.out) == (acceleration == "on")
    assert bool(sums) == (acceleration == "on" and not compiled)
    assert ("runs eagerly" in result.out + result.err) == (not compiled)
    logged = lines(result.run_dir)
    assert [line["step"] for line in logged] == [32, 64]
    for line in logged:
        assert all(math.isfinite(value) for value in line.values())
        assert line["tamiyo.gnn.compile_enabled"] == compiled
        assert line["tamiyo.gnn.compile_fallback_total"] == 0
        assert (line["amp/scale"] > 1) == (precision == "fp16")
    # The scale starts too large, which may cost the first of eight steps.
    assert logged[-1]["amp/skipped_steps"] <= (2 if precision == "fp16" else 0)
